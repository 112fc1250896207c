"""What a run prints at its end."""

import os
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtnlg_jax.train.reporter import Summary


def described(summary: "Summary") -> str:
    """Return the text that is printed at the end of a run."""
    run = shlex.quote(summary.workdir)
    number = "1 spike" if summary.spikes == 1 else f"{summary.spikes:,} spikes"
    spikes = f", {number} left out" if summary.spikes else ""
    shown = f"""; also in TensorBoard: pip install tensorboard, then
                       tensorboard --logdir={run}/tensorboard"""
    # Of another tracker there is no folder.
    board = shown if os.path.isdir(os.path.join(summary.workdir, "tensorboard")) else ""
    results = "\n".join(filter(None, [summary.held_out, summary.scored, summary.time]))
    return f"""
{summary.parameters:,} parameters, {summary.steps:,} steps, {summary.tokens:,} tokens, \
{summary.speed}, {summary.skipped} steps skipped{spikes}
{results}
  {run}/checkpoints    {summary.kept}
  {run}/metrics.jsonl  every step
  {run}/report.html    curves, time, samples and starts
  {run}/loss.png       the losses{board}
next: python launch/generate.py --workdir={run} --prompt="Once upon a time"
      python launch/evaluate.py --workdir={run} --input=FILE"""
