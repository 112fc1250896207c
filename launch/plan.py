"""Show how a run is split over a mesh, and rank meshes by estimated speed.

--help describes every flag. The code is in mtnlg_jax/cli/plan.py.
"""

from mtnlg_jax.cli.plan import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
