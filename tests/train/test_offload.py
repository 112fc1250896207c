"""Moments and kept activations in the memory of the host: the same numbers, and what it needs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import batch_on, config_of, mesh_of

from mtnlg_jax.config import validate
from mtnlg_jax.model.params import names_of
from mtnlg_jax.planning.moments import moments_of
from mtnlg_jax.train import offload
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.moments import moment_of
from mtnlg_jax.train.state import abstract_state, init_state
from mtnlg_jax.train.step import make_train_step

COUNTS = (jnp.int32(2), jnp.int32(16), jnp.float32(1))


def with_settings(config, offload, **optimizer):
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, **optimizer),
        train=dataclasses.replace(config.train, offload=offload),
    )
    validate(config)
    return config


@functools.cache
def run(config, steps=2):
    """Return (losses and norms of the steps, the state after them, the compiled step)."""
    mesh = mesh_of(config)
    state = init_state(config, mesh)
    args = (batch_on(mesh), *COUNTS)
    step = make_train_step(config, mesh, causal=True).lower(state, *args).compile()
    found = []
    for _ in range(steps):
        state, metrics = step(state, *args)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return found, state, step


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("moments", {"moments_dtype": "float32"}),
        # Slow: other codes and updates on the same path, and one part of both.
        pytest.param("moments", {"moments_dtype": "int8", "name": "muon"}, marks=pytest.mark.slow),
        pytest.param("activations", {}, marks=pytest.mark.slow),
        ("both", {}),
    ],
    ids=str,
)
def test_the_numbers_are_those_without(part, settings):
    plain, expected, _ = run(with_settings(config_of(2, 4), "none", **settings))
    found, state, _ = run(with_settings(config_of(2, 4), part, **settings))
    assert found == plain
    one = names_of(expected)
    for name, array in names_of(state).items():
        if part == "activations":
            np.testing.assert_array_equal(array, one[name], name)
        elif "codes_" in name:
            # The next code, where multiplying and adding in one rounds otherwise.
            assert np.abs(np.int32(array) - np.int32(one[name])).max() <= 1, name
        else:
            np.testing.assert_allclose(array, one[name], rtol=1e-4, atol=1e-7, err_msg=name)


def test_moments_stay_on_the_host_and_vectors_on_the_device():
    _, state, _ = run(with_settings(config_of(2, 4), "moments"))
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    kinds = {moment_of(path) is not None: set() for path, _ in leaves}
    for path, leaf in leaves:
        kinds[moment_of(path) is not None].add(leaf.sharding.memory_kind)
    assert kinds == {True: {offload.HOST}, False: {"device"}}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}


def test_a_step_that_is_not_finite_changes_no_moment():
    config = with_settings(config_of(2, 4), "moments")
    mesh = mesh_of(config)
    _, _, step = run(config)
    state = init_state(config, mesh)
    state, _ = step(state, batch_on(mesh), *COUNTS)
    broken = state.params
    leaves, tree = jax.tree.flatten(broken)
    leaves[-1] = leaves[-1] * jnp.nan
    before = {name: np.asarray(x) for name, x in names_of(state.opt_state).items()}
    state = state._replace(params=jax.tree.unflatten(tree, leaves))
    after, metrics = step(state, batch_on(mesh), *COUNTS)
    assert int(metrics["nonfinite_streak"]) == 1
    for name, array in names_of(after.opt_state).items():
        np.testing.assert_array_equal(array, before[name], name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_step_takes_the_bytes_that_are_planned(dtype):
    config = with_settings(config_of(2, 4), "none", moments_dtype=dtype)
    mesh = mesh_of(config)
    state = abstract_state(config, mesh)

    def bytes_of(tree):
        return sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    touched = jax.jit(lambda state: jax.tree.map(lambda x: x + x, state))
    arguments = touched.lower(state.opt_state).compile().memory_analysis().argument_size_in_bytes
    planned = moments_of(config, mesh.shape, config.mesh.zero)
    assert planned.host == 0 and arguments == planned.device + 4 == bytes_of(state.opt_state)
    on_host = dataclasses.replace(config, train=dataclasses.replace(config.train, offload="both"))
    there = moments_of(on_host, mesh.shape, config.mesh.zero)
    assert there.device + there.host == planned.device and there.host > there.device
    assert 0 < there.coming < there.host / 2


def test_a_resume_may_turn_it_on(tmp_path):
    before = with_settings(config_of(2, 4), "none")
    after = with_settings(config_of(4, 2), "moments", moments_dtype="bfloat16")
    _, state, _ = run(before)
    checkpoints = Checkpoints(tmp_path)
    try:
        checkpoints.save(2, state, {}, wait=True)
        found = checkpoints.restore(abstract_state(after, mesh_of(after)), {})[1]
        # And what is on the host is saved and read.
        checkpoints.save(3, found, {}, wait=True)
        again = checkpoints.restore(abstract_state(after, mesh_of(after)), {})[1]
    finally:
        checkpoints.close()
    old = names_of(state.opt_state)
    for name, array in names_of(found.opt_state).items():
        np.testing.assert_allclose(np.float32(array), old[name], rtol=2**-7, err_msg=name)
        np.testing.assert_array_equal(names_of(again.opt_state)[name], array, name)
        assert names_of(again.opt_state)[name].sharding == array.sharding


def test_a_backend_without_the_memory_is_an_error():
    class Memory:
        kind = "device"

    class Device:
        platform = "quantum"

        def addressable_memories(self):
            return [Memory()]

    class Mesh:
        local_devices = (Device(),)

    config = with_settings(config_of(2, 4), "activations")
    way_out = (
        r"train.offload=activations needs .* pinned_host, .* quantum has device; set train.off"
    )
    with pytest.raises(ValueError, match=way_out):
        offload.check_backend(config, Mesh())
    offload.check_backend(with_settings(config, "none"), Mesh())
