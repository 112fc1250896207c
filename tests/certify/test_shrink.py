"""Check the small copies of configs: valid, as small as they should be, and otherwise the same."""

import dataclasses
import itertools
from pathlib import Path

import jax
import pytest

from mtnlg_jax.certify import meshes
from mtnlg_jax.certify.shrink import check, small_copy
from mtnlg_jax.config import (
    Config,
    LayerSpec,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PrefixConfig,
    RopeScaling,
    StageConfig,
    TrainConfig,
    load_config,
    validate,
)
from mtnlg_jax.config.samples import phases_of, samples_before
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import AXES, make_mesh
from mtnlg_jax.train.optimizer import sizes_of_sides
from mtnlg_jax.train.state import state_shardings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LADDER = "1.7b 3.6b 7.5b 18.4b 39.1b 76.1b 145.6b 310.1b 529.6b 1008b".split()
NAMES = [path.name for path in sorted(CONFIGS.glob("*.py")) if path.stem != "ladder"]
NAMES += [f"ladder.py:{row}" for row in LADDER]


def sizes(**given):
    return dict.fromkeys(AXES, 1) | given


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_valid_small_copy(name):
    config = load_config(f"{CONFIGS}/{name}")
    copy = small_copy(config, 8)
    (small,) = copy.meshes
    assert meshes.devices_of(small) == 8
    assert meshes.used_axes(small) == meshes.used_axes(meshes.sizes_of(config.mesh))
    check(copy.config, small)
    check(copy.elsewhere, copy.other)
    assert copy.other != small and meshes.devices_of(copy.other) <= 8
    new = copy.config
    assert new.model.parameter_count() < 500_000 and new.train.steps == 4
    for kept in ("zero", "schedule", "virtual_pipe", "context_mode", "tp_comm_overlap"):
        assert getattr(new.mesh, kept) == getattr(config.mesh, kept)
    for kept in ("compute_dtype", "reduce_dtype", "recompute", "seed", "label_smoothing"):
        assert getattr(new.train, kept) == getattr(config.train, kept)
    assert (new.train.rampup_batch_size is None) == (config.train.rampup_batch_size is None)
    assert dataclasses.replace(new.optimizer, lora_rank=0) == dataclasses.replace(
        config.optimizer, lora_rank=0
    )
    sized = (
        "num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size "
        "vocab_size vocab_size_divisible_by vocab_padding max_position_embeddings layer_pattern "
        "rope_scaling moe prefix"
    ).split()
    changed = {
        each.name
        for each in dataclasses.fields(ModelConfig)
        if getattr(new.model, each.name) != getattr(config.model, each.name)
    }
    assert changed <= set(sized)


MODEL = ModelConfig(num_layers=24, hidden_size=1024, num_attention_heads=16, vocab_size=1024)


def config_of(model=(), mesh=(), train=(), optimizer=()):
    config = Config(
        model=dataclasses.replace(MODEL, **dict(model)),
        mesh=MeshConfig(**dict(mesh)),
        train=TrainConfig(
            **{"global_batch_size": 512, "micro_batch_size": 1, "steps": 100} | dict(train)
        ),
        optimizer=OptimizerConfig(**dict(optimizer)),
    )
    validate(config)
    return config


def small_of(devices=8, **given):
    """Return the small config, checked on each of its meshes."""
    copy = small_copy(config_of(**given), devices)
    return copy


def test_grouped_heads_keep_their_ratio_and_their_split():
    grouped = small_of(model={"num_query_groups": 4}, mesh={"tensor": 4}).config.model
    assert grouped.num_attention_heads == 4 * grouped.num_query_groups
    # Fewer key/value heads than parts of tensor: each part still has all of them.
    copy = small_of(model={"num_query_groups": 2}, mesh={"tensor": 8, "data": 4})
    assert copy.config.model.num_query_groups < copy.meshes[0]["tensor"]
    assert copy.config.model.num_attention_heads == 8 * copy.config.model.num_query_groups


@pytest.mark.parametrize(("groups", "exchanged"), [(16, True), (2, False)])
def test_attention_over_context_keeps_its_mode(groups, exchanged):
    mesh = {"tensor": 2, "context": 4, "data": 2}
    copy = small_of(model={"num_query_groups": groups}, mesh=mesh)
    (small,) = copy.meshes
    each = copy.config.model.num_query_groups // small["tensor"]
    assert (each % small["context"] == 0) == exchanged


