"""Seconds of the pieces of a program on a GPU, by rooflines.

The GPU compiler writes no estimates into a program. So a fusion takes the longer of its products,
at ``PRODUCT_SHARE`` of the peak, and of the bytes that it moves, at ``MEMORY_SHARE`` of the speed
of main memory, after a launch. The shares are round numbers of what cuBLAS, NCCL and copies reach
on H100 and A100 for large operands; nothing was fitted to a run. A collective is a ring, inside a
node over NVLink and between nodes over the cards' network, which the members of its group in one
node share.
"""

from collections import Counter

import numpy as np

from mtnlg_jax.hardware import Chip
from mtnlg_jax.planning import hlo_cost
from mtnlg_jax.planning.hlo import Instruction, Program, bytes_of
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
        named = hlo_cost.kernel_of(instruction) if instruction.opcode == "custom-call" else None
        if named and not flops:
            self.unknown[named[0]] += 1
            return LAUNCH
        share = PRODUCT_SHARE if _is_short(program, computation, instruction) else FLOAT32_SHARE
        seconds = 0.0
        for product, part in hlo_cost.products_of(program, computation, instruction):
            kernel = hlo_cost.kernel_of(product) if product.opcode == "custom-call" else None
            if kernel:
                self.assumed[kernel[0]] += 1
            seconds += part / ((KERNEL_SHARE if kernel else share) * self.chip.flops)
        if named:
            return LAUNCH + seconds
        moved = _moved(program, computation, instruction)
        return LAUNCH + max(seconds, moved / (MEMORY_SHARE * self.chip.memory_speed))

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


def _moved(program: Program, computation: str, instruction: Instruction) -> int:
    """Return the bytes of main memory that an instruction reads and writes.

    A slice, or rows that are looked up, count as what is read of the array; an update in place as
    what it writes. The compiler may reshape an array before that."""
    name = next(iter(program.called(instruction, "calls")), None)
    if name is None:
        return traffic(program, computation, instruction)
    body = program.computations[name]
    index = program.index(name)
    root = program.roots[name]
    outputs = root.operands if root.opcode == "tuple" else (root.name,)
    read = sum(_read(body, part) for part in body if part.opcode == "parameter")
    return read + sum(_written(index, output) for output in outputs)


_PARTS = ("slice", "dynamic-slice", "gather")
# The operand that an update in place writes into the first one.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def _read(body: list[Instruction], parameter: Instruction) -> int:
    whole = bytes_of(parameter.shape)
    names = {parameter.name}
    total = 0
    for user in body:  # in the order of use
        if not names.intersection(user.operands) or user is parameter:
            continue
        first_alone = user.operands[0] in names and not names.intersection(user.operands[1:])
        if user.opcode == "bitcast":
            names.add(user.name)
        elif user.opcode in _PARTS and first_alone:
            total += bytes_of(user.shape)
        elif not (user.opcode in _UPDATES and first_alone):
            return whole
    return min(total, whole)


def _written(index: dict[str, Instruction], name: str) -> int:
    output = index[name]
    while output.opcode == "bitcast":
        output = index[output.operands[0]]
    if output.opcode in _UPDATES:
        return bytes_of(index[output.operands[_UPDATES[output.opcode]]].shape)
    return bytes_of(output.shape)


def _is_short(program: Program, computation: str, instruction: Instruction) -> bool:
    """Return whether the products of an instruction are not of float32."""
    arrays = program.operand_arrays(computation, instruction)
    return any(array.startswith(("bf16", "f16", "f8", "s8")) for array in arrays)
