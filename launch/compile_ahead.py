"""Compiles a step for accelerators that are not here, and says whether it fits and what it does:

--help says more. The code is in mtnlg_jax/cli/compile_ahead.py.
"""

from mtnlg_jax.cli.compile_ahead import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
