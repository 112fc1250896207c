"""Token arrays to Megatron's .bin and .idx and back, and either to text.

--help says more. The code is in mtnlg_jax/cli/convert_data.py.
"""

from mtnlg_jax.cli.convert_data import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
