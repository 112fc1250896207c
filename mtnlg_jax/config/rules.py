"""Rules that span several fields of a config. The range and the choices of a single field are in
`schema`, the rules of decoding in `decode_rules`."""

import dataclasses
import math

from mtnlg_jax.config.checks import (
    Rules,
    check_fields,
    check_rules,
    must_divide,
    near_divisors,
    one_of,
    refuse_changed,
    within,
)
from mtnlg_jax.config.coerce import coerce
from mtnlg_jax.config.decode_rules import validate_decode
from mtnlg_jax.config.memory_rules import check_memory
from mtnlg_jax.config.model import BIASES, ModelConfig
from mtnlg_jax.config.privacy_rules import check_privacy
from mtnlg_jax.config.schedule_rules import check_schedule
from mtnlg_jax.config.schema import Config, StageConfig
from mtnlg_jax.config.spike_rules import check_spikes
from mtnlg_jax.config.watching_rules import check_watching


def _ring_cannot(model: ModelConfig) -> bool:
    return (
        any(spec.window is not None for spec in model.layer_pattern)
        or model.position_embedding_type == "alibi"
        or model.attention_sink
    )


_RULES: Rules = (
    (
        lambda c: c.mesh.schedule == "1f1b" and c.mesh.virtual_pipe > 1,
        "mesh.schedule=1f1b runs each stage once, not mesh.virtual_pipe={c.mesh.virtual_pipe} "
        "times; set it to 1, or mesh.schedule=circular",
    ),
    (
        lambda c: c.mesh.expert > 1 and not c.model.moe.num_moe_experts,
        "mesh.expert={c.mesh.expert} splits experts, and this model has none "
        "(model.moe.num_moe_experts=0); set mesh.expert=1 and raise mesh.data",
    ),
    (
        lambda c: c.mesh.pipe > 1 and c.train.micro_batch_size is None,
        "mesh.pipe={c.mesh.pipe} needs train.micro_batch_size, since a pipeline takes "
        "micro-batches; set it so that each data shard has {c.mesh.pipe} or more",
    ),
    (
        lambda c: (
            c.mesh.pipe > 1
            and c.mesh.schedule == "circular"
            and c.mesh.flush is None
            and c.train.rampup_batch_size
        ),
        "train.rampup_batch_size with mesh.schedule=circular needs mesh.flush, the micro-batches "
        "taken at a time, a multiple of mesh.pipe={c.mesh.pipe}; without it small batches cost as "
        "much as the largest. Or set mesh.schedule=1f1b",
    ),
    (
        lambda c: (
            c.model.position_embedding_type == "learned"
            and c.sequence_length > c.model.max_position_embeddings
        ),
        "data.sequence_length={c.sequence_length} is longer than "
        "model.max_position_embeddings={c.model.max_position_embeddings}; raise that, shorten the "
        "sequence, or set model.position_embedding_type=rotary",
    ),
    (
        lambda c: c.sequence_length < c.model.prefix.positions + 2,
        "data.sequence_length={c.sequence_length} holds the {c.model.prefix.positions} positions "
        "of model.prefix and the text; set it to more",
    ),
    (
        lambda c: c.data.path and c.data.blend,
        "data.path and data.blend are both set; keep one of them",
    ),
    (
        lambda c: c.data.masking.mask_share + c.data.masking.random_share > 1 + 1e-9,
        "data.masking.mask_share={c.data.masking.mask_share} and "
        "random_share={c.data.masking.random_share} add up to more than 1; lower one of them",
    ),
    (
        lambda c: c.train.eval_tasks and all(stage.masked == 1 for stage in c.train.stages),
        "train.eval_tasks={c.train.eval_tasks} scores texts that go on, and no stage of this run "
        "learns to continue a text (masked=1 in all); add a causal stage, or leave it out",
    ),
    (
        lambda c: len(set(c.train.eval_tasks)) < len(c.train.eval_tasks),
        "train.eval_tasks={c.train.eval_tasks} names a task twice; name each once",
    ),
    (
        lambda c: c.train.near_every and not c.train.near_folder,
        "train.near_every={c.train.near_every} needs train.near_folder, a folder local to each "
        "host; name one, such as /dev/shm/mtnlg_jax, or set train.near_every=0",
    ),
    (
        lambda c: c.train.near_every and "://" in c.train.near_folder,
        "train.near_folder={c.train.near_folder} is an object store, where the checkpoints may be; "
        "name a folder local to each host, such as /dev/shm/mtnlg_jax",
    ),
    (lambda c: not c.train.stages, "train.stages is empty; give at least one StageConfig"),
    (
        lambda c: c.mesh.context > 1 and c.mesh.context_mode == "ring" and _ring_cannot(c.model),
        "mesh.context_mode=ring passes on whole keys and values, without windows, distances or "
        "sinks, which this model has; set mesh.context_mode=gather, or ulysses",
    ),
)

