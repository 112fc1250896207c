"""Compare every way of decoding over pipeline stages with one device."""

import jax
import pytest
from test_over_mesh import WAYS, assert_same, beams, look_up, perplexity, ranked, rows

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.parallel.mesh import make_mesh

MESHES = [(2, 1, 1), (2, 1, 2), (4, 2, 1)]  # (pipe, data, tensor)


def mesh_of(pipe: int, data: int = 1, tensor: int = 1):
    devices = jax.devices()[: pipe * data * tensor]
    return make_mesh(MeshConfig(pipe=pipe, data=data, tensor=tensor), devices)


_ONE: dict = {}


def check(way, tiny, tokenizer, sizes, **held):
    """Compare ``way`` over a mesh with one device, whose results are kept for other meshes."""
    key = way.__name__, tiny.config, tuple(held.items())
    if key not in _ONE:
        _ONE[key] = way(unstack(tiny.config, tiny.params, **held), tokenizer)
    over = unstack(tiny.config, tiny.params, **held, mesh=mesh_of(*sizes))
    assert_same(way(over, tokenizer), _ONE[key])
    return over


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
    for way in (rows, look_up, beams, ranked):
        check(way, striped, tokenizer, (2, 2, 1))
