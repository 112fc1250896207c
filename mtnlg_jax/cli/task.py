"""Does a task with a trained model: python launch/task.py --workdir=RUN --task=summarise
--input=FILE

    --task=continue | summarise | translate | sentiment | answer     English or Chinese, seen from
        the text
    --input=FILE       one text; - or nothing: standard input
    --eval=ROWS        scores the answers to many rows, beside those of a trivial baseline
    --score=ANSWERS    scores answers that exist, without a model: those of --output, or of anything
                       else
    --make_pairs=OUT   writes the rows of --input=ROWS as prompts and answers to fine-tune on; needs
                       no run: python launch/prepare_data.py --input=OUT.jsonl --output=DATA
                           --tokenizer=RUN/tokenizer \\ --answer='{answer}'

ROWS and --examples are .jsonl, .json (also in SQuAD's layout), .csv, .parquet or columns between
tabs (.tsv, .txt), also compressed, with an input, a reference, and where there are some a context
and choices. The layouts of well-known sets are found by their keys, and said; --columns says where
things stand otherwise, by key (a.b inside objects), by number from 0 or by the head's name, several
as sol1+sol2; --labels what a reference is called here:

    SST-2         --task=sentiment --eval=dev.tsv --labels=0=negative,1=positive
    SciTLDR       --task=summarise --eval=dev.jsonl --columns=input=source,reference=target
    Tatoeba       --task=translate --eval=cmn.txt           (--columns=input=1,reference=0 for
                  Chinese into English)
    XQuAD         --task=answer --eval=xquad.zh.json
    ARC           --task=answer --eval=arc_easy.jsonl
                  --columns=input=query,choices=choices,reference=gold
    PIQA          --task=answer --eval=piqa.jsonl
                  --columns=input=goal,choices=sol1+sol2,reference=label
    BoolQ         --task=answer --eval=boolq.jsonl
    Winogrande    --task=continue --eval=winogrande.jsonl   (each option fills the blank; what
                  follows it is scored)
    LAMBADA       --task=continue --eval=lambada.jsonl --last_word

A reference to a choice is its text, its letter, or its number: reference=KEY@0 or @1 says where
numbers begin, @letter and @text that it is none (tasks.rows.read_rows has the rule for what is not
said). --normalise divides the scores of
choices: sum is acc of lm-evaluation-harness, per_char its acc_norm (characters without the space
before them), per_byte the same in UTF-8; --eval prints the accuracy of all three. --templates=FILE
changes the prompts, as to those of a fine-tuned model; {choices} in one lists the choices by
letters and ranks the letters: see tasks.templates. --passages=FOLDER looks up what to answer from
and cites it. --set=num_beams=1 changes the task's decoding.

--output=FILE.jsonl gets each answer when it is there, so nothing done is lost; the keys of a line,
and of --json, are those of tasks.answers.Answer, Choice and Evaluation: `score` is what choices
were ranked by, `log_prob` the natural logarithm of a choice's probability behind its prompt,
`probability` that of this choice among all of the row.
Exit codes: 0 done, 1 the metrics failed (the answers are kept, and told where), 2 bad input.
"""

import dataclasses
import json
import os
import sys
import tempfile

from absl import flags

from mtnlg_jax import command

