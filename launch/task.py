"""Does a task with a trained model: python launch/task.py --workdir=RUN --task=summarise --input=FILE

    --task=continue | summarise | translate | sentiment | answer     English or Chinese, seen from the text
    --input=FILE       one text; - or nothing: standard input
    --eval=ROWS        scores the answers to many rows, beside those of a trivial baseline
    --make_pairs=OUT   writes the rows of --input=ROWS as prompts and answers to fine-tune on; needs no run:
                       python launch/prepare_data.py --input=OUT.jsonl --output=DATA --tokenizer=RUN/tokenizer \\
                           --answer='{answer}'

ROWS and --examples are .jsonl, .json (also in SQuAD's layout) or columns between tabs (.tsv, .txt), with an input, a
reference, and where there are some a context and choices. --columns says where they stand, by key, by number from 0
or by the head's name; --labels what a reference is called here:

    SST-2         --task=sentiment --eval=dev.tsv --labels=0=negative,1=positive
    SciTLDR       --task=summarise --eval=dev.jsonl --columns=input=source,reference=target
    Tatoeba       --task=translate --eval=cmn.txt           (--columns=input=1,reference=0 for Chinese into English)
    XQuAD         --task=answer --eval=xquad.zh.json
    ARC           --task=answer --eval=arc_easy.jsonl --columns=input=query,choices=choices,reference=gold

--passages=FOLDER looks up what to answer from and cites it. --templates=FILE changes the prompts, as to those of a
fine-tuned model: see tasks.templates. --set=num_beams=1 changes the task's decoding. Exit codes: 0 done, 2 bad input.
"""

import dataclasses
import json
import os
import sys

from absl import flags

from mtnlg_jax import command

_TASK = flags.DEFINE_string("task", None, "continue, summarise, translate, sentiment or answer", required=True)
_WORKDIR = command.define_path("workdir", None, "folder of the run")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "which checkpoint")
_INPUT = command.define_path("input", None, "file with the text, - for standard input; rows for --make_pairs")
_EVAL = command.define_path("eval", None, "file of rows to score")
_MAKE_PAIRS = command.define_path("make_pairs", None, "file to write: a JSON line for each row of --input")
_EXAMPLES = command.define_path("examples", None, "file of rows shown before the input, in their order")
_SHOTS = flags.DEFINE_integer("shots", None, "as many of the examples, the first ones; default: all", lower_bound=0)
_PASSAGES = command.define_path("passages", None, "folder or file of texts to answer from")
_BEST = flags.DEFINE_integer("best", 3, "passages looked up", lower_bound=1)
_PASSAGE_SIZE = flags.DEFINE_integer("passage_size", 600, "characters of a passage at most", lower_bound=1)
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "key or column of the text in --passages of JSON or Parquet")
_CHOICES = flags.DEFINE_multi_string("choices", [], "an answer to choose from; repeat for more")
_LANGUAGE = flags.DEFINE_string("language", None, "en or zh, of the input; default: seen from it")
_TEMPLATES = command.define_path("templates", None, "JSON or Python file with other prompts")
_COLUMNS = flags.DEFINE_list("columns", [], "input=KEY,reference=KEY,context=KEY,choices=KEY")
_LABELS = flags.DEFINE_list("labels", [], "REFERENCE=LABEL,REFERENCE=LABEL")
_LIMIT = flags.DEFINE_integer("limit", None, "as many rows, the first ones; default: all", lower_bound=1)
_SCORER = flags.DEFINE_enum("scorer", "logprob", ["logprob", "pmi", "pseudo_log_likelihood"], "of labels and choices")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE of DecodeConfig; repeat for more")
_BATCH = flags.DEFINE_integer("batch", 8, "rows written at once", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "type of products and cache")


def main() -> None:
    from mtnlg_jax.tasks.templates import task_of

    task = task_of(_TASK.value, _TEMPLATES.value)
    if _EVAL.value and (_INPUT.value or _MAKE_PAIRS.value or _CHOICES.value):
        raise ValueError("--eval reads its inputs and choices from its rows; leave --input, --make_pairs and --choices "
                         "out")
    if _MAKE_PAIRS.value:
        return _pairs(task)
    if not _WORKDIR.value:
        raise ValueError("--workdir is missing; name the folder of a run, from launch/pretrain.py")
    if _EVAL.value:
        return _evaluate(task)
    return _answer(task)


