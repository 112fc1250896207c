"""Train one run.

--help shows examples and every flag. The code is in mtnlg_jax/cli/pretrain.py.
"""

from mtnlg_jax.cli.pretrain import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
