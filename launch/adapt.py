"""Adapt a model to a person: train a low-rank adapter on somebody's texts.

--help shows examples and every flag. The code is in mtnlg_jax/cli/adapt.py.
"""

from mtnlg_jax.cli.adapt import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
