"""Compile a step for accelerators that are not present, and report whether it fits.

--help shows examples and every flag. The code is in mtnlg_jax/cli/compile_ahead.py.
"""

from mtnlg_jax.cli.compile_ahead import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
