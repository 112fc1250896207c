"""Seconds of the pieces of a program on a GPU, by rooflines.

The GPU compiler writes no estimates into a program. So a fusion takes the longer of its products,
at ``PRODUCT_SHARE`` of the peak, and of the bytes that it moves, at ``MEMORY_SHARE`` of the speed
of main memory, after a launch. The shares are round numbers of what cuBLAS, NCCL and copies reach
on H100 and A100 for large operands; nothing was fitted to a run. A collective is a ring, inside a
node over NVLink and between nodes over the cards' network, which the members of its group in one
node share.
"""

import dataclasses
from collections import Counter

import numpy as np

from mtnlg_jax.hardware import Chip
from mtnlg_jax.planning import hlo_cost
from mtnlg_jax.planning.hlo import Instruction, Program, split_top
from mtnlg_jax.planning.timeline import Transfer
from mtnlg_jax.planning.tpu_costs import HOST, traffic

PRODUCT_SHARE = 0.7
FLOAT32_SHARE = 1 / 16  # of the peak, for products of float32
KERNEL_SHARE = 0.5
MEMORY_SHARE = 0.85
LINK_SHARE = 0.8
LAUNCH = 3e-6  # seconds before a kernel starts
LATENCY = 10e-6  # seconds of the smallest collective

_WORKS = ("fusion", "fusion-start", "custom-call", "dot", "convolution", "copy", "reduce", "sort")


class GpuCosts:
    """Costs on ``chip``, ``cards`` of which are in a node; devices are numbered node by node.

    ``unknown`` counts what has no estimate, by name; ``assumed`` our kernels, at KERNEL_SHARE.
    """

    def __init__(self, chip: Chip, cards: int):
        self.chip = chip
        self.cards = cards
        self.unknown: Counter[str] = Counter()
        self.assumed: Counter[str] = Counter()

    def compute(
        self, program: Program, computation: str, instruction: Instruction, flops: float
    ) -> float:
        if instruction.opcode not in _WORKS:
            return 0.0
        kernel = hlo_cost.kernel_of(instruction) if instruction.opcode == "custom-call" else None
        if kernel:
            if not flops:
                self.unknown[kernel[0]] += 1
                return LAUNCH
            self.assumed[kernel[0]] += 1
            return LAUNCH + flops / (KERNEL_SHARE * self.chip.flops)
        moved = traffic(program, computation, _outputs_alone(instruction))
        seconds = moved / (MEMORY_SHARE * self.chip.memory_speed)
        share = PRODUCT_SHARE if _is_short(program, computation, instruction) else FLOAT32_SHARE
        return LAUNCH + max(seconds, flops / (share * self.chip.flops))

    def transfer(self, transfer: Transfer) -> float:
        if not transfer.axes:
            speed = HOST if transfer.kind == "host copy" else MEMORY_SHARE * self.chip.memory_speed
            return transfer.given / speed
        near = self._near(transfer)
        inside = near == transfer.group
        speed = self.chip.fast if inside else min(self.chip.fast, near * self.chip.slow)
        return LATENCY + transfer.sent / (LINK_SHARE * speed)

    def lane(self, transfer: Transfer) -> str:
        if not transfer.axes:
            return {"host copy": "host", "copy": "copies"}[transfer.kind]
        link = "NVLink" if self._near(transfer) == transfer.group else "network"
        return f"{link} {transfer.axes}"

    def _near(self, transfer: Transfer) -> int:
        """Return the most members of a group in one node."""
        nodes = hlo_cost.members_of(transfer.attributes, transfer.group) // self.cards
        if transfer.kind == "collective-permute":
            return transfer.group if (nodes[:, 0] == nodes[:, 1]).all() else 1
        return int(np.unique(nodes[0], return_counts=True)[1].max())


def _outputs_alone(instruction: Instruction) -> Instruction:
    """Return an instruction whose shape has its results alone.

    The shape of an asynchronous start is (operands, results, context), and ``traffic`` would count
    the operands as written: of a slice, the whole array."""
    if not instruction.opcode.endswith("-start"):
        return instruction
    parts = split_top(instruction.shape[1:-1])
    return dataclasses.replace(instruction, shape=parts[1]) if len(parts) > 1 else instruction


def _is_short(program: Program, computation: str, instruction: Instruction) -> bool:
    """Return whether the products of an instruction are not of float32."""
    arrays = program.operand_arrays(computation, instruction)
    return any(array.startswith(("bf16", "f16", "f8", "s8")) for array in arrays)
