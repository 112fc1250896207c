"""Initializing from another run: the first parameters, and the teachers of distillation stages."""

import dataclasses
import os
import shutil
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mtnlg_jax import foreign, storage
from mtnlg_jax.config import (
    Config,
    ModelConfig,
    MoEConfig,
    PrefixConfig,
    StageConfig,
    TrainConfig,
    from_json,
    validate,
)
from mtnlg_jax.data.tokenizer import Tokenizer, load_tokenizer
from mtnlg_jax.model.prefix import PrefixEncoder
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import AXES, plan_table, shardings_of
from mtnlg_jax.train import lora, quantized_base
from mtnlg_jax.train.adapted_arrays import stored_arrays
from mtnlg_jax.train.checkpoint import Run, find_run, load_run
from mtnlg_jax.train.distill import Distillation

# {index of a stage: (settings of its loss, the teacher's parameters, the teacher's step)}
Teachers = dict[int, tuple[Distillation, nnx.State, int]]


# Settings of the model that act on training alone, and what the mesh decides.
_FREE = (
    "attention_impl",
    "dropout_rate",
    "init_method_std",
    "vocab_size_divisible_by",
    "vocab_padding",
)
_FREE_OF_MOE = ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate")
# Added to the experts' settings later: left out where they are off.
_ADDED_TO_MOE = ("moe_router_enable_expert_bias",)
# Settings whose None stands for what other settings say. Another value than that changes a shape.
_DERIVED = ("num_query_groups", "kv_channels", "ffn_hidden_size", "vocab_size", "bias")
# Runs of version 0.2 do not record these.
_ADDED = (
    "rotary_percent rope_scaling norm_placement qk_layernorm parallel_residual embedding_norm bias "
    "mlm_head layer_pattern attn_logit_softcapping final_logit_softcapping multipliers "
    "attention_sink moe prefix mup_base_hidden_size mup_base_kv_channels"
).split()


def meaning(model: ModelConfig) -> dict:
    """Return the settings that give the parameters their meaning."""
    given = dataclasses.asdict(model)
    given["moe"] = {key: v for key, v in given["moe"].items() if key not in _FREE_OF_MOE}
    plain = MoEConfig()
    for key in _ADDED_TO_MOE:
        if given["moe"][key] == getattr(plain, key):
            del given["moe"][key]
    return {key: value for key, value in given.items() if key not in _FREE}


def recorded_meaning(model: ModelConfig) -> dict:
    """Return `meaning` as checkpoints record it: switches at their defaults are left out, as in the
    runs of versions that did not have them."""
    plain = meaning(ModelConfig())
    return {
        key: value
        for key, value in meaning(model).items()
        if key not in _ADDED or value != plain[key]
    }


def refuse_other_runs(config: Config, tokenizer: Tokenizer, fresh: bool = True) -> None:
    """Check before any work that train.init and each stage's distill are runs that fit this one.

    Raise ValueError or FileNotFoundError otherwise. ``config`` is resolved. A run that is not
    ``fresh`` no longer reads train.init.
    """
    # Only the first start reads train.init, so a run resumes even where that run is gone.
    if config.train.init and fresh:
        theirs = _settings("--init", config.train.init, tokenizer)
        ours = config.model
        if ours.prefix.positions and not theirs.model.prefix.positions:
            if lora.used(config):
                raise ValueError(
                    f"--init={config.train.init} reads text alone: the projector of model.prefix "
                    "is new, and optimizer.lora_rank trains adapters alone; set it to 0"
                )
            ours = dataclasses.replace(ours, prefix=PrefixConfig())
        _refuse_other_model(f"--init={config.train.init}", theirs.model, ours)
    # Teachers are read at every start.
    for stage in config.train.stages:
        if _learns_from_teacher(stage):
            what = f"stage {stage.name!r}: distill"
            theirs = _settings(what, stage.distill, tokenizer)
            _refuse_other_vocabulary(f"{what}={stage.distill}", theirs, config)


def load_start(config: Config, mesh: Mesh) -> nnx.State | None:
    """Return the best parameters of train.init, on ``mesh``; None where the run starts afresh."""
    if not config.train.init:
        return None
    if quantized_base.used(config):
        # Quantized parameter by parameter: the model in float32 need not fit the devices.
        return quantized_base.read_base(config, _stored(config.train.init), mesh)
    return _with_prefix(_load(config.train.init, config, mesh).params, config, mesh)


