"""Memory of a step that trains low-rank adapters."""

import math
from collections.abc import Callable
from typing import NamedTuple

from mtnlg_jax.config import Config
from mtnlg_jax.parallel.mesh import plan_table
from mtnlg_jax.train import lora, quantized_base


class Adapters(NamedTuple):
    """What a device holds of a run with low-rank adapters."""

    base: int  # bytes of the frozen parameters
    factors: int  # numbers of A and B
    whole: int  # the same with D whole


def adapters_of(
    config: Config, sizes: dict[str, int], zero: int, size: Callable[[tuple[int, ...]], int]
) -> Adapters:
    """Return what a device holds on a mesh of ``sizes`` (axis -> size); ``size`` counts the numbers
    stored for a shape."""

    def rows(tree, zero):
        return plan_table(tree, sizes, zero=zero)

    params = rows(lora.abstract_parameters(config), zero)
    base = 0
    factors = 0
    for row in params:
        numbers = size(row.local)
        if row.path.startswith("lora."):
            factors += numbers
        else:
            base += numbers * row.bytes // math.prod(row.local)
    whole = sum(size(row.local) for row in rows({"lora": lora.abstract_adapters(config)}, 0))
    return Adapters(base, factors, whole)


def memory(
    config: Config,
    held: Adapters,
    layers: int,
    all_blocks: int,
    all_rest: int,
    item: int,
    zero: int,
) -> dict[str, float]:
    """Return the bytes of parameters, their averages and gradients of a device, by content.

    ``layers`` of a stage have ``all_blocks`` numbers with D whole, and the other parameters
    ``all_rest``; compute weights have ``item`` bytes each.
    """
    held_factors = {
        "base": held.base,
        "adapters": (8 if config.train.ema_decay else 4) * held.factors,
    }
    layer = all_blocks / layers
    if quantized_base.used(config):
        # A layer in float32, and two layers of compute weights.
        weights = 4 * layer + item * (2 * layer + all_rest)
    elif zero == 3:
        weights = item * (2 * layer + all_rest)
    else:
        weights = item * (all_blocks + all_rest)
    # Whole in float32 and in compute_dtype, then this device's part.
    gradients = (4 + item) * held.whole + 4 * held.factors
    return held_factors | {"weights": weights, "gradients": gradients}
