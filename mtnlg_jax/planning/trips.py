"""Trips of the while loops of a compiled program."""

import dataclasses
import operator
import re
from collections.abc import Callable

from mtnlg_jax.planning.hlo import Instruction, Program


def trips_of(program: Program, computation: str, loop: Instruction) -> int | None:
    """Return the trips of a while loop as the compiler noted them, or as start, step and condition
    give them.

    The counter may start anywhere, count up or down by any step, and be compared in any direction
    with a constant or with another number that the loop carries. Copies and fusions may hide all of
    these. None if the trips are known at run time only, or if the bound is too large to be one
    (``NEVER``)."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    trips = int(noted[1]) if noted else _counted(program, computation, loop)
    return None if trips is None or trips >= NEVER else trips


# A bound this large means "until something else ends it", and would dominate every sum.
NEVER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class _Number:
    """An integer of a loop: ``offset``, or element ``position`` of the loop's state plus
    ``offset``."""

    offset: int
    position: int | None = None


# The value of a parameter, by its number.
Given = Callable[[int], _Number | None]

_ALL = -1  # the position in a loop whose state is one number instead of a tuple

# Instructions that pass on the value of their first operand.
_PASSES = (
    "copy",
    "copy-start",
    "copy-done",
    "bitcast",
    "convert",
    "reshape",
    "optimization-barrier",
)
# Trips of ``while (distance DIRECTION 0) distance += step``; None if the step has the wrong sign
# and the loop never ends.
_ENDS: dict[str, Callable[[int, int], int | None]] = {
    "LT": lambda distance, step: _until(-distance, step),
    "LE": lambda distance, step: _until(1 - distance, step),
    "GT": lambda distance, step: _until(distance, -step),
    "GE": lambda distance, step: _until(1 + distance, -step),
    "NE": lambda distance, step: _until_equal(distance, step),
    "EQ": lambda distance, step: 1 if step else None,
}
_HOLDS = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "NE": operator.ne,
    "EQ": operator.eq,
}


def _until(far: int, step: int) -> int | None:
    """Steps to reach ``far`` or more."""
    return -(-far // step) if step > 0 else None


def _until_equal(distance: int, step: int) -> int | None:
    """Steps after which ``distance`` is exactly 0."""
    if step == 0 or distance % step or -distance // step < 0:
        return None
    return -distance // step


def _counted(program: Program, computation: str, loop: Instruction) -> int | None:
    """Work out the trips by arithmetic. None if that is not possible."""
    condition = _first(program.called(loop, "condition"))
    body = _first(program.called(loop, "body"))
    if condition not in program.roots or body not in program.roots:
        return None
    test, values = _look_through(program, condition, program.roots[condition].name, None)
    direction = re.search(r"direction=(\w\w)", test.attributes)
    if test.opcode != "compare" or direction is None:
        return None
    first = []
    steps = []
    for side in map(values, test.operands):
        if side is None:
            return None
        if side.position is None:
            first.append(side.offset)
            steps.append(0)
            continue
        position = None if side.position == _ALL else side.position
        begin = _number_of(program, computation, loop.operands[0], None, position)
        after = _number_of(program, body, program.roots[body].name, None, position)
        if (
            begin is None
            or begin.position is not None
            or after is None
            or after.position != side.position
        ):
            return None
        first.append(begin.offset + side.offset)
        steps.append(after.offset)
    distance = first[0] - first[1]
    if not _HOLDS[direction[1]](distance, 0):
        return 0
    return _ENDS[direction[1]](distance, steps[0] - steps[1])


def _first(names: list[str]) -> str:
    """Return the first name, or "" if there is none."""
    return names[0] if names else ""


def _look_through(
    program: Program, computation: str, name: str, given: Given | None
) -> tuple[Instruction, Callable[[str], _Number | None]]:
    """Return the instruction that makes the value of ``name``, behind copies and inside fusions,
    and a function from the names of its operands to their numbers."""
    instruction = program.index(computation)[name]
    while instruction.opcode in _PASSES and instruction.operands[0] in program.index(computation):
        instruction = program.index(computation)[instruction.operands[0]]

    def value(operand: str):
        return _number_of(program, computation, operand, given)

    inner = _first(program.called(instruction, "calls", "to_apply"))
    if instruction.opcode in ("fusion", "call") and inner in program.roots:
        operands = instruction.operands
        root = program.roots[inner].name
        return _look_through(program, inner, root, lambda number: value(operands[number]))
    return instruction, value


def _number_of(
    program: Program,
    computation: str,
    name: str,
    given: Given | None,
    position: int | None = None,
) -> _Number | None:
    """Return the integer that ``name`` has in a computation of a loop, or element ``position`` of
    its tuple. None if it cannot be followed.

    In a fusion ``given`` maps the number of a parameter to its value; None means that the parameter
    is the state of the loop."""
    index = program.index(computation)
    instruction = index.get(name)
    if instruction is None:
        return None
    opcode = instruction.opcode
    operands = instruction.operands

    def of(operand: str, position: int | None = None) -> _Number | None:
        return _number_of(program, computation, operand, given, position)

    if opcode == "parameter":
        if given is not None:
            return given(int(operands[0])) if position is None else None
        return _Number(0, _ALL if position is None else position)
    if opcode == "get-tuple-element":
        element = re.search(r"index=(\d+)", instruction.attributes)
        return of(operands[0], int(element[1])) if position is None and element else None
    if opcode in _PASSES:
        return of(operands[0], position)
    if opcode == "tuple":
        return of(operands[position]) if position is not None and position < len(operands) else None
    if opcode in ("fusion", "call"):
        inner = _first(program.called(instruction, "calls", "to_apply"))
        root = program.roots.get(inner)
        if root is None:
            return None
        return _number_of(program, inner, root.name, lambda number: of(operands[number]), position)
    if position is not None:
        return None
    if opcode == "constant":
        return _Number(int(operands[0])) if re.fullmatch(r"-?\d+", operands[0]) else None
    if opcode in ("add", "subtract", "multiply", "negate"):
        numbers = [of(operand) for operand in operands]
        known = [number for number in numbers if number is not None]
        return _combine(opcode, known) if len(known) == len(numbers) else None
    return None


def _combine(opcode: str, numbers: list[_Number]) -> _Number | None:
    if opcode == "negate":
        numbers = [_Number(0), *numbers]
        opcode = "subtract"
    left, right = numbers
    if opcode == "multiply":
        known = left.position is None and right.position is None
        return _Number(left.offset * right.offset) if known else None
    if opcode == "add":
        if None not in (left.position, right.position):
            return None
        position = right.position if left.position is None else left.position
        return _Number(left.offset + right.offset, position)
    if right.position is None:
        return _Number(left.offset - right.offset, left.position)
    return _Number(left.offset - right.offset) if left.position == right.position else None
