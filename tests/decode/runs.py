"""Save parameters as the checkpoint of a run."""

import json
from pathlib import Path

from mtnlg_jax.config import Config, to_json
from mtnlg_jax.train.checkpoint import Checkpoints


def save_run(folder: Path, config: Config, params, tokenizer) -> Path:
    """Save ``params`` as step 3 of a run in ``folder``, and return that."""
    tokenizer.save(folder / "tokenizer")
    checkpoints = Checkpoints(folder / "checkpoints")
    meta = {"config": json.loads(to_json(config)), "identity": {}}
    checkpoints.save(3, {"params": params}, meta, wait=True)
    checkpoints.close()
    return folder
