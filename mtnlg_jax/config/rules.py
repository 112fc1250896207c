"""What the fields of a config ask of each other. Ranges and choices of a single field stand in
`schema`."""

import dataclasses
import math
import typing
from collections.abc import Iterable

from mtnlg_jax.config.checks import check_fields, must_divide, one_of, within
from mtnlg_jax.config.coerce import coerce, hints_of
from mtnlg_jax.config.schema import (
    Config,
    DecodeConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)


def validate(config: Config) -> None:
    """Raises ValueError, naming both numbers and a way out, where the parts of ``config`` do not
    fit."""
    coerce(dataclasses.asdict(config), Config, "config")  # a config file can put anything anywhere
    validate_model(config.model)
    validate_decode(config.decode, standing_by=True)
    for section in ("mesh", "data", "optimizer", "train"):
        check_fields(getattr(config, section), f"{section}.")
    _validate_mesh(config)
    _validate_data(config)
    optimizer = config.optimizer
    if optimizer.decay_fraction <= optimizer.warmup_fraction:
        raise ValueError(
            f"optimizer.decay_fraction={optimizer.decay_fraction} lies outside "
            f"({optimizer.warmup_fraction}, inf): the decay ends after optimizer.warmup_fraction"
        )
    if not config.train.stages:
        raise ValueError("train.stages is empty; give at least one StageConfig")
    for stage in config.train.stages:
        name = f"stage {stage.name!r}:"
        check_fields(stage, f"{name} ")
        _validate_distillation(name, stage, config.mesh)
    _validate_lora(optimizer, config.model, config.train)
    validate_batch(config, 1 if config.mesh.data == -1 else config.mesh.data)


def _validate_mesh(config: Config) -> None:
    model = config.model
    mesh = config.mesh
    train = config.train
    if mesh.data != -1:
        within("mesh.data", mesh.data, 1, 2**20)
    must_divide("model.num_attention_heads", model.num_attention_heads, "mesh.tensor", mesh.tensor)
    must_divide("model.num_query_groups", model.kv_heads, "mesh.tensor", mesh.tensor)
    must_divide("model.ffn_hidden_size", model.mlp_width, "mesh.tensor", mesh.tensor)
    if model.vocab_size is not None:
        must_divide("model.vocab_size", model.vocab_size, "mesh.tensor", mesh.tensor)
    if mesh.schedule == "1f1b" and mesh.virtual_pipe > 1:
        raise ValueError(
            f"mesh.schedule=1f1b passes each stage once, not mesh.virtual_pipe={mesh.virtual_pipe} "
            "times; set it to 1, or mesh.schedule=circular"
        )
    name = "mesh.pipe x mesh.virtual_pipe" if mesh.virtual_pipe > 1 else "mesh.pipe"
    must_divide("model.num_layers", model.num_layers, name, mesh.pipe * mesh.virtual_pipe)
    if mesh.flush is not None:
        must_divide("mesh.flush", mesh.flush, "mesh.pipe", mesh.pipe)
    if mesh.context_mode == "ulysses":
        must_divide(
            "model.num_query_groups / mesh.tensor",
            model.kv_heads // mesh.tensor,
            "mesh.context",
            mesh.context,
        )
    if mesh.pipe > 1 and train.micro_batch_size is None:
        raise ValueError(
            f"mesh.pipe={mesh.pipe} needs train.micro_batch_size: a pipeline is fed micro-batches; set it "
            f"so that each data shard has {mesh.pipe} or more"
        )
    if (
        mesh.pipe > 1
        and mesh.schedule == "circular"
        and mesh.flush is None
        and train.rampup_batch_size
    ):
        raise ValueError(
            "train.rampup_batch_size with mesh.schedule=circular needs mesh.flush, the micro-batches "
            f"taken at a time, a multiple of mesh.pipe={mesh.pipe}; without it small batches cost as much "
            "as the largest. Or set mesh.schedule=1f1b"
        )


