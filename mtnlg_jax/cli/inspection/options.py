"""The flags of launch/inspect.py, and which of them each mode takes."""

import math
import os

from absl import flags

from mtnlg_jax import command, foreign, storage

MODES = ("lens", "attention", "loss", "patch", "influence")

with command.flag_group("The model"):
    WORKDIR = command.define_path(
        "workdir",
        None,
        "folder of a run or of a Hugging Face model, or a GGUF file",
        required=True,
    )
    CHECKPOINT = command.define_checkpoint()
    MODE = flags.DEFINE_enum("mode", "lens", MODES, "what to look at")
    OUTPUT = command.define_path("output", None, "folder of the results; default: RUN/inspect")
with command.flag_group("A text (lens, attention, loss)"):
    TEXT = flags.DEFINE_string("text", None, "the text")
    INPUT = command.define_path(
        "input", None, "loss: file or folder of texts, - for standard input"
    )
    TEXT_KEY = flags.DEFINE_string("text_key", "text", "key of the text in JSON and Parquet")
    DOCUMENTS = flags.DEFINE_integer(
        "documents", 10, "loss: documents of --input, the first ones", lower_bound=1
    )
    STRIDE = flags.DEFINE_integer(
        "stride", None, "loss: tokens scored in each window; default: half the context"
    )
    GUESSES = flags.DEFINE_integer("guesses", 5, "most probable tokens to show", lower_bound=1)
    LAYER = flags.DEFINE_integer("layer", None, "attention: layer to show token by token")
with command.flag_group("Two prompts (patch)"):
    CLEAN = flags.DEFINE_string("clean", None, "prompt behind which the first answer is likely")
    CORRUPT = flags.DEFINE_string(
        "corrupt", None, "prompt with the same number of tokens, behind which it is not"
    )
    ANSWERS = flags.DEFINE_multi_string("answers", [], "an answer; give two, the clean one first")
with command.flag_group("Training passages (influence)"):
    PROMPT = flags.DEFINE_string("prompt", "", "text before the continuation")
    CONTINUATION = flags.DEFINE_string("continuation", None, "text whose probability is asked for")
    PASSAGES = command.define_path(
        "passages", None, "file or folder of texts to rank; default: the training data of the run"
    )
    MOST = flags.DEFINE_integer("most", 512, "passages to rank, drawn by --seed", lower_bound=1)
    LENGTH = flags.DEFINE_integer(
        "length", None, "tokens of a passage, up to the context; default: 256 or the context"
    )
    RANK = flags.DEFINE_integer("rank", 8, "of the projections of gradients", lower_bound=1)
    DAMPING = flags.DEFINE_float(
        "damping", 0.1, "of the second moment, in its mean eigenvalues; 0: plain products"
    )
    SEED = flags.DEFINE_integer("seed", 0, "seed of projections and passages", lower_bound=0)
    SET = flags.DEFINE_multi_string("set", [], "where the data of the run are: data.path=OUT")

_OF_MODE: dict[str, tuple[tuple[flags.FlagHolder, ...], tuple[flags.FlagHolder, ...]]] = {
    "lens": ((TEXT,), (GUESSES,)),
    "attention": ((TEXT,), (LAYER,)),
    "loss": ((), (TEXT, INPUT, TEXT_KEY, DOCUMENTS, STRIDE, GUESSES)),
    "patch": ((CLEAN, CORRUPT, ANSWERS), ()),
    "influence": (
        (CONTINUATION,),
        (PROMPT, PASSAGES, TEXT_KEY, MOST, LENGTH, RANK, DAMPING, SEED, SET),
    ),
}


def given(holder: flags.FlagHolder) -> str:
    """Return the value of a text flag that `check` requires."""
    assert holder.value is not None, "checked"
    return holder.value


def check() -> None:
    """Raise ValueError where a flag is missing for the mode, or has no effect in it."""
    mode = MODE.value
    required, optional = _OF_MODE[mode]
    for holder in required:
        if not holder.value:
            raise ValueError(f"--mode={mode} needs --{holder.name}")
    taken = {holder.name for holder in (*required, *optional)}  # holders do not compare
    for others in _OF_MODE.values():
        for holder in (*others[0], *others[1]):
            if holder.present and holder.name not in taken:
                raise ValueError(
                    f"--{holder.name}={holder.value} has no effect in --mode={mode}; leave it out"
                )
    if mode == "loss" and (TEXT.value is None) == (INPUT.value is None):
        raise ValueError("--mode=loss needs one of --text and --input")
    if not 0 <= DAMPING.value < math.inf:
        raise ValueError(f"--damping={DAMPING.value} must be a number from 0 on")


def folder() -> str:
    """Return the folder of the results. Raises ValueError where it must be given."""
    if OUTPUT.value is not None:
        if not storage.is_remote(OUTPUT.value) and os.path.isfile(OUTPUT.value):
            raise ValueError(f"--output={OUTPUT.value} is a file; give a folder")
        return OUTPUT.value
    workdir = WORKDIR.value
    if foreign.reader_of(workdir) is not None:
        raise ValueError(
            f"--workdir={workdir} is not a run of launch/pretrain.py, into which results could "
            "go; give --output=FOLDER"
        )
    return storage.join(workdir, "inspect")