def test_stages_hold_whole_periods_of_the_pattern():
    pattern = (LayerSpec(window=512), LayerSpec(window=4096), LayerSpec())
    copy = small_of(model={"layer_pattern": pattern}, mesh={"pipe": 4, "virtual_pipe": 2})
    model = copy.config.model
    assert model.num_layers == copy.meshes[0]["pipe"] * 2 * len(pattern)
    length = copy.config.sequence_length
    windows = [spec.window for spec in model.layer_pattern]
    assert windows == [length // 4, length, None]
    # Of a long pattern, as models of other projects may have, each kind stays once.
    long = tuple(LayerSpec(window=512 if n % 3 else None) for n in range(24))
    assert len(small_of(model={"layer_pattern": long}).config.model.layer_pattern) == 2


def test_micro_batches_fill_the_pipeline_and_its_flushes():
    mesh = {"pipe": 8, "flush": 16, "data": 2}
    config = small_of(mesh=mesh, train={"rampup_batch_size": (2, 2, 512)}).config
    rows = config.mesh.data
    assert config.mesh.flush % config.mesh.pipe == 0
    assert config.train.global_batch_size // rows >= 2 * config.mesh.pipe
    start, increment, samples = config.train.rampup_batch_size
    assert start < config.train.global_batch_size and increment == start and samples > start


def test_experts_keep_their_number_on_a_device_and_exceed_those_of_a_token():
    many = small_of(
        model={"moe": MoEConfig(64, 4, moe_shared_expert_intermediate_size=512)},
        mesh={"expert": 8, "data": 4},
    )
    assert many.config.model.moe.num_moe_experts == 8 * many.meshes[0]["expert"]
    few = small_of(model={"moe": MoEConfig(8, 2)}, mesh={"expert": 8, "data": 4})
    assert few.config.model.moe.num_moe_experts > 2
    assert few.config.model.moe.num_moe_experts % few.meshes[0]["expert"] == 0


def test_adapters_rope_prefix_and_privacy_stay_valid():
    blocks = small_of(
        mesh={"tensor": 2},
        optimizer={"lora_rank": 16, "lora_base": "nf4", "lora_targets": ("q", "in")},
        train={"init": "RUN"},
    ).config
    assert blocks.train.init == "RUN" and blocks.optimizer.lora_rank == 4
    factors = tuple(1.0 + number for number in range(16))
    rope = RopeScaling(
        "longrope", 4.0, 1024, short_factor=factors, long_factor=tuple(4 * x for x in factors)
    )
    scaled = small_of(
        model={"position_embedding_type": "rotary", "rotary_percent": 0.5, "rope_scaling": rope}
    ).config.model
    assert len(scaled.rope_scaling.short_factor) == scaled.rotary_width // 2
    assert scaled.rope_scaling.original_max_position_embeddings * 2 == (
        scaled.max_position_embeddings
    )
    image = PrefixConfig(width=128, image_size=224, patch_size=14)
    pictured = small_of(model={"prefix": image}).config
    assert 0 < pictured.model.prefix.positions < pictured.sequence_length - 8
    private = small_of(optimizer={"dp_target_epsilon": 8.0}, train={"micro_batch_size": None})
    assert private.config.optimizer.dp_noise_multiplier == 1.0


def test_padding_and_teachers_stay():
    padded = small_of(model={"vocab_size": 50257, "vocab_padding": 47}, mesh={"tensor": 8})
    model = padded.config.model
    assert model.vocab_padding > 0 and model.vocabulary % 8 == 0
    stages = (StageConfig("taught", distill="no such run", distill_temperature=2.0),)
    copy = small_of(train={"stages": stages})
    assert copy.teacher is not None and copy.teacher.vocabulary == copy.config.model.vocabulary
    assert not any("in place of" in note for note in copy.notes)
    stages += (dataclasses.replace(stages[0], distill="nor this"),)
    assert any("in place of 2: of the first" in n for n in small_of(train={"stages": stages}).notes)


FITTING = {
    "muP": ({"mup_base_hidden_size": 256}, {}, {}),
    "int8": (
        {"ffn_hidden_size": 2752, "activation": "swiglu"},
        {"moments_dtype": "int8"},
        {},
    ),
    "samples": ({}, {"warmup_samples": 1000, "decay_samples": 25_000}, {}),
    "short decay": ({}, {"warmup_samples": 100, "decay_fraction": 0.2}, {}),
    "wsd": (
        {},
        {"lr_decay_style": "wsd", "wsd_decay_fraction": 0.9, "warmup_samples": 1000},
        {},
    ),
    "root of a share": ({}, {"lr_decay_style": "inverse_square_root"}, {}),
    "line": (
        {},
        {"lr_decay_style": "linear", "warmup_fraction": 0.008, "decay_fraction": 0.01},
        {"steps": 1000},
    ),
    "root": ({}, {"lr_decay_style": "inverse_square_root", "warmup_samples": 100}, {}),
    "soap": ({}, {"name": "soap"}, {}),
    "lion": ({}, {"name": "lion", "clip_update_norm": 2.0}, {}),
    "offload": ({}, {"moments_dtype": "bfloat16"}, {"offload": "both", "ema_decay": 0.9}),
    "watched": (
        {},
        {},
        {
            "spike_policy": "rewind",
            "spike_deviations": 4.0,
            "near_every": 2,
            "stats_every": 20,
            "verify_every": 20,
            "trackers": ("wandb",),
            "profile_steps": (90, 95),
            "profile_signal": "SIGUSR1",
            "profile_signal_steps": 3,
            "sample_prompts": ("a text",),
            "sample_tokens": 40,
            "eval_tasks": ("hellaswag",),
        },
    ),
}


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("mesh", [{"tensor": 4, "data": 4}, {"pipe": 4, "data": 2, "context": 2}])
def test_settings_that_depend_on_sizes_fit_the_small_copy(name, mesh):
    model, optimizer, train = FITTING[name]
    config = config_of(mesh=mesh, model=model, optimizer=optimizer, train=train)
    new = small_copy(config, 8).config
    for kept in ("lr_decay_style", "wsd_decay_fraction", "moments_dtype", "name"):
        assert getattr(new.optimizer, kept) == getattr(config.optimizer, kept)
    assert new.train.offload == config.train.offload
    assert new.train.ema_decay == config.train.ema_decay
    assert new.train.spike_policy == "none" and not new.train.near_every
    if name == "muP":
        small = new.model
        assert small.hidden_size / small.mup_base_hidden_size == pytest.approx(4)
    if name == "soap":
        assert new.optimizer.precondition_frequency == 2  # it turns before the state is saved
    total = samples_before(new.train, new.train.steps)
    if name == "samples":
        phases = phases_of(new.optimizer, total)
        assert phases.end == pytest.approx(25_000 / 51_200 * total, abs=1)
        assert phases.warmup == pytest.approx(1000 / 51_200 * total, abs=1)


def test_the_statistics_of_soap_divide_as_in_the_whole_run():
    wide = {"ffn_hidden_size": 672, "activation": "swiglu", "num_query_groups": 1}
    wide["vocab_size"] = None  # known with the data alone
    copy = small_of(model=wide, mesh={"data": 8}, optimizer={"name": "soap"})
    config = copy.config
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    assert config.model.mlp_width % 8 == 0 and state_shardings(config, mesh)
    narrow = dataclasses.replace(config.model, ffn_hidden_size=84)
    with pytest.raises(ValueError, match="U=84 is not divisible by data=8"):
        check(dataclasses.replace(config, model=narrow), copy.meshes[0])
    # So does a run that could not start.
    with pytest.raises(ValueError, match="U=676 is not divisible by data=8"):
        small_of(
            model=wide | {"ffn_hidden_size": 676}, mesh={"data": 8}, optimizer={"name": "soap"}
        )


def test_sides_of_matrices_that_soap_leaves_stay_without_a_basis():
    optimizer = {"name": "soap", "max_precond_dim": 1024}
    copy = small_of(model={"ffn_hidden_size": 1408}, mesh={"data": 8}, optimizer=optimizer)
    limit = copy.config.optimizer.max_precond_dim
    sizes = sizes_of_sides(abstract_model(copy.config.model)[1])
    assert {side for side, size in sizes.items() if size > limit} == {
        *(("w_in_DF", 1), ("w_out_FD", 0))
    }
    assert any(f"max_precond_dim 1024 -> {limit}" in note for note in copy.notes)
    turned = small_of(mesh={"data": 8}, optimizer={"name": "soap"}).config.optimizer
    assert turned.max_precond_dim == OptimizerConfig().max_precond_dim


def test_a_wrong_copy_is_refused_for_its_own_reason(monkeypatch):
    def wrong(config, sizes):
        raise ValueError("the real reason")

    monkeypatch.setattr("mtnlg_jax.certify.shrink.check", wrong)
    with pytest.raises(ValueError, match="the real reason"):
        small_of(mesh={"tensor": 4})


# --- meshes


@pytest.mark.parametrize("used", [4, 5])
@pytest.mark.parametrize("together", [2, 3, 4])
def test_several_meshes_cover_every_pair_of_axes(used, together):
    chosen = meshes.covering(AXES[:used], together)
    assert all(len(each) == together for each in chosen)
    pairs = set(itertools.combinations(AXES[:used], 2))
    assert {pair for each in chosen for pair in itertools.combinations(each, 2)} == pairs
    assert len(chosen) <= 1 + len(pairs) // (together - 1)


def test_axes_of_a_large_mesh_are_shown_in_several_small_ones():
    mesh = {"pipe": 4, "data": 16, "context": 2, "tensor": 8}
    copy = small_copy(config_of(mesh=mesh), 8)
    assert len(copy.meshes) == 3 and len(meshes.covered_pairs(copy.meshes)) == 6
    assert copy.notes[-1].startswith("pairs   ")
    whole = small_copy(config_of(mesh=mesh), 16)
    assert whole.meshes == [sizes(pipe=2, data=2, context=2, tensor=2)]


def test_a_mesh_that_fits_stays_as_it_is():
    assert meshes.small_meshes(MeshConfig(pipe=2, tensor=3, data=1), 8) == [sizes(pipe=2, tensor=3)]
    assert meshes.small_meshes(MeshConfig(tensor=2), 8) == [sizes(data=4, tensor=2)]
    assert meshes.small_meshes(MeshConfig(data=32, tensor=2), 8) == [sizes(data=4, tensor=2)]


def test_a_mesh_that_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="one device, so there is nothing to compare; .*data=-1"):
        small_copy(config_of(mesh={"data": 1}), 8)
    with pytest.raises(ValueError, match="--devices=2 is too few to show data x tensor.*=4 or"):
        small_copy(config_of(mesh={"tensor": 2}), 2)
