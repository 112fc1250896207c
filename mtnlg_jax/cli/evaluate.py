"""Score a text with a trained model: loss, perplexity, bits per byte.

    python launch/evaluate.py --workdir=RUN --input=FILE
    python launch/evaluate.py --workdir=RUN --input=FOLDER --text_key='body|text' --on_error=skip
    python launch/evaluate.py --workdir=RUN --input=- --json < FILE

The input is anything that launch/prepare_data.py reads (text, JSON lines, Parquet, or a folder), or
- for standard input. Every token counts once and is scored with context (--stride). Perplexity is
per token; bits per byte and word perplexity (words between white space) compare models with
different tokenizers.

Let the model learn from each window after scoring it, like a compressor; this takes three times as
long, and compares more fairly with one:

    python launch/evaluate.py --workdir=RUN --input=FILE --adapt=4e-4

Score the text a second time with the model as launch/generate.py would hold it, to show the loss in
quality:

    python launch/evaluate.py --workdir=RUN --input=FILE --weights=int8 --cache=int8

Split the model over devices, also of several processes (launch/cluster/launch.py
--script=evaluate):

    python launch/evaluate.py --workdir=RUN --input=FILE --set=mesh.tensor=4 --set=mesh.data=2

Exit codes: 0 done, 2 bad input, 6 another process ended (134: detected by JAX).
"""

import json

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.decoding import devices

with command.flag_group("The run and the text"):
    _WORKDIR = command.define_path(
        "workdir",
        None,
        "folder of a run or of a Hugging Face model, or a GGUF file",
        required=True,
    )
    _CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "which checkpoint")
    _INPUT = command.define_path(
        "input", None, "file or folder to score, - for standard input", required=True
    )
    _TEXT_KEY = flags.DEFINE_string(
        "text_key",
        "text",
        "key or column of the text in JSON and Parquet; a|b: the first that exists",
    )
    _ON_ERROR = flags.DEFINE_enum(
        "on_error", "raise", ["raise", "skip"], "damaged documents: stop, or drop and count them"
    )
    _ENCODING = flags.DEFINE_string(
        "encoding", "", "encoding of text that is not UTF-8 and does not declare one: cp1252"
    )
    _ADAPTER = command.define_path(
        "adapter", None, "folder of a PEFT adapter to merge into the model at --workdir"
    )
with command.flag_group("Scoring"):
    _STRIDE = flags.DEFINE_integer(
        "stride", None, "tokens scored in each window; default: half the context"
    )
    _ADAPT = flags.DEFINE_float(
        "adapt",
        0.0,
        "learning rate of dynamic evaluation, which restarts from the trained weights for each "
        "document; 0: the weights stay fixed",
    )
    _JSON = flags.DEFINE_bool("json", False, "print one JSON object")
with command.flag_group("A second score, as launch/generate.py would hold the model"):
    _DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "type of the products")
    _WEIGHTS = flags.DEFINE_enum("weights", None, ["int8"], "type of the weights")
    _CACHE = flags.DEFINE_enum("cache", None, ["int8"], "type of the keys and values")


with command.flag_group("Devices"):
    _SET = flags.DEFINE_multi_string(
        "set", [], "mesh.KEY=VALUE: devices to split the model over (data, tensor)"
    )

flags.adopt_module_key_flags(devices)


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.interop import registry

    compat.quiet()
    registry.register()
    rounded = {
        flag.name: flag.value
        for flag in (_DTYPE, _WEIGHTS, _CACHE)
        if flag.value not in (None, "float32")
    }
    if rounded and _ADAPT.value:
        name, value = next(iter(rounded.items()))
        raise ValueError(
            f"--adapt={_ADAPT.value} trains weights, and --{name}={value} rounds them; leave one "
            "of the two out"
        )
    for entry in _SET.value:
        if not devices.of_mesh(entry):
            raise ValueError(f"--set={entry} is not of the mesh; write --set=mesh.KEY=VALUE")
    registry.adapt(_WORKDIR.value, _ADAPTER.value, _CHECKPOINT.value)
    with devices.started(_SET.value):
        _evaluate(rounded)


def _evaluate(rounded: dict[str, str]) -> None:
    """Score the text and print the report."""
    from mtnlg_jax import compat
    from mtnlg_jax.evaluate.texts import read_texts

    texts, left_out = devices.on_first(
        lambda: read_texts(_INPUT.value, _TEXT_KEY.value, _ON_ERROR.value, _ENCODING.value)
    )
    compat.configure_cache()

    # Imported here: bad input is reported before JAX is imported, which takes longer.
    from mtnlg_jax.evaluate.run_score import as_json, describe, score_run

    score = score_run(
        _WORKDIR.value,
        _CHECKPOINT.value,
        texts,
        _STRIDE.value,
        _ADAPT.value,
        rounded,
        devices.mesh(),
    )
    if _JSON.value:
        print(json.dumps(as_json(score, left_out), allow_nan=False))
        return
    if left_out:
        counts = ", ".join(f"{count:,} {what}" for what, count in left_out.items())
        devices.note(f"{_INPUT.value}: {counts}")
    print(describe(_INPUT.value, score))


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
