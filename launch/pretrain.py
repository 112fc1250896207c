"""Trains one run: python launch/pretrain.py --config=configs/small.py --set=data.path=OUT --workdir=RUN

Start it again with the same flags to go on where it stopped. Exit codes: 0 done, 2 bad input, 3 diverged,
75 stopped by a signal with its state saved.
"""

from absl import flags

from mtnlg_jax import command

_CONFIG = flags.DEFINE_string("config", None, "a file of configs/", required=True)
_SET = flags.DEFINE_multi_string("set", [], "a value of the config, as train.steps=10; repeat for more")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
_PROGRESS = flags.DEFINE_bool("progress", True, "show a progress bar")


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.config import load_config
    from mtnlg_jax.train.loop import train

    compat.quiet()
    compat.configure_cache()
    print(describe(train(load_config(_CONFIG.value, _SET.value), _WORKDIR.value, _PROGRESS.value)))


def describe(summary) -> str:
    """The end of a run, for a person."""
    final = summary.final
    held_out = ", ".join(f"{name.replace('_', ' ')} {final[name]:.3f}" for name in
                         ("causal_loss", "perplexity", "bits_per_byte", "masked_loss") if name in final)
    run = summary.workdir
    return f"""
{summary.parameters:,} parameters, {summary.steps:,} steps, {summary.tokens:,} tokens, \
{summary.tokens_per_second:,.0f} tokens/s, MFU {summary.mfu:.0%}, {summary.skipped} steps skipped
held out at step {final["step"]}: {held_out}
  {run}/checkpoints    the last ones and the best (step {summary.best_step})
  {run}/metrics.jsonl  every step
  {run}/loss.png       the curve;  tensorboard --logdir={run}/tensorboard
next: python launch/generate.py --workdir={run} --prompt="Once upon a time"
      python launch/evaluate.py --workdir={run} --input=FILE"""


if __name__ == "__main__":
    command.run(main)
