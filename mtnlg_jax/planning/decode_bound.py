"""The least time of a step of decoding on described chips: what it reads, multiplies and sends.

A bound and no prediction: kernels that wait, norms, sampling and the latency of messages are left
out, so a real step takes longer. All weights count as read: for a model with an input table of its
own, or with experts that no row chooses, the true bound is lower by their share.
"""

import math
from typing import NamedTuple

from mtnlg_jax.config import Config
from mtnlg_jax.decode.results import CHUNK
from mtnlg_jax.hardware import CHIPS, Chip
from mtnlg_jax.parallel.mesh import ROWS
from mtnlg_jax.planning.aot import Measurement
from mtnlg_jax.planning.topology import parse


class Bound(NamedTuple):
    """Seconds of one call of the compiled program, and the tokens that it reads or writes."""

    read: float  # of the main memory: weights and cache, which is full
    products: float
    sent: float
    tokens: int
    devices: int

    @property
    def seconds(self) -> float:
        """Reads and products overlap; what is sent is waited for."""
        return max(self.read, self.products) + self.sent

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.tokens / self.seconds / self.devices


def bound_of(config: Config, m: Measurement) -> Bound | None:
    """Return the bound of a compiled "prefill" or "decode"; None for chips without figures.

    None over stages too: there every micro-batch reads the weights of its stage again.
    """
    chip = chip_of(m.topology)
    if chip is None or m.failure or m.step == "train" or m.mesh.get("pipe", 1) > 1:
        return None
    shards = math.prod(m.mesh.get(axis, 1) for axis in ROWS)
    rows = (config.train.micro_batch_size or 1) * shards
    # A call writes a chunk of tokens, and every one of them reads all weights.
    each = CHUNK if m.step == "decode" else config.sequence_length
    passes = CHUNK if m.step == "decode" else 1
    return Bound(
        passes * m.arguments_exact / chip.memory_speed,
        m.flops / chip.flops,
        sum(
            each.bytes / (chip.fast if each.group <= chip.domain else chip.slow)
            for each in m.collectives
        ),
        rows * each,
        m.devices,
    )


def chip_of(topology: str) -> Chip | None:
    """Return the figures of a topology's chips, such as "H100:2x8"."""
    kind = parse(topology).kind.lower()
    named = {name.lower(): chip for name, chip in CHIPS.items()}
    return named.get(kind) or named.get(f"{kind}-80")
