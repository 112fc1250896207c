"""Scores a text with a trained model: python launch/evaluate.py --workdir=RUN --input=FILE [--json]

--help says more. The code is in mtnlg_jax/cli/evaluate.py.
"""

from mtnlg_jax.cli.evaluate import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
