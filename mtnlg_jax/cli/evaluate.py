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

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli import evaluating
from mtnlg_jax.cli.decoding import devices

flags.adopt_module_key_flags(devices)
flags.adopt_module_key_flags(evaluating)


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.interop import registry

    compat.quiet()
    registry.register()
    rounded = {
        flag.name: flag.value
        for flag in (evaluating.DTYPE, evaluating.WEIGHTS, evaluating.CACHE)
        if flag.value not in (None, "float32")
    }
    if rounded and evaluating.ADAPT.value:
        name, value = next(iter(rounded.items()))
        raise ValueError(
            f"--adapt={evaluating.ADAPT.value} trains weights, and --{name}={value} rounds them; "
            "leave one of the two out"
        )
    for entry in evaluating.SET.value:
        if not devices.of_mesh(entry):
            raise ValueError(f"--set={entry} is not of the mesh; write --set=mesh.KEY=VALUE")
    registry.adapt(evaluating.WORKDIR.value, evaluating.ADAPTER.value, evaluating.CHECKPOINT.value)
    with devices.started(evaluating.SET.value):
        evaluating.evaluate(rounded)


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
