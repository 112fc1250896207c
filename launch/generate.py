"""Generate, rank or fill in text with a trained model.

--help shows examples and every flag. The code is in mtnlg_jax/cli/generate.py.
"""

from mtnlg_jax.cli.generate import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
