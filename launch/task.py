"""Do a task with a trained model, and score its answers.

--help shows examples and every flag. The code is in mtnlg_jax/cli/task.py.
"""

from mtnlg_jax.cli.task import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
