"""Adapt a model to a person: train a low-rank adapter on somebody's texts, a file that is its own.

    python launch/adapt.py --texts=FOLDER --workdir=RUN --adapter=NAME
    python launch/generate.py --workdir=RUN --adapter=NAME --prompt="Once upon a time"

The texts are anything that launch/prepare_data.py reads. A part of them is held out: it says when
to stop, and how many bits per byte the adapter gains. What it costs on the texts of others is
measured on --others=FILE, by default the held-out text of the run's own data.

The adapter is RUN/adapters/NAME.safetensors, and deleting that file deletes it. For a model in
another format, say where the file goes:

    python launch/adapt.py --texts=FOLDER --workdir=MODEL.gguf --output=ME.safetensors
    python launch/generate.py --workdir=MODEL.gguf --adapter=ME.safetensors --prompt=TEXT

After an interruption the same command goes on where it was.

Exit codes: 0 done, 2 bad input, 3 diverged, 75 stopped by a signal with its state saved.
"""

import json

from absl import flags

from mtnlg_jax import command

with command.flag_group("The texts and the model"):
    _TEXTS = command.define_path("texts", None, "file or folder of the person's texts", True)
    _WORKDIR = command.define_path(
        "workdir", None, "folder of a run or of a Hugging Face model, or a GGUF file", True
    )
    _TEXT_KEY = flags.DEFINE_string(
        "text_key", "text", "key or column of the text in JSON and Parquet; a|b: the first found"
    )
    _ON_ERROR = flags.DEFINE_enum(
        "on_error", "raise", ["raise", "skip"], "damaged documents: stop, or drop and count them"
    )
    _ENCODING = flags.DEFINE_string(
        "encoding", "", "encoding of text that is not UTF-8 and does not declare one: cp1252"
    )
with command.flag_group("The adapter"):
    _ADAPTER = flags.DEFINE_string("adapter", None, "name of the new adapter of a run")
    _OUTPUT = command.define_path(
        "output", None, "file to write instead: FILE.safetensors, anywhere"
    )
    _OVERWRITE = flags.DEFINE_bool(
        "overwrite", False, "replace an adapter of that name, once the new one is whole"
    )
with command.flag_group("Training"):
    _RANK = flags.DEFINE_integer("rank", 8, "rank of the factors", lower_bound=1)
    _STEPS = flags.DEFINE_integer(
        "steps", None, "steps at most; default: by the size of the texts", lower_bound=1
    )
    _LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "peak of the learning rate")
    _TARGETS = flags.DEFINE_list(
        "targets", [], "matrices to adapt: q, k, v, o, in, gate, out; default: all of them"
    )
    _HELDOUT = flags.DEFINE_float("heldout", 0.1, "share of the texts to hold out")
    _SEED = flags.DEFINE_integer("seed", 0, "seed of the factors and of the order of the texts")
    _SET = flags.DEFINE_multi_string(
        "set", [], "a value of the run's config, such as train.global_batch_size=4"
    )
    _PROGRESS = flags.DEFINE_bool("progress", True, "show a progress bar")
with command.flag_group("Measuring"):
    _OTHERS = command.define_path(
        "others", None, "texts of others; default: the held-out text of the run's own data"
    )
    _JSON = flags.DEFINE_bool("json", False, "print one JSON object")


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.interop import registry

    registry.register()
    compat.quiet()
    compat.configure_cache()
    if (_ADAPTER.value is None) == (_OUTPUT.value is None):
        raise ValueError("give one of the two: --adapter=NAME or --output=FILE.safetensors")
    from mtnlg_jax.evaluate.adapting import adapt, describe, output_of
    from mtnlg_jax.evaluate.texts import read_texts
    from mtnlg_jax.train.adapt import AdaptSettings, Texts

    name = _ADAPTER.value or _OUTPUT.value
    output = output_of(_WORKDIR.value, name, _OUTPUT.value, _OVERWRITE.value)
    reading = (_TEXT_KEY.value, _ON_ERROR.value, _ENCODING.value)
    others = None if _OTHERS.value is None else read_texts(_OTHERS.value, *reading)[0]
    settings = AdaptSettings(
        rank=_RANK.value,
        learning_rate=_LEARNING_RATE.value,
        steps=_STEPS.value,
        targets=tuple(_TARGETS.value),
        heldout=_HELDOUT.value,
        seed=_SEED.value,
        overrides=tuple(_SET.value),
    )
    texts = Texts(_TEXTS.value, *reading)
    adapted = adapt(
        _WORKDIR.value,
        texts,
        output,
        settings,
        others,
        progress=_PROGRESS.value and not _JSON.value,
    )
    if _JSON.value:
        content = {
            "adapter": adapted.path,
            "person": adapted.person._asdict(),
            "others": adapted.others and adapted.others._asdict(),
            "trained": dict(adapted.adapter.trained),
        }
        print(json.dumps(content, allow_nan=False))
        return
    print(describe(adapted, name))


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main, log=True)
