"""Compare every way of decoding over pipeline stages with one device."""

import jax
import numpy as np
import pytest
from runs import save_run
from test_over_mesh import (
    INT8_ROUNDING,
    ROUNDING,
    WAYS,
    beams,
    compare,
    look_up,
    perplexity,
    ranked,
    ranked_many,
    rows,
)

from mtnlg_jax.config import Config, MeshConfig
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train.checkpoint import load_run

MESHES = [(2, 1, 1), (2, 1, 2), (4, 2, 1)]  # (pipe, data, tensor)


def mesh_of(pipe: int, data: int = 1, tensor: int = 1):
    devices = jax.devices()[: pipe * data * tensor]
    return make_mesh(MeshConfig(pipe=pipe, data=data, tensor=tensor), devices)


def check(way, tiny, tokenizer, sizes, **held):
    """Compare ``way`` over stages with one device; see `compare`."""
    rounding = INT8_ROUNDING if held else ROUNDING
    return compare(way, tiny, tokenizer, mesh_of(*sizes), rounding, **held)


def test_rows_over_stages_equal_one_device(deep, tokenizer):
    over = check(rows, deep, tokenizer, (2, 1, 2))
    first = jax.tree.leaves(over.params[1][0])[0]
    assert len(over.params[1]) == 2 and first.shape[0] == 2
    assert first.sharding.spec[0] == "pipe"
    # Each device holds the layer of one stage.
    assert {shard.data.shape[0] for shard in first.addressable_shards} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_over_stages_equals_one_device(deep, tokenizer, way, sizes):
    check(way, deep, tokenizer, sizes)


@pytest.mark.slow
def test_rows_over_all_three_axes_equal_one_device(deep, tokenizer):
    check(rows, deep, tokenizer, (2, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("held", [{"weights": "int8"}, {"weights": "int8", "cache": "int8"}])
def test_int8_over_stages_equals_one_device(deep, tokenizer, held):
    for way in (rows, look_up, perplexity):
        check(way, deep, tokenizer, (2, 2, 1), **held)


@pytest.mark.slow
def test_windows_over_stages_equal_one_device(striped, tokenizer):
    for way in (rows, look_up, beams, ranked, ranked_many):
        check(way, striped, tokenizer, (2, 2, 1))


@pytest.mark.parametrize(
    "held",
    [{}, pytest.param({"weights": "int8", "dtype": "bfloat16"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_loaded_decoder_has_each_layer_on_its_stage(deep, tokenizer, tmp_path, held):
    folder = save_run(tmp_path, Config(model=deep.config), deep.params, tokenizer)
    mesh = mesh_of(2, 1, 2)
    expected = unstack(deep.config, load_run(folder).params, **held, mesh=mesh)
    _, found = load_decoder(folder, mesh=mesh, **held)
    assert jax.tree.structure(found.params) == jax.tree.structure(expected.params)
    pairs = zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True)
    for one, other in pairs:
        assert one.sharding.is_equivalent_to(other.sharding, other.ndim)
        numbers = np.asarray(one, np.float32), np.asarray(other, np.float32)
        # Quotients of int8 are rounded differently where they tie.
        np.testing.assert_allclose(*numbers, atol=int(one.dtype == np.int8), rtol=1e-6)
