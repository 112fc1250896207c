"""A task of lm-evaluation-harness whose rows come from local files, and whose rows are checked."""

import functools
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow
from lm_eval import utils
from lm_eval.api.task import ConfigurableTask

from mtnlg_jax.evaluate.harness_tasks import files, layouts
from mtnlg_jax.evaluate.harness_tasks.checking import check_rows, count_cut
from mtnlg_jax.evaluate.harness_tasks.fewshot import Distinct
from mtnlg_jax.evaluate.harness_tasks.files import Rows

# How a template, or a function of a task, fails on a row that it does not expect.
FAILURES = (
    jinja2.TemplateError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    SyntaxError,
    ValueError,
)
BUILDERS = ("json", "parquet", "csv")

# The harness compiles a template each time that it renders one, which takes 15 times as long as
# rendering: 12 s for the 12,637 rows of four tasks.
utils.env.from_string = functools.lru_cache(256)(utils.env.from_string)


class LocalTask(ConfigurableTask):
    """A configurable task of the harness over files of this disk.

    The folder is ``metadata["task_data"]``, or the config names ``data_files`` itself. The form of
    the rows is ``metadata["rows"]`` (`layouts.FORMS`). Without a training split, few-shot examples
    come from the evaluated rows. An example that equals the row in question is never shown to it.
    """

    sampler: Any
    dataset: Any

    def __init__(
        self,
        data_dir: str | None = None,
        cache_dir: str | None = None,
        download_mode: Any = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        given = {key: value for key, value in (config or {}).items() if key != "class"}
        self.rows: dict[str, Rows] = {}
        # Messages of rows that are left out, by metadata["on_error"] = "skip"; None: they raise.
        skip = (given.get("metadata") or {}).get("on_error") == "skip"
        self.left_out: list[str] | None = [] if skip else None
        self.kept: list[int] | None = None
        self._docs: dict[str, Any] = {}
        self.model: Any = None  # whose context the requests must fit
        self.cut = 0
        self._where: str | None = None
        self.places: list[str] | None = None
        try:
            super().__init__(config=given)
        except (IndexError, TypeError, KeyError) as error:
            # The base class tries the first row out.
            if hasattr(self, "multiple_target"):
                self.places = self.rows[self.evaluated].places or None
                check_rows(self, 1)
            raise ValueError(f"the task {given.get('task')} cannot be made: {error!r}") from None
        # A function of the task may have left rows out; then their numbers are unknown.
        rows = self.rows[self.evaluated]
        self.places = rows.places if len(rows.rows) == len(self.eval_docs) else None
        self.asked_shots: int | None = self.config.num_fewshot  # by its file
        self.sampler = Distinct(self.sampler, self)
        self._pool: Counter | None = None

    @property
    def evaluated(self) -> str:
        """The split whose rows are scored."""
        return str(self.config.test_split or self.config.validation_split)

    @property
    def fewshot_source(self) -> str:
        """The split that few-shot examples come from."""
        split = self.fewshot_cfg.split or self.config.training_split
        return str(split or self.config.validation_split or self.config.test_split)

    def place(self, number: int) -> str:
        """Return "FILE row N" of a document."""
        if self.places is None:
            return f"{self.config.task}: document {number}"
        return self.places[number]

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Read the rows. Named as in the harness, which calls it; nothing is downloaded."""
        metadata = self.config.metadata or {}
        data_files = (self.config.dataset_kwargs or {}).get("data_files")
        if data_files is not None and self.DATASET_PATH not in BUILDERS:
            super().download(dataset_kwargs, **kwargs)
            self.rows = {name: Rows(list(part), []) for name, part in self.dataset.items()}
            return
        if data_files is not None:
            found = self._named(data_files, metadata)
        elif metadata.get("task_data") is not None:
            found = self._found(metadata["task_data"], metadata.get("rows"))
        else:
            raise ValueError(
                f"the task {self.config.task} reads local rows; name their folder with "
                '--task_data=FOLDER (lm_eval: --metadata=\'{"task_data": "FOLDER"}\')'
            )
        form = metadata.get("rows")
        task = str(self.config.task)
        self.rows = {
            split: layouts.shape(form, files.read(paths), task, self.left_out)
            for split, paths in found.items()
        }
        self.dataset = {split: self._dataset(rows) for split, rows in self.rows.items()}

    def _found(self, folder: str, form: str | None) -> dict[str, list[Path]]:
        """Return the files of each split, and let the config name the splits that are there."""
        evaluated = "test" if self.config.test_split else "validation"
        found = files.find(folder, str(self.config.task), evaluated, form)
        self.config.training_split = "train" if "train" in found else None
        self.config.validation_split = "validation" if "validation" in found else None
        self.config.test_split = "test" if evaluated == "test" else None
        self.config.fewshot_split = None
        if self.fewshot_cfg.split not in (None, *found):
            self.fewshot_cfg.split = None
        return found

    def _named(self, given: Any, metadata: dict[str, Any]) -> dict[str, list[Path]]:
        """Return the files of ``data_files``: a path, or {split: path or paths}.

        Relative paths count from the current folder, then from the folder of the YAML file, then
        from --task_data.
        """
        splits = given if isinstance(given, dict) else {self.evaluated: given}
        source = metadata.get("config_source")
        roots = [Path(), Path(source).parent if source else Path()]
        if metadata.get("task_data"):
            roots.append(Path(metadata["task_data"]))
        found = {}
        for split, paths in splits.items():
            named = [paths] if isinstance(paths, str) else list(paths)
            found[split] = [
                next((root / each for root in roots if (root / each).is_file()), Path(each))
                for each in named
            ]
        if self.evaluated not in found:
            raise ValueError(
                f"data_files of the task {self.config.task} has {', '.join(found)}, not the "
                f"evaluated split {self.evaluated}"
            )
        for name in ("training_split", "fewshot_split"):
            if getattr(self.config, name) not in (None, *found):
                setattr(self.config, name, None)
        return found

    def _dataset(self, rows: Rows) -> datasets.Dataset:
        try:
            return datasets.Dataset.from_list(rows.rows)
        except (pyarrow.ArrowException, TypeError, ValueError) as error:
            kinds: dict[str, type] = {}
            for row, place in zip(*rows, strict=True):
                for name, value in row.items():
                    if value is not None and kinds.setdefault(name, type(value)) is not type(value):
                        raise ValueError(
                            f"{place}: the field {name!r} is {value!r:.40}, and a "
                            f"{kinds[name].__name__} in the rows before; make all of one type"
                        ) from None
            raise ValueError(f"{rows.places[0]} and those behind it: {error}") from None

    def _split(self, name: str | None) -> Any:
        """Return the documents of a split. Raise ValueError with row and field if they cannot be
        made."""
        name = str(name)
        if self.config.process_docs is None:
            return self.dataset[name]
        try:
            if name not in self._docs:
                self._docs[name] = self.config.process_docs(self.dataset[name])
            return self._docs[name]
        except FAILURES as error:
            rows = self.rows[name]
            missing = _field(error)
            number = next((n for n, row in enumerate(rows.rows) if row.get(missing) is None), 0)
            place = rows.places[number] if rows.places else f"{self.config.task} row {number + 1}"
            raise ValueError(
                _missing(place, str(self.config.task), error, rows.rows[number])
            ) from None

    def training_docs(self) -> Any:
        return self._split(self.config.training_split) if self.has_training_docs() else None

    def validation_docs(self) -> Any:
        return self._split(self.config.validation_split) if self.has_validation_docs() else None

    def test_docs(self) -> Any:
        return self._split(self.config.test_split) if self.has_test_docs() else None

    # The base class forms the first document while it is made, and all of them in requests.

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        return self._formed("doc_to_text", doc, doc_to_text)

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        return self._formed("doc_to_target", doc, doc_to_target)

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> Any:
        return self._formed("doc_to_choice", doc, doc_to_choice)

    def _formed(self, name: str, doc: Any, template: Any) -> Any:
        try:
            return getattr(super(), name)(doc, template)
        except FAILURES as error:
            place = self._where or f"{self.config.task}, its first row"
            rows = self.rows.get(self.evaluated)
            if place.endswith("first row") and rows is not None and rows.places:
                place = rows.places[0]
            raise ValueError(_missing(place, str(self.config.task), error, doc)) from None

    @property
    def eval_docs(self) -> Any:
        """The documents that are scored, without those that are left out."""
        docs = super().eval_docs
        return docs if self.kept is None else docs.select(self.kept)

    def _leave_out(self, numbers: list[int], messages: list[str]) -> None:
        """Drop documents by their numbers among those that are scored."""
        if not numbers:
            return
        gone = set(numbers)
        count = len(self.eval_docs)
        kept = self.kept or list(range(count))
        self.kept = [kept[number] for number in range(count) if number not in gone]
        if not self.kept:
            raise ValueError(
                f"no row of the task {self.config.task} can be used; the first: {messages[0]}"
            )
        if self.places is not None:
            self.places = [each for n, each in enumerate(self.places) if n not in gone]
        assert self.left_out is not None
        self.left_out += messages

    def each(self, limit: int | None, examine: Callable[[int, dict[str, Any], str], None]) -> None:
        """Call ``examine`` (number, document, place) on documents, and raise its ValueError.

        Where rows are left out, all are examined, and those that raise are left out.
        """
        docs = self.eval_docs
        numbers = []
        messages = []
        most = len(docs) if limit is None or self.left_out is not None else min(limit, len(docs))
        for number in range(most):
            self._where = self.place(number)
            try:
                examine(number, docs[number], self._where)
            except ValueError as error:
                if self.left_out is None:
                    raise
                numbers.append(number)
                messages.append(str(error))
        self._where = None
        self._leave_out(numbers, messages)

    # Few-shot examples.

    def key(self, doc: dict[str, Any]) -> str:
        """Return what two equal questions share: the text, and the choices."""
        text = self.doc_to_text(doc)
        if isinstance(text, int):
            # The choices are contexts (WinoGrande), and what follows all of them is the question.
            text = self.doc_to_target(doc)
        if self.config.doc_to_choice is not None:
            return json.dumps([text, self.doc_to_choice(doc)])
        return json.dumps([text])

    def pool(self) -> Counter:
        """Return how often each question occurs among the rows of few-shot examples."""
        if self._pool is None:
            self._pool = Counter(map(self.key, self.sampler.inner.df))
        return self._pool

    def equal_examples(self, docs: Sequence[dict[str, Any]]) -> int:
        """Return for how many of ``docs`` the examples hold a row that equals it, and is not it."""
        itself = self.fewshot_source == self.evaluated
        return sum(self.pool()[self.key(doc)] > itself for doc in docs)

    def check_fewshot(self, count: int) -> None:
        """Raise ValueError if there are too few rows for ``count`` examples."""
        have = len(self.sampler.inner.df)
        # The harness draws one more where the question itself may be among them; it takes that for
        # granted wherever both splits are unnamed.
        more = self.fewshot_source == self.evaluated
        more |= self.fewshot_cfg.split == self.config.test_split
        need = count + more
        if count and have < need:
            rows = self.rows[self.fewshot_source]
            place = rows.places[0].rpartition(" row ")[0] if rows.places else self.fewshot_source
            raise ValueError(
                f"--num_fewshot={count} needs {need} rows of the task {self.config.task}, and "
                f"{place} has {have}; ask for {max(0, have - need + count)} or fewer"
            )

    def build_all_requests(
        self,
        *,
        limit: int | None = None,
        samples: list[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        **how: Any,
    ) -> None:
        """Form the requests as the harness does, without its bar.

        ``how``: the arguments of the harness about chat templates; it caches no requests.
        """
        chat = {name: how.get(name) for name in ("apply_chat_template", "chat_template")}
        shown = {
            name: how[name]
            for name in ("system_instruction", "fewshot_as_multiturn")
            if name in how
        }
        instances = []
        for number, doc in self.doc_iterator(
            rank=rank, limit=limit, samples=samples, world_size=world_size
        ):
            self._where = self.place(number) if samples is None else None
            context = self.fewshot_context(
                doc,
                num_fewshot=self.config.num_fewshot or 0,
                gen_prefix=self.doc_to_prefix(doc),
                **shown,
                **chat,
            )
            made = self.construct_requests(
                doc=doc,
                ctx=context,
                metadata=(self.config["task"], number, self.config.repeats),
                **chat,
            )
            instances += made if isinstance(made, list) else [made]
        self._where = None
        self._instances = instances
        self.cut = count_cut(self) if self.model is not None else 0

    def fewshot_context(self, doc: Any, num_fewshot: int, **kwargs: Any) -> Any:
        self.sampler.asked = doc
        return super().fewshot_context(doc, num_fewshot=num_fewshot, **kwargs)

    def set_fewshot_seed(self, seed: int | None = None) -> None:
        self.fewshot_rnd = random.Random(seed)
        self.sampler.set_rnd(seed)


def _field(error: Exception) -> str:
    """Return the name of the field that a template or a function did not find; "" if unknown."""
    if isinstance(error, KeyError):
        return str(error.args[0])
    if isinstance(error, jinja2.UndefinedError):
        message = str(error)
        return message.split("'")[-2 if "attribute" in message else 1] if "'" in message else ""
    return ""


def _missing(place: str, task: str, error: Exception, row: dict[str, Any]) -> str:
    name = _field(error)
    shown = ", ".join(sorted(key for key, value in row.items() if value is not None)) or "none"
    if name:
        return f"{place}: the task {task} needs the field {name!r}; the row has the fields {shown}"
    reason = str(error) or type(error).__name__
    if str(error).startswith(place):
        return reason  # from the check of the row itself
    return f"{place}: the task {task} cannot form its prompt ({reason}) of the fields {shown}"