def _with_prefix(params: nnx.State, config: Config, mesh: Mesh) -> nnx.State:
    """Return ``params`` with a new projector, and patch encoder, where a run of text has none."""
    if not config.model.prefix.positions or "prefix" in params.raw_mapping:
        return params
    shardings = shardings_of(abstract_model(config.model)[1], mesh, config.mesh.zero)

    def make():
        return nnx.split(PrefixEncoder(config.model, rngs=nnx.Rngs(config.train.seed)))[1]

    new = jax.jit(make, out_shardings=shardings["prefix"])()
    return type(params)({**params.raw_mapping, "prefix": new.raw_mapping})


def _load(folder: str, config: Config, mesh: Mesh) -> Run:
    """Load a run onto this run's mesh, with this run's padding of the vocabulary."""
    return load_run(folder, "best", mesh, config.mesh.zero, config.model.vocab_padding)


def _stored(folder: str) -> Any:
    """Return the best parameters of the run or model in ``folder``, to be read one at a time."""
    reader = foreign.reader_of(folder)
    if reader is not None:
        return reader.open(folder)[1]

    return find_run(folder, "best", stored_arrays).params


def keep_originals(config: Config, workdir: str) -> None:
    """Keep in ``workdir`` what export needs to write the model of train.init again, such as its
    chat template (`foreign.ORIGINALS`). A run of train.init may have come from such a model.

    Call it at a fresh start: what an earlier one left, perhaps of another model, is removed.
    """
    target = os.path.join(workdir, foreign.ORIGINALS)
    # Written to another name and renamed, so that the folder is always complete.
    partial = target + ".partial"
    for folder in (target, partial):
        shutil.rmtree(folder, ignore_errors=True)
    init = config.train.init
    if not init:
        return
    reader = foreign.reader_of(init)
    if reader is not None:
        reader.keep(init, partial)
    else:
        for name in storage.list_files(init, foreign.ORIGINALS):
            content = storage.read_file(init, name)
            if content is not None:
                storage.write_file(partial, name.removeprefix(f"{foreign.ORIGINALS}/"), content)
    if os.path.isdir(partial):
        os.replace(partial, target)


def load_teachers(config: Config, mesh: Mesh) -> Teachers:
    """Load the teacher of each stage on ``mesh``; a teacher of several stages is held once."""
    stages = {
        number: stage
        for number, stage in enumerate(config.train.stages)
        if _learns_from_teacher(stage)
    }
    # A set: a teacher of several stages is loaded and held once.
    folders = {stage.distill for stage in stages.values()}
    runs = {folder: _load(folder, config, mesh) for folder in sorted(folders)}
    return {
        number: (
            Distillation(
                runs[stage.distill].config.model, stage.distill_temperature, stage.distill_weight
            ),
            runs[stage.distill].params,
            runs[stage.distill].step,
        )
        for number, stage in stages.items()
    }


def kinds_of_steps(teachers: Teachers) -> list[tuple[int, dict[str, Any]]]:
    """Return (kind, options of ``make_train_step``) for each kind of step.

    Kind -1 learns from data alone; the others are the indices of stages with a teacher.
    """
    distilled = [
        (number, {"distillation": settings}) for number, (settings, _, _) in teachers.items()
    ]
    # Temperature and weight are compiled into the step, so each stage with a teacher has its own
    # program.
    return [(-1, {}), *distilled]


def teacher_of(teachers: Teachers, number: int) -> tuple[int, tuple]:
    """Return (the kind of stage ``number``'s steps, their last arguments)."""
    return (number, (teachers[number][1],)) if number in teachers else (-1, ())


def identity_of(config: Config, teachers: Teachers) -> dict[str, dict]:
    """Return the settings of adapters and teachers that must stay the same when a run resumes.

    Adapters only have a meaning together with their scale, and a teacher that was trained further
    teaches something else.
    """
    found: dict[str, dict] = {}
    if lora.used(config):
        optimizer = config.optimizer
        found["lora"] = {
            "rank": optimizer.lora_rank,
            "alpha": optimizer.lora_alpha,
            "targets": sorted(optimizer.lora_targets),
        }
        # Runs of earlier versions do not record it.
        if quantized_base.used(config):
            found["lora"]["base"] = optimizer.lora_base
    if teachers:
        found["teacher"] = {
            f"stage {number}": f"checkpoint {step}" for number, (_, _, step) in teachers.items()
        }
    return found


def _learns_from_teacher(stage: StageConfig) -> bool:
    return bool(stage.distill) and stage.distill_weight > 0


