"""Write the report of a run, one page that needs neither network nor scripts.

--help shows examples and every flag. The code is in mtnlg_jax/cli/report.py.
"""

from mtnlg_jax.cli.report import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
