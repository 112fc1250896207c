"""PEFT's adapters against PEFT: logits of a merged and of a kept adapter, and the way back.

make_adapters.py writes the fixtures.
"""

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mtnlg_jax.interop import adapter_runs, loading
from mtnlg_jax.interop.adapter_runs import Beside, base_of, open_base, open_merged
from mtnlg_jax.interop.adapters import Adapter
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.train import lora

HERE = Path(__file__).parent / "adapters"
NAMES = sorted(path.name for path in HERE.iterdir())
KEPT = ("gpt2", "llama", "neox")  # those that low-rank adaptation here holds
LOGITS = 1e-4


def logits(model, params, tokens):
    graph = abstract_model(model)[0]
    run = jax.jit(lambda params: nnx.merge(graph, params)(jnp.asarray(tokens, jnp.int32)))
    return np.asarray(run(params))


@functools.cache
def expected(name):
    return dict(np.load(HERE / name / "expected.npz"))


def base(name):
    return open_base(base_of(HERE / name))


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_adapter_gives_the_logits_of_peft(name):
    _, merged = None, adapter_runs.Merged(base(name), Adapter(HERE / name, base(name)))
    params = loading._on_mesh(merged, None, 0)
    tokens, wanted = expected(name)["tokens"], expected(name)["logits"]
    assert np.abs(logits(merged.model, params, tokens) - wanted).max() < LOGITS
    plain = merged.base.interchange.parameters(merged.base.tensor)
    assert np.abs(logits(merged.model, plain, tokens) - wanted).max() > 100 * LOGITS


def kept(name):
    """Return (params with adapters, config) of a fixture beside its base."""
    found = base(name)
    beside = Beside(Adapter(HERE / name, found))
    config = beside.config(run_config(found), "BASE")
    factors = {full.split(".")[-1]: jnp.asarray(array) for full, _, array in beside.parameters()}
    abstract = lora.abstract_parameters(config)
    assert {n: leaf.shape for n, leaf in lora.split(abstract)[1]["blocks"].items()} == {
        n: array.shape for n, array in factors.items()
    }
    params = found.interchange.parameters(found.tensor)
    return lora.joined(params, {"blocks": factors}), config


def run_config(found):
    from mtnlg_jax.interop.source import run_of

    return run_of(found.path, found.original)


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_adapter_gives_the_logits_of_peft(name):
    params, config = kept(name)
    merged = lora.merge(params, config)
    tokens, wanted = expected(name)["tokens"], expected(name)["logits"]
    assert np.abs(logits(config.model, merged, tokens) - wanted).max() < LOGITS
