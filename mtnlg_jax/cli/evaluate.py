"""Score a text with a trained model (loss, perplexity, bits per byte), or tasks.

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

Measure repetition, diversity, coherence, loss by position and recall of long texts, in place of the
score (docs/measuring_text.md), beside real texts and with plots:

    python launch/evaluate.py --workdir=RUN --input=FILE --longtext --references=REAL \\
        --plots=FOLDER --needle

Score tasks of lm-evaluation-harness on local files, in place of a text (docs/evaluation.md):

    python launch/evaluate.py --workdir=RUN --tasks=lambada_openai,hellaswag --task_data=FOLDER
    python launch/evaluate.py --workdir=RUN --tasks=hans --task_data=FOLDER --num_fewshot=0,1,4 \\
        --plots=FOLDER --compare=RESULTS.json

Split the model over devices, also of several processes (launch/cluster/launch.py
--script=evaluate):

    python launch/evaluate.py --workdir=RUN --input=FILE --set=mesh.tensor=4 --set=mesh.data=2

Exit codes: 0 done, 2 bad input, 6 another process ended (134: detected by JAX).
"""

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.decoding import devices, fitting
from mtnlg_jax.cli.evaluation import longtext, score, tasks

flags.adopt_module_key_flags(devices)
flags.adopt_module_key_flags(fitting)
flags.adopt_module_key_flags(score)
flags.adopt_module_key_flags(longtext)
flags.adopt_module_key_flags(tasks)


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.interop import registry

    compat.quiet()
    registry.register()
    rounded = {
        flag.name: flag.value
        for flag in (score.DTYPE, score.WEIGHTS, score.CACHE)
        if flag.value not in (None, "float32")
    }
    if rounded and score.ADAPT.value:
        name, value = next(iter(rounded.items()))
        raise ValueError(
            f"--adapt={score.ADAPT.value} trains weights, and --{name}={value} rounds them; "
            "leave one of the two out"
        )
    longtext.check(shared=tasks.TASKS.value is not None)
    tasks.check()
    devices.check_of_mesh(score.SET.value)
    registry.adapt(score.WORKDIR.value, score.ADAPTER.value, score.CHECKPOINT.value)
    with devices.started(score.SET.value, tasks.check_files):
        if tasks.TASKS.value is not None:
            tasks.measure(rounded)
        elif longtext.LONGTEXT.value:
            longtext.measure(rounded)
        else:
            score.evaluate(rounded)


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
