"""Turn text into a folder to train from: tokenizer, token arrays, held-out part.

--help shows examples and every flag. The code is in mtnlg_jax/cli/prepare.py.
"""

from mtnlg_jax.cli.prepare import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
