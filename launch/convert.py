"""Turns a GPT-2 of Hugging Face into a run folder, and back; without PyTorch.

--help says more. The code is in mtnlg_jax/cli/convert.py.
"""

from mtnlg_jax.cli.convert import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