_LORA_RULES: Rules = (  # for lora_rank above 0
    (
        lambda c: not c.optimizer.lora_targets,
        "optimizer.lora_rank={c.optimizer.lora_rank} without optimizer.lora_targets would train "
        "nothing; name some of q, k, v, o, in, out (and gate of swiglu)",
    ),
    (
        lambda c: c.optimizer.name in ("muon", "soap"),
        "optimizer.name={c.optimizer.name} is for whole matrices, and "
        "optimizer.lora_rank={c.optimizer.lora_rank} trains factors; set optimizer.name=adamw",
    ),
    (
        lambda c: not c.train.init,
        "optimizer.lora_rank={c.optimizer.lora_rank} needs pretrained weights; give --init=RUN, or "
        "set optimizer.lora_rank=0",
    ),
    (
        lambda c: c.optimizer.lora_base != "float" and c.mesh.pipe > 1,
        "optimizer.lora_base={c.optimizer.lora_base} with mesh.pipe={c.mesh.pipe}: stages do not "
        "pass on quantized layers; set mesh.pipe=1, and raise mesh.data (mesh.zero=3) or "
        "mesh.tensor",
    ),
)


def validate(config: Config) -> None:
    """Raise ValueError if the parts of ``config`` do not fit together. The message names both
    numbers and a way out."""
    coerce(dataclasses.asdict(config), Config, "config")  # a config file can put anything anywhere
    validate_model(config.model)
    validate_decode(config.decode, standing_by=True)
    for section in ("mesh", "data", "optimizer", "train"):
        check_fields(getattr(config, section), f"{section}.")
    _check_divisors(config)
    check_rules(_RULES, config)
    for blend in (config.data.blend, *(stage.blend for stage in config.train.stages)):
        for path, weight in blend:
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(
                    f"blend weight {weight} of {path!r} must be finite and above 0; leave the "
                    "source out instead"
                )
    for stage in config.train.stages:
        _check_stage(stage, config)
    _check_lora(config)
    if config.optimizer.name != "soap":
        why = f"is for soap, and optimizer.name={config.optimizer.name}; set that to soap"
        of_soap = ("precondition_frequency", "max_precond_dim")
        refuse_changed(config.optimizer, of_soap, why, "optimizer.")
    if not config.train.eval_tasks:
        why = "is for tasks, and train.eval_tasks names none; name some"
        keys = ("eval_tasks_every", "eval_tasks_rows", "eval_tasks_fewshot", "eval_tasks_data")
        refuse_changed(config.train, keys, why, "train.")
    check_privacy(config)
    check_memory(config)
    check_spikes(config)
    check_watching(config)
    data = 1 if config.mesh.data == -1 else config.mesh.data
    validate_batch(config, data * config.mesh.expert)
    # It counts the samples of the ramp, which is sound by now.
    check_schedule(config)


