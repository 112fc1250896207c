"""Flags of launch/prepare_data.py."""

from dataclasses import replace
from typing import Any

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.data.canaries import CanaryConfig
from mtnlg_jax.data.prefix.rows import PrefixInput

with command.flag_group("Input and output"):
    INPUT = command.define_path(
        "input",
        None,
        "file or folder: .txt .md .rst .jsonl .json .csv .tsv .parquet .html .warc .wet (also .gz "
        ".zst .bz2 .xz); default: the embedded text",
    )
    OUTPUT = command.define_path("output", None, "folder to make (or gs://, s3://)", required=True)
    OVERWRITE = flags.DEFINE_bool(
        "overwrite",
        False,
        "replace a prepared data set once the new one is complete; of a recipe: remake what "
        "depends on a changed input or setting",
    )
    TEXT_KEY = flags.DEFINE_string(
        "text_key",
        "text",
        "key or column of the text in JSON, tables and Parquet; a|b: the first that exists; "
        "data.text goes into objects and lists",
    )
    ON_ERROR = flags.DEFINE_enum(
        "on_error", "raise", ["raise", "skip"], "damaged input: stop, or drop and count it"
    )
    ENCODING = flags.DEFINE_string(
        "encoding",
        "",
        "encoding of text that is not UTF-8 and does not declare one: cp1252, gb18030, big5, "
        "shift_jis, euc_kr, utf-16-le and the like",
    )

with command.flag_group("Tokens"):
    TOKENIZER = command.define_path(
        "tokenizer",
        "bpe",
        "bpe or unigram, to train one; or the path of one: a Hugging Face folder, GPT-2's files, "
        "the tokenizer of a run, a tokenizer.json, or a SentencePiece .model",
    )
    VOCAB_SIZE = flags.DEFINE_integer(
        "vocab_size", 8000, "pieces of the tokenizer to train", lower_bound=1
    )
    HELDOUT = flags.DEFINE_float(
        "heldout", 0.02, "share of the text held out from training, 0 to 0.5"
    )
    SEED = flags.DEFINE_integer("seed", 0, "draws the held-out part and the order of documents")

with command.flag_group("Canaries for an audit"):
    CANARIES = flags.DEFINE_integer(
        "canaries",
        0,
        "random secrets to plant in the training text for each number of copies; "
        "launch/audit.py measures later how well a model knows them",
    )
    CANARY_COPIES = flags.DEFINE_list(
        "canary_copies",
        ["0", "1", "4", "16", "64"],
        "how many times each is planted; 0: recorded alone, as a control",
    )
    CANARY_FORMAT = flags.DEFINE_string(
        "canary_format",
        "",
        "text of a canary, with {name} for a random name and # for each random digit; default: "
        "'The access code of {name} is #### ####.', or Chinese in a Chinese corpus",
    )

with command.flag_group("Prompts with answers"):
    PROMPT = flags.DEFINE_string("prompt", "{prompt}", "with --answer: the text before it")
    ANSWER = flags.DEFINE_string(
        "answer",
        None,
        "makes pairs: a template of the answer, with {KEY} for the value of a JSON row, mostly "
        "with a space in front: ' {answer}'",
    )

with command.flag_group("Images and features ahead of pairs"):
    IMAGE = flags.DEFINE_string(
        "image",
        None,
        "key of a row that holds an image: a path relative to the input, the bytes of a file, or "
        "an object with one of the two; --prompt may stay empty",
    )
    IMAGE_SIZE = flags.DEFINE_integer(
        "image_size",
        32,
        "height and width in pixels to which images are resized: model.prefix.image_size",
        lower_bound=1,
    )
    IMAGE_CHANNELS = flags.DEFINE_enum(
        "image_channels", "3", ["1", "3"], "channels of an image: 3 for RGB, 1 for gray"
    )
    PREFIX = flags.DEFINE_string(
        "prefix",
        None,
        "key of a row that holds features of another encoder: a .npy file of shape (positions, "
        "width), given as for --image",
    )

with command.flag_group("Conversations"):
    MESSAGES = flags.DEFINE_string(
        "messages",
        None,
        "makes conversations: the key of a JSON row that holds a list of {role, content}, mostly "
        "messages; the tokenizer's chat template renders them",
    )
    CHAT_TEMPLATE = command.define_path(
        "chat_template", None, "file of a chat template, instead of the tokenizer's"
    )
    SEQUENCE_LENGTH = flags.DEFINE_integer(
        "sequence_length",
        None,
        "data.sequence_length of the training, to refuse longer conversations",
        lower_bound=1,
    )
    SHOW = flags.DEFINE_integer(
        "show",
        0,
        "number of conversations to print with what is trained on marked",
        lower_bound=0,
    )

