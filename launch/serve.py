"""Serve a trained model over HTTP: OpenAI's API, ranking, filling, and a page to try them.

--help shows examples and every flag. The code is in mtnlg_jax/cli/serve.py.
"""

from mtnlg_jax.cli.serve import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
