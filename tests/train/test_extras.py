"""Optional parts of the state: made where a checkpoint lacks them, unread where not wanted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import Config, MeshConfig, ModelConfig
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import extras
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.state import abstract_state, init_state, renew

MODEL = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=384, max_position_embeddings=8
)
PART = extras.Part(
    lambda config: config.name == "with a copy",
    lambda config, params: {"copy": params, "count": jnp.int32(7)},
)


def saved_and_restored(tmp_path, before: Config, after: Config):
    """Return (the state saved with ``before``, what a run with ``after`` makes of it)."""
    state = init_state(before, make_mesh(before.mesh, jax.devices()[:4]))
    checkpoints = Checkpoints(tmp_path)
    try:
        checkpoints.save(3, state, {}, wait=True)
        mesh = make_mesh(after.mesh, jax.devices()[:4])
        _, found, _ = checkpoints.restore(abstract_state(after, mesh), {})
        return state, renew(after, found, checkpoints.lacking)
    finally:
        checkpoints.close()


@pytest.mark.parametrize("had", [True, False])
@pytest.mark.parametrize("wants", [True, False])
def test_a_resume_turns_a_part_on_and_off(tmp_path, monkeypatch, had, wants):
    monkeypatch.setitem(extras.PARTS, "copies", PART)
    before = Config(name="with a copy" if had else "", model=MODEL, mesh=MeshConfig(tensor=2))
    after = dataclasses.replace(
        before, name="with a copy" if wants else "", mesh=MeshConfig(data=4)
    )
    state, found = saved_and_restored(tmp_path, before, after)
    assert set(found.extras) == ({"copies"} if wants else set())
    if wants:
        assert int(found.extras["copies"]["count"]) == 7
        for one, other in zip(
            jax.tree.leaves(state.params),
            jax.tree.leaves(found.extras["copies"]["copy"]),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
            assert other.sharding.mesh.shape["data"] == 4


def test_a_part_that_is_saved_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(extras.PARTS, "copies", PART)
    config = Config(name="with a copy", model=MODEL)
    state = init_state(config, make_mesh(config.mesh, jax.devices()[:4]))
    state = state._replace(extras={"copies": {**state.extras["copies"], "count": jnp.int32(9)}})
    checkpoints = Checkpoints(tmp_path)
    try:
        checkpoints.save(3, state, {}, wait=True)
        mesh = make_mesh(config.mesh, jax.devices()[:4])
        _, found, _ = checkpoints.restore(abstract_state(config, mesh), {})
        assert not checkpoints.lacking
    finally:
        checkpoints.close()
    assert int(found.extras["copies"]["count"]) == 9
