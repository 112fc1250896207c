"""Time attention on this machine and record the fastest settings.

--help shows examples and every flag. The code is in mtnlg_jax/cli/tune_attention.py.
"""

from mtnlg_jax.cli.tune_attention import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