def _pairs(task) -> None:
    from mtnlg_jax.data.storage import write_file
    from mtnlg_jax.tasks.prompts import pairs

    if _INPUT.value in (None, "-"):
        raise ValueError("--make_pairs takes its rows from a file; name it with --input")
    rows, size = _rows(_INPUT.value, _LIMIT.value), {}
    if _WORKDIR.value:
        run = _load()
        size = {"tokenizer": run.tokenizer, "context": run.config.model.max_position_embeddings}
    made = pairs(task, rows, language=_LANGUAGE.value, **size)
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in made)
    write_file(*os.path.split(_MAKE_PAIRS.value), lines.encode())
    print(f"{len(made):,} pairs in {_MAKE_PAIRS.value}; the first:\n{made[0]['prompt']}[{made[0]['answer']}]")


def _answer(task) -> None:
    from mtnlg_jax.tasks.prompts import Row

    row = Row(_text(), choices=tuple(_CHOICES.value))
    given = _given()
    run, answers = _perform(task, [row], given)
    answer = answers[0]
    if _JSON.value:
        print(json.dumps({"task": task.name, "step": run.step, "input": row.input} | dataclasses.asdict(answer),
                         ensure_ascii=False))
        return
    print((row.input.rstrip() if task.joined else "") + answer.text)
    for choice in answer.choices:
        print(f"  {choice.share:6.1%}  {choice.label}")
    for number, passage in enumerate(answer.citations, 1):
        print(f"[{number}] {passage.source}, characters {passage.start} to {passage.end}: {passage.text[:60]!r} ...")
    if answer.shortened:
        print("(the input was shortened to the model's context)", file=sys.stderr)


def _evaluate(task) -> None:
    from mtnlg_jax.tasks.run import check_references, evaluate

    rows = _rows(_EVAL.value, _LIMIT.value)
    check_references(task, rows, _LANGUAGE.value)
    run, answers = _perform(task, rows, _given())
    result = evaluate(task, rows, answers)
    shortened, shown = sum(answer.shortened for answer in answers), [answer.examples for answer in answers]
    if _JSON.value:
        print(json.dumps({"task": task.name, "step": run.step, "shortened": shortened, "examples": max(shown)}
                         | dataclasses.asdict(result)))
        return
    print(f"{task.name}: {result.rows:,} rows, checkpoint of step {run.step}, {min(shown)} to {max(shown)} examples, "
          f"{shortened} inputs shortened; 95 % intervals by bootstrap")
    print(f"{'':12}  {'model':24}  {result.baseline}")
    for name, score in result.scores.items():
        print(f"{name:12}  {str(score):24}  {result.baseline_scores[name]}")


def _given() -> dict:
    """What is read before the model is."""
    from mtnlg_jax.tasks.passages import read_passages

    examples = []
    if _EXAMPLES.value and _SHOTS.value != 0:
        examples = _rows(_EXAMPLES.value, _SHOTS.value)
    elif _SHOTS.value:
        raise ValueError(f"--shots={_SHOTS.value} without examples; name their file with --examples")
    retriever = None
    if _PASSAGES.value:
        retriever = read_passages(_PASSAGES.value, _PASSAGE_SIZE.value, _TEXT_KEY.value)
    return {"examples": examples, "retriever": retriever}


def _load():
    from mtnlg_jax import compat
    from mtnlg_jax.train.checkpoint import load_run

    compat.quiet()
    compat.configure_cache()
    return load_run(_WORKDIR.value, _CHECKPOINT.value)


def _perform(task, rows, given):
    from tqdm import tqdm

    from mtnlg_jax.config import Config, override
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.tasks.run import perform

    decode = override(Config(decode=task.decode), *(f"decode.{each}" for each in _SET.value)).decode
    run = _load()
    decoder = unstack(run.config.model, run.params, _DTYPE.value)
    with tqdm(total=len(rows), unit="row", disable=None if len(rows) > 1 else True, leave=False) as bar:
        return run, perform(decoder, run.tokenizer, task, rows, language=_LANGUAGE.value, passages=_BEST.value,
                            decode=decode, scorer=_SCORER.value, stages=run.config.train.stages, batch=_BATCH.value,
                            on_row=bar.update, **given)


def _rows(path: str, limit: int | None):
    from mtnlg_jax.tasks.rows import read_rows

    return read_rows(path, _assignments("columns", _COLUMNS.value), _assignments("labels", _LABELS.value), limit,
                     ("input", "reference"))


def _assignments(flag: str, entries: list[str]) -> dict[str, str]:
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not value:
            raise ValueError(f"--{flag}={entry} is not of the form NAME=VALUE, as in --{flag}="
                             f"{'input=0,reference=1' if flag == 'columns' else '0=negative,1=positive'}")
        if name in found:
            raise ValueError(f"--{flag} names {name!r} twice; keep one of them")
        found[name] = value
    return found


def _text() -> str:
    name, text = command.read_text(_INPUT.value, "the text", "utf-8-sig")
    if not text.strip():
        raise ValueError(f"{name} is empty; give a text to work on")
    return text


if __name__ == "__main__":
    command.run(main)
