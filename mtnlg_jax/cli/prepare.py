"""Turn text into a folder to train from: tokenizer, token arrays, held-out part.

    python launch/prepare_data.py --output=data/python                 the embedded text, no
        download
    python launch/prepare_data.py --input=novels --output=data/novels --vocab_size=8000
    python launch/prepare_data.py --input=web.jsonl.zst --output=data/web --tokenizer=gpt2_files

By the data recipe of MT-NLG, with a report.html for people; stopped at any moment, the same command
goes on:

    python launch/prepare_data.py --config=configs/data/english.py --input=FOLDER --test_sets=EVAL
    --output=OUT
    ... --stages=clean,duplicates,paragraphs    some of the stages; without "tokens" their texts are
                                                the result
    ... --set=duplicates.threshold=0.7          a setting of mtnlg_jax/data/recipe/settings.py;
                                                repeat for more
    ... --processes=8 | --engine=ray            here, or on the machines of a Ray cluster
                                                (RAY_ADDRESS)

Prompts with answers, of which the answers alone are learnt, for the configs/finetune_*.py:

    python launch/prepare_data.py --input=pairs.jsonl --output=data/pairs --tokenizer=RUN/tokenizer
    \\
        --prompt='{title}\\n{text}\\nSummary:' --answer=' {summary}'
"""

import dataclasses
import os
import shlex

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.data.prepare import describe, prepare

_CONFIG = command.define_path(
    "config", None, "A recipe: a file of configs/data. Without it, text is taken as it is."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "A setting of the recipe, as clean.min_tokens=64; repeat for more."
)
_STAGES = flags.DEFINE_list(
    "stages",
    None,
    "Of the recipe: clean, duplicates, paragraphs, decontaminate, quality, tokens; default: all.",
)
_TEST_SETS = command.define_paths(
    "test_sets",
    "Of the recipe: what a model is to be tested on, and must not "
    "see; a file or folder; repeat for more.",
)
_SKIP_SOURCES = flags.DEFINE_list("skip_sources", [], "Of the recipe: sources to leave out.")
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "Of the recipe: how many; default: one for each core.", lower_bound=1
)
_ENGINE = flags.DEFINE_enum(
    "engine", "local", ["local", "ray"], "Of the recipe: this machine, or a Ray cluster."
)
_INPUT = command.define_path(
    "input",
    None,
    "File or folder: .txt .md .rst .jsonl .json .csv .tsv .parquet "
    ".html .warc .wet (also .gz .zst .bz2 .xz); without it, the embedded text.",
)
_OUTPUT = command.define_path("output", None, "Folder to make (or gs://, s3://).")
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 8000, "Pieces of the tokenizer to train.", lower_bound=1
)
_TOKENIZER = command.define_path(
    "tokenizer",
    "bpe",
    "bpe or unigram, to train one; or the path of one: a "
    "folder of Hugging Face's, of GPT-2's files or of a run's "
    "tokenizer, a tokenizer.json, or a SentencePiece .model.",
)
_HELDOUT = flags.DEFINE_float(
    "heldout", 0.02, "Share of the text held out from training, 0 to 0.5."
)
_SEED = flags.DEFINE_integer("seed", 0, "Draws the held-out part and the order of the documents.")
_TEXT_KEY = flags.DEFINE_string(
    "text_key",
    "text",
    "Key or column of the text in JSON, tables and Parquet; of 'a|b' "
    "the first that is there; 'data.text' goes into objects and lists.",
)
_PROMPT = flags.DEFINE_string("prompt", "{prompt}", "With --answer: what is read before it.")
_ANSWER = flags.DEFINE_string(
    "answer",
    None,
    "Makes pairs: the answer, with {KEY} for what a JSON row holds there, "
    "mostly with a space in front: ' {answer}'.",
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite",
    False,
    "Replace a prepared data set, once the new one is whole; of a "
    "recipe: make again what depends on a changed input or setting.",
)
_ON_ERROR = flags.DEFINE_enum(
    "on_error", "raise", ["raise", "skip"], "Damaged input: stop, or drop and count it."
)
_ENCODING = flags.DEFINE_string(
    "encoding",
    "",
    "Of text that is not UTF-8 and does not say so: cp1252, gb18030, big5, "
    "shift_jis, euc_kr, utf-16-le and the like.",
)


