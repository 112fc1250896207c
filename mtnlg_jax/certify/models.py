"""Bring a model down to widths that a CPU computes in seconds, with all of its switches.

What the meshes split stays divisible and splits in the same way: heads that tensor does not split,
attention that exchanges heads over context, whole periods of the layer pattern on a stage.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

from mtnlg_jax.certify.meshes import Sizes
from mtnlg_jax.config import Config, LayerSpec, MeshConfig, ModelConfig, MoEConfig, PrefixConfig
from mtnlg_jax.config.memory_rules import width_block

VOCABULARY = 300  # tokens of the tokenizer of the small data
LENGTH = 32  # fewest tokens in a row
_WIDTH = 32  # smallest width of the residual stream
_BLOCK = 64  # inputs of a block of NF4
_LONG_PATTERN = 8  # layers; of a longer pattern each kind of layer stays once
_KERNELS = ("pallas_tpu", "pallas_gpu", "cudnn")


class Parts(NamedTuple):
    """Parts into which the meshes of a certificate split what they share: least common multiples
    over all of them."""

    pipe: int
    data: int
    rows: int  # data x expert
    expert: int
    context: int
    tensor: int
    compared: int  # tensor, of the meshes that loss and gradients are computed on


def parts_of(compared: list[Sizes], other: Sizes | None = None) -> Parts:
    """Return the parts of the meshes that are ``compared`` and of the ``other`` one, to which a run
    moves."""
    meshes = compared if other is None else [*compared, other]

    def least(meshes: list[Sizes], *axes: str) -> int:
        return math.lcm(*(math.prod(sizes[axis] for axis in axes) for sizes in meshes))

    rows = least(meshes, "data", "expert")
    pipe, data, expert, context, tensor = (
        least(meshes, axis) for axis in ("pipe", "data", "expert", "context", "tensor")
    )
    return Parts(pipe, data, rows, expert, context, tensor, least(compared, "tensor"))


def up_to(number: float, unit: int) -> int:
    """Return the smallest multiple of ``unit`` that is at least ``number`` and ``unit``."""
    return max(1, math.ceil(number / unit)) * unit


def small_length(config: Config, parts: Parts) -> int:
    """Return the tokens in a row of the small copy."""
    # Each device along context has two chunks, which tensor splits again.
    unit = 2 * parts.context * parts.tensor
    return up_to(max(LENGTH, _small_prefix(config.model.prefix).positions + 8), unit)


def small_model(config: Config, parts: Parts) -> ModelConfig:
    """Return the model of ``config`` with small sizes; all else is kept."""
    model = config.model
    blocks = _BLOCK if config.optimizer.lora_base == "nf4" else 1
    length = small_length(config, parts)
    scale = length / config.sequence_length
    heads, groups = _heads(model, config.mesh, parts)
    head = _head_width(model, heads, parts, blocks)
    while groups * head % _columns(config, parts):
        head = _head_width(model, heads, parts, blocks, head + 8)
    hidden = heads * head
    if model.kv_channels and model.kv_channels * model.num_attention_heads != model.hidden_size:
        ratio = model.hidden_size / (model.num_attention_heads * model.head_width)
        hidden = up_to(hidden * ratio, math.lcm(8, parts.rows, blocks * parts.data))
    ratio = hidden / model.hidden_size
    # The columns of SOAP's statistics of an MLP are as many as its width, and ZeRO splits them.
    unit = math.lcm(2 * blocks * parts.tensor, _columns(config, parts))

    def wide(width: int | None) -> int | None:
        return up_to(width * ratio, unit) if width else width

    def mlp(width: int | None) -> int | None:
        found = wide(width) or 4 * hidden
        if config.optimizer.moments_dtype == "int8":
            # Whole blocks for each part, as `config.memory_rules` asks.
            while not width_block(found) or found // width_block(found) % parts.tensor:
                found += unit
        return width if width is None and found == 4 * hidden else found

    def base(width: int | None, of: int, new: int) -> int | None:
        return max(1, round(width / of * new)) if width else width

    changes: dict[str, Any] = {
        "num_layers": 0,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups if model.num_query_groups else None,
        "kv_channels": head if model.kv_channels else None,
        "ffn_hidden_size": mlp(model.ffn_hidden_size),
        "mup_base_hidden_size": base(model.mup_base_hidden_size, model.hidden_size, hidden),
        "mup_base_kv_channels": base(model.mup_base_kv_channels, model.head_width, head),
        "max_position_embeddings": up_to(max(1, scale * model.max_position_embeddings), length),
        "layer_pattern": _pattern(model, length, config.sequence_length),
        "moe": _experts(model.moe, config.mesh, parts, wide),
        "prefix": _small_prefix(model.prefix),
        "rope_scaling": _rope(model, head, scale),
        "attention_impl": "auto" if model.attention_impl in _KERNELS else model.attention_impl,
        **_vocabulary(model, parts.tensor),
    }
    small = dataclasses.replace(model, **changes)
    return dataclasses.replace(small, num_layers=_layers(config, small.layer_pattern, parts))


def _heads(model: ModelConfig, mesh: MeshConfig, parts: Parts) -> tuple[int, int]:
    """Return (query heads, key/value heads) in the same ratio, split by tensor and context in the
    same way."""
    ratio = model.num_attention_heads // model.kv_heads
    whole = model.kv_heads < mesh.tensor
    each = max(1, model.kv_heads // mesh.tensor)
    exchanged = _exchanges_heads(mesh, each)
    for groups in itertools.count(1):
        fits = groups * ratio % parts.tensor == 0
        if whole:
            fits &= groups < parts.compared and parts.compared % groups == 0
            # With other sizes of tensor no number of heads may be whole.
            whole &= groups < parts.compared
        else:
            own = groups // parts.compared
            fits &= groups % parts.tensor == 0 and own >= min(each, 2 if ratio == 1 else 1)
            if parts.context > 1 and mesh.context_mode in ("auto", "ulysses"):
                fits &= (own % parts.context == 0) == exchanged
        if fits or groups > 64 * parts.tensor:
            return groups * ratio, groups
    raise AssertionError("the loop above has no end")


def _exchanges_heads(mesh: MeshConfig, heads: int) -> bool:
    """Return whether attention over context exchanges ``heads`` key/value heads of a device."""
    return mesh.context_mode == "ulysses" or (
        mesh.context_mode == "auto" and heads % mesh.context == 0
    )


def _columns(config: Config, parts: Parts) -> int:
    """Return what divides the widths of an MLP and of all key/value heads together, 1 but for
    SOAP, whose statistics ZeRO splits by columns."""
    return parts.rows if config.optimizer.name == "soap" and config.mesh.zero else 1


def _head_width(model: ModelConfig, heads: int, parts: Parts, blocks: int, least: int = 8) -> int:
    """Return the smallest width of a head, a multiple of 8 from ``least``, with which all dims
    divide."""
    for width in itertools.count(least, 8):
        hidden = heads * width
        turns = int(model.rotary_percent * width) // 2
        if model.position_embedding_type == "rotary" and not turns:
            continue
        if (
            hidden >= _WIDTH
            and hidden % math.lcm(parts.rows, blocks * parts.data, blocks * parts.tensor) == 0
        ):
            return width
    raise AssertionError("the loop above has no end")


def _layers(config: Config, pattern: tuple[LayerSpec, ...], parts: Parts) -> int:
    """Return layers: of each stage whole periods of ``pattern``, and two layers if it has them."""
    mesh = config.mesh
    period = len(pattern)
    chunks = mesh.pipe * mesh.virtual_pipe
    each = config.model.num_layers // chunks
    if parts.pipe == 1:
        return max(period, min(each, 2)) * mesh.virtual_pipe
    return parts.pipe * mesh.virtual_pipe * up_to(min(each, 2), period)


def _pattern(model: ModelConfig, length: int, before: int) -> tuple[LayerSpec, ...]:
    """Return the pattern of layers with windows in the same share of the row."""
    pattern = model.layer_pattern
    if len(pattern) > min(_LONG_PATTERN, model.num_layers):
        pattern = tuple(dict.fromkeys(pattern))

    def one(spec: LayerSpec) -> LayerSpec:
        if spec.window is None:
            return spec
        window = length if spec.window >= before else max(2, spec.window * length // before)
        return dataclasses.replace(spec, window=window)

    return tuple(map(one, pattern))


def _experts(moe: MoEConfig, mesh: MeshConfig, parts: Parts, wide: Any) -> MoEConfig:
    """Return the experts: as many on a device, and more than a token visits."""
    if not moe.num_moe_experts:
        return moe
    each = moe.num_moe_experts // mesh.expert
    experts = parts.expert * each
    if moe.moe_router_topk < moe.num_moe_experts:
        experts = max(experts, up_to(moe.moe_router_topk + 1, parts.expert))
    shared = wide(moe.moe_shared_expert_intermediate_size)
    return dataclasses.replace(
        moe, num_moe_experts=experts, moe_shared_expert_intermediate_size=shared
    )


def _small_prefix(prefix: PrefixConfig) -> PrefixConfig:
    if not prefix.positions:
        return prefix
    if not prefix.image_size:
        return dataclasses.replace(prefix, length=min(prefix.length, 4), width=8)
    side = min(prefix.image_size // prefix.patch_size, 2)
    patch = min(prefix.patch_size, 4)
    return dataclasses.replace(prefix, width=8, image_size=side * patch, patch_size=patch)


def _rope(model: ModelConfig, head: int, scale: float) -> Any:
    """Return the scaling of the rotary frequencies for heads of width ``head`` and rows shorter by
    ``scale``."""
    scaling = model.rope_scaling
    pairs = int(model.rotary_percent * head) // 2

    def spread(factors: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(factors[number * len(factors) // pairs] for number in range(pairs))

    before = scaling.original_max_position_embeddings
    return dataclasses.replace(
        scaling,
        original_max_position_embeddings=max(2, round(scale * before)) if before else 0,
        short_factor=spread(scaling.short_factor) if scaling.short_factor else (),
        long_factor=spread(scaling.long_factor) if scaling.long_factor else (),
    )


def _vocabulary(model: ModelConfig, tensor: int) -> dict[str, int]:
    rows = up_to(VOCABULARY, math.lcm(64, tensor))
    # One with padding keeps some.
    size = VOCABULARY + 1 if model.vocab_padding else rows
    return {"vocab_size": size, "vocab_padding": rows - size, "vocab_size_divisible_by": 1}
