"""Check how rows pass the stages of a pipeline, with stages that only count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_over_pipe import mesh_of

from mtnlg_jax.config import LayerSpec, ModelConfig
from mtnlg_jax.decode import cache, stages
from mtnlg_jax.decode.sharding import Placement
from mtnlg_jax.decode.stages import (
    Cost,
    Flow,
    check_stages,
    in_flight,
    micro_batches,
    stream,
    through,
)

ROWS = 8
FACTORS = np.array([2.0, 3.0, 5.0, 7.0])


def _run(count, monkeypatch, *, held: bool):
    """Send rows 1 to 8 through four stages that multiply; return what came out and was written.

    Written is what each stage read: its input, added to the cache if that is ``held``.
    """
    monkeypatch.setattr(stages, "micro_batches", lambda *_: count)

    def apply(layers, flow, cache, shared, live):
        x_BSD = flow.x_BSD
        new = x_BSD[:, 0]
        if cache is not None:
            # A bubble writes nothing, and so adds nothing.
            new = cache[0] + jnp.where(True if live is None else live, new, 0)
        assert shared is None
        return x_BSD * layers[0] + flow.rows[:, None, None], (new,)

    x_BSD = jnp.arange(1.0, ROWS + 1)[:, None, None]
    flow = Flow(x_BSD, jnp.zeros((ROWS, 1), jnp.int32), jnp.arange(ROWS) / 8)
    start = (jnp.full((ROWS, 4), 100.0),) if held else None
    with jax.set_mesh(mesh_of(4)):
        run = jax.jit(
            lambda layers, flow, start: through(
                apply, layers, flow, start, None, stages=4, units=ROWS
            )
        )
        text = str(jax.make_jaxpr(run)((FACTORS,), flow, start))
        assert f"length={4 + count - 1}\n" in text, "ticks"
        return jax.device_get(run((jnp.asarray(FACTORS),), flow, start))


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("held", [False, True])
def test_each_stage_reads_each_row_once(monkeypatch, count, held):
    y_BSD, (written,) = _run(count, monkeypatch, held=held)
    x_B = np.arange(1.0, ROWS + 1)
    for stage, factor in enumerate(FACTORS):
        np.testing.assert_allclose(written[:, stage], x_B + (100 if held else 0))
        x_B = x_B * factor + np.arange(ROWS) / 8
    np.testing.assert_allclose(y_BSD[:, 0, 0], x_B)


def test_the_number_of_micro_batches_takes_the_least_time():
    assert micro_batches(8, 4, Cost(1, 0.1)) == 1  # weights take all the time
    assert micro_batches(8, 4, Cost(0, 1)) == 8  # a tick costs its rows
    assert micro_batches(8, 4, Cost(1, 4)) == 4  # (4 + 4 - 1) (1 + 4 / 4) = 14
    assert micro_batches(7, 4, Cost(1, 100)) == 7
    # Without a bubble between steps, M ticks take M 1 + 100 instead of (4 + 7 - 1) (1 + 100 / 7).
    assert in_flight(7, 4, Cost(1, 100)) == 7
    assert in_flight(7, 4, Cost(1, 0.1)) == 0  # 7.1 instead of 4.4
    assert in_flight(8, 4, Cost(1, 0.1)) == 4  # 4.1 instead of 4.4
    assert in_flight(3, 4, Cost(1, 100)) == 0  # too few rows
    with jax.set_mesh(mesh_of(2, 4)):
        assert micro_batches(8, 2, Cost(0, 1)) == 2  # each data shard has two rows


@pytest.mark.parametrize("count", [4, 8])
def test_rows_in_flight_take_steps_without_a_bubble_between(count):
    """Each step of a row multiplies it by all factors and adds the number of the step."""

    def apply(layers, flow, cache, shared, live):
        seen = cache[0] + jnp.where(live, flow.x_BSD[:, 0], 0)
        return flow.x_BSD * layers[0], (seen,)

    def leave(y_BSD, state, fixed):
        values, numbers = state
        return y_BSD[:, 0, 0] + numbers * fixed, numbers + 1

    values = jnp.arange(1.0, ROWS + 1)
    fixed = values / 8

    def run(factors):
        return stream(
            apply,
            (factors,),
            (jnp.zeros((ROWS, 4)),),
            (values, jnp.zeros(ROWS)),
            fixed,
            enter=lambda state: state[0][:, None, None],
            leave=leave,
            flow_of=lambda state: (jnp.zeros((ROWS, 1), jnp.int32), state[1]),
            steps=3,
            count=count,
            stages=4,
            units=ROWS,
        )

    with jax.set_mesh(mesh_of(4)):
        factors = jnp.asarray(FACTORS)
        assert f"length={3 * count + 4 - 1}\n" in str(jax.make_jaxpr(run)(factors)), "ticks"
        (seen,), (found, numbers) = jax.device_get(jax.jit(run)(factors))
    expected = np.arange(1.0, ROWS + 1)
    read = np.zeros((ROWS, 4))
    for step in range(3):
        for stage, factor in enumerate(FACTORS):
            read[:, stage] += expected
            expected = expected * factor
        expected = expected + step * np.asarray(fixed)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(seen, read, rtol=1e-6)
    assert (numbers == 3).all()


def test_stages_that_would_differ_are_refused():
    config = ModelConfig(
        num_layers=6,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=16,
        position_embedding_type="rotary",
        layer_pattern=(LayerSpec(window=4), LayerSpec()),
    )
    check_stages(config, 3)
    with pytest.raises(ValueError, match="mesh.pipe=2 gives .* 3 of 6 .*try mesh.pipe=1 or 3"):
        check_stages(config, 2)
    with pytest.raises(ValueError, match="num_layers=6 is not divisible by mesh.pipe=4"):
        Placement(config, cache.split_abstract(config), mesh_of(4))


def test_a_decoder_outside_of_its_mesh_is_refused(deep):
    over = cache.unstack(deep.config, deep.params, mesh=mesh_of(2))
    with pytest.raises(ValueError, match="split over 2 pipeline stages.*over_its_mesh"):
        cache.prefill_rows(
            over.params,
            np.ones((1, 4), np.int32),
            np.ones(1, np.int32),
            config=over.config,
            size=16,
        )
