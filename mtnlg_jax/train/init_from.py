"""Runs that stand on other runs: the parameters that one starts from, and the teachers of its
stages."""

import dataclasses
import json
import os

from jax.sharding import Mesh

from mtnlg_jax import storage
from mtnlg_jax.config import Config, ModelConfig, StageConfig, TrainConfig, from_json, validate
from mtnlg_jax.data.tokenizer import Tokenizer, load_tokenizer
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import AXES, plan_table
from mtnlg_jax.train import lora
from mtnlg_jax.train.checkpoint import load_run
from mtnlg_jax.train.distill import Distillation


def meaning(model: ModelConfig) -> dict:
    """The settings that say what parameters mean: with others they are another model."""
    free = ("attention_impl", "dropout_rate", "init_method_std", "vocab_size_divisible_by")
    return {key: value for key, value in dataclasses.asdict(model).items() if key not in free}


def refuse_other_runs(config: Config, tokenizer: Tokenizer, fresh: bool = True) -> None:
    """Before any work: ValueError or FileNotFoundError in one line where train.init or a stage's
    distill is no run, or does not fit this one. ``config`` is resolved. A run that is not ``fresh``
    has read its start already."""
    if config.train.init and fresh:
        theirs = _settings("--init", config.train.init, tokenizer)
        _refuse_other_model(f"--init={config.train.init}", theirs.model, config.model)
    for stage in config.train.stages:
        if _learns_from_teacher(stage):
            what = f"stage {stage.name!r}: distill"
            _refuse_other_vocabulary(
                f"{what}={stage.distill}", _settings(what, stage.distill, tokenizer), config
            )


def load_start(config: Config, mesh: Mesh):
    """The best parameters of train.init, on ``mesh``; None where the run starts afresh."""
    if not config.train.init:
        return None
    return load_run(config.train.init, "best", mesh, config.mesh.zero).params


def load_teachers(config: Config, mesh: Mesh) -> dict[int, tuple[Distillation, object, int]]:
    """{number of a stage: (what its step must know, the teacher's parameters on ``mesh``, their
    step)}; a teacher of several stages is held once."""
    stages = {
        number: stage
        for number, stage in enumerate(config.train.stages)
        if _learns_from_teacher(stage)
    }
    folders = {stage.distill for stage in stages.values()}
    runs = {folder: load_run(folder, "best", mesh, config.mesh.zero) for folder in sorted(folders)}
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


def kinds_of_steps(teachers: dict) -> list[tuple[int, dict]]:
    """(number, what ``make_train_step`` is given) of each kind: -1 learns from data alone, the
    others are stages."""
    return [
        (-1, {}),
        *((number, {"distillation": given}) for number, (given, _, _) in teachers.items()),
    ]


def teacher_of(teachers: dict, number: int) -> tuple[int, tuple]:
    """(the kind of stage ``number``'s steps, their last arguments)."""
    return (number, (teachers[number][1],)) if number in teachers else (-1, ())


def identity_of(config: Config, teachers: dict) -> dict[str, dict]:
    """What a run that goes on must find as it was: adapters mean something with their scale alone,
    and a teacher that has learnt more teaches other things."""
    found = {}
    if lora.used(config):
        optimizer = config.optimizer
        found["lora"] = {
            "rank": optimizer.lora_rank,
            "alpha": optimizer.lora_alpha,
            "targets": sorted(optimizer.lora_targets),
        }
    if teachers:
        found["teacher"] = {
            f"stage {number}": f"checkpoint {step}" for number, (_, _, step) in teachers.items()
        }
    return found


def _learns_from_teacher(stage: StageConfig) -> bool:
    return bool(stage.distill) and stage.distill_weight > 0


def _settings(what: str, folder: str, tokenizer: Tokenizer) -> Config:
    """config.json of the run in ``folder``, whose tokenizer must be that of the data."""
    content = storage.read_file(folder, "config.json")
    if content is None and not storage.is_remote(folder) and not os.path.exists(folder):
        raise FileNotFoundError(
            f"{what}={folder} is no run: {storage.missing(folder)}; give the --workdir of a "
            "launch/pretrain.py run, or the --to of launch/convert.py"
        )
    if content is None:
        raise FileNotFoundError(
            f"{what}={folder} is no run (no config.json in it); give the --workdir of a "
            "launch/pretrain.py run, or the --to of launch/convert.py"
        )
    if "model_type" in json.loads(content):
        raise ValueError(
            f"{what}={folder} is a model of Hugging Face's; make a run of it with launch/convert.py "
            f"--from={folder} --to=RUN and give that"
        )
    theirs = load_tokenizer(storage.join(folder, "tokenizer"))
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{what}={folder} has another tokenizer ({theirs.vocab_size} tokens, "
            f"{theirs.fingerprint[:12]}) than the data ({tokenizer.vocab_size}, "
            f"{tokenizer.fingerprint[:12]}); prepare the data with --tokenizer={folder}/tokenizer"
        )
    return from_json(content)


def _refuse_other_model(what: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    old = meaning(theirs)
    new = meaning(ours)
    differing = [key for key in old if old[key] != new[key]]
    if ours.position_embedding_type == theirs.position_embedding_type == "rotary":
        differing = [
            key for key in differing if key != "max_position_embeddings"
        ]  # no parameter, and no meaning
    found = _shapes(theirs)
    wanted = _shapes(ours)
    way_out = "give " + ", ".join(f"--set=model.{key}={old[key]}" for key in differing)
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{what}: parameter {name} is {_shape(found.get(name))} there and "
                f"{_shape(wanted.get(name))} in this config; {way_out}"
            )
    effective = [
        key for key in differing if old[key] is not None and new[key] is not None
    ]  # None: a width derived
    if effective:
        key = effective[0]
        raise ValueError(
            f"{what}: model.{key} is {old[key]} there and {new[key]} in this config, so that its "
            f"parameters would mean something else; {way_out}"
        )


def _refuse_other_vocabulary(what: str, theirs: Config, config: Config) -> None:
    rows = theirs.model.vocab_size
    ours = config.model.vocab_size
    if rows != ours:
        raise ValueError(
            f"{what}: the teacher's distributions are over {rows} rows and this model's over {ours}; give "
            f"--set=model.vocab_size={rows}"
        )
    plain = dataclasses.replace(
        lora.without(config),
        model=theirs.model,
        train=dataclasses.replace(config.train, stages=TrainConfig.stages),
    )
    try:
        validate(plain)
    except ValueError as error:
        raise ValueError(f"{what}: the teacher does not fit: {error}") from None


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        row.path: row.shape for row in plan_table(abstract_model(model)[1], dict.fromkeys(AXES, 1))
    }


def _shape(shape) -> str:
    return "absent" if shape is None else str(tuple(shape))
