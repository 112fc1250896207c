"""Simulate one run of a compiled program on one device, by the compiler's own schedule.

Computing is one lane. Its instructions run in the order of the program's text, which is the
schedule. Each set of links is a lane of its own, and so are copies within a device and to the host:
what an instruction starts there runs beside the computing until the instruction that waits for it.
A synchronous collective stops the computing, and shares its links with what runs there. The body of
a loop is simulated once, and counts as often as it runs. `Costs` gives the seconds of each piece.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Protocol

from mtnlg_jax.planning import hlo_cost
from mtnlg_jax.planning.hlo import Instruction, Program, bytes_of, split_top
from mtnlg_jax.planning.source_lines import SourceLines
from mtnlg_jax.planning.span import Event, Loop, Span, empty_sums
from mtnlg_jax.planning.trips import trips_of

COMPUTE = "compute"
# Classes of computing. The others are those of `Transfer`.
PRODUCTS = "products"
AGAIN = "products again"
KERNELS = "attention kernels"
ELEMENTWISE = "element-wise"
OPTIMIZER = "optimizer"
OUTSIDE = "outside loops"

OPTIMIZER_SCOPE = "optimizer"  # of the update in train/step.py
# Scopes of what jax.checkpoint computes a second time.
_REMATERIALIZED = ("rematted_computation", "checkpoint/remat")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective, or one copy within a device or to the host."""

    kind: str  # one of hlo_cost.KINDS, "copy" or "host copy"
    axes: str  # mesh axes joined by "+", "slices" between TPU slices, "" for copies
    group: int  # devices that take part
    given: int  # bytes of the operands
    attributes: str = ""

    @property
    def label(self) -> str:
        return f"{self.kind} {self.axes}".strip()

    @property
    def sent(self) -> float:
        """The bytes that a device sends in a collective over a ring."""
        whole = self.given * (self.group if self.kind == "all-gather" else 1)
        return hlo_cost.sent(self.kind, whole, self.group)


class Costs(Protocol):
    """Seconds of the pieces of a program on one kind of chip."""

    def compute(
        self, program: Program, computation: str, instruction: Instruction, flops: float
    ) -> float:
        """Return the seconds of an instruction of the computing lane; ``flops`` are those of its
        products."""
        ...

    def transfer(self, transfer: Transfer) -> float: ...

    def lane(self, transfer: Transfer) -> str:
        """Return the lane of a transfer. Transfers in one lane run one after another."""
        ...


@dataclasses.dataclass
class _Running:
    """A transfer that was started."""

    end: float
    lane: str
    transfer: Transfer
    source: str


class Timeline:
    """A simulated program.

    Args:
      mesh: {axis: size}, in the order in which the program's devices are numbered.
      dynamic_trips: trips of a loop that only knows them at run time, given the number of loops
        around it.
    """

    def __init__(
        self,
        program: Program,
        mesh: Mapping[str, int],
        costs: Costs,
        dynamic_trips: Callable[[int], float] = lambda depth: 1,
        sources: SourceLines | None = None,
    ):
        self.program = program
        self.mesh = dict(mesh)
        self.costs = costs
        self.dynamic_trips = dynamic_trips
        self.sources = sources or SourceLines("")
        self.guessed_loops: set[str] = set()
        self.span = functools.cache(self._span)

    @property
    def step(self) -> Span:
        """The whole program."""
        return self.span(self.program.entry, 0)

    def _span(self, computation: str, depth: int) -> Span:
        return _Walk(self, computation, depth).run()

    def trips(self, computation: str, loop: Instruction, depth: int) -> float:
        trips = trips_of(self.program, computation, loop)
        if trips is not None:
            return trips
        self.guessed_loops.add(loop.name)
        return self.dynamic_trips(depth)

    def transfer_of(self, instruction: Instruction, given: int, computation: str) -> Transfer:
        """Describe a collective whose operands have ``given`` bytes."""
        kind = instruction.opcode.removesuffix("-start")
        between = hlo_cost.between_slices(instruction)
        if between:
            return Transfer(between[0], "slices", between[1], given, instruction.attributes)
        axes, size = hlo_cost.groups_of(instruction.attributes, self.mesh)
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        return Transfer(kind, "+".join(axes), size, given, instruction.attributes)

    def collective_in(self, instruction: Instruction) -> Transfer | None:
        """Return the first collective in what an instruction calls."""
        for name in self.program.called(instruction, "calls", "to_apply", "called_computations"):
            for inner in self.program.computations[name]:
                if inner.opcode.removesuffix("-start") in hlo_cost.KINDS:
                    given = self.program.operand_bytes(name, inner)
                    scattered = "all-reduce-scatter" in instruction.name
                    return self.transfer_of(
                        inner, given, "all-reduce-scatter" if scattered else name
                    )
                found = self.collective_in(inner)
                if found:
                    return found
        return None


