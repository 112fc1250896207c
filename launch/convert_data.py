"""Convert token arrays to Megatron's .bin and .idx and back, or either to text.

--help shows examples and every flag. The code is in mtnlg_jax/cli/convert_data.py.
"""

from mtnlg_jax.cli.convert_data import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
