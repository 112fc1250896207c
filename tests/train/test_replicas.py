"""Plant silent faults in one data replica, and find it: on several meshes and in whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mtnlg_jax import errors
from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import loop
from mtnlg_jax.train.batch import micro_batch_shape, put_batch
from mtnlg_jax.train.course import open_checkpoints
from mtnlg_jax.train.metrics import read_metrics
from mtnlg_jax.train.micro_batches import MicroBatches
from mtnlg_jax.train.replicas import (
    COMPARED,
    KIND,
    check_mesh,
    make_sums,
    odd_ones,
    sums_after,
)
from mtnlg_jax.train.state import init_state

WORDS = "the whale swam north while the old captain slept and nobody on the ship dared".split()


def config_of(mesh: MeshConfig, **model) -> Config:
    model = {"dropout_rate": 0.1, "num_layers": 2} | model
    return Config(
        model=ModelConfig(
            hidden_size=32,
            num_attention_heads=4,
            max_position_embeddings=16,
            vocab_size=384,
            **model,
        ),
        mesh=mesh,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(
            steps=4, global_batch_size=16, micro_batch_size=1, compute_dtype="float32"
        ),
    )


def batch_of(config: Config, mesh):
    length = config.sequence_length
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 300, (64, length), dtype=np.int32)

    def rows_of(numbers):
        rows = tokens[numbers % 64]
        return {
            "tokens": rows,
            "labels": np.roll(rows, -1, axis=1),
            "segment_ids": np.zeros_like(rows),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), rows.shape),
            "weights": np.zeros(rows.shape, np.float32),  # as those that a ramp does not use
        }

    return put_batch(rows_of, (*micro_batch_shape(config, mesh), length), mesh)


class Replicas:
    """The comparison of replicas over a mesh; one program for healthy and faulty turns."""

    def __init__(self, config: Config):
        self.mesh = make_mesh(config.mesh)
        self.state = init_state(config, self.mesh)
        self.batch = batch_of(config, self.mesh)
        self.sums = make_sums(config, self.mesh, causal=True)

    def turn(self, number: int, step: int = 0) -> np.ndarray:
        state = self.state._replace(step=jnp.int32(step))
        return sums_after(self.sums, state, self.batch, self.mesh, number)

    def turns(self, count: int, step: int = 0) -> list[np.ndarray]:
        return [self.turn(number, step) for number in range(count)]


def plant(monkeypatch, replica: int, step: int, row: int | None = None) -> None:
    """Flip the lowest bit of one number of a layer's output in ``replica`` at ``step``; with
    ``row`` only in micro-batches that begin with this row."""
    layers = MicroBatches.layers

    def faulty(self, rest, blocks, first, number, x):
        y = layers(self, rest, blocks, first, number, x)
        # The dropout's key tells the step, so that a healthy step runs the same program.
        key = jax.random.fold_in(jax.random.key(0), step)
        hit = (jax.random.key_data(self.key) == jax.random.key_data(key)).all()
        hit &= lax.axis_index("data") == replica
        if row is not None:
            hit &= self.batch["rows"][0, 0] == row
        one = jnp.zeros(y.shape, jnp.uint32).at[0, 3, 1].set(1)
        flipped = lax.bitcast_convert_type(y, jnp.uint32) ^ one
        return jnp.where(hit, lax.bitcast_convert_type(flipped, y.dtype), y)

    monkeypatch.setattr(MicroBatches, "layers", faulty)


MESHES = {
    "8": MeshConfig(data=8),
    "4 x 2": MeshConfig(data=4, tensor=2, zero=3),
    "pipe": MeshConfig(data=4, pipe=2, zero=0),
    "context": MeshConfig(data=2, context=2, tensor=2),
    "1f1b": MeshConfig(data=4, pipe=2, schedule="1f1b"),
    "rounds": MeshConfig(data=2, pipe=2, virtual_pipe=2, tensor=2),
    "experts": MeshConfig(data=2, expert=2, tensor=2),
    "adapters": MeshConfig(data=4, tensor=2),
}
EXPERTS = MoEConfig(num_moe_experts=4, moe_router_topk=2, moe_aux_loss_coeff=0.01)
SLOW = ("context", "1f1b", "rounds", "experts", "adapters")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MESHES],
)
def test_equal_replicas_agree_and_a_flipped_bit_names_one(name, monkeypatch):
    model = {"moe": EXPERTS} if name == "experts" else {"num_layers": 4} if name == "rounds" else {}
    config = config_of(MESHES[name], **model)
    if name == "adapters":
        lora = OptimizerConfig(lora_rank=2, lora_base="int8")
        config = dataclasses.replace(config, optimizer=lora)
    plant(monkeypatch, 1, step=1)
    replicas = Replicas(config)
    good = replicas.turns(2)
    assert odd_ones(good) == ([], False, [])
    odd, sure, what = odd_ones(replicas.turns(3, step=1))
    # Of two that always disagree nobody can tell.
    assert (odd, sure) == (([0, 1], False) if config.mesh.data == 2 else ([1], True))
    assert "output" in what
    assert "weights" not in what


def test_a_passing_fault_names_the_replica_of_two(monkeypatch):
    # Replica 1 is wrong once, with its own rows.
    plant(monkeypatch, 1, step=0, row=1)
    replicas = Replicas(config_of(MeshConfig(data=2, tensor=4)))
    bad, second, third = replicas.turns(3)
    assert odd_ones([bad, second])[:2] == ([0, 1], False)
    # The third turn has it again, as every turn in which the replica has these rows.
    assert odd_ones([bad, second, third])[:2] == ([0, 1], False)
    # Without: the replica's second result is that of the other one.
    good = replicas.turn(0, step=2), replicas.turn(1, step=2), replicas.turn(2, step=2)
    wrong = good[0].copy()
    wrong[:, 1, ..., 1, :] += 1
    assert odd_ones([wrong, *good[1:]]) == ([1], True, ["output"])


def test_weights_that_differ_name_the_replica():
    replicas = Replicas(config_of(MeshConfig(data=4, tensor=2, zero=0)))

    def spoil(x):
        # One shard of the final norm's scale, which all replicas hold, on a device of replica 2.
        device = replicas.mesh.devices[0, 2, 0, 0, 0]
        parts = [
            jax.device_put(np.asarray(s.data) + (1e-7 if s.device == device else 0), s.device)
            for s in x.addressable_shards
        ]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)

    norm = replicas.state.params["final_norm"]["scale_D"]
    norm.set_value(spoil(norm.get_value()))
    odd, sure, what = odd_ones(replicas.turns(3))
    assert (odd, sure) == ([2], True)
    assert "weights" in what


def test_votes():
    def passes(turns, replicas):
        sums = [np.zeros((1, replicas, 1, 1, 1, len(COMPARED), 2), np.uint32) for _ in range(turns)]
        for turn, each in enumerate(sums):
            for replica in range(replicas):
                each[0, replica, ..., :3, :] = (replica - turn) % replicas  # the rows
        return sums

    assert odd_ones(passes(2, 3)) == ([], False, [])
    always = passes(3, 5)
    for each in always:
        each[0, 4, ..., 2, 0] += 7
    assert odd_ones(always) == ([4], True, ["gradient"])
    assert odd_ones(always[:2])[:2] == ([0, 3, 4], False)
    both = passes(3, 8)
    for each in both:
        each[0, 1, ..., 0, 0] += 7
        each[0, 5, ..., 0, 0] += 9
    assert odd_ones(both) == ([1, 5], True, ["loss"])


@pytest.fixture(scope="module")
def prepared(prepared_words):
    return prepared_words(WORDS)


def test_a_fault_ends_a_run_before_a_checkpoint_of_it(tmp_path, prepared, monkeypatch):
    config = config_of(MeshConfig(data=4, tensor=2))
    train = dataclasses.replace(config.train, steps=6, save_every=2, verify_every=3)
    config = dataclasses.replace(config, data=DataConfig(path=prepared), train=train)
    plant(monkeypatch, 2, step=4)
    run = tmp_path / "run"
    with pytest.raises(errors.Corrupted, match="replica 2 of 4 along mesh.data") as raised:
        loop.train(config, str(run), False)
    assert raised.value.exit_code == errors.DISAGREEMENT
    text = str(raised.value)
    for part in ("after step 4", "devices 4, 5 of process 0 on host", "from checkpoint 2"):
        assert part in text
    records = read_metrics(str(run / "metrics.jsonl"))
    compared = [(each["step"], each["odd"]) for each in records if each["kind"] == KIND]
    assert compared == [(2, []), (3, []), (4, [2])]
    checkpoints = open_checkpoints(config, str(run), make_mesh(config.mesh))
    assert checkpoints.steps() == [2]
    # Such as one that a signal saved between two comparisons.
    assert checkpoints.distrust(1) is None
    checkpoints.close()
    assert (run / "checkpoints/2.suspect").is_dir()


def test_one_replica_cannot_be_compared():
    config = config_of(MeshConfig(data=1, tensor=8))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, verify_every=5))
    with pytest.raises(ValueError, match="train.verify_every=5 compares .* mesh.data, which is 1"):
        check_mesh(config, make_mesh(config.mesh))