# The steps of such a collective are fused into the products between start and done (v5e).
_FUSED = re.compile(r"async-collective-(start|done)([.\d]*)")
_STARTED = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "call",
    "async",
    "custom-call",
)
_COPIED = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_HOST = "S(5)"  # the memory of the host in a shape


class _Walk:
    """One run through the instructions of a computation."""

    def __init__(self, timeline: Timeline, computation: str, depth: int):
        self.timeline = timeline
        self.program = timeline.program
        self.costs = timeline.costs
        self.computation = computation
        self.depth = depth
        self.index = self.program.index(computation)
        self.now = 0.0
        self.free = empty_sums()  # seconds at which a lane is free again
        self.running: dict[str, _Running] = {}
        self.span = Span()

    def run(self) -> Span:
        for instruction in self.program.computations[self.computation]:
            self._take(instruction)
        # What nobody waits for still belongs to a step, but not to a turn of a loop.
        end = max([self.now, *self.free.values()]) if self.depth == 0 else self.now
        self.span.seconds = end
        return self.span

    def _take(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        base, _, phase = opcode.rpartition("-")
        fused = _FUSED.fullmatch(instruction.name) if opcode == "fusion" else None
        if fused:
            self._fused(instruction, *fused.groups())
        elif phase in ("start", "update", "done") and base in (*_STARTED, *_COPIED):
            self._asynchronous(instruction, base, phase)
        elif opcode in ("send", "recv", "send-done", "recv-done"):
            self._between_slices(instruction)
        elif opcode == "while":
            self._loop(instruction)
        elif opcode == "conditional":
            branches = [
                self.timeline.span(name, self.depth)
                for name in self.program.called(instruction, *_BRANCHES)
            ]
            self._inline(max(branches, key=lambda branch: branch.seconds))
        elif opcode == "call":
            for name in self.program.called(instruction, "to_apply"):
                self._inline(self.timeline.span(name, self.depth))
        elif opcode in hlo_cost.KINDS:
            self._synchronous(instruction, self._transfer(instruction))
        elif opcode == "fusion" and "all-reduce-scatter" in instruction.name:
            self._synchronous(instruction, self.timeline.collective_in(instruction))
        else:
            self._compute(instruction)

    # --- computing

    def _compute(self, instruction: Instruction) -> None:
        products = hlo_cost.products_of(self.program, self.computation, instruction)
        flops = sum(flops for _, flops in products)
        seconds = self.costs.compute(self.program, self.computation, instruction, flops)
        if not seconds and not flops:
            return
        label = self._class(instruction, [product for product, _ in products])
        self.span.flops[label] += flops
        self._spend(
            instruction.name, label, seconds, self.timeline.sources.of(instruction.attributes)
        )

    def _class(self, instruction: Instruction, products: list[Instruction]) -> str:
        if self._updates(instruction):
            return OPTIMIZER
        # The GPU compiler fuses slices to a kernel.
        inside = products if instruction.opcode == "fusion" else ()
        calls = [each for each in (instruction, *inside) if each.opcode == "custom-call"]
        if any(hlo_cost.kernel_of(call) for call in calls):
            return KERNELS
        if products:
            names = [product.op_name for product in products]
            again = any(scope in name for name in names for scope in _REMATERIALIZED)
            return AGAIN if again else PRODUCTS
        return OUTSIDE if self.depth == 0 else ELEMENTWISE

    def _updates(self, instruction: Instruction) -> bool:
        """Return whether an instruction, or a part of what is fused to it, is of the optimizer."""
        scope = f"/{OPTIMIZER_SCOPE}/"
        inside = (
            inner
            for name in self.program.called(instruction, "calls")
            for inner in self.program.computations[name]
        )
        return scope in instruction.op_name or any(scope in inner.op_name for inner in inside)

    def _spend(self, name: str, label: str, seconds: float, source: str = "") -> None:
        if seconds > 0:
            self.span.events.append(Event(name, COMPUTE, self.now, seconds, label, source))
            self.span.classes[label] += seconds
            self.now += seconds

    def _loop(self, instruction: Instruction) -> None:
        trips = self.timeline.trips(self.computation, instruction, self.depth)
        for body in self.program.called(instruction, "body"):
            inner = self.timeline.span(body, self.depth + 1)
            self.span.loops.append(
                Loop(instruction.name, self.now, inner.seconds * trips, trips, body)
            )
            self.span.include(inner, trips)
            self.now += inner.seconds * trips

    def _inline(self, inner: Span) -> None:
        self.span.include(inner)
        shift = self.now
        self.span.events += [
            dataclasses.replace(event, begin=event.begin + shift) for event in inner.events
        ]
        self.span.loops += [
            dataclasses.replace(loop, begin=loop.begin + shift) for loop in inner.loops
        ]
        self.now += inner.seconds

    # --- transfers

    def _given(self, instruction: Instruction) -> int:
        return self.program.operand_bytes(self.computation, instruction)

    def _transfer(self, instruction: Instruction) -> Transfer:
        return self.timeline.transfer_of(instruction, self._given(instruction), self.computation)

    def _source(self, instruction: Instruction, transfer: Transfer) -> str:
        of = self.timeline.sources.of
        return of(transfer.attributes) or of(instruction.attributes)

    def _synchronous(self, instruction: Instruction, transfer: Transfer | None) -> None:
        if transfer is None or transfer.group == 1:
            return
        seconds = self.costs.transfer(transfer)
        # What runs on the same links meanwhile shares them: both go at half speed until one ends.
        lane = self.costs.lane(transfer)
        shared = max(0.0, min(seconds, self.free[lane] - self.now))
        for running in self.running.values():
            if running.lane == lane and running.end > self.now:
                running.end += shared
        self.free[lane] += shared
        seconds += shared
        source = self._source(instruction, transfer)
        self.span.wait(instruction.name, transfer.label, source, seconds, transfer.given)
        self._spend(instruction.name, transfer.label, seconds, source)

    def _begin(self, instruction: Instruction, transfer: Transfer) -> _Running:
        lane = self.costs.lane(transfer)
        begin = max(self.now, self.free[lane])
        seconds = self.costs.transfer(transfer)
        source = self._source(instruction, transfer)
        self.free[lane] = begin + seconds
        if seconds > 0:
            self.span.events.append(
                Event(instruction.name, lane, begin, seconds, transfer.label, source)
            )
        return _Running(begin + seconds, lane, transfer, source)

    def _finish(self, instruction: Instruction, running: _Running | None) -> None:
        if running is None or running.end <= self.now:
            return
        label = f"wait {running.transfer.label}"
        seconds = running.end - self.now
        self.span.wait(instruction.name, label, running.source, seconds, running.transfer.given)
        self._spend(instruction.name, label, seconds, running.source)

    def _fused(self, instruction: Instruction, phase: str, number: str) -> None:
        key = f"async-collective{number}"
        if phase == "done":
            self._finish(instruction, self.running.get(key))
            return
        transfer = self.timeline.collective_in(instruction)
        if transfer is not None and transfer.group > 1:
            given = self._given(instruction)
            transfer = dataclasses.replace(transfer, given=given)
            self.running[key] = self._begin(instruction, transfer)

    def _asynchronous(self, instruction: Instruction, base: str, phase: str) -> None:
        origin = self._origin(instruction).name
        if phase == "done":
            self._finish(instruction, self.running.get(origin))
            return
        if origin in self.running or (phase == "start" and not instruction.operands):
            return  # operands come with the first update
        transfer = self._started(instruction, base)
        if transfer is None:  # computing on a lane of its own counts as if it were in turn
            if phase == "start":
                self._compute(instruction)
            return
        if transfer.kind in hlo_cost.KINDS and transfer.group == 1:
            return
        if '"is_sync":true' in instruction.attributes.replace(" ", ""):  # GPU
            self._synchronous(instruction, transfer)
            return
        self.running[origin] = self._begin(instruction, transfer)

    def _origin(self, instruction: Instruction) -> Instruction:
        """Return the instruction that starts what ``instruction`` updates or ends."""
        while instruction.opcode.endswith(("-update", "-done")) or (
            instruction.opcode == "get-tuple-element"
        ):
            source = self.index.get(instruction.operands[0])
            if source is None:
                break
            instruction = source
        return instruction

    def _started(self, instruction: Instruction, base: str) -> Transfer | None:
        if base in _COPIED:
            arrays = self.program.operand_arrays(self.computation, instruction)
            host = _HOST in instruction.shape or any(_HOST in array for array in arrays)
            return Transfer("host copy" if host else "copy", "", 1, self._copied(instruction, base))
        if base in hlo_cost.KINDS:
            return self._transfer(instruction)
        return self.timeline.collective_in(self._origin(instruction))

    def _copied(self, instruction: Instruction, base: str) -> int:
        """Return the bytes that a copy moves: of a slice, not of the array that has it."""
        parts = split_top(instruction.shape[1:-1])
        if base in ("slice", "dynamic-slice") and len(parts) > 1:
            return bytes_of(parts[1])  # operands, result, context
        if base == "dynamic-update-slice" and len(instruction.operands) > 1:
            return bytes_of(self.index[instruction.operands[1]].shape)
        return self._given(instruction)

    def _between_slices(self, instruction: Instruction) -> None:
        key = "between slices"  # a receive has no bytes of its own: it waits for the last send
        if instruction.opcode == "send" and hlo_cost.between_slices(instruction):
            self.running[key] = self._begin(instruction, self._transfer(instruction))
        elif instruction.opcode == "recv-done":
            self._finish(instruction, self.running.get(key))
