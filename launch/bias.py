"""Measure whom a model speaks of differently: words by group, scores, paired sentences.

--help shows examples and every flag. The code is in mtnlg_jax/cli/bias.py.
"""

from mtnlg_jax.cli.bias import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
