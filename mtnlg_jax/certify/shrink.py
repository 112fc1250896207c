"""Make the small copy of a config on which a certificate is computed.

Kept: schedule and virtual stages, ZeRO, recompute, types, optimizer, objectives, batch ramp,
context mode, experts, and every switch of the model. Smaller: sizes of the mesh, widths, depth, the
length of rows, the batch and the steps.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from mtnlg_jax.certify import meshes as small
from mtnlg_jax.certify.meshes import Sizes
from mtnlg_jax.certify.models import Parts, parts_of, small_length, small_model, up_to
from mtnlg_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    validate,
    validate_batch,
)
from mtnlg_jax.config.samples import phases_of, samples_before
from mtnlg_jax.model.params import name_of
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import dims_of, local_shape, row_shards
from mtnlg_jax.train import changes, lora
from mtnlg_jax.train.checkpoint import config_of
from mtnlg_jax.train.optimizer import optimizer_of, sizes_of_sides

STEPS = 4  # of the small run; its state is saved in the middle

# Settings of training that no gradient of the small copy depends on: what the host alone reads, and
# the rule of spikes, which four steps are too few for.
_SET_BACK = [
    name.removeprefix("train.") for name in sorted(changes.HOST) if name.startswith("train.")
] + ["spike_policy", "spike_deviations", "spike_window", "spike_leave_out"]


class Copy(NamedTuple):
    """The small copy of a config."""

    config: Config  # on the first of ``meshes``
    meshes: list[Sizes]  # that loss and gradients are computed on
    other: Sizes  # to which a run moves
    notes: list[str]  # what was shrunk or replaced, a line each
    teacher: ModelConfig | None  # of the stages that distill

    def on(self, sizes: Sizes) -> Config:
        """Return the config on another mesh."""
        mesh = small.with_sizes(self.config.mesh, sizes)
        return dataclasses.replace(self.config, mesh=mesh)

    @property
    def elsewhere(self) -> Config:
        """The config on the mesh that a run moves to, where ZeRO splits state that was whole."""
        config = self.on(self.other)
        zero = config.mesh.zero or 1
        return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, zero=zero))


def small_copy(config: Config, devices: int, data: Sequence[str] = ()) -> Copy:
    """Return the small copy of ``config`` for at most ``devices`` devices, which reads the folders
    ``data``.

    Raises ValueError where the mesh cannot be brought down, or the copy is not a valid config.
    """
    found = small.small_meshes(config.mesh, devices)
    other = _other(config, found)
    parts = parts_of(found, other)
    copied = _copied(config, found[0], parts, data)
    teacher = _teacher(config, copied, parts)
    copy = Copy(copied, found, other, _notes(config, copied, found, teacher), teacher)
    if config.mesh.data != -1:
        _check_shards(_with_vocabulary(config), small.sizes_of(config.mesh))
    for sizes in found:
        check(copy.on(sizes), sizes)
    check(copy.elsewhere, other)
    return copy


def check(config: Config, sizes: Sizes) -> None:
    """Raise ValueError if ``config`` does not fit a mesh of ``sizes``."""
    validate(config)
    validate_batch(config, row_shards(sizes))
    _check_shards(config, sizes)


def _check_shards(config: Config, sizes: Sizes) -> None:
    """Raise ValueError if a mesh of ``sizes`` does not divide all parameters of ``config`` and the
    state of its optimizer."""
    params = lora.abstract_parameters(config)
    trained, _ = lora.trainable(params, config)
    moments = jax.eval_shape(optimizer_of(config).init, trained)
    for path, leaf in jax.tree_util.tree_leaves_with_path((params, moments)):
        if leaf.ndim:  # not a count of steps
            local_shape(name_of(path), dims_of(path), leaf.shape, sizes, config.mesh.zero)


def _with_vocabulary(config: Config) -> Config:
    """Return ``config`` with some vocabulary, where that of its data is not known yet."""
    if config.model.vocab_size is not None:
        return config
    model = dataclasses.replace(config.model, vocab_size=config.mesh.tensor)
    return dataclasses.replace(config, model=model)


def _other(config: Config, found: list[Sizes]) -> Sizes:
    """Return a mesh unlike the first of ``found`` on which the small copy is valid."""
    candidates = small.other_meshes(found[0])
    # First those for which heads need not grow, and one device last: a run moves there anyway.
    candidates.sort(key=lambda sizes: (small.devices_of(sizes) == 1, parts_of(found, sizes).tensor))
    for sizes in candidates:
        candidate = _copied(config, sizes, parts_of(found, sizes), ())
        try:
            check(candidate, sizes)
        except ValueError:
            continue
        return sizes
    # Where the copy itself is wrong, more devices would not help.
    check(_copied(config, found[0], parts_of(found), ()), found[0])
    raise ValueError(
        f"no mesh is left to resume on beside {small.text_of(found[0])}; give more --devices"
    )


def _copied(config: Config, sizes: Sizes, parts: Parts, data: Sequence[str]) -> Config:
    """Return the small config on a mesh of ``sizes``, whose dims all of ``parts`` divide."""
    mesh = small.with_sizes(config.mesh, sizes)
    pipeline = config.mesh.pipe > 1
    if pipeline and config.mesh.flush:
        mesh = dataclasses.replace(mesh, flush=parts.pipe)
    model = small_model(config, parts)
    length = small_length(config, parts)
    train = _train(config, parts, length)
    return dataclasses.replace(
        config,
        name=f"{config.name} (small copy)",
        model=model,
        mesh=mesh,
        data=DataConfig(
            blend=tuple((folder, 1.0) for folder in data),
            masking=config.data.masking,
            sequence_length=length,
        ),
        optimizer=_optimizer(config, train, model),
        train=train,
        decode=DecodeConfig(),
    )


def _optimizer(config: Config, train: TrainConfig, model: ModelConfig) -> OptimizerConfig:
    """Return the optimizer of the small copy, whose training is ``train`` and whose model is
    ``model``."""
    optimizer = config.optimizer
    if optimizer.private:
        noise = optimizer.dp_noise_multiplier or 1.0
        optimizer = dataclasses.replace(
            optimizer,
            dp_noise_multiplier=noise,
            dp_target_epsilon=None,
            dp_delta=None,
            dp_secret="",
        )
    if optimizer.name == "soap":
        # Its bases turn before the state is saved, so that a turned one is compared.
        often = min(optimizer.precondition_frequency, STEPS // 2)
        optimizer = dataclasses.replace(
            optimizer, precondition_frequency=often, max_precond_dim=_precond_dim(config, model)
        )
    narrow = min(model.hidden_size, model.mlp_width)
    return dataclasses.replace(
        optimizer,
        lora_rank=min(optimizer.lora_rank, 4, narrow),
        lr_cycles=1,  # four steps have no cycles
        **_phases(config, train),
    )


def _precond_dim(config: Config, model: ModelConfig) -> int:
    """Return max_precond_dim of the small ``model``, by which the sides of its matrices keep the
    identity for their basis that do in ``config``."""
    limit = config.optimizer.max_precond_dim
    before = sizes_of_sides(abstract_model(_with_vocabulary(config).model)[1])
    after = sizes_of_sides(abstract_model(model)[1])
    if max(before.values()) <= limit:
        return limit
    # Widths are rounded up, so a long side may become as short as one that turns: that one counts.
    return max((after[side] for side, size in before.items() if size <= limit), default=1)


def _phases(config: Config, train: TrainConfig) -> dict[str, Any]:
    """Return warm-up and decay in samples, the same shares of ``train`` as of the whole run, where
    ``config`` gives samples."""
    optimizer = config.optimizer
    shares = optimizer.warmup_samples is None and optimizer.decay_samples is None
    if shares and optimizer.lr_decay_style not in ("inverse_square_root", "linear"):
        return {}  # these two round a share to whole sequences, of which few steps have few
    before = samples_before(config.train, config.train.steps)
    after = samples_before(train, train.steps)
    whole = phases_of(optimizer, before)
    warmup = round(whole.warmup * after / before)
    if whole.warmup and optimizer.lr_decay_style == "inverse_square_root":
        warmup = max(warmup, 1)  # it falls from there
    return {
        "warmup_samples": warmup,
        "decay_samples": max(round(whole.end * after / before), warmup + 1),
    }


def _train(config: Config, parts: Parts, length: int) -> TrainConfig:
    """Return the training of the small copy: batch, ramp, stages and steps."""
    train = config.train
    pipeline = config.mesh.pipe > 1
    micro = train.micro_batch_size and min(train.micro_batch_size, 2)
    unit = (micro or 1) * parts.rows
    sizes = small.sizes_of(config.mesh)
    before = (train.micro_batch_size or train.global_batch_size) * (
        1 if config.mesh.data == -1 else row_shards(sizes)
    )
    # Two where micro-batches are added up; twice the stages in a pipeline.
    number = 2 if micro is None or before < train.global_batch_size else 1
    if pipeline:
        number = 2 * parts.pipe
    if train.rampup_batch_size:
        number = max(number, 2)
    batch = up_to(max(number * unit, 2 * config.optimizer.rows_of_unit), number * unit)
    ramp = (unit, unit, batch) if train.rampup_batch_size else None
    # Of one device's micro-batch more than one chunk is left, as in the large run.
    tokens = (micro or number) * length
    set_back = {name: getattr(TrainConfig, name) for name in _SET_BACK}
    if not lora.used(config):
        set_back["init"] = ""
    return dataclasses.replace(
        train,
        steps=STEPS,
        global_batch_size=batch,
        micro_batch_size=micro,
        rampup_batch_size=ramp,
        stages=tuple(dataclasses.replace(stage, blend=()) for stage in train.stages),
        loss_chunk=3 * tokens // 4,
        **set_back,
    )


def _teacher(config: Config, copied: Config, parts: Parts) -> ModelConfig | None:
    """Return the small copy of the model that the stages distill from; None without one."""
    folders = [stage.distill for stage in config.train.stages if stage.distill]
    if not folders:
        return None
    model = config.model
    try:
        found = config_of(folders[0])
        model = model if found is None else found.model
    except (OSError, ValueError):
        pass  # no run is there yet: a teacher of the student's kind
    model = small_model(dataclasses.replace(config, model=model), parts)
    # It reads the student's rows.
    same = ("vocab_size", "vocab_padding", "max_position_embeddings", "prefix")
    return dataclasses.replace(model, **{name: getattr(copied.model, name) for name in same})


def _notes(
    config: Config, copied: Config, found: list[Sizes], teacher: ModelConfig | None
) -> list[str]:
    """Return what was shrunk, and what was replaced."""
    old = config.model
    new = copied.model
    before = small.text_of({**small.sizes_of(config.mesh), "data": max(1, config.mesh.data)})
    if config.mesh.data == -1:
        before = f"data -1{'' if before == 'one device' else f' x {before}'}"
    notes = [
        f"mesh    {before} -> {'; '.join(map(small.text_of, found))}",
        f"model   {_shape(config)} -> {_shape(copied)}",
        f"batch   {config.train.global_batch_size} -> {copied.train.global_batch_size} rows, "
        f"micro-batches of {copied.train.micro_batch_size or 'a shard'}; {STEPS} steps",
    ]
    if old.moe.num_moe_experts:
        notes.append(
            f"experts {old.moe.num_moe_experts} -> {new.moe.num_moe_experts}, of which a token "
            f"visits {new.moe.moe_router_topk}"
        )
    if len(old.layer_pattern) > len(new.layer_pattern):
        notes.append(
            f"pattern {len(old.layer_pattern)} layers -> one of each of {len(new.layer_pattern)} "
            "kinds"
        )
    if old.attention_impl != new.attention_impl:
        notes.append(f"kernel  model.attention_impl={old.attention_impl} -> auto, as CPUs have")
    if lora.used(config):
        notes.append("base    random parameters in place of train.init, and adapters away from 0")
    if copied.optimizer.max_precond_dim != config.optimizer.max_precond_dim:
        notes.append(
            f"SOAP    max_precond_dim {config.optimizer.max_precond_dim} -> "
            f"{copied.optimizer.max_precond_dim}: longer sides of a matrix are not turned"
        )
    if teacher is not None:
        folders = dict.fromkeys(stage.distill for stage in config.train.stages if stage.distill)
        which = f", in place of {len(folders)}: of the first one" if len(folders) > 1 else ""
        notes.append(
            f"teacher {teacher.num_layers} layers of width {teacher.hidden_size}, with random "
            f"parameters{which}"
        )
    if config.optimizer.private:
        notes.append("privacy noise of dp_noise_multiplier, or of 1 where an epsilon decides it")
    if config.optimizer.private and new.prefix.positions:
        notes.append("prefix  rows of text alone: samples of differential privacy have none here")
    if len(found) > 1:
        pairs = ", ".join(small.covered_pairs(found))
        notes.append(f"pairs   {pairs}: each on one of {len(found)} meshes")
    return notes


def _shape(config: Config) -> str:
    model = config.model
    heads = f"{model.num_attention_heads} heads"
    if model.kv_heads != model.num_attention_heads:
        heads += f" on {model.kv_heads}"
    return (
        f"{model.num_layers} layers, width {model.hidden_size}, {heads}, rows of "
        f"{config.sequence_length}"
    )
