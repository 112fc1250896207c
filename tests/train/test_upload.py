"""Checkpoints on an object store that is slow: steps do not wait for it."""

import threading
import time

import jax
import numpy as np
import pytest
import slow_store

from mtnlg_jax.config import Config, MeshConfig, ModelConfig
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.saving import Saver
from mtnlg_jax.train.state import abstract_state

MODEL = ModelConfig(
    num_layers=1, hidden_size=16, num_attention_heads=4, vocab_size=64, max_position_embeddings=8
)
SECONDS = 0.003  # of a request; a checkpoint of this model takes about 150
META = {"identity": {}}


@pytest.fixture
def store():
    with slow_store.serve(SECONDS) as store:
        yield store


@pytest.fixture
def abstract():
    config = Config(model=MODEL, mesh=MeshConfig(data=2))
    return abstract_state(config, make_mesh(config.mesh, jax.devices()[:2]))


def state_of(step: int, abstract):
    def made(leaf):
        values = np.full(leaf.shape, step, leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(made, abstract)


def test_steps_go_on_while_a_checkpoint_is_uploaded(store, abstract, caplog):
    """The thread of the steps waits for one request at most; all others are in the background."""
    main = threading.get_ident()
    own = []
    wait = store.wait

    def counted() -> None:
        own.extend([None] * (threading.get_ident() == main))
        wait()

    checkpoints = Checkpoints("gs://bucket/run/checkpoints")
    saver = Saver(checkpoints)
    store.wait = counted
    try:
        for step in range(1, 9):
            state = state_of(step, abstract)
            saved = saver.save(
                lambda step=step, state=state: checkpoints.save(step, state, META), must=step == 8
            )
            assert saved == (step in (1, 8))
            saver.is_due()
            checkpoints.prove()
            if step < 8:
                # Deciding a step's save takes no request, and beginning one a single one.
                assert len(own) <= 1 and checkpoints.is_uploading()
        began = time.monotonic()
        saver.finish(None)
        assert time.monotonic() - began > 50 * SECONDS  # the uploads were far from done
    finally:
        checkpoints.close()
    assert caplog.text.count("a checkpoint is left out") == 1
    assert len(store.requests) > 100
    reader = Checkpoints("gs://bucket/run/checkpoints")
    assert reader.steps() == [1, 8]
    step, state, _ = reader.restore(abstract, {})
    reader.close()
    for leaf in jax.tree.leaves(state):
        assert step == 8 and (np.asarray(leaf) == 8).all()


@pytest.mark.slow  # two uploads
def test_an_unfinished_upload_is_skipped_and_written_again(store, abstract):
    checkpoints = Checkpoints("gs://bucket/other/checkpoints")
    checkpoints.save(1, state_of(1, abstract), META)
    checkpoints.wait()
    del store.objects["bucket/other/checkpoints/1/record.json"]
    checkpoints.close()
    checkpoints = Checkpoints("gs://bucket/other/checkpoints")
    assert checkpoints.restore(abstract, {}) is None
    checkpoints.save(1, state_of(3, abstract), META, wait=True)
    _, state, _ = checkpoints.restore(abstract, {})
    checkpoints.close()
    assert all((np.asarray(leaf) == 3).all() for leaf in jax.tree.leaves(state))


def test_a_store_that_orbax_does_not_write_is_refused():
    with pytest.raises(ValueError, match=r"s3://bucket/run: Orbax writes checkpoints to folders"):
        Checkpoints("s3://bucket/run")