def _validate_data(config: Config) -> None:
    model = config.model
    mesh = config.mesh
    data = config.data
    if (
        model.position_embedding_type == "learned"
        and config.sequence_length > model.max_position_embeddings
    ):
        raise ValueError(
            f"data.sequence_length={config.sequence_length} is longer than "
            f"model.max_position_embeddings={model.max_position_embeddings}; raise that, shorten the "
            f"sequence, or set model.position_embedding_type=rotary"
        )
    places = mesh.context * mesh.tensor
    name = "mesh.context x mesh.tensor"
    if mesh.context > 1 and mesh.tensor % 2:  # two chunks a device
        places = 2 * places
        name = "2 x " + name
    must_divide("data.sequence_length", config.sequence_length, name, places)
    if data.path and data.blend:
        raise ValueError("data.path and data.blend are both set; keep one of them")
    for blend in (data.blend, *(stage.blend for stage in config.train.stages)):
        for path, weight in blend:
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(
                    f"blend weight {weight} of {path!r} must be above 0; leave the source out instead"
                )
    masking = data.masking
    if masking.mask_share + masking.random_share > 1 + 1e-9:
        raise ValueError(
            f"data.masking.mask_share={masking.mask_share} and random_share={masking.random_share} add up to "
            f"more than 1; lower one of them"
        )


def _validate_distillation(name: str, stage: StageConfig, mesh: MeshConfig) -> None:
    for key in ("distill_temperature", "distill_weight"):
        if not stage.distill and getattr(stage, key) != getattr(StageConfig, key):
            raise ValueError(
                f"{name} {key}={getattr(stage, key)} is for a teacher, and distill names none; set it to "
                "the folder of a run, or leave this out"
            )
    if stage.distill and mesh.pipe > 1:
        raise ValueError(
            f"{name} distill={stage.distill} with mesh.pipe={mesh.pipe}: the teacher's layers pass "
            "through no pipeline; set mesh.pipe=1 and raise mesh.data, mesh.tensor or mesh.zero"
        )


def _validate_lora(optimizer: OptimizerConfig, model: ModelConfig, train: TrainConfig) -> None:
    rank = optimizer.lora_rank
    query = model.num_attention_heads * model.head_width
    kv = model.kv_heads * model.head_width
    mlp = model.mlp_width
    widths = {"q": query, "k": kv, "v": kv, "o": query, "in": mlp, "gate": mlp, "out": mlp}
    if model.activation != "swiglu":
        del widths["gate"]
    for target in optimizer.lora_targets:
        one_of("optimizer.lora_targets", target, tuple(widths))
    if rank == 0:
        for key in ("lora_targets", "lora_alpha"):
            if getattr(optimizer, key) != getattr(OptimizerConfig, key):
                raise ValueError(
                    f"optimizer.{key}={getattr(optimizer, key)} is for low-rank adaptation, and "
                    "optimizer.lora_rank=0 is none; set that to 8, or leave this out"
                )
        return
    if not optimizer.lora_targets:
        raise ValueError(
            f"optimizer.lora_rank={rank} with no optimizer.lora_targets would learn nothing; name some of "
            f"{', '.join(widths)}"
        )
    for target in optimizer.lora_targets:
        narrow = min(model.hidden_size, widths[target])
        if rank > narrow:
            raise ValueError(
                f"optimizer.lora_rank={rank} is above the rank of matrix {target!r}, "
                f"{model.hidden_size} x {widths[target]}; set it to {narrow} or less, mostly 4 to 64"
            )
    if optimizer.name != "adamw":
        raise ValueError(
            f"optimizer.name={optimizer.name} is for whole matrices, and optimizer.lora_rank={rank} "
            "learns factors; set optimizer.name=adamw"
        )
    if not train.init:
        raise ValueError(
            f"optimizer.lora_rank={rank} without a start would freeze parameters that know nothing; give "
            "--init=RUN, or optimizer.lora_rank=0"
        )


