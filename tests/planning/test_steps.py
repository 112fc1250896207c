"""Trace steps over abstract arrays: trip counts of loops, and settings without a layout."""

import dataclasses
from pathlib import Path

import jax
import pytest

from mtnlg_jax import compat
from mtnlg_jax.config import LayerSpec, load_config
from mtnlg_jax.model.attention import mean_key_blocks
from mtnlg_jax.model.kernels import blocks
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.planning.steps import dynamic_trips, lower

ROOT = Path(__file__).resolve().parents[2]


def config(*changes):
    return load_config(
        str(ROOT / "configs/tiny.py"),
        ["model.vocab_size=512", "train.micro_batch_size=1", *changes],
    )


@pytest.mark.parametrize(
    ("changes", "step", "turns"),
    [
        (["train.global_batch_size=32"], "train", 4),  # 32 rows over data 8
        (["mesh.pipe=2", "train.global_batch_size=24"], "train", 1),  # 6 micro-batches in one flush
        (["mesh.pipe=2", "train.global_batch_size=24", "mesh.flush=2"], "train", 3),
        (
            ["mesh.pipe=2", "train.global_batch_size=24", "mesh.schedule=1f1b"],
            "train",
            6 + 2 * (2 - 1),
        ),
        ([], "decode", 1),
    ],
)
def test_the_outermost_loop_runs_for_the_full_batch(changes, step, turns):
    changed = config(*changes)
    trips = dynamic_trips(changed, make_mesh(changed.mesh, jax.devices()), step)
    assert trips(0) == turns and trips(2) == mean_key_blocks(64, 16, "float32") == 1


def test_a_windowed_layer_holds_only_its_window():
    changed = config("model.position_embedding_type=rotary")
    pattern = (LayerSpec(window=16), LayerSpec())
    model = dataclasses.replace(changed.model, layer_pattern=pattern)
    changed = dataclasses.replace(changed, model=model)
    lowered = lower(changed, make_mesh(changed.mesh, jax.devices()), "decode")
    held = [x.shape for x in jax.tree.leaves(lowered.args_info[0][1].cache)]
    assert [shape[2] for shape in held] == [16, 16, 64, 64]


def test_causal_attention_visits_half_of_the_keys(monkeypatch):
    monkeypatch.setattr(blocks, "table", lambda: ())
    # Blocks of 256 queries and 512 keys: two blocks of queries see one of keys, the next two both.
    assert mean_key_blocks(1024, 64, "float32") == 1.5
    assert mean_key_blocks(300, 64, "float32") == 1
    entry = blocks.Entry(
        "cpu",
        "xla_blockwise",
        "float32",
        64,
        512,
        True,
        "both",
        blocks.Blocks(128, 128),
        1.0,
        "test",
    )
    monkeypatch.setattr(blocks, "table", lambda: (entry,))
    assert mean_key_blocks(512, 64, "float32") == (1 + 2 + 3 + 4) / 4
    assert mean_key_blocks(300, 64, "float32") == (1 + 2 + 3) / 3


def test_programs_are_made_for_the_described_platform(monkeypatch):
    monkeypatch.setattr(compat, "_DESCRIBED", [])
    assert compat.platform() == jax.default_backend() and not compat.described()
    compat.compile_for("tpu", "TPU v5 lite")
    assert (
        compat.platform() == "tpu" and compat.device_kind() == "TPU v5 lite" and compat.described()
    )


def test_decoding_over_context_raises_an_error():
    changed = config("mesh.context=2")
    with pytest.raises(
        ValueError, match="--step=decode runs over data, tensor and pipe.*--set=mesh.context=1"
    ):
        lower(changed, make_mesh(changed.mesh, jax.devices()), "decode")


def test_decoding_may_have_fewer_key_value_heads_than_parts():
    changed = config("mesh.tensor=2", "model.num_query_groups=1", "model.vocab_size=511")
    assert changed.model.vocabulary == 512  # padded
    assert "func" in lower(changed, make_mesh(changed.mesh, jax.devices()), "decode").as_text()


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_decoding_runs_over_pipeline_stages(step):
    changed = config("mesh.pipe=2", "mesh.tensor=2")
    text = lower(changed, make_mesh(changed.mesh, jax.devices()), step).as_text()
    assert "collective_permute" in text
