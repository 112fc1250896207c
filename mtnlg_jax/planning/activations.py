"""Memory of the activations of a micro-batch, in bytes of a device."""

from mtnlg_jax.config import Config
from mtnlg_jax.planning.layout import POLICIES, Layout


def item_of(config: Config) -> int:
    """Return the bytes of a number in train.compute_dtype."""
    return 2 if config.train.compute_dtype == "bfloat16" else 4


def stage_input(config: Config, layout: Layout) -> float:
    """Return the bytes of what one layer hands to the next."""
    tokens = layout.micro_batch_size * config.sequence_length / layout.context
    return item_of(config) * tokens * config.model.hidden_size / layout.tensor


def kept(config: Config, layout: Layout) -> float:
    """Return the bytes that the layers of a stage, or of one chunk of it, keep for the backward
    pass."""
    model = config.model
    policy = POLICIES[layout.recompute]
    layers = model.num_layers // layout.pipe / layout.virtual_pipe
    found = layers * policy.kept / 2 * stage_input(config, layout)
    if model.moe.num_moe_experts:  # no policy keeps the products of experts
        found *= min(1, POLICIES["mlp"].kept / policy.kept)
    return found


def visits(config: Config, layout: Layout) -> float:
    """Return the bytes of a layer's visits to experts: input, output and what is between them.
    Where experts are split there is room for all tokens that may come."""
    model = config.model
    moe = model.moe
    if not moe.num_moe_experts:
        return 0.0
    tokens = layout.micro_batch_size * config.sequence_length / layout.context
    most = min(moe.moe_router_topk, moe.num_moe_experts // layout.expert)
    inner = (3 if model.gated else 2) * model.mlp_width / layout.tensor
    width = 2 * model.hidden_size + inner
    return item_of(config) * tokens * layout.expert * most * width