_TASK = flags.DEFINE_string(
    "task", None, "continue, summarise, translate, sentiment or answer", required=True
)
_WORKDIR = command.define_path("workdir", None, "folder of the run")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "which checkpoint")
_INPUT = command.define_path(
    "input", None, "file with the text, - for standard input; rows for --make_pairs"
)
_EVAL = command.define_path("eval", None, "file of rows to score")
_SCORE = command.define_path(
    "score",
    None,
    "file of answers to score without a model; their rows are there, too, or in --eval",
)
_OUTPUT = command.define_path(
    "output", None, "with --eval: file to write, a JSON line for each answer when it comes"
)
_MAKE_PAIRS = command.define_path(
    "make_pairs", None, "file to write: a JSON line for each row of --input"
)
_EXAMPLES = command.define_path(
    "examples", None, "file of rows shown before the input, never the one that is asked"
)
_SHOTS = flags.DEFINE_integer(
    "shots",
    None,
    "as many of the examples, the first ones or, with --seed, drawn for each "
    "row; default: all, in their order",
    lower_bound=0,
)
_SEED = flags.DEFINE_integer(
    "seed",
    None,
    "draws the rows of --limit (default 0), and the examples of --shots where it is given",
    lower_bound=0,
)
_PASSAGES = command.define_path("passages", None, "folder or file of texts to answer from")
_BEST = flags.DEFINE_integer("best", 3, "passages looked up", lower_bound=1)
_PASSAGE_SIZE = flags.DEFINE_integer(
    "passage_size", 600, "characters of a passage at most", lower_bound=1
)
_TEXT_KEY = flags.DEFINE_string(
    "text_key", "text", "key or column of the text in --passages of JSON or Parquet"
)
_ON_ERROR = flags.DEFINE_enum(
    "on_error", "raise", ["raise", "skip"], "what to do about damaged texts in --passages"
)
_CHOICES = flags.DEFINE_multi_string(
    "choices", [], "an answer to choose from, of rows that hold none; repeat for more"
)
_BLANK = flags.DEFINE_string(
    "blank",
    None,
    "mark in the input, such as _, that each choice fills; what follows it is "
    "scored (task continue)",
)
_LAST_WORD = flags.DEFINE_bool(
    "last_word",
    False,
    "score the reference, or else the input's last word, as the end of "
    "the text: accuracy of the greedy answer, and perplexity (task continue)",
)
_LANGUAGE = flags.DEFINE_string("language", None, "en or zh, of the input; default: seen from it")
_TEMPLATES = command.define_path("templates", None, "JSON or Python file with other prompts")
_COLUMNS = flags.DEFINE_list("columns", [], "input=KEY,reference=KEY,context=KEY,choices=KEY+KEY")
_LABELS = flags.DEFINE_list("labels", [], "REFERENCE=LABEL,REFERENCE=LABEL")
_LIMIT = flags.DEFINE_integer(
    "limit", None, "as many rows, drawn by --seed, in their order; default: all", lower_bound=1
)
_SCORER = flags.DEFINE_enum(
    "scorer", "logprob", ["logprob", "pmi", "pseudo_log_likelihood"], "of labels and choices"
)
_NORMALISE = flags.DEFINE_enum(
    "normalise",
    None,
    ["sum", "per_char", "per_byte"],
    "what scores of choices are divided by; default: per_byte, of labels sum",
)
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE of DecodeConfig; repeat for more")
_BATCH = flags.DEFINE_integer("batch", 8, "rows written at once", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "type of products and cache"
)


class MetricsFailed(Exception):
    """All answers are there, and could not be scored."""

    exit_code = 1


def main() -> None:
    from absl import logging

    from mtnlg_jax.tasks.templates import task_of

    # Before anything imports JAX, which tells at INFO of every backend that is not here.
    logging.set_verbosity(logging.WARNING)
    task = task_of(_TASK.value, _TEMPLATES.value)
    if _EVAL.value and (_INPUT.value or _MAKE_PAIRS.value):
        raise ValueError(
            "--eval reads its inputs from its rows; leave --input and --make_pairs out"
        )
    for flag in (_OUTPUT, _BLANK):
        if flag.value and not _EVAL.value:
            raise ValueError(
                f"--{flag.name}={flag.value} belongs to rows that are scored; name their file with --eval"
            )
    if _LAST_WORD.value and not (_EVAL.value or _SCORE.value):
        raise ValueError("--last_word scores rows; name their file with --eval")
    if _SCORE.value:
        return _score(task)
    if _MAKE_PAIRS.value:
        return _pairs(task)
    if not _WORKDIR.value:
        raise ValueError("--workdir is missing; name the folder of a run, from launch/pretrain.py")
    if _EVAL.value:
        return _evaluate(task)
    return _answer(task)


def _pairs(task) -> None:
    from mtnlg_jax.storage import write_file
    from mtnlg_jax.tasks.prompts import pairs

    if _INPUT.value in (None, "-"):
        raise ValueError("--make_pairs takes its rows from a file; name it with --input")
    rows = _rows(task, _INPUT.value, _LIMIT.value)
    size = {}
    if _WORKDIR.value:
        run = _load()
        size = {"tokenizer": run.tokenizer, "context": run.config.model.max_position_embeddings}
    made = pairs(task, rows, language=_LANGUAGE.value, **size)
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in made)
    write_file(*os.path.split(_MAKE_PAIRS.value), lines.encode())
    print(
        f"{len(made):,} pairs in {_MAKE_PAIRS.value}; the first:\n{made[0]['prompt']}[{made[0]['answer']}]"
    )


