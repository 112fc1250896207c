"""The predicted step of a layout, and the parts of its seconds."""

from typing import NamedTuple

from mtnlg_jax.hardware import Chip
from mtnlg_jax.planning.layout import Layout


class Stage(NamedTuple):
    """Seconds of one micro-batch in one stage, forward and backward, by purpose."""

    compute: float
    recompute: float
    elementwise: float  # operations outside products, where a schedule is known
    tensor: float
    context: float
    expert: float
    fetch: float  # of weights, by ZeRO-3
    hidden: float  # traffic beside products, not in ``total``
    head: float  # the head's products; the stages share them unless the schedule is 1f1b
    head_tensor: float  # collectives over tensor of embedding and head
    passed: float  # bytes that one stage hands to the next
    again: float  # share of the forward FLOPs computed again

    @property
    def total(self) -> float:
        return sum(self[:7])  # up to what is fetched


class Estimate(NamedTuple):
    layout: Layout
    seconds: dict[str, float]  # of a step, by purpose
    memory: dict[str, float]  # bytes of a device, by content
    tokens: int
    model_flops: float  # of a step as PaLM counts: full attention, nothing recomputed
    done_flops: float  # of a step, with what is recomputed
    # Seconds of traffic that runs beside products: that of ZeRO-3, and on v5p of the backward pass
    # over tensor. Not in ``seconds``.
    hidden: float
    chip: Chip
    host: float = 0.0  # bytes of a device's host, for train.offload

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def mfu(self) -> float:
        return self.model_flops / self.step_seconds / (self.layout.devices * self.chip.flops)

    @property
    def hfu(self) -> float:
        return self.done_flops / self.step_seconds / (self.layout.devices * self.chip.flops)

    @property
    def bubble(self) -> float:
        """Share of the step that a device waits for its pipeline."""
        return self.seconds["bubble"] / self.step_seconds

    @property
    def binds(self) -> str:
        """The resource to buy more of; compute if nothing else takes a fifth of the step. Memory is
        charged for recomputation because memory is short."""
        losses = {
            "memory": self.seconds["recompute"],
            "tensor comm": self.seconds["tensor"],
            "context comm": self.seconds["context"],
            "expert comm": self.seconds["expert"],
            "pipeline bubble": self.seconds["bubble"],
            "pipeline comm": self.seconds["pipe"],
            "data comm": self.seconds["data"],
            "host link": self.seconds["host"],
            "memory speed": self.seconds["element-wise"] + self.seconds["update"],
        }
        worst = max(losses, key=losses.__getitem__)
        return worst if sum(losses.values()) > 0.2 * self.step_seconds else "compute"
