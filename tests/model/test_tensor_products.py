"""Check the rings of mesh.tp_comm_overlap against a gather before and a sum after the products."""

# Shapes: B rows, S query positions, D width, N heads, H head width, F MLP width

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.model.tensor_products import multiply_gathered, multiply_scattered
from mtnlg_jax.parallel.collectives import vary
from mtnlg_jax.parallel.mesh import AXES, make_mesh

SPECS = (P(None, "tensor"), P(None, "tensor"), P(None, "tensor"), P("tensor"))


@functools.cache
def arrays(parts, chunk):
    """Return an input, the weights of two products of it, and that of a last product."""
    rng = np.random.default_rng(0)
    shapes = ((2, parts * chunk, 4), (4, parts, 3), (4, parts * 3), (parts * 3, 4))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def make_local(overlap):
    """Return a function of one device's parts of `arrays` with both kinds of products."""

    def local(x_BSD, w_DNH, w_DF, w_FD):
        factors = [("BSD,DNH->BSNH", w_DNH), ("BSD,DF->BSF", w_DF)]
        q_BSNH, h_BSF = multiply_gathered(x_BSD, factors, overlap)
        # Not linear, and different at each position.
        places_BSF = jax.lax.broadcasted_iota(jnp.float32, h_BSF.shape, 1)
        h_BSF = jnp.sin(h_BSF) * places_BSF + jnp.square(q_BSNH).reshape(h_BSF.shape)
        return multiply_scattered("BSF,FD->BSD", h_BSF, w_FD, overlap)

    def values_and_gradients(*given):
        given = vary(given)
        y_BSD, back = jax.vjp(local, *given)
        return y_BSD, back(1 + jnp.tanh(y_BSD))

    return values_and_gradients


def on_a_mesh(parts, chunk, overlap):
    mesh = make_mesh(MeshConfig(data=1, tensor=parts), jax.devices()[:parts])

    def whole(values):
        # Equal on axes of size 1, which only a reduction tells JAX.
        return jax.tree.map(lambda x: jax.lax.psum(x, AXES[:-1]), values)

    step = make_local(overlap)
    return jax.shard_map(
        lambda *given: whole(step(*given)),
        mesh=mesh,
        in_specs=SPECS,
        out_specs=(SPECS[0], SPECS),
    )


# A chunk of odd length too, and an odd number of devices, which have as many on either side.
@pytest.mark.parametrize(("parts", "chunk"), [(2, 3), (3, 2), (4, 2), (8, 1)])
def test_rings_equal_a_gather_and_a_sum(parts, chunk):
    given = arrays(parts, chunk)
    wanted = jax.jit(make_local(False))(*given)  # on one device
    plain = jax.jit(on_a_mesh(parts, chunk, False))(*given)
    rings = jax.jit(on_a_mesh(parts, chunk, True))(*given)
    assert np.abs(wanted[0]).max() > 1
    for got in (plain, rings):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_a_ring_sends_one_chunk_less_than_there_are_devices(parts):
    text = {
        overlap: str(jax.make_jaxpr(on_a_mesh(parts, 2, overlap))(*arrays(parts, 2)))
        for overlap in (False, True)
    }
    # Rings: the input, the sum of the outputs, and that of the input's gradient.
    assert text[True].count("ppermute[") == 3 * (parts - 1)
    # Gathers, for gradients of weights: the input again, and the gradient of the output.
    assert text[True].count("all_gather[") == 2 and "reduce_scatter" not in text[True]
    assert "ppermute" not in text[False]
    assert text[False].count("all_gather[") == 2 and text[False].count("reduce_scatter[") == 2


@pytest.mark.parametrize("overlap", [False, True])
def test_heads_are_one_dim_in_products(overlap):
    text = str(jax.make_jaxpr(on_a_mesh(4, 2, overlap))(*arrays(4, 2)))
    ranks = {len(dims.split(",")) for dims in re.findall(r"f32\[([\d,]+)\]\S* = dot_general", text)}
    assert ranks == {2, 3}  # gradients of weights, and products with a sequence
