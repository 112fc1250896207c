"""What a run needs from above its package: tasks to score and prompts to continue."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtnlg_jax.config import Config
    from mtnlg_jax.decode.in_training import RunSamples
    from mtnlg_jax.evaluate.in_training import RunTasks


def tasks_of(config: "Config") -> "RunTasks | None":
    """Return what scores train.eval_tasks; its rows are read here, before any work."""
    if not config.train.eval_tasks:
        return None
    # The harness takes seconds to import.
    from mtnlg_jax.evaluate.in_training import RunTasks

    return RunTasks(config)


def samples_of(config: "Config") -> "RunSamples | None":
    """Return what continues train.sample_prompts."""
    if not config.train.sample_prompts:
        return None
    from mtnlg_jax.decode.in_training import RunSamples

    return RunSamples(config)
