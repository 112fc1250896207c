"""Run a recipe: read the input, run each stage in turn, write the tokens and the report."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
from collections.abc import Callable

from mtnlg_jax import storage
from mtnlg_jax.data.canaries import CANARIES
from mtnlg_jax.data.output import check_output
from mtnlg_jax.data.read.documents import ReadReport
from mtnlg_jax.data.read.open_files import File
from mtnlg_jax.data.recipe import blend, corpus, filters, texts
from mtnlg_jax.data.recipe.inputs import beside_sources, input_files
from mtnlg_jax.data.recipe.report import render
from mtnlg_jax.data.recipe.settings import Recipe, validate, with_sources
from mtnlg_jax.data.recipe.stages import Runner, Shard, Task, in_processes, shards_of
from mtnlg_jax.data.store.prepared import PREPARED, write_prepared
from mtnlg_jax.data.tokenizer import load_tokenizer


def make(
    recipe: Recipe,
    root: str | None,
    output: str,
    *,
    engine=None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Run ``recipe``, and return the content of its report.json (without prepared.json's).

    After an interruption the same call continues. Every result depends only on the text and the
    recipe.

    When it is done, ``output`` holds prepared.json (which makes it a ``data.path``), tokenizer/,
    sources/NAME/train, heldout/, report.html, report.json, and stages/ with the output of each
    stage: Parquet files of texts and their origins. Without the stage "tokens" the texts of the
    last stage are the result.

    Memory: a few times ``recipe.shard_bytes`` in each process, and in this one also 40 bytes for
    each document and 80 for each pair of possible duplicates.

    Args:
      root: file or folder of the input, from which the relative paths of the recipe's sources
        start; None if those paths are complete.
      output: folder or URL.
      engine: `in_processes` (default: one process for each core) or `on_ray`.
      overwrite: remake what depends on a changed setting or input.
      progress: whether to show a progress bar on a terminal.

    Raises:
      ValueError: the recipe or the input is invalid; raised before any work where possible.
      FileNotFoundError: an input is missing.
      FileExistsError: ``output`` was begun with other settings or input and ``overwrite`` is false,
        or another run is writing to it.
    """
    validate(recipe)
    output = str(output).rstrip("/")
    check_output(output, "recipe.json", resume=True, flag="--output", input_path=root)
    recipe = with_sources(recipe, None if root is None else str(root))
    files, left_out = input_files(recipe)
    reports = {"test sets": ReadReport(), "samples of quality": ReadReport()}
    tests = []
    if "decontaminate" in recipe.stages:
        tests = filters.test_files(recipe.decontamination, reports["test sets"])
    samples = [
        filters.files_of(paths, reports["samples of quality"])
        for paths in (recipe.quality.good, recipe.quality.bad)
    ]
    left_out += [texts.named_after(name, report.notes) for name, report in reports.items()]
    left_out += [beside_sources(recipe, str(root))] if root is not None else []
    # A stamp changes with the content of a file, so `_check_settings` notices changed input.
    stamps = {f"{name}/{file.name}": file.stamp for name, group in files.items() for file in group}
    stamps |= {file.path: file.stamp for file in (*tests, *samples[0], *samples[1])}
    if recipe.tokenizer not in ("bpe", "unigram"):
        given = load_tokenizer(recipe.tokenizer)
        given.check_end()
        stamps[recipe.tokenizer] = given.fingerprint
    with _locked(output):
        _check_settings(recipe, output, stamps, overwrite)
        kept = "what is done is kept, and the same command continues from there"
        engine = engine or in_processes(os.cpu_count() or 1)
        with storage.disk_errors(output, kept), engine as run_tasks:
            runner = Runner(output, run_tasks, progress)
            info = _run(runner, recipe, files, tests, samples, left_out)
        runner.prune("stages")
    return info


def _run(
    runner: Runner,
    recipe: Recipe,
    files: dict[str, list[File]],
    tests: list[File],
    samples: list[list[File]],
    left_out: list[dict],
) -> dict:
    tasks = _read_tasks(recipe, files)
    results = runner.run("reading", tasks)
    inputs = {name: entry for result in results for name, entry in result["inputs"].items()}
    stages = [texts.merged("read", results)]
    texts.with_notes(stages[0], [*left_out, *(result["notes"] for result in results)])
    shards = _remaining(tasks, results, stages, [])

    functions: dict[str, Callable[..., corpus.StageResult]] = {
        "clean": corpus.clean,
        "duplicates": corpus.duplicates,
        "paragraphs": corpus.paragraphs,
        "decontaminate": functools.partial(corpus.decontaminate, tests=tests),
        "quality": functools.partial(corpus.quality, samples=samples),
    }
    # Tokens are made below; the other two are left out if there is nothing to compare with.
    idle = {"tokens"} | ({"decontaminate"} if not tests else set())
    idle |= {"quality"} if not recipe.quality.good else set()
    skipping = {source.name: source.skip_stages for source in recipe.sources}
    for stage in recipe.stages:
        passing = [shard for shard in shards if stage in skipping[shard.source]]
        treated = [shard for shard in shards if stage not in skipping[shard.source]]
        if stage in idle or not treated:
            continue
        tasks, results, counts = functions[stage](runner, recipe, treated)
        stages.append(counts)
        if passing:
            names = ", ".join(sorted({shard.source for shard in passing}))
            count = sum(shard.documents for shard in passing)
            note = f"Not run over {names}: {count:,} documents."
            counts["note"] = " ".join(filter(None, [counts.get("note"), note]))
        shards = _remaining(tasks, results, stages, passing)

    info = {
        "name": recipe.name,
        "settings": _settings(recipe),
        "stages": stages,
        "inputs": inputs,
        "outputs": {},
    }
    if "tokens" in recipe.stages:
        info |= blend.make_tokens(runner, recipe, shards)
    else:
        _remove_tokens(runner.root)
    info = json.loads(json.dumps(info))  # as report.json will be read, with lists for tuples
    storage.write_file(
        runner.root, "report.json", json.dumps(info, indent=1, ensure_ascii=False).encode()
    )
    storage.write_file(runner.root, "report.html", render(info).encode())
    if prepared := info.pop("prepared", None):
        write_prepared(runner.root, prepared)
    return info


