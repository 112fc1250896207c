"""Seconds of the pieces of a program on a TPU, from the compiler's own estimates.

The compiler writes ``estimated_cycles`` on fusions and loose operations, and on kernels if it is
asked to profile them. Products include the time of main memory. Loop fusions are estimated too
slow (0.45 to 0.7 of the speed of main memory where little else happens), so the shorter of the
estimate and of the bytes at ``MEMORY_SHARE`` of that speed counts.

``RULES`` is the version of these rules and of those in timeline.py and torus.py. A calibration
names the version that it tested. Version 2 counts copies of slices as the slices, where version 1
counted the whole arrays: a fault that the point v5e-128b of benchmarks/calibration.py showed. In
version 3 a synchronous collective shares busy links, where it waited for them before: a small sum
of the 530B step waited for the scatter of a whole matrix. Version 4 counts the hops of all-to-alls
and of permutes between devices that are no neighbors.
"""

import re
from collections import Counter

from mtnlg_jax.hardware import Chip
from mtnlg_jax.planning import hlo_cost
from mtnlg_jax.planning.cycles import cycles_of, is_estimated
from mtnlg_jax.planning.hlo import Instruction, Program, arrays_of, bytes_of, dims_of
from mtnlg_jax.planning.kernel_cycles import KernelCycles, key_of
from mtnlg_jax.planning.timeline import Transfer
from mtnlg_jax.planning.torus import Torus

RULES = 4

MEMORY_SHARE = 0.85
START = 1e-6  # seconds of an operation that moves few bytes
# Share of the peak that a kernel reaches for which the compiler has no estimate.
KERNEL_SHARE = 0.5

# Operations that take time whether or not the compiler estimates it.
_WORKS = ("sort", "fusion", "gather", "scatter", "call-start", "async-start")
_ON_CHIP = "S(1)"  # vector memory


class TpuCosts:
    """Costs on ``chip``. ``unknown`` counts what has no estimate, by name."""

    def __init__(self, chip: Chip, torus: Torus, kernels: KernelCycles | None = None):
        self.chip = chip
        self.torus = torus
        self.kernels = kernels or {}
        self.unknown: Counter[str] = Counter()
        self.assumed: Counter[str] = Counter()  # kernels that count at KERNEL_SHARE

    def compute(
        self, program: Program, computation: str, instruction: Instruction, flops: float
    ) -> float:
        cycles = cycles_of(instruction.attributes)
        name = re.sub(r"[.\d]+$", "", instruction.name)
        kernel = hlo_cost.kernel_of(instruction) if instruction.opcode == "custom-call" else None
        if kernel:
            key = key_of(program, computation, instruction)
            if cycles is None and key is not None:
                cycles = self.kernels.get(key)
            if cycles is not None:
                return cycles / self.chip.clock
            if flops:
                self.assumed[kernel[0]] += 1
                return flops / (KERNEL_SHARE * self.chip.flops)
            self.unknown[kernel[0]] += 1
            return 0.0
        if cycles is None:
            if is_estimated(instruction.attributes) or instruction.opcode in _WORKS:
                self.unknown[name] += 1
            if instruction.opcode == "copy" and dims_of(instruction.shape):
                return START + 2 * bytes_of(instruction.shape) / self._memory_speed
            return 0.0
        seconds = cycles / self.chip.clock
        if flops:
            return seconds
        moved = traffic(program, computation, instruction)
        return min(seconds, START + moved / self._memory_speed)

    @property
    def _memory_speed(self) -> float:
        return MEMORY_SHARE * self.chip.memory_speed

    def transfer(self, transfer: Transfer) -> float:
        if transfer.kind == "host copy":
            return transfer.given / self.chip.host
        if transfer.kind == "copy":
            return transfer.given / self._memory_speed
        return self.torus.seconds(transfer)

    def lane(self, transfer: Transfer) -> str:
        if not transfer.axes:
            return {"host copy": "host", "copy": "copies"}[transfer.kind]
        if transfer.axes == "slices":
            return "between slices"
        lane = f"links of {transfer.axes}"
        # A permute uses one direction of the links, and another one may use the other.
        to = re.search(r"source_target_pairs=\{\{(\d+,\d+)\}", transfer.attributes)
        return f"{lane}, {to[1].replace(',', ' to ')}" if to else lane


def traffic(program: Program, computation: str, instruction: Instruction) -> int:
    """Return the bytes of main memory that a fusion or an operation touches. A slice of an
    argument counts as the slice, and arrays in vector memory do not count."""
    shapes = program.index(computation)
    total = sum(bytes_of(array) for array in arrays_of(instruction.shape) if _ON_CHIP not in array)
    inner = next(iter(program.called(instruction, "calls")), None)
    body = program.computations.get(inner or "", [])
    parameters = {i.operands[0]: i.name for i in body if i.opcode == "parameter"}
    for place, name in enumerate(instruction.operands):
        shape = shapes[name].shape if name in shapes else ""
        if not shape or _ON_CHIP in shape:
            continue
        inside = parameters.get(str(place))
        users = [i for i in body if inside in i.operands] if inside else []
        if users and all(i.opcode == "dynamic-slice" and i.operands[0] == inside for i in users):
            total += sum(bytes_of(i.shape) for i in users)
        elif users and all(
            i.opcode == "dynamic-update-slice" and i.operands[0] == inside for i in users
        ):
            # The result is the argument, of which only the update is written.
            index = program.index(inner or "")
            total += sum(bytes_of(index[i.operands[1]].shape) for i in users) - bytes_of(shape)
        else:
            total += bytes_of(shape)
    return max(total, 0)
