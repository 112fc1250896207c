"""Score a text with a trained model: loss, perplexity, bits per byte.

--help shows examples and every flag. The code is in mtnlg_jax/cli/evaluate.py.
"""

from mtnlg_jax.cli.evaluate import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
