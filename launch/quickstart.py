"""From text to a trained model that writes, in one command.

    bash launch/quickstart.sh                               the prose of Python's documentation
    bash launch/quickstart.sh --corpus=PATH --workdir=DIR   your own text
    bash launch/quickstart.sh --set=train.steps=300         more steps

It makes a tokenizer, trains, compares the model with two baselines, and shows three ways to write.
Without --corpus nothing is downloaded. Start it again to continue where it stopped; what is done is
not repeated.
"""

import functools
import os
import shlex
import time
from typing import TYPE_CHECKING

from absl import flags

from mtnlg_jax import command

if TYPE_CHECKING:
    from mtnlg_jax.train.reporter import Summary

_CORPUS = command.define_path(
    "corpus", None, "your own text: a file or folder (txt, jsonl, parquet, .gz, .zst)"
)
_WORKDIR = command.define_path("workdir", "runs/quickstart", "folder of the run and its data")
_CONFIG = command.define_path(
    "config", os.path.join(os.path.dirname(__file__), "../configs/quickstart.py"), "the run"
)
_SET = flags.DEFINE_multi_string("set", [], "a value of the config, such as train.steps=300")
_VOCAB = flags.DEFINE_integer("vocab_size", 4096, "pieces of the tokenizer")


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.config import load_config
    from mtnlg_jax.data.store.sources import open_tokens
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.evaluate.baselines import compare
    from mtnlg_jax.evaluate.samples import samples
    from mtnlg_jax.train.checkpoint import load_run
    from mtnlg_jax.train.curve import text_curve
    from mtnlg_jax.train.inputs import load_data
    from mtnlg_jax.train.loop import train

    began = time.monotonic()
    compat.quiet()
    compat.configure_cache()
    workdir = _WORKDIR.value
    data_folder = os.path.join(workdir, "data")
    config = load_config(_CONFIG.value, [f"data.path={data_folder}", *_SET.value])
    _heading("1. Text and tokenizer")
    _prepare(data_folder)

    _heading("2. Training: " + ", then ".join(stage.name for stage in config.train.stages))
    summary = train(config, workdir, announce=functools.partial(print, flush=True))
    run = load_run(workdir)
    data = load_data(run.config)

    _heading("3. What it learned")
    print(text_curve(os.path.join(workdir, "metrics.jsonl")))
    trained_on = open_tokens(os.path.join(data_folder, "train"))
    print(compare(data, trained_on, summary.final.get("bits_per_byte")))

    _heading("4. Writing")
    for sample in samples(unstack(run.config.model, run.params), run.tokenizer, data):
        print(sample, flush=True)
    print(_next_steps(summary, time.monotonic() - began))


def _prepare(data_folder: str) -> None:
    """Make the data of the run, unless an earlier start did."""
    from mtnlg_jax.data.prepare import describe, prepare

    if os.path.exists(data_folder):
        print(
            f"{data_folder} is there already: continuing with it (remove it to start from other "
            "text)"
        )
        return
    corpus = os.path.abspath(_CORPUS.value) if _CORPUS.value else None
    os.makedirs(_WORKDIR.value, exist_ok=True)
    print(describe(prepare(corpus, data_folder, vocab_size=_VOCAB.value, heldout=0.02)))


def _next_steps(summary: "Summary", seconds: float) -> str:
    """Return the figures of the run, its files, and commands to go on with."""
    run = shlex.quote(summary.workdir)
    mine = shlex.quote(summary.workdir + "-mine")
    longer = shlex.quote(summary.workdir + "-long")
    return f"""
{summary.parameters:,} parameters, {summary.tokens:,} tokens in {summary.seconds:.0f} s of \
training ({summary.speed}); {seconds:.0f} s in all
  {run}/loss.png       the curve
  {run}/metrics.jsonl  every step;  pip install tensorboard, tensorboard --logdir={run}/tensorboard
  {run}/checkpoints    {summary.kept}
next: .venv/bin/python launch/generate.py --workdir={run} --prompt="The function returns" \
--temperature=0.8
      .venv/bin/python launch/generate.py --workdir={run} --mode=ranking --n=8 \
--prompt="The function returns"
      bash launch/quickstart.sh --corpus=YOUR_FOLDER --workdir={mine}
      more steps:  bash launch/quickstart.sh --workdir={longer} \
--set=train.steps={4 * summary.steps}"""


def _heading(text: str) -> None:
    print(f"\n== {text} " + "=" * max(0, 76 - len(text)), flush=True)


if __name__ == "__main__":
    command.run(main, log=True)
