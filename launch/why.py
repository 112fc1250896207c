"""Replay the batch of a training step, and find the documents that made it unusual.

--help shows examples and every flag. The code is in mtnlg_jax/cli/why.py.
"""

from mtnlg_jax.cli.why import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