def _answer(task) -> None:
    from mtnlg_jax.tasks.prompts import Row

    row = Row(_text(), choices=tuple(_CHOICES.value))
    notes = []
    given = _given(task, notes)
    run, answers = _perform(task, [row], given)
    answer = answers[0]
    if _JSON.value:
        print(
            json.dumps(
                {"task": task.name, "step": run.step, "input": row.input}
                | dataclasses.asdict(answer),
                ensure_ascii=False,
                allow_nan=False,
            )
        )
        return
    print((row.input.rstrip() if task.joined else "") + answer.text)
    for choice in answer.choices:
        print(f"  {choice.probability:6.1%}  {choice.label}  ({choice.score:.4f})")
    if answer.choices:
        print(
            f"(the probability of each among these, and {answer.ranked_by} in nats, by which they are ranked)"
        )
    for number, passage in enumerate(answer.citations, 1):
        print(
            f"[{number}] {passage.source}, characters {passage.start} to {passage.end}: {passage.text[:60]!r} ..."
        )
    for part, cut in (
        ("input", answer.shortened),
        ("input's own context", answer.context_shortened),
    ):
        if cut:
            print(f"(the {part} was shortened to the model's context)", file=sys.stderr)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _evaluate(task) -> None:
    from mtnlg_jax.tasks.answers import AnswersFile, check_references

    notes = []
    rows = _rows(task, _EVAL.value, _LIMIT.value, notes)
    if not _LAST_WORD.value:
        check_references(task, rows, _LANGUAGE.value)
    given = _given(task, notes)
    path = _OUTPUT.value
    if path and os.path.exists(path):
        raise ValueError(
            f"--output={path} is there already; give another name, or score it with --score={path}"
        )
    if not path:
        folder = tempfile.mkdtemp(prefix="mtnlg_jax_task_")
        path = os.path.join(folder, "answers.jsonl")
    file = AnswersFile(path, rows)
    try:
        run, answers = _perform(task, rows, given, file.add)
        _report(task, rows, answers, notes, run.step, _OUTPUT.value)
    except BaseException:
        file.close()
        if os.path.getsize(path):
            print(f"the answers so far are in {path}; --score={path} scores them", file=sys.stderr)
        else:
            _remove(path)
        raise
    file.close()
    if not _OUTPUT.value:
        _remove(path)


def _remove(path: str) -> None:
    os.remove(path)
    if not _OUTPUT.value:
        os.rmdir(os.path.dirname(path))


def _score(task) -> None:
    from mtnlg_jax.tasks.answers import check_references, read_answers

    for flag in (
        _WORKDIR,
        _INPUT,
        _OUTPUT,
        _MAKE_PAIRS,
        _EXAMPLES,
        _SHOTS,
        _PASSAGES,
        _SCORER,
        _NORMALISE,
        _SET,
    ):
        if flag.present:
            raise ValueError(
                f"--score reads answers that are there, without a model; leave --{flag.name} out"
            )
    notes = []
    rows = _rows(task, _EVAL.value, _LIMIT.value, notes) if _EVAL.value else None
    rows, answers = read_answers(_SCORE.value, task, rows, _LANGUAGE.value)
    if not all(answer.finish_reason == "last word" for answer in answers):
        check_references(task, rows, _LANGUAGE.value)
    _report(task, rows, answers, notes, None, None)


def _report(task, rows, answers, notes, step, output) -> None:
    from mtnlg_jax.tasks.answers import evaluate

    try:
        result = evaluate(task, rows, answers, language=_LANGUAGE.value)
    except Exception as error:
        raise MetricsFailed(
            f"error: the metrics failed ({type(error).__name__}: {error})"
        ) from error
    shown = [answer.examples for answer in answers]
    shortened = sum(answer.shortened for answer in answers)
    contexts = sum(answer.context_shortened for answer in answers)
    ranked_by = next((answer.ranked_by for answer in answers if answer.ranked_by), "")
    if _JSON.value:
        counts = {
            "examples": {"min": min(shown), "max": max(shown)},
            "shortened": shortened,
            "context_shortened": contexts,
            "ranked_by": ranked_by,
            "notes": notes,
            "output": output,
        }
        print(
            json.dumps(
                {"task": task.name, "step": step} | counts | dataclasses.asdict(result),
                ensure_ascii=False,
                allow_nan=False,
            )
        )
        return
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    told = [
        f"{result.rows:,} rows",
        f"checkpoint of step {step}" if step is not None else f"answers of {_SCORE.value}",
        f"{min(shown)} to {max(shown)} examples",
        f"{shortened:,} inputs shortened",
    ]
    if with_context := sum(bool(row.context) for row in rows):
        told.append(f"{contexts:,} of {with_context:,} contexts shortened")
    told += [f"ranked by {ranked_by}"] * bool(ranked_by)
    print(f"{task.name}: {', '.join(told)}; 95 % intervals by bootstrap")
    print(f"{'':12}  {'model':24}  {result.baseline}")
    for name, score in result.scores.items():
        print(f"{name:12}  {str(score):24}  {result.baseline_scores.get(name, '')}".rstrip())
    for name, score in result.normalised.items():
        print(f"  {name:10}  {score}")
    if output:
        print(f"answers in {output}")


