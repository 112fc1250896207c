"""Settings that changed since the checkpoint from which a run resumes: refused, reported or free.

Every key of `Config` is in one of the five sets below (a test compares). Settings that decide which
samples the next steps read, their random numbers or their learning rate are refused, or reported
with both values. Speed, memory and output are free.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

from mtnlg_jax.config import (
    Config,
    MoEConfig,
    Multipliers,
    PrefixConfig,
    RopeScaling,
    TrainConfig,
    from_json,
    to_json,
)
from mtnlg_jax.data.batches import SAMPLE_ORDER
from mtnlg_jax.foreign import folder_of
from mtnlg_jax.storage import is_remote
from mtnlg_jax.train import lengthening
from mtnlg_jax.train.schedule import (
    batch_size_at,
    learning_rate,
    samples_at_end,
    samples_before,
    stage_at,
    stage_bounds,
)

# The checkpoint's identity refuses these (`loop.identity_of_data`, `init_from.meaning`), by value
# rather than by name: data.path and the paths of a blend may move while the tokens stay the same.
_SECTIONS = {"rope_scaling": RopeScaling, "multipliers": Multipliers}
_SECTIONS |= {"moe": MoEConfig, "prefix": PrefixConfig}
_TRAINING_OF_MOE = {
    "model.moe.moe_aux_loss_coeff",
    "model.moe.moe_z_loss_coeff",
    "model.moe.moe_router_bias_update_rate",
}
IDENTITY = (
    {
        f"model.{key}"
        for key in (
            "num_layers hidden_size num_attention_heads num_query_groups kv_channels "
            "ffn_hidden_size vocab_size max_position_embeddings position_embedding_type "
            "rotary_base rotary_percent normalization norm_placement norm_epsilon qk_layernorm "
            "parallel_residual embedding_norm activation add_bias bias tie_embeddings mlm_head "
            "layer_pattern attn_logit_softcapping final_logit_softcapping attention_sink "
            "mup_base_hidden_size mup_base_kv_channels"
        ).split()
    }
    | {
        f"model.{section}.{each.name}"
        for section, kind in _SECTIONS.items()
        for each in dataclasses.fields(kind)
    }
    | {
        "data.path",
        "data.tokenizer",
        "optimizer.lora_rank",
        "optimizer.lora_alpha",
        "optimizer.lora_targets",
        "optimizer.lora_base",
    }
) - _TRAINING_OF_MOE

# Another value would change the meaning of the state or of the sample count.
# `privacy.start` refuses another unit, and to turn differential privacy on or off.
# `lengthening` refuses a change of train.steps under which the steps so far would have had other
# learning rates; it is reported otherwise.
REFUSED = {
    "train.init",
    "data.sequence_length",
    "optimizer.name",
    "optimizer.max_precond_dim",
    "optimizer.dp_unit",
}

REPORTED = {
    "model.dropout_rate",
    *_TRAINING_OF_MOE,
    "data.blend",
    "data.heldout",
    "data.masking.word_share",
    "data.masking.mask_share",
    "data.masking.random_share",
    "optimizer.learning_rate",
    "optimizer.min_learning_rate_ratio",
    "optimizer.lr_decay_style",
    "optimizer.warmup_fraction",
    "optimizer.warmup_samples",
    "optimizer.decay_fraction",
    "optimizer.decay_samples",
    "optimizer.wsd_decay_style",
    "optimizer.wsd_decay_fraction",
    "optimizer.lr_cycles",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.muon_momentum",
    "optimizer.moments_dtype",
    "optimizer.precondition_frequency",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.clip_grad_norm",
    "optimizer.clip_update_norm",
    "optimizer.dp_noise_multiplier",
    "optimizer.dp_target_epsilon",
    "optimizer.dp_clip_norm",
    "optimizer.dp_delta",
    "optimizer.dp_source_rows",
    "optimizer.dp_secret",
    "train.steps",
    "train.global_batch_size",
    "train.rampup_batch_size",
    "train.stages",
    "train.seed",
    "train.compute_dtype",
    "train.reduce_dtype",
    "train.label_smoothing",
    "train.z_loss_coeff",
    "train.ema_decay",
    "train.eval_batches",
    "train.spike_policy",
    "train.spike_deviations",
    "train.spike_window",
    "train.spike_leave_out",
}

# These act when parameters are drawn, so they do nothing to a resumed run.
START = {"model.init_method_std"}

# The host alone reads these: neither a step nor its program depends on them.
HOST = {
    "name",
    "optimizer.dp_accountant",
    "model.vocab_size_divisible_by",
    "train.log_every",
    "train.stats_every",
    "train.eval_every",
    "train.eval_tasks",
    "train.eval_tasks_every",
    "train.eval_tasks_rows",
    "train.eval_tasks_fewshot",
    "train.eval_tasks_data",
    "train.save_every",
    "train.keep_last",
    "train.near_every",
    "train.near_folder",
    "train.keep_best",
    "train.max_bad_steps",
    "train.watchdog_seconds",
    "train.phase_seconds",
    "train.heartbeat_seconds",
    "train.compare_every",
    "train.verify_every",
    "train.trackers",
    "train.tracker_project",
    "train.profile_steps",
    "train.profile_signal",
    "train.profile_signal_steps",
    "train.sample_prompts",
    "train.sample_every",
    "train.sample_tokens",
    "train.device_flops",
}

FREE = HOST | {
    "model.vocab_padding",
    "model.attention_impl",
    "train.micro_batch_size",
    "train.recompute",
    "train.offload",
    "train.loss_chunk",
}
FREE_SECTIONS = ("mesh", "decode")


def kept_init(meta: dict, config: Config) -> Config:
    """Return ``config`` with the train.init of the checkpoint: it is only read at a fresh start."""
    before = meta.get("config", {}).get("train", {}).get("init", "")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, init=before))


def kept_warmup(meta: dict, step: int, samples: int, config: Config) -> Config:
    """Return ``config`` with the warm-up of the checkpoint of ``step``, as `lengthening` keeps it.

    ``samples``: sequences read so far; 0 of parameters alone, which have no warm-up.
    """
    before = _config_of(meta.get("config", {}))
    if before is None or not samples:
        return config
    return lengthening.kept_warmup(before, step, samples, config)


def deciding(config: Config) -> dict[str, Any]:
    """Return the settings that decide the steps of a run, without paths and what is free."""
    paths = {"data.path", "data.tokenizer", "optimizer.dp_secret"}
    keys = (IDENTITY | REFUSED | REPORTED) - paths
    return {key: x for key, x in normalized(config).items() if key in keys}


def normalized(config: Config) -> dict[str, Any]:
    """Return the settings by dotted key, so that those with equal effects have equal values."""
    return _values(json.loads(to_json(config)))


def refuse_changes(meta: dict, step: int, alone: bool, config: Config) -> None:
    """Raise ValueError where a run cannot resume from the checkpoint of ``step`` with ``config``.

    ``config`` is resolved. From parameters ``alone`` it starts afresh instead of resuming.
    """
    saved = meta.get("config", {})
    before = saved.get("train", {}).get("init", "")
    init = config.train.init
    # An empty --init does not contradict: the run remembers its own (`kept_init`).
    if init and not _same_path(before, init):
        raise ValueError(
            f"train.init={init} is not what this run started from ({before or 'no other run'}), "
            f"and its checkpoint {step} resumes without it; leave --init out, or give another "
            "--workdir"
        )
    # Without a sample count and moments nothing below can contradict the checkpoint.
    if alone:
        return
    # Equal is allowed: a finished run that is started again reports itself as finished.
    if step > config.train.steps:
        raise ValueError(
            f"train.steps={config.train.steps} is below the checkpoint's step {step}; give "
            f"{step} or more, or another --workdir"
        )
    old = _values(saved)
    new = normalized(config)
    for key, why in (
        ("data.sequence_length", "samples of another length hold other text"),
        ("optimizer.name", "its moments are those of another optimizer"),
        ("optimizer.max_precond_dim", "soap has statistics of other matrices"),
    ):
        if old[key] != new[key]:
            raise ValueError(
                f"{key} was {old[key]} up to checkpoint {step} and is {new[key]}: {why}; give the "
                "same, or another --workdir with --init of this run"
            )
    if before_config := _config_of(saved):
        samples = meta.get("samples", samples_before(before_config.train, step))
        lengthening.refuse_other_rates(before_config, step, samples, config)
        lengthening.refuse_kept_warmup(before_config, step, samples, config)


def report_changes(meta: dict, step: int, samples: int, config: Config) -> str | None:
    """Return one line with both values of each setting that changes the steps after ``step``.

    It includes the next learning rate. Return None where nothing differs. ``samples``: sequences
    read so far.
    """
    saved = meta.get("config", {})
    given = json.loads(to_json(config))
    old = _values(saved)
    new = _values(given)
    keys = [key for key in new if key in REPORTED and old[key] != new[key]]
    found = []
    for key in keys:
        # Stages are compared key by key below, which reads better than two whole lists.
        if key != "train.stages":
            found.append(f"{key} {_text(old[key])} -> {_text(new[key])}")
    found += _changed_stages(old["train.stages"], new["train.stages"])
    order = meta.get("order_of_samples", "1")  # version 0.1.0 did not record its own
    if order != SAMPLE_ORDER:
        found.append(
            f"order of samples {order} -> {SAMPLE_ORDER} (this version draws them differently: "
            "some are read again, others later)"
        )
    # Reported, because someone who changed them expects an effect.
    unused = [
        f"{key} {old[key]} -> {new[key]} (it only acts at a fresh start)"
        for key in sorted(START)
        if old[key] != new[key]
    ]
    if not found + unused:
        return None
    # Still reported, since the config on disk will differ from what was trained.
    if step >= config.train.steps:
        return f"step {step} was the last, so these changes do nothing: {'; '.join(found + unused)}"
    before = _config_of(saved)
    consequences = _consequences(before, config, step, samples) if before else []
    return f"from step {step + 1} on, settings differ from checkpoint {step}: " + "; ".join(
        found + unused + consequences
    )


def _config_of(saved: dict) -> Config | None:
    """Return the config that a checkpoint recorded; None if another version wrote it."""
    try:
        return from_json(json.dumps(saved))
    except ValueError:
        # Its keys are compared, its schedule cannot be computed.
        return None


def _consequences(before: Config, config: Config, step: int, samples: int) -> list[str]:
    """Return the effects of all changes on learning rate and stages."""
    found = []
    rates = []
    for one in (before, config):
        # Both schedules are asked about the same step after the same samples, so that only the
        # settings differ.
        total = samples_at_end(one.train, min(step, one.train.steps), samples)
        after = samples + batch_size_at(one.train, samples)
        scale = stage_at(one.train, step)[2].learning_rate_scale
        rates.append(float(learning_rate(one, after, total)) * scale)
    # float32 rounds a rate that did not change.
    if abs(rates[1] - rates[0]) > 1e-6 * max(rates):
        found.append(f"learning rate of step {step + 1} {rates[0]:.3g} -> {rates[1]:.3g}")
    # The bounds follow from the fractions and from train.steps, so they may move without a change
    # of a stage.
    bounds = [stage_bounds(one.train) for one in (before, config)]
    if len(config.train.stages) > 1 and bounds[0] != bounds[1]:
        found.append(f"stages end at steps {_listed(bounds[0])} -> {_listed(bounds[1])}")
        names = [stage_at(one.train, step)[2].name for one in (before, config)]
        if names[0] != names[1]:
            found.append(f"step {step + 1} is in stage {names[0]} -> {names[1]}")
    return found


def _changed_stages(old: list[dict], new: list[dict]) -> list[str]:
    if len(old) != len(new):
        return [
            f"train.stages {_listed(stage['name'] for stage in old)} -> "
            f"{_listed(stage['name'] for stage in new)}"
        ]
    return [
        f"train.stages[{number}].{key} {_text(one.get(key))} -> {_text(other[key])}"
        for number, (one, other) in enumerate(zip(old, new, strict=True))
        for key in other
        # A new name alone changes no step.
        if key != "name" and one.get(key) != other[key]
    ]


def _values(config: dict) -> dict[str, Any]:
    """Return values by dotted key, normalized so that equal values have equal effects.

    Keys that ``config`` lacks, because an older version wrote it, have their defaults.
    """
    # JSON on both sides, so that tuples and lists compare equal.
    config = _filled(json.loads(to_json(Config())), config)
    data = config["data"]
    train = config["train"]
    train["stages"] = [
        _filled(dataclasses.asdict(TrainConfig().stages[0]), stage) for stage in train["stages"]
    ]
    # data.path is the blend of one source.
    own = data["blend"] or ([[data["path"], 1.0]] if data["path"] else [])
    # Sources count by their position, as in the identity: their paths may move.
    blends = [stage["blend"] or own for stage in train["stages"]]
    paths = list(dict.fromkeys(path for blend in blends for path, _ in blend))
    uses_own = any(not stage["blend"] for stage in train["stages"])
    data["blend"] = _shares(own, paths) if uses_own else None
    for stage in train["stages"]:
        stage["blend"] = _shares(stage["blend"], paths)
        stage["distill"] = _real_path(stage["distill"])
    data["sequence_length"] = data["sequence_length"] or config["model"]["max_position_embeddings"]
    # A path to held-out text; otherwise a share.
    if isinstance(data["heldout"], str):
        data["heldout"] = _real_path(data["heldout"])
    return _leaves(config)


def _filled(defaults: dict, given: dict) -> dict:
    """Return ``defaults`` updated from ``given``.

    Keys that only ``given`` has belong to another version and are left out.
    """
    return {
        key: _filled(value, given.get(key, {}))
        if isinstance(value, dict)
        else given.get(key, value)
        for key, value in defaults.items()
    }


def _leaves(tree: dict, path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def _shares(blend: list, paths: list[str]) -> list[list]:
    """Return [position of the source, its share] for each source of ``blend``."""
    total = sum(weight for _, weight in blend)
    # Weights 1:1 and 2:2 are the same blend; 9 digits absorb the rounding of the division.
    return [
        [paths.index(path), round(weight / total, 9)] for path, weight in blend if path in paths
    ]


def _same_path(one: str, other: str) -> bool:
    return one == other or bool(one) and _real_path(one) == _real_path(other)


def _real_path(path: str) -> str:
    """Return one spelling of ``path`` for all of the same folder or URL."""
    if not path:
        return path
    if is_remote(path):
        return path.rstrip("/")
    # A link, a path relative to this folder, or a file that names its folder.
    return os.path.realpath(folder_of(os.path.expanduser(path)))


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):  # a blend
        return " + ".join(f"{share:.4g} of source {number}" for number, share in value)
    return json.dumps(value) if isinstance(value, list | None) else str(value)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
