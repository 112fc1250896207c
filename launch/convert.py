"""Convert a Hugging Face GPT-2 to a run folder or back, without PyTorch.

--help shows examples and every flag. The code is in mtnlg_jax/cli/convert.py.
"""

from mtnlg_jax.cli.convert import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
