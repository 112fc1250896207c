"""Check the collectives: no-ops outside the manual region and on axes of size 1, exact inside
it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.parallel.collectives import (
    axis_index,
    axis_size,
    gather,
    gather_weights,
    max_over,
    own_part,
    reduce_gradients,
    scatter_sum,
    sum_over,
    vary,
)
from mtnlg_jax.parallel.mesh import AXES, ROWS, make_mesh

MOVES = {
    "gather": lambda x: gather(x, "tensor", 0),
    "scatter_sum": lambda x: scatter_sum(x, "tensor", 0),
    "sum_over": lambda x: sum_over(x, "tensor"),
    "max_over": lambda x: max_over(x, "tensor"),
    "own_part": lambda x: own_part(x, "tensor", 0),
}
COMMUNICATES = (
    "all_gather",
    "psum",
    "reduce_scatter",
    "pmax",
    "all_to_all",
    "ppermute",
    "axis_index",
)


def _over(mesh, function, in_specs, out_specs):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


@pytest.mark.parametrize("move", MOVES)
def test_outside_the_region_collectives_are_no_ops(move):
    assert jax.make_jaxpr(MOVES[move])(jnp.ones((8, 2))).eqns == []


@pytest.mark.parametrize("move", MOVES)
def test_collectives_on_an_axis_of_size_one_send_nothing(move):
    mesh = make_mesh(MeshConfig(data=8))
    text = str(jax.make_jaxpr(_over(mesh, MOVES[move], P("data"), P("data")))(jnp.ones((8, 2))))
    assert not [name for name in COMMUNICATES if name in text]
    # The same program on an axis of size 8 sends, or asks for its index, so the test can fail.
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    whole = "tensor" if move != "own_part" else None
    text = str(
        jax.make_jaxpr(
            jax.shard_map(
                MOVES[move], mesh=mesh, in_specs=P(whole), out_specs=P("tensor"), check_vma=False
            )
        )(jnp.ones((64, 2)))
    )
    assert [name for name in COMMUNICATES if name in text]


def test_sizes_and_indices_outside_the_region_are_those_of_one_device():
    tree = {"a": jnp.ones(3)}
    assert all(axis_size(axis) == 1 and axis_index(axis) == 0 for axis in AXES)
    assert vary(tree) is tree and reduce_gradients(tree, zero=1, scattered=False) is tree
    low = gather_weights({"w_in_DF": jnp.ones((4, 2))}, jnp.bfloat16, zero=1)
    assert low["w_in_DF"].dtype == jnp.bfloat16 and low["w_in_DF"].shape == (4, 2)


def test_collectives_inside_the_region():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    x = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)  # one row a device, tensor fastest

    def local(x):
        whole = gather(x, "tensor", 0)
        place = jnp.int32([axis_index("data"), axis_index("tensor"), axis_size("tensor")])
        return (
            whole,
            scatter_sum(whole, "tensor", 0),
            sum_over(x, "tensor"),
            max_over(x, "tensor"),
            own_part(whole, "tensor", 0),
            vary(place)[None],
        )

    rows = P(("data", "tensor"))
    whole, scattered, total, top, own, place = _over(
        mesh, local, rows, (rows, rows, P("data"), P("data"), rows, P(AXES))
    )(x)
    fours = x.reshape(2, 4, 3)
    np.testing.assert_array_equal(whole.reshape(2, 4, 4, 3), np.repeat(fours[:, None], 4, 1))
    np.testing.assert_array_equal(
        scattered, 4 * x
    )  # four equal copies summed, and each device's part kept
    np.testing.assert_array_equal(total, fours.sum(1))
    np.testing.assert_array_equal(top, fours.max(1))
    np.testing.assert_array_equal(own, x)
    assert place.tolist() == [[d, t, 4] for d in range(2) for t in range(4)]


def test_gather_and_scatter_sum_are_transposes():
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    x = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32)
    y = np.random.default_rng(1).standard_normal((64, 2)).astype(np.float32)

    def local(x, y):  # x: this device's 8 rows; y: likewise
        up = jax.vjp(lambda x: gather(x, "tensor", 0), x)[1](gather(y, "tensor", 0))[0]
        down = jax.vjp(lambda x: scatter_sum(x, "tensor", 0), gather(x, "tensor", 0))[1](y)[0]
        return up - scatter_sum(gather(y, "tensor", 0), "tensor", 0), down - gather(y, "tensor", 0)

    for difference in _over(mesh, local, (P("tensor"), P("tensor")), P("tensor"))(x, y):
        np.testing.assert_allclose(difference, 0, atol=1e-6)


# --- ZeRO


def test_weights_are_gathered_and_gradients_summed_in_float32():
    mesh = make_mesh(MeshConfig(data=8))
    params = {
        "w_in_DF": np.arange(8 * 2, dtype=np.float32).reshape(8, 2),
        "b_in_F": np.ones(2, np.float32),
    }
    specs = {"w_in_DF": P("data", "tensor"), "b_in_F": P("tensor")}

    def local(params):
        share = 1 + axis_index("data") / 128  # bfloat16 holds each of these, but not their sum
        weights, back = jax.vjp(
            functools.partial(gather_weights, dtype=jnp.bfloat16, zero=1), vary(params)
        )
        ones = jax.tree.map(lambda w: vary(jnp.full(w.shape, share, w.dtype)), weights)
        return jax.tree.map(lambda w: w[None], weights), back(ones)[0]["w_in_DF"]

    weights, grad = _over(
        mesh, local, (specs,), (P(AXES), P("data", ("pipe", "expert", "context", "tensor")))
    )(params)
    assert weights["w_in_DF"].dtype == weights["b_in_F"].dtype == jnp.bfloat16
    for copy in weights["w_in_DF"]:
        np.testing.assert_array_equal(np.float32(copy), params["w_in_DF"])
    assert grad.dtype == jnp.float32 and grad.shape == (8, 2)
    np.testing.assert_array_equal(grad, 8 + 28 / 128)
    assert np.float32(jnp.bfloat16(8 + 28 / 128)) != 8 + 28 / 128


def test_gradients_may_be_summed_in_bfloat16():
    mesh = make_mesh(MeshConfig(data=8))

    def local(w):
        share = 1 + axis_index("data") / 128  # bfloat16 holds each of these, but not their sum
        through = functools.partial(
            gather_weights, dtype=jnp.float32, zero=1, reduce_dtype=jnp.bfloat16
        )
        scattered = jax.vjp(through, vary({"w_in_DF": w}))[1](
            {"w_in_DF": vary(jnp.full((8, 2), share))}
        )[0]
        return scattered, reduce_gradients(
            {"b_in_F": vary(jnp.full((2,), share))}, 1, False, jnp.bfloat16
        )

    specs = (
        {"w_in_DF": P("data", ("pipe", "expert", "context", "tensor"))},
        {"b_in_F": P("tensor")},
    )
    for grad in jax.tree.leaves(
        _over(mesh, local, (P("data", "tensor"),), specs)(np.ones((8, 2), np.float32))
    ):
        assert grad.dtype == jnp.float32
        np.testing.assert_array_equal(grad, np.float32(jnp.asarray(grad, jnp.bfloat16)))
        assert 0 < np.abs(grad - (8 + 28 / 128)).max() < 0.1


def test_a_slice_of_a_layer_without_its_leading_dim_is_gathered():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    w = np.arange(3 * 4 * 8 * 2, dtype=np.float32).reshape(3, 4, 8, 2)  # LDNH

    def local(w):
        layer = gather_weights({"blocks": {"w_q_DNH": w[1]}}, jnp.float32, zero=3)
        return layer["blocks"]["w_q_DNH"][None]

    got = _over(mesh, local, P(None, "data", "tensor"), P("data", None, "tensor"))(w)
    np.testing.assert_array_equal(got, [w[1], w[1]])


def test_without_zero_weights_are_unchanged():
    mesh = make_mesh(MeshConfig(data=8))

    def local(w):
        return gather_weights({"w_in_DF": w}, jnp.float32, zero=0)["w_in_DF"]

    assert "all_gather" not in str(
        jax.make_jaxpr(_over(mesh, local, P(None, "tensor"), P(None, "tensor")))(
            np.ones((8, 2), np.float32)
        )
    )


@pytest.mark.parametrize(("zero", "scattered"), [(0, False), (1, False), (3, True)])
def test_gradients_are_summed_once_over_axes_that_do_not_split_them(zero, scattered):
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    number = 1.0 + np.arange(8).reshape(2, 4)  # the contribution of device (d, t)

    def local():
        mine = 1.0 + 4 * axis_index("data") + axis_index("tensor")
        width = (
            2 if scattered else 4
        )  # scattered: already summed over data, and each device has its part
        grads = {
            "w_in_DF": jnp.full((width, 3), mine, jnp.bfloat16),
            "scale_D": jnp.full((width,), mine),
            "b_in_F": jnp.full((3,), mine),
        }
        return reduce_gradients(vary(grads), zero, scattered)

    data = None if zero == 0 else ROWS
    grads = _over(
        mesh, local, (), {"w_in_DF": P(data, "tensor"), "scale_D": P(data), "b_in_F": P("tensor")}
    )()
    assert {g.dtype for g in grads.values()} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(grads["b_in_F"], np.repeat(number.sum(0), 3))
    if scattered:
        np.testing.assert_array_equal(grads["w_in_DF"], np.repeat(np.repeat(number, 2, 0), 3, 1))
        np.testing.assert_array_equal(grads["scale_D"], np.repeat(number.sum(1), 2))
    else:
        np.testing.assert_array_equal(
            grads["w_in_DF"], np.repeat(number.sum(0), 3)[None].repeat(4, 0)
        )
        np.testing.assert_array_equal(grads["scale_D"], [number.sum()] * 4)