with command.flag_group("A recipe"):
    CONFIG = command.define_path(
        "config", None, "the recipe, a file of configs/data; default: text is taken as it is"
    )
    SET = flags.DEFINE_multi_string(
        "set", [], "a setting of the recipe, such as clean.min_tokens=64"
    )
    STAGES = flags.DEFINE_list(
        "stages",
        None,
        "of clean, duplicates, paragraphs, decontaminate, quality, tokens; default: all",
    )
    TEST_SETS = command.define_paths(
        "test_sets",
        "evaluation data to remove from the text, a file or folder",
    )
    SKIP_SOURCES = flags.DEFINE_list("skip_sources", [], "sources to leave out")
    PROCESSES = flags.DEFINE_integer(
        "processes", None, "number of processes; default: one for each core", lower_bound=1
    )
    ENGINE = flags.DEFINE_enum(
        "engine", "local", ["local", "ray"], "this machine, or a Ray cluster"
    )

# Flags of one of the two ways to prepare: a recipe, or text as it is.
_RECIPE_FLAGS = (SET, STAGES, TEST_SETS, SKIP_SOURCES, PROCESSES, ENGINE)
_PAIR_FLAGS = (PROMPT, ANSWER, IMAGE, IMAGE_SIZE, IMAGE_CHANNELS, PREFIX)
_CHAT_FLAGS = (MESSAGES, CHAT_TEMPLATE, SEQUENCE_LENGTH, SHOW)
# Flags of both; those that are given replace a setting of the recipe.
_SETTINGS = (VOCAB_SIZE, TOKENIZER, HELDOUT, SEED, TEXT_KEY, ON_ERROR, ENCODING)


def settings(given: bool = False, canaries: CanaryConfig | None = None) -> dict[str, Any]:
    """Return the settings that both ways have; if ``given``, those of the command line alone.
    ``canaries``: those of a recipe, which the flags change."""
    plain = {
        flag.name: flag.value for flag in _SETTINGS if not given or flags.FLAGS[flag.name].present
    }
    return plain | {"canaries": _canaries(canaries or CanaryConfig())}


def _canaries(given: CanaryConfig) -> CanaryConfig:
    """Return ``given`` with what the flags change. Raise ValueError if they do not fit together."""
    if CANARIES.present:
        given = replace(given, count=CANARIES.value)
    for flag in (CANARY_COPIES, CANARY_FORMAT):
        if flag.present and not given.count:
            raise ValueError(f"--{flag.name} is for canaries; give their number with --canaries=10")
    if CANARY_COPIES.present:
        try:
            copies = tuple(map(int, CANARY_COPIES.value))
        except ValueError:
            raise ValueError(
                f"--canary_copies={','.join(CANARY_COPIES.value)} is not a list of whole numbers, "
                "such as 0,1,4,16,64"
            ) from None
        given = replace(given, copies=copies)
    return replace(given, format=CANARY_FORMAT.value) if CANARY_FORMAT.present else given


def prefix() -> PrefixInput | None:
    """Return where rows have what a model reads ahead of their text; None for text alone."""
    if PREFIX.value is not None:
        return PrefixInput(PREFIX.value)
    if IMAGE.value is not None:
        return PrefixInput(IMAGE.value, IMAGE_SIZE.value, int(IMAGE_CHANNELS.value))
    return None


def prompt() -> str:
    """Return the template of prompts. An image needs no text before the answer."""
    given = flags.FLAGS[PROMPT.name].present or prefix() is None
    return PROMPT.value if given else ""


def check() -> None:
    """Raise ValueError if a flag is given that the way to prepare does not use."""
    if CONFIG.value is None:
        _refuse(_RECIPE_FLAGS, "is for a recipe; give one with --config=configs/data/english.py")
        if IMAGE.value is None:
            _refuse((IMAGE_SIZE, IMAGE_CHANNELS), "is for images; name their key with --image")
        elif PREFIX.value is not None:
            raise ValueError(
                f"--image={IMAGE.value} and --prefix={PREFIX.value}: a row has one of the two "
                "ahead of its text; leave one out"
            )
        return
    _refuse(_PAIR_FLAGS, "makes pairs, which no recipe cleans; leave --config out")
    _refuse(_CHAT_FLAGS, "is for conversations, which no recipe cleans; leave --config out")


def _refuse(given: tuple[flags.FlagHolder, ...], why: str) -> None:
    for flag in given:
        if flags.FLAGS[flag.name].present:
            raise ValueError(f"--{flag.name} {why}")