def _settings(what: str, folder: str, tokenizer: Tokenizer) -> Config:
    """Return the config of the run in ``folder``, whose tokenizer must be that of the data."""
    reader = foreign.reader_of(folder)
    if reader is not None:
        return _settings_of_model(what, folder, reader, tokenizer)
    # The run's own config and not the checkpoint's: nothing large is opened for a check.
    content = storage.read_file(folder, "config.json")
    if content is None:
        reason = storage.lacking(folder, "config.json")
        raise FileNotFoundError(
            f"{what}={folder} is not a run: {reason}; give the --workdir of a "
            "launch/pretrain.py run, the --to of launch/convert.py, or a Hugging Face folder"
        )
    theirs = load_tokenizer(storage.join(folder, "tokenizer"))
    # The same ids must mean the same text, or the parameters mean nothing here.
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{what}={folder} has another tokenizer ({theirs.vocab_size} tokens, "
            f"{theirs.fingerprint[:12]}) than the data ({tokenizer.vocab_size}, "
            f"{tokenizer.fingerprint[:12]}); prepare the data with --tokenizer={folder}/tokenizer"
        )
    return from_json(content.decode())


def _settings_of_model(
    what: str, folder: str, reader: foreign.Reader, tokenizer: Tokenizer
) -> Config:
    """Return the config of a model of another format, whose tokenizer must be that of the data."""
    config, theirs = reader.settings(folder)
    if tokenizer.fingerprint not in [each.fingerprint for each in theirs]:
        raise ValueError(
            f"{what}={folder} has another tokenizer ({theirs[0].vocab_size} tokens, "
            f"{theirs[0].fingerprint[:12]}) than the data ({tokenizer.vocab_size}, "
            f"{tokenizer.fingerprint[:12]}); prepare the data with --tokenizer={folder}, or with "
            "the tokenizer/ that launch/convert.py writes"
        )
    return config


def _refuse_other_model(what: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    old = meaning(theirs)
    new = meaning(ours)
    differing = [key for key in old if old[key] != new[key]]
    if ours.position_embedding_type == theirs.position_embedding_type == "rotary":
        # Then the length shapes no parameter and changes no meaning.
        differing = [key for key in differing if key != "max_position_embeddings"]
    found = _shapes(theirs)
    wanted = _shapes(ours)
    way_out = "give " + ", ".join(f"--set=model.{key}={old[key]}" for key in differing)
    # Shapes come before settings: a parameter that does not fit is the more concrete message.
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{what}: parameter {name} is {_shape(found.get(name))} there and "
                f"{_shape(wanted.get(name))} in this config; {way_out}"
            )
    # No shape differs, so where one side derives the setting, both mean the same.
    effective = [
        key for key in differing if key not in _DERIVED or None not in (old[key], new[key])
    ]
    if effective:
        key = effective[0]
        raise ValueError(
            f"{what}: model.{key} is {old[key]} there and {new[key]} in this config, so that its "
            f"parameters would mean something else; {way_out}"
        )


def _refuse_other_vocabulary(what: str, theirs: Config, config: Config) -> None:
    rows = theirs.model.vocab_size
    ours = config.model.vocab_size
    # Distributions are compared entry by entry, so the vocabularies must be equal.
    if rows != ours:
        raise ValueError(
            f"{what}: the teacher's vocabulary has {rows} rows and this model's has {ours}; "
            f"give --set=model.vocab_size={rows}"
        )
    # The teacher reads what the student reads.
    prefix = config.model.prefix
    if prefix.positions and theirs.model.prefix.shape != prefix.shape:
        raise ValueError(
            f"{what}: the teacher's prefix has shape {theirs.model.prefix.shape} and this model's "
            f"{prefix.shape} (model.prefix); take a teacher with the same"
        )
    # The teacher runs on this run's mesh with these batches, so the usual checks apply to it.
    plain = dataclasses.replace(
        lora.without(config),
        model=dataclasses.replace(theirs.model, vocab_padding=config.model.vocab_padding),
        train=dataclasses.replace(config.train, stages=TrainConfig.stages),
    )
    try:
        validate(plain)
    except ValueError as error:
        raise ValueError(f"{what}: the teacher does not fit: {error}") from None


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    # A mesh of size 1 along every axis: whole shapes. Padding depends on the mesh.
    model = dataclasses.replace(model, vocab_padding=0)
    return {
        row.path: row.shape for row in plan_table(abstract_model(model)[1], dict.fromkeys(AXES, 1))
    }


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(tuple(shape))
