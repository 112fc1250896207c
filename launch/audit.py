"""Measure what a model remembers of its training text: a report as HTML and JSON.

--help shows examples and every flag. The code is in mtnlg_jax/cli/audit.py.
"""

from mtnlg_jax.cli.audit import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