def _check_divisors(config: Config) -> None:
    model = config.model
    mesh = config.mesh
    if mesh.data != -1:
        within("mesh.data", mesh.data, 1, 2**20)
    # Fewer key/value heads than parts are replicated.
    heads = model.kv_heads if mesh.tensor % model.kv_heads else mesh.tensor
    split_by_tensor = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": heads,
        "model.ffn_hidden_size": model.mlp_width,
    }
    for name, number in split_by_tensor.items():
        must_divide(name, number, "mesh.tensor", mesh.tensor)
    experts = model.moe.num_moe_experts
    must_divide("model.moe.num_moe_experts", experts, "mesh.expert", mesh.expert)
    if model.vocab_size is not None and model.vocabulary % mesh.tensor:
        padding = model.padded(mesh.tensor).vocab_padding
        raise ValueError(
            f"mesh.tensor={mesh.tensor} does not divide the {model.vocabulary} rows of the "
            f"vocabulary (model.vocab_size={model.vocab_size}, "
            f"model.vocab_padding={model.vocab_padding}); try --set=model.vocab_padding={padding}, "
            f"or mesh.tensor={near_divisors(model.vocabulary, mesh.tensor)}"
        )
    chunks = "mesh.pipe x mesh.virtual_pipe" if mesh.virtual_pipe > 1 else "mesh.pipe"
    must_divide("model.num_layers", model.num_layers, chunks, mesh.pipe * mesh.virtual_pipe)
    if mesh.pipe > 1:
        layers = model.num_layers // (mesh.pipe * mesh.virtual_pipe)
        period = len(model.layer_pattern)
        if layers % period:
            raise ValueError(
                f"a pipeline stage holds whole periods of model.layer_pattern, and {layers} layers "
                f"({chunks}={mesh.pipe * mesh.virtual_pipe}) are not a multiple of its length "
                f"{period}; lower {chunks}, or set mesh.pipe=1"
            )
    must_divide("mesh.flush", mesh.flush or 0, "mesh.pipe", mesh.pipe)
    if mesh.context_mode == "ulysses":
        heads = max(1, model.kv_heads // mesh.tensor)
        must_divide("model.num_query_groups / mesh.tensor", heads, "mesh.context", mesh.context)
    parts = mesh.context * mesh.tensor
    name = "mesh.context x mesh.tensor"
    if mesh.context > 1 and mesh.tensor % 2:  # each device has two chunks of the sequence
        parts = 2 * parts
        name = "2 x " + name
    must_divide("data.sequence_length", config.sequence_length, name, parts)


def _check_stage(stage: StageConfig, config: Config) -> None:
    prefix = f"stage {stage.name!r}: "
    check_fields(stage, prefix)
    if not stage.distill:
        why = "is for a teacher, and distill names none; set distill to the folder of a run"
        refuse_changed(stage, ("distill_temperature", "distill_weight"), why, prefix)
    elif config.mesh.pipe > 1:
        raise ValueError(
            f"{prefix}distill={stage.distill} with mesh.pipe={config.mesh.pipe}: a teacher does "
            "not run in a pipeline; set mesh.pipe=1 and raise mesh.data, mesh.tensor or mesh.zero"
        )


def _check_lora(config: Config) -> None:
    model = config.model
    optimizer = config.optimizer
    query = model.num_attention_heads * model.head_width
    kv = model.kv_heads * model.head_width
    mlp = model.mlp_width
    widths = {"q": query, "k": kv, "v": kv, "o": query, "in": mlp, "gate": mlp, "out": mlp}
    if not model.gated:
        del widths["gate"]
    for target in optimizer.lora_targets:
        one_of("optimizer.lora_targets", target, tuple(widths))
        narrow = min(model.hidden_size, widths[target])
        if optimizer.lora_rank > narrow:
            raise ValueError(
                f"optimizer.lora_rank={optimizer.lora_rank} is above the rank of matrix "
                f"{target!r}, {model.hidden_size} x {widths[target]}; set it to {narrow} or less, "
                "often 4 to 64"
            )
    if optimizer.lora_rank:
        check_rules(_LORA_RULES, config)
    else:
        why = "is for low-rank adaptation, and optimizer.lora_rank=0 turns it off; set that to 8"
        keys = ("lora_targets", "lora_alpha", "lora_base")
        refuse_changed(optimizer, keys, why, "optimizer.")


def _check_blocks(config: Config, data_size: int) -> None:
    """Check that each device's part of a matrix in NF4 has whole blocks along its inputs."""
    if not config.optimizer.lora_rank or config.optimizer.lora_base != "nf4":
        return
    model = config.model
    split = data_size if config.mesh.zero else 1
    for what, size, axis, parts in (
        ("model.hidden_size", model.hidden_size, "mesh.data", split),
        (
            "model.num_attention_heads x head width",
            model.num_attention_heads * model.head_width,
            "mesh.tensor",
            config.mesh.tensor,
        ),
        ("model.ffn_hidden_size", model.mlp_width, "mesh.tensor", config.mesh.tensor),
    ):
        if size % (64 * parts):
            ways = "set optimizer.lora_base=int8"
            if parts > 1:
                whole = f"lower {axis}" + (", or set mesh.zero=0" if axis == "mesh.data" else "")
                ways = f"{whole}, or {ways}"
            raise ValueError(
                f"optimizer.lora_base=nf4 has blocks of 64 inputs, and {what}={size} over "
                f"{axis}={parts} is not a multiple of them; {ways}"
            )


def validate_batch(config: Config, data_size: int) -> None:
    """Raise ValueError if a batch, of the ramp or after it, does not split evenly over
    ``data_size`` parts, those of mesh.data x mesh.expert."""
    _check_blocks(config, data_size)
    train = config.train
    micro = train.micro_batch_size
    sizes = {"train.global_batch_size": train.global_batch_size}
    if train.rampup_batch_size:
        start, increment, samples = train.rampup_batch_size
        ramp = {
            "train.rampup_batch_size start": start,
            "train.rampup_batch_size increment": increment,
        }
        for name, size in ramp.items():
            within(name, size, 1, train.global_batch_size)
        within("train.rampup_batch_size samples", samples, 0, 2**62)
        growth = train.global_batch_size - start
        must_divide("train.global_batch_size - start", growth, "increment", increment)
        if micro is None:
            raise ValueError(
                "train.rampup_batch_size needs train.micro_batch_size, since the ramp adds "
                "micro-batches; set it"
            )
        sizes |= ramp
    unit = (micro or 1) * data_size
    name = "mesh.data x mesh.expert" if config.mesh.expert > 1 else "mesh.data"
    name = f"train.micro_batch_size x {name}" if micro else name
    for what, size in sizes.items():
        if size % unit:
            near = [str(rounds * unit) for rounds in (size // unit, size // unit + 1) if rounds]
            raise ValueError(
                f"{what}={size} is not divisible by {name}={unit}; try {' or '.join(near)}"
            )


def _check_rope(model: ModelConfig) -> None:
    scaling = model.rope_scaling
    if scaling.rope_type in ("llama3", "yarn", "longrope"):
        if not scaling.original_max_position_embeddings:
            raise ValueError(
                f"model.rope_scaling.rope_type={scaling.rope_type} needs "
                "model.rope_scaling.original_max_position_embeddings, the context of pretraining; "
                "set it"
            )
    if scaling.rope_type == "longrope":
        for name in ("short_factor", "long_factor"):
            number = len(getattr(scaling, name))
            if number != model.rotary_width // 2:
                raise ValueError(
                    f"model.rope_scaling.{name} has {number} factors, and "
                    f"{model.rotary_width} dims of a head rotate; give {model.rotary_width // 2}"
                )


_MODEL_RULES: Rules = (
    (
        lambda m: m.parallel_residual != "none" and m.norm_placement != "pre",
        "model.parallel_residual={c.parallel_residual} with "
        "model.norm_placement={c.norm_placement}: attention and MLP side by side read normed "
        "inputs; set model.norm_placement=pre, or model.parallel_residual=none",
    ),
    (
        lambda m: m.attention_sink and m.attention_impl == "cudnn",
        "model.attention_sink needs the log-sum-exp, which model.attention_impl=cudnn does not "
        "give; set it to auto",
    ),
    (
        lambda m: (m.mup_base_hidden_size or 0) > m.hidden_size,
        "model.mup_base_hidden_size={c.mup_base_hidden_size} is wider than "
        "model.hidden_size={c.hidden_size}; give the width of a smaller model, at which the "
        "learning rate was found, or None",
    ),
    (
        lambda m: (m.mup_base_kv_channels or 0) > m.head_width,
        "model.mup_base_kv_channels={c.mup_base_kv_channels} is wider than a head of this model, "
        "{c.head_width}; give the head width of the base model, or None",
    ),
    (
        lambda m: m.mup_base_kv_channels and not m.mup_base_hidden_size,
        "model.mup_base_kv_channels={c.mup_base_kv_channels} is for muP, and "
        "model.mup_base_hidden_size=None turns it off; set that too",
    ),
    (
        lambda m: m.moe.num_moe_experts and m.moe.moe_router_topk > m.moe.num_moe_experts,
        "model.moe.moe_router_topk={c.moe.moe_router_topk} is above "
        "model.moe.num_moe_experts={c.moe.num_moe_experts}; lower it",
    ),
)


# c.length and c.image_size are 0 in a model of text alone.
_PREFIX_RULES: Rules = (
    (
        lambda c: c.length and c.image_size,
        "model.prefix.length={c.length} is for features, and model.prefix.image_size="
        "{c.image_size} takes a position for each patch; set one of the two to 0",
    ),
    (
        lambda c: (c.length or c.image_size) and not c.width,
        "model.prefix.width=0 leaves the prefix no numbers; set it to the width of the features, "
        "or of the patch encoder, such as 64",
    ),
    (
        lambda c: c.width and not (c.length or c.image_size),
        "model.prefix.width={c.width} without positions: set model.prefix.length, or "
        "model.prefix.image_size, or model.prefix.width=0",
    ),
)


def _check_prefix(model: ModelConfig) -> None:
    prefix = model.prefix
    check_rules(_PREFIX_RULES, prefix)
    must_divide(
        "model.prefix.image_size", prefix.image_size, "model.prefix.patch_size", prefix.patch_size
    )
    # A <bos> and a token to predict.
    if prefix.positions > model.max_position_embeddings - 2:
        raise ValueError(
            f"model.prefix takes {prefix.positions} positions of model.max_position_embeddings="
            f"{model.max_position_embeddings}, which leaves no room for a text; raise that"
        )


def validate_model(model: ModelConfig) -> None:
    check_fields(model, "model.")
    heads = model.num_attention_heads
    if model.kv_channels is None:
        must_divide("model.hidden_size", model.hidden_size, "model.num_attention_heads", heads)
    must_divide("model.num_attention_heads", heads, "model.num_query_groups", model.kv_heads)
    if model.position_embedding_type == "rotary" and not model.rotary_width:
        raise ValueError(
            f"model.rotary_percent={model.rotary_percent} of a head width of {model.head_width} "
            "leaves no pair of dims to rotate; raise it, or set model.kv_channels"
        )
    if model.position_embedding_type == "rotary" and model.head_width % 2:
        raise ValueError(
            f"rotary positions need an even head width, not {model.head_width}; set "
            "model.kv_channels"
        )
    if not model.layer_pattern:
        raise ValueError("model.layer_pattern is empty; give at least one LayerSpec")
    for number, spec in enumerate(model.layer_pattern):
        check_fields(spec, f"model.layer_pattern[{number}].")
    for name in model.bias or ():
        one_of("model.bias", name, BIASES)
    _check_rope(model)
    _check_prefix(model)
    check_rules(_MODEL_RULES, model)