def _remove_tokens(root: str) -> None:
    """Remove what an earlier run with the stage "tokens" made."""
    storage.remove_file(root, PREPARED)
    storage.remove_file(root, CANARIES)
    for folder in ("sources", "heldout", "tokenizer"):
        for name in storage.list_files(root, folder):
            storage.remove_file(root, name)


def _remaining(
    tasks: list[Task], results: list[dict], stages: list[dict], passing: list[Shard]
) -> list[Shard]:
    """Return the shards that a stage kept and those it skipped, in the order of reading.

    Raises ValueError if none is left.
    """
    shards = sorted([*shards_of(tasks, results), *passing], key=lambda shard: shard.base)
    if not shards:
        last = stages[-1]
        raise ValueError(
            f"nothing is left after the stage {last['name']!r}, which received "
            f"{last['documents'][0]} documents: {last['dropped'] or last['tables']}; loosen the "
            "rule that dropped most"
        )
    return shards


def _read_tasks(recipe: Recipe, files: dict[str, list[File]]) -> list[Task]:
    """Return the tasks that read the input, each about ``recipe.shard_bytes`` of one source."""
    given = (
        recipe.on_error,
        recipe.max_document_bytes,
        recipe.shard_bytes,
        recipe.encoding,
    )
    tasks = []
    for source in recipe.sources:
        for number, group in enumerate(_groups(files[source.name], recipe.shard_bytes)):
            settings = (source.name, source.text_key, *given)
            stamps = [(file.name, file.stamp) for file in group]
            name = f"stages/read/{source.name}-{number:06d}"
            tasks.append(Task(name, texts.read, (group, *settings), (stamps, *settings)))
    return tasks


def _groups(files: list[File], size: int) -> list[list[File]]:
    """Divide files, in their order, into groups of about ``size`` bytes."""
    groups: list[list[File]] = [[]]
    total = 0
    for file in files:
        if total and total + file.size > size:
            groups.append([])
            total = 0
        groups[-1].append(file)
        total += file.size
    return groups


def _check_settings(recipe: Recipe, output: str, stamps: dict[str, str], overwrite: bool) -> None:
    """Compare settings and input with the recipe.json of ``output``, and write a new one.

    Raises FileExistsError if they differ and ``overwrite`` is false.
    """
    settings = _settings(dataclasses.replace(recipe, sources=()))
    sources = {}
    for source in recipe.sources:
        own = filter(None, (source.settings, source.skip_stages))
        sources[source.name] = [source.weight, source.priority, source.text_key, *own]
    wanted = json.loads(json.dumps({"settings": settings, "sources": sources, "inputs": stamps}))
    content = storage.read_file(output, "recipe.json")
    if content is not None and not overwrite:
        begun = json.loads(content)
        if _own_keys(begun) != _own_keys(wanted):
            raise FileExistsError(
                f"{output} was begun by another version, which has other settings; choose another "
                "--output, or remake all of it with --overwrite"
            )
        for what, noun in (("settings", "settings"), ("sources", "sources"), ("inputs", "input")):
            changed = sorted(
                key
                for key in begun[what].keys() | wanted[what].keys()
                if begun[what].get(key) != wanted[what].get(key)
            )
            if changed:
                key = changed[0]
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                raise FileExistsError(
                    f"{output} was begun with other {noun}: {key} was {begun[what].get(key)} and "
                    f"is {wanted[what].get(key)}{more}; choose another --output, or remake all "
                    "that depends on it with --overwrite"
                )
    storage.write_file(
        output, "recipe.json", json.dumps(wanted, indent=1, ensure_ascii=False).encode()
    )


@contextlib.contextmanager
def _locked(output: str):
    """Lock a local folder, so that only one run writes to it; raise FileExistsError if one does."""
    if storage.is_remote(output):
        yield
        return
    os.makedirs(output, exist_ok=True)
    with open(f"{output}/.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"another run is writing to {output}; wait for it, or choose another --output"
            ) from None
        yield


def _own_keys(recorded: dict) -> set[str]:
    return {key for key in recorded["settings"] if not key.startswith("canaries.")}


def _settings(recipe: Recipe) -> dict:
    """Return the settings of a recipe under dotted keys. Those of canaries are left out where none
    are planted: outputs begun before there were any have none."""
    flat = _flat(dataclasses.asdict(recipe))
    planted = recipe.canaries.count > 0
    return {key: value for key, value in flat.items() if planted or not key.startswith("canaries.")}


def _flat(tree: dict, prefix: str = "") -> dict:
    """Return nested settings under dotted keys."""
    flat: dict = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
