"""Write the model card and data statement of a run, each figure from a file of it.

--help shows examples and every flag. The code is in mtnlg_jax/cli/model_card.py.
"""

from mtnlg_jax.cli.model_card import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
