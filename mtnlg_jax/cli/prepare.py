"""Turn text into a folder to train from: tokenizer, token arrays, held-out part.

    python launch/prepare_data.py --output=data/python           the embedded text: no download
    python launch/prepare_data.py --input=novels --output=data/novels --vocab_size=8000
    python launch/prepare_data.py --input=web.jsonl.zst --output=data/web --tokenizer=gpt2_files

The data recipe of MT-NLG, with a report.html. After an interruption the same command continues:

    python launch/prepare_data.py --config=configs/data/english.py --input=FOLDER \\
        --test_sets=EVAL --output=OUT
    ... --stages=clean,duplicates,paragraphs    some of the stages; without "tokens" the result is
                                                text
    ... --set=duplicates.threshold=0.7          a setting of mtnlg_jax/data/recipe/settings.py;
                                                repeat for more
    ... --processes=8 | --engine=ray            on this machine, or on a Ray cluster (RAY_ADDRESS)

Prompts with answers, for the configs/finetune_*.py, which train on the answers alone:

    python launch/prepare_data.py --input=pairs.jsonl --output=data/pairs \\
        --tokenizer=RUN/tokenizer --prompt='{title}\\n{text}\\nSummary:' --answer=' {summary}'

Conversations, which train the assistant's turns alone, by the chat template of a tokenizer:

    python launch/prepare_data.py --input=chats.jsonl --output=data/chats \\
        --tokenizer=RUN/tokenizer --messages=messages --sequence_length=1024 --show=3
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
    "set", [], "A setting of the recipe, such as clean.min_tokens=64; repeat for more."
)
_STAGES = flags.DEFINE_list(
    "stages",
    None,
    "Of the recipe: clean, duplicates, paragraphs, decontaminate, quality, tokens; default: all.",
)
_TEST_SETS = command.define_paths(
    "test_sets",
    "Of the recipe: evaluation data to remove from the text; a file or folder; repeat for more.",
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
    "File or folder: .txt .md .rst .jsonl .json .csv .tsv .parquet .html .warc .wet (also .gz .zst "
    ".bz2 .xz); without it, the embedded text.",
)
_OUTPUT = command.define_path("output", None, "Folder to make (or gs://, s3://).")
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 8000, "Pieces of the tokenizer to train.", lower_bound=1
)
_TOKENIZER = command.define_path(
    "tokenizer",
    "bpe",
    "bpe or unigram, to train one; or the path of one: a folder of Hugging Face's, of GPT-2's "
    "files "
    "or of a run's tokenizer, a tokenizer.json, or a SentencePiece .model.",
)
_HELDOUT = flags.DEFINE_float(
    "heldout", 0.02, "Share of the text held out from training, 0 to 0.5."
)
_SEED = flags.DEFINE_integer("seed", 0, "Draws the held-out part and the order of the documents.")
_TEXT_KEY = flags.DEFINE_string(
    "text_key",
    "text",
    "Key or column of the text in JSON, tables and Parquet; of 'a|b' the first that exists; "
    "'data.text' goes into objects and lists.",
)
_PROMPT = flags.DEFINE_string("prompt", "{prompt}", "With --answer: the text before it.")
_ANSWER = flags.DEFINE_string(
    "answer",
    None,
    "Makes pairs: a template of the answer, with {KEY} for the value of a JSON row, mostly with a "
    "space in front: ' {answer}'.",
)
_MESSAGES = flags.DEFINE_string(
    "messages",
    None,
    "Makes conversations: the key of a JSON row that holds a list of {role, content}, mostly "
    "messages; the tokenizer's chat template renders them.",
)
_CHAT_TEMPLATE = command.define_path(
    "chat_template", None, "With --messages: file of a chat template, instead of the tokenizer's."
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length",
    None,
    "With --messages: data.sequence_length of the training, to refuse longer conversations.",
    lower_bound=1,
)
_SHOW = flags.DEFINE_integer(
    "show",
    0,
    "With --messages: how many conversations to print, with what is trained on marked.",
    lower_bound=0,
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite",
    False,
    "Replace a prepared data set once the new one is complete; of a recipe: remake what depends on "
    "a changed input or setting.",
)
_ON_ERROR = flags.DEFINE_enum(
    "on_error", "raise", ["raise", "skip"], "Damaged input: stop, or drop and count it."
)
_ENCODING = flags.DEFINE_string(
    "encoding",
    "",
    "Encoding of text that is not UTF-8 and does not declare one: cp1252, gb18030, big5, "
    "shift_jis, euc_kr, utf-16-le and the like.",
)

# Flags of one of the two ways to prepare: a recipe, or text as it is.
_RECIPE_FLAGS = ("set", "stages", "test_sets", "skip_sources", "processes", "engine")
_PAIR_FLAGS = ("prompt", "answer")
_CHAT_FLAGS = ("messages", "chat_template", "sequence_length", "show")
# Flags that replace a setting of the recipe if they are given.
_SETTINGS = ("vocab_size", "tokenizer", "heldout", "seed", "text_key", "on_error", "encoding")


def main() -> None:
    """Prepare text as it is, or with --config by a recipe, and print what came of it."""
    if _CONFIG.value is None:
        _refuse(_RECIPE_FLAGS, "is for a recipe; give one with --config=configs/data/english.py")
        info = _prepare()
    else:
        _refuse(_PAIR_FLAGS, "makes pairs, which no recipe cleans; leave --config out")
        _refuse(_CHAT_FLAGS, "is for conversations, which no recipe cleans; leave --config out")
        info = _make()
    print(describe(info))
    if _CONFIG.value is not None:
        print(f"report: {_OUTPUT.value}/report.html")
    if "tokenizer" in info:  # a recipe without the stage "tokens" leaves nothing to train on
        config = (
            "--config=configs/small.py"
            if _ANSWER.value is None and _MESSAGES.value is None
            else "--config=configs/finetune_sentiment.py, or another that fits"
        )
        path = shlex.quote(_OUTPUT.value)
        print(f"next: python launch/pretrain.py {config} --set=data.path={path} --workdir=RUN")


def _refuse(names: tuple[str, ...], why: str) -> None:
    for name in names:
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name} {why}")


def _prepare() -> dict:
    return prepare(
        _INPUT.value,
        _OUTPUT.value,
        prompt=_PROMPT.value,
        answer=_ANSWER.value,
        messages=_MESSAGES.value,
        chat_template=_CHAT_TEMPLATE.value,
        sequence_length=_SEQUENCE_LENGTH.value,
        show=_SHOW.value,
        overwrite=_OVERWRITE.value,
        **{name: flags.FLAGS[name].value for name in _SETTINGS},
    )


def _make() -> dict:
    # Imported here: a recipe needs pyarrow, matplotlib and more, which plain text does not.
    from mtnlg_jax.data.recipe.run import make
    from mtnlg_jax.data.recipe.stages import in_processes, on_ray

    if _ENGINE.value == "ray" and _PROCESSES.value:
        raise ValueError("--processes is for this machine; a Ray cluster uses all of its own")
    recipe = _recipe()
    if _ENGINE.value == "ray":
        engine = on_ray()
    else:
        engine = in_processes(_PROCESSES.value or os.cpu_count() or 1)
    return make(recipe, _INPUT.value, _OUTPUT.value, engine=engine, overwrite=_OVERWRITE.value)


def _recipe():
    """Return the recipe of --config with the flags applied."""
    from mtnlg_jax.data.recipe.settings import load_recipe

    recipe = load_recipe(_CONFIG.value, tuple(_SET.value))
    known = [source.name for source in recipe.sources]
    for name in _SKIP_SOURCES.value:
        if name not in known:
            raise ValueError(
                f"--skip_sources={name} is not a source of the recipe: "
                f"{', '.join(known) or 'it names none'}"
            )
    sources = [source for source in recipe.sources if source.name not in _SKIP_SOURCES.value]
    if flags.FLAGS["text_key"].present:
        sources = [
            dataclasses.replace(source, text_key=_TEXT_KEY.value)
            if source.text_key == "text"
            else source
            for source in sources
        ]
    changes = {name: flags.FLAGS[name].value for name in _SETTINGS if flags.FLAGS[name].present}
    changes["sources"] = tuple(sources)
    if _STAGES.value is not None:
        changes["stages"] = tuple(_STAGES.value)
    if _TEST_SETS.value:
        changes["decontamination"] = dataclasses.replace(
            recipe.decontamination, test_sets=tuple(_TEST_SETS.value)
        )
    return dataclasses.replace(recipe, **changes)


def run() -> None:
    """Parse the command line, run it and exit."""
    flags.mark_flag_as_required("output")
    command.run(main)