def _given(task, notes: list[str]) -> dict:
    """What is read before the model is."""
    from mtnlg_jax.tasks.passages import read_passages

    examples = []
    if _EXAMPLES.value and _SHOTS.value != 0:
        examples = _rows(task, _EXAMPLES.value, None, notes)
        if (_SHOTS.value or 0) > len(examples):
            raise ValueError(
                f"--shots={_SHOTS.value}, but {_EXAMPLES.value} holds {len(examples)} rows; give as many "
                "or fewer"
            )
    elif _SHOTS.value:
        raise ValueError(
            f"--shots={_SHOTS.value} without examples; name their file with --examples"
        )
    retriever = None
    if _PASSAGES.value:
        retriever = read_passages(
            _PASSAGES.value, _PASSAGE_SIZE.value, _TEXT_KEY.value, _ON_ERROR.value
        )
    return {
        "examples": examples,
        "shots": _SHOTS.value or None,
        "seed": _SEED.value,
        "retriever": retriever,
    }


def _load():
    from mtnlg_jax import compat
    from mtnlg_jax.train.checkpoint import load_run

    compat.quiet()
    compat.configure_cache()
    return load_run(_WORKDIR.value, _CHECKPOINT.value)


def _perform(task, rows, given, on_answer=lambda index, answer: None):
    from tqdm import tqdm

    from mtnlg_jax.config import Config, acting, override
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.tasks.run import perform

    decode = override(Config(decode=task.decode), *(f"decode.{each}" for each in _SET.value)).decode
    # Settings of the task that --set leaves nothing to do, as early_stopping without beams, are no
    # fault.
    decode = acting(decode, [each.partition("=")[0].strip() for each in _SET.value])
    run = _load()
    decoder = unstack(run.config.model, run.params, _DTYPE.value)
    with tqdm(
        total=len(rows), unit="row", disable=None if len(rows) > 1 else True, leave=False
    ) as bar:

        def done(index, answer):
            on_answer(index, answer)
            bar.update()

        return run, perform(
            decoder,
            run.tokenizer,
            task,
            rows,
            language=_LANGUAGE.value,
            passages=_BEST.value,
            decode=decode,
            scorer=_SCORER.value,
            normalise=_NORMALISE.value,
            last_word=_LAST_WORD.value,
            stages=run.config.train.stages,
            batch=_BATCH.value,
            on_answer=done,
            **given,
        )


def _rows(task, path: str, limit: int | None, notes: list[str] | None = None) -> list:
    from mtnlg_jax.tasks.examples import read_rows
    from mtnlg_jax.tasks.prompts import split_last_word

    needs = ("input",) if _LAST_WORD.value else ("input", "reference")
    columns = _assignments("columns", _COLUMNS.value)
    rows = read_rows(
        path,
        columns or None,
        _assignments("labels", _LABELS.value),
        limit,
        needs,
        seed=_SEED.value or 0,
        choices=_CHOICES.value,
        notes=notes,
    )
    if _BLANK.value:
        if not task.joined:
            raise ValueError(
                f"--blank={_BLANK.value} fills the input itself, and task {task.name!r} asks about it; "
                "take --task=continue"
            )
        rows = [dataclasses.replace(row, blank=_BLANK.value) for row in rows]
    return [split_last_word(row) for row in rows] if _LAST_WORD.value else rows


def _assignments(flag: str, entries: list[str]) -> dict[str, str]:
    found = {}
    name = ""
    for entry in entries:
        if flag == "columns" and "=" not in entry and name:
            found[name] += f"+{entry}"  # choices=sol1,sol2
            continue
        name, equals, value = entry.partition("=")
        if not equals or not value:
            raise ValueError(
                f"--{flag}={entry} is not of the form NAME=VALUE, as in --{flag}="
                f"{'input=0,reference=1' if flag == 'columns' else '0=negative,1=positive'}"
            )
        if name in found:
            raise ValueError(f"--{flag} names {name!r} twice; keep one of them")
        found[name] = value
    return found


def _text() -> str:
    name, text = command.read_text(_INPUT.value, "the text", "utf-8-sig")
    if not text.strip():
        raise ValueError(f"{name} is empty; give a text to work on")
    return text


def run() -> None:
    """Parses the command line, does what it says and exits."""
    command.run(main)
