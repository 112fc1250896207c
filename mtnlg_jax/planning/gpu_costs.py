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
from mtnlg_jax.planning.tpu_costs import traffic

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
            copied = transfer.kind == "copy"
            speed = MEMORY_SHARE * self.chip.memory_speed if copied else self.chip.host
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


_PARTS = ("slice", "dynamic-slice", "gather")
# The operand that an update in place writes into the first one.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


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
    total = 0
    in_place: set[str] = set()
    for output in root.operands if root.opcode == "tuple" else (root.name,):
        updates = _updates(index, output)
        in_place |= {update.name for update in updates}
        written = [update.operands[_UPDATES[update.opcode]] for update in updates] or [output]
        total += sum(bytes_of(index[each].shape) for each in written)
    parameters = [part for part in body if part.opcode == "parameter"]
    return total + sum(_read(body, root, parameter, in_place) for parameter in parameters)


def _updates(index: dict[str, Instruction], output: str) -> list[Instruction]:
    """Return the updates that turn an argument into ``output`` in place; [] if there is none."""
    found = []
    current = index[output]
    while current.opcode == "bitcast" or current.opcode in _UPDATES:
        if current.opcode in _UPDATES:
            found.append(current)
        current = index[current.operands[0]]
    return found if current.opcode == "parameter" else []


def _read(
    body: list[Instruction], root: Instruction, parameter: Instruction, in_place: set[str]
) -> int:
    whole = bytes_of(parameter.shape)
    sizes = {parameter.name: whole}  # of the array in other shapes and types
    total = 0
    for user in body:  # in the order of use
        if not sizes.keys() & set(user.operands) or user is parameter:
            continue
        first_alone = user.operands[0] in sizes and not sizes.keys() & set(user.operands[1:])
        if user.opcode in ("bitcast", "convert"):
            sizes[user.name] = bytes_of(user.shape)
        elif user.opcode in _PARTS and first_alone:
            total += whole * bytes_of(user.shape) // sizes[user.operands[0]]
        elif not (user.name in in_place and first_alone):
            return whole
    return whole if root.name in sizes else min(total, whole)


def _is_short(program: Program, computation: str, instruction: Instruction) -> bool:
    """Return whether the products of an instruction are not of float32."""
    arrays = program.operand_arrays(computation, instruction)
    return any(array.startswith(("bf16", "f16", "f8", "s8")) for array in arrays)