def main() -> None:
    if _CONFIG.value is not None:
        _make()
        return
    for name in ("set", "stages", "test_sets", "skip_sources", "processes", "engine"):
        if flags.FLAGS[name].present:
            raise ValueError(
                f"--{name} is for a recipe; give one with --config=configs/data/english.py"
            )
    info = prepare(
        _INPUT.value,
        _OUTPUT.value,
        vocab_size=_VOCAB_SIZE.value,
        tokenizer=_TOKENIZER.value,
        heldout=_HELDOUT.value,
        seed=_SEED.value,
        text_key=_TEXT_KEY.value,
        prompt=_PROMPT.value,
        answer=_ANSWER.value,
        on_error=_ON_ERROR.value,
        encoding=_ENCODING.value,
        overwrite=_OVERWRITE.value,
    )
    print(describe(info))
    command = (
        "--config=configs/small.py"
        if _ANSWER.value is None
        else "--config=configs/finetune_sentiment.py, or another that fits"
    )
    print(
        f"next       python launch/pretrain.py {command} --set=data.path={shlex.quote(_OUTPUT.value)} --workdir=RUN"
    )


def _make() -> None:
    """A recipe from end to end."""
    from mtnlg_jax.data.recipe.run import make, summary
    from mtnlg_jax.data.recipe.settings import load_recipe
    from mtnlg_jax.data.recipe.stages import in_processes, on_ray

    for name in ("prompt", "answer"):
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name} makes pairs, which no recipe cleans; leave --config out")
    given = {
        name: flags.FLAGS[name].value
        for name in (
            "vocab_size",
            "tokenizer",
            "heldout",
            "seed",
            "text_key",
            "on_error",
            "encoding",
        )
        if flags.FLAGS[name].present
    }
    recipe = dataclasses.replace(load_recipe(_CONFIG.value, tuple(_SET.value)), **given)
    if flags.FLAGS["text_key"].present:
        recipe = dataclasses.replace(
            recipe,
            sources=tuple(
                dataclasses.replace(source, text_key=_TEXT_KEY.value)
                if source.text_key == "text"
                else source
                for source in recipe.sources
            ),
        )
    if _ENGINE.value == "ray" and _PROCESSES.value:
        raise ValueError("--processes is for this machine; a Ray cluster takes as many as it has")
    known = [source.name for source in recipe.sources]
    for name in _SKIP_SOURCES.value:
        if name not in known:
            raise ValueError(
                f"--skip_sources={name} is none of the recipe's: {', '.join(known) or 'it names none'}"
            )
    recipe = dataclasses.replace(
        recipe, sources=tuple(s for s in recipe.sources if s.name not in _SKIP_SOURCES.value)
    )
    if _STAGES.value is not None:
        recipe = dataclasses.replace(recipe, stages=tuple(_STAGES.value))
    if _TEST_SETS.value:
        recipe = dataclasses.replace(
            recipe,
            decontamination=dataclasses.replace(
                recipe.decontamination, test_sets=tuple(_TEST_SETS.value)
            ),
        )
    engine = (
        on_ray()
        if _ENGINE.value == "ray"
        else in_processes(_PROCESSES.value or os.cpu_count() or 1)
    )
    info = make(recipe, _INPUT.value, _OUTPUT.value, engine=engine, overwrite=_OVERWRITE.value)
    print(summary(info))
    print(f"report: {_OUTPUT.value}/report.html")
    if "tokens" in info:
        print(
            "next:   python launch/pretrain.py --config=configs/small.py "
            f"--set=data.path={shlex.quote(_OUTPUT.value)} --workdir=RUN"
        )


def run() -> None:
    """Parses the command line, does what it says and exits."""
    flags.mark_flag_as_required("output")
    command.run(main)