def validate_batch(config: Config, data_size: int) -> None:
    """The batch against a data axis of ``data_size``: every batch of the ramp must split evenly."""
    train = config.train
    micro = train.micro_batch_size
    unit = (micro or 1) * data_size
    name = "train.micro_batch_size x mesh.data" if micro else "mesh.data"
    sizes = {"train.global_batch_size": train.global_batch_size}
    if train.rampup_batch_size:
        start, increment, samples = train.rampup_batch_size
        within("train.rampup_batch_size start", start, 1, train.global_batch_size)
        within("train.rampup_batch_size increment", increment, 1, train.global_batch_size)
        within("train.rampup_batch_size samples", samples, 0, 2**62)
        growth = train.global_batch_size - start
        must_divide("train.global_batch_size - start", growth, "increment", increment)
        if micro is None:
            raise ValueError(
                "train.rampup_batch_size needs train.micro_batch_size: the ramp adds micro-batches; set it"
            )
        sizes |= {
            "train.rampup_batch_size start": start,
            "train.rampup_batch_size increment": increment,
        }
    for what, size in sizes.items():
        if size % unit:
            near = [str(rounds * unit) for rounds in (size // unit, size // unit + 1) if rounds]
            raise ValueError(
                f"{what}={size} does not divide by {name}={unit}; try {' or '.join(near)}"
            )


def validate_model(model: ModelConfig) -> None:
    check_fields(model, "model.")
    heads = model.num_attention_heads
    if model.kv_channels is None:
        must_divide("model.hidden_size", model.hidden_size, "model.num_attention_heads", heads)
    must_divide("model.num_attention_heads", heads, "model.num_query_groups", model.kv_heads)
    if model.position_embedding_type == "rotary" and model.head_width % 2:
        raise ValueError(
            f"rotary positions need an even head width, not {model.head_width}; set model.kv_channels"
        )


def validate_decode(decode: DecodeConfig, standing_by: bool = False) -> None:
    """Raises ValueError on a setting that is out of range, contradicts another one, or cannot act
    beside the others; with ``standing_by``, for the settings of a run, the last of these may wait
    until others let them act: ``acting``.
    """
    for key, kind in hints_of(DecodeConfig).items():
        if typing.get_origin(kind) is tuple:
            coerce(getattr(decode, key), kind, key)
    check_fields(decode)
    within("min_new_tokens", decode.min_new_tokens, 0, decode.max_new_tokens)
    if "" in decode.stop_strings:
        raise ValueError("a stop string is empty; leave it out")
    for key in ("bad_words_ids", "stop_sequences"):
        if () in getattr(decode, key):
            raise ValueError(f"{key} has a sequence without tokens; leave it out")
    if any(not tokens for tokens, _ in decode.sequence_bias):
        raise ValueError("sequence_bias has a sequence without tokens; leave it out")
    for what, bias in (*decode.logit_bias, *decode.sequence_bias):
        within(f"the bias of {what}", bias, -math.inf, math.inf, high_open=True)
    for index, _ in decode.forced_tokens:
        within("forced_tokens, which new token", index, 0, decode.max_new_tokens, high_open=True)
    forced = {
        decode.forced_bos_token_id,
        decode.forced_eos_token_id,
        *(token for _, token in decode.forced_tokens),
    }
    if both := sorted(forced & set(decode.suppress_tokens)):
        raise ValueError(
            f"token {both[0]} is both forced and in suppress_tokens; take it out of one of them"
        )
    if standing_by:
        decode = acting(decode)
    _validate_beams(decode)
    _validate_rows(decode)


# What only draws, and what only orders beams.
SAMPLING_LIMITS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAM_ORDER = (
    "length_penalty",
    "length_penalty_type",
    "early_stopping",
    "num_beam_groups",
    "diversity_penalty",
)


def acting(decode: DecodeConfig, kept: Iterable[str] = ()) -> DecodeConfig:
    """``decode`` with the defaults in place of what cannot act, as top_k=50 beside temperature=0;
    such settings of a run, or of a generation_config.json, wait for a temperature. ``kept`` names
    settings that stay as they are, since
    somebody asked for them: ``validate_decode`` then refuses those that cannot act."""
    idle = set()
    if decode.temperature == 0:
        idle |= {*SAMPLING_LIMITS, "seed"}
        if decode.num_beams == 1:
            idle.add("num_return_sequences")
    if decode.num_beams == 1 or decode.temperature > 0:
        idle |= set(BEAM_ORDER)
    if decode.num_beams > 1:
        idle.add("prompt_lookup_num_tokens")
    if decode.num_beams > 1 or decode.prompt_lookup_num_tokens == 0:
        idle.add("max_matching_ngram_size")
    return dataclasses.replace(
        decode, **{name: getattr(DecodeConfig, name) for name in idle - set(kept)}
    )


def _validate_rows(decode: DecodeConfig) -> None:
    """What cannot act on rows, or guess for them."""
    if decode.temperature == 0:
        what = "greedy decoding" if decode.num_beams == 1 else "beam search"
        for key in (*SAMPLING_LIMITS, "seed"):
            if getattr(decode, key) != getattr(DecodeConfig, key):
                raise ValueError(
                    f"{key}={getattr(decode, key)} acts on what is drawn, and {what} at temperature=0 "
                    f"draws nothing; set temperature above 0 to sample, or leave {key} out"
                )
        if decode.num_beams == 1 and decode.num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences={decode.num_return_sequences} (--n) at temperature=0 would write "
                "the same text that many times; set temperature above 0 to sample, or num_beams, or ask "
                "for 1"
            )
    if (
        decode.prompt_lookup_num_tokens == 0
        and decode.max_matching_ngram_size != DecodeConfig.max_matching_ngram_size
    ):
        raise ValueError(
            f"max_matching_ngram_size={decode.max_matching_ngram_size} is what is looked up to guess "
            "tokens, and prompt_lookup_num_tokens=0 guesses none; set that to 5, or leave this out"
        )


def _validate_beams(decode: DecodeConfig) -> None:
    beams = decode.num_beams
    groups = decode.num_beam_groups
    must_divide("num_beams", beams, "num_beam_groups", groups)
    if groups > 1 and decode.diversity_penalty == 0:
        raise ValueError(
            f"num_beam_groups={groups} with diversity_penalty=0 would write the same {groups} times; set "
            "diversity_penalty above 0, or num_beam_groups=1"
        )
    if groups == 1 and decode.diversity_penalty > 0:
        raise ValueError(
            f"diversity_penalty={decode.diversity_penalty} acts between groups, and num_beam_groups=1; "
            "set num_beam_groups to a divisor of num_beams above 1, or diversity_penalty=0"
        )
    off = DecodeConfig
    changed = [
        f"{key}={getattr(decode, key)}"
        for key in BEAM_ORDER
        if getattr(decode, key) != getattr(off, key)
    ]
    if beams == 1:
        if changed:
            raise ValueError(
                f"{changed[0]} acts on beams alone, and num_beams=1; set num_beams above 1, or "
                "leave it out"
            )
        return
    if decode.prompt_lookup_num_tokens:
        raise ValueError(
            f"prompt_lookup_num_tokens={decode.prompt_lookup_num_tokens} guesses how one row goes on, "
            f"and num_beams={beams} beams go on in several ways; set one of them to its default (0, 1)"
        )
    if decode.num_return_sequences > beams:
        raise ValueError(
            f"num_return_sequences={decode.num_return_sequences} is above num_beams={beams}; raise "
            f"num_beams, or ask for at most {beams}"
        )
    if decode.stop_strings:
        raise ValueError(
            f"stop_strings are not known while num_beams={beams} beams are chosen; give stop_sequences "
            "(tokens), or num_beams=1"
        )
    limits = [
        f"{key}={getattr(decode, key)}"
        for key in SAMPLING_LIMITS
        if getattr(decode, key) != getattr(off, key)
    ]
    if decode.temperature == 0 and limits:
        raise ValueError(
            f"{limits[0]} limits what is drawn, and beam search at temperature=0 draws nothing; leave it "
            "out, or set temperature above 0 for stochastic beams"
        )
    if decode.temperature > 0 and changed:
        raise ValueError(
            f"{changed[0]} orders the beams of a search, and temperature={decode.temperature} draws them; "
            "leave it out, or set temperature=0"
        )
