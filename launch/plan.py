"""Show how a run lies on a mesh, and which mesh to choose, by arithmetic; nothing is allocated.

--help shows examples and every flag. The code is in mtnlg_jax/cli/plan.py.
"""

from mtnlg_jax.cli.plan import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
