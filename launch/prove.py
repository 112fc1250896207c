"""Prove that a config's mesh computes what one device computes, on simulated devices of this CPU.

--help shows examples and every flag. The code is in mtnlg_jax/cli/prove.py.
"""

from mtnlg_jax.cli.prove import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
