"""Times attention on this machine and writes what is fastest: python launch/tune_attention.py

--help says more. The code is in mtnlg_jax/cli/tune_attention.py.
"""

from mtnlg_jax.cli.tune_attention import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
