"""Rules of optimizer.moments_dtype and train.offload (docs/memory.md)."""

import math

from mtnlg_jax.config.checks import Rules, check_rules, must_divide
from mtnlg_jax.config.schema import Config

MOST_BLOCK = 128  # numbers of a block of int8 moments along the MLP's width
LEAST_BLOCK = 8  # below it the scales would take half as much as the codes
# A width has at least this number of blocks, so that tensor up to 8 divides them.
LEAST_BLOCKS = 8


def width_block(width: int) -> int:
    """Return the numbers of a block along an MLP's ``width``: the largest power of two up to
    MOST_BLOCK that divides an eighth of it, or 0 if that is below LEAST_BLOCK.

    It depends on the width alone, so that blocks are the same on every mesh.
    """
    twos = math.gcd(width, LEAST_BLOCKS * MOST_BLOCK) // LEAST_BLOCKS
    return twos if twos >= LEAST_BLOCK else 0


_RULES: Rules = (
    (
        lambda c: c.train.offload in ("moments", "both") and c.optimizer.name == "soap",
        "train.offload={c.train.offload} takes the moments of one parameter after the other, and "
        "optimizer.name=soap turns them by bases that stay on the device; set "
        "train.offload=activations, or another optimizer",
    ),
    (
        lambda c: c.optimizer.moments_dtype == "int8" and c.optimizer.lora_rank,
        "optimizer.moments_dtype=int8 is for whole matrices, and the factors of "
        "optimizer.lora_rank={c.optimizer.lora_rank} have no blocks; set it to bfloat16 or float32",
    ),
    (
        lambda c: c.optimizer.moments_dtype == "int8" and not width_block(c.model.mlp_width),
        "optimizer.moments_dtype=int8 has blocks along the width of the MLP, and "
        "model.ffn_hidden_size={c.model.mlp_width} is not a multiple of 64; set "
        "optimizer.moments_dtype=bfloat16, or another width",
    ),
)


def offloads_moments(config: Config) -> bool:
    """Return whether the moments are in the host's memory between steps."""
    return config.train.offload in ("moments", "both")


def offloads_activations(config: Config) -> bool:
    """Return whether what train.recompute keeps waits in the host's memory."""
    return config.train.offload in ("activations", "both")


def check_memory(config: Config) -> None:
    """Raise ValueError if moments_dtype or offload does not go with the rest of ``config``."""
    check_rules(_RULES, config)
    if config.optimizer.moments_dtype != "int8":
        return
    for key, width in (
        ("ffn_hidden_size", config.model.mlp_width),
        ("moe.moe_shared_expert_intermediate_size", _shared_width(config)),
    ):
        block = width_block(width)
        # Moments of a shared expert without blocks stay float32.
        if block:
            must_divide(
                f"model.{key}={width}, in blocks of {block} for optimizer.moments_dtype=int8,",
                width // block,
                "mesh.tensor",
                config.mesh.tensor,
            )


def _shared_width(config: Config) -> int:
    moe = config.model.moe
    return moe.moe_shared_expert_intermediate_size if moe.num_moe_experts else 0
