"""Models of several families, as transformers' folders hold them."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mtnlg_jax.interop.families import FAMILIES, family_of, model_of
from mtnlg_jax.interop.interchange import Interchange, stored_names
from mtnlg_jax.model.transformer import abstract_model

FOLDERS = Path(__file__).resolve().parents[2] / "interop/families"


@pytest.fixture(scope="session")
def family():
    """Return a function from the name of a folder to (model, tokens (S,), whether causal)."""

    @functools.cache
    def load(name):
        config = json.loads((FOLDERS / name / "config.json").read_text())
        stored = load_file(FOLDERS / name / "model.safetensors")
        tokens = np.load(FOLDERS / name / "expected.npz")["tokens"][0]
        kind = FAMILIES[family_of(config)[0]]
        names = stored_names(kind, stored)
        given = model_of(config)
        params = Interchange(given, kind).parameters(lambda each: stored[names[each]])
        params = nnx.State(params) if isinstance(params, dict) else params
        model = nnx.merge(abstract_model(given)[0], params)
        return model, jnp.asarray(tokens, jnp.int32), not kind.masked

    return load
