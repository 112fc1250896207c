"""FLOPs and collectives of a compiled program, each counted as often as it runs.

XLA's own cost analysis counts the body of a loop once. Here every count is multiplied by the trips
of the loops around it; loops that know their trips only when they run are asked for
(``dynamic_trips``). Of a conditional, the costlier branch counts.
"""

import dataclasses
import functools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from mtnlg_jax.planning.hlo import Instruction, Program, arrays_of, bytes_of, dims_of

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind, over one set of mesh axes, at one depth of loops."""

    kind: str  # one of KINDS
    axes: tuple[
        str, ...
    ]  # mesh axes along which the devices of a group differ; ("slices",) between TPU slices
    group: (
        int  # devices of a group: the product of the axes, or less where a group is a part of them
    )
    depth: int  # loops around it
    count: float  # executions a step
    # that a device sends in them, by the ring's count: (n - 1)/n of the whole, twice for a sum
    bytes: float


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All runs of one of our kernels at one depth of loops."""

    name: str  # of the scope that it is called in: attention_forward, ...
    depth: int  # loops around it
    count: float  # executions a step


@dataclasses.dataclass(frozen=True)
class Cost:
    flops: (
        float  # of the products a device computes, 2 for a multiplication and addition; kernels too
    )
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    guessed_loops: int  # loops whose trips were asked for


# --- products
# -----------------------------------------------------------------------------------------------------


def _numbers(attributes: str, key: str) -> list[int]:
    found = re.search(rf'"?{key}"?[=:][{{\[]([\d",\s]*)[}}\]]', attributes)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


def _window_hits(size, stride, low, lhs_dilate, rhs_dilate, length, out) -> int:
    """Pairs (output place, window place) of one dim that fall on an element of the input and not on
    padding."""
    place = np.arange(out)[:, None] * stride - low + np.arange(size)[None] * rhs_dilate
    return int(((place >= 0) & (place % lhs_dilate == 0) & (place // lhs_dilate < length)).sum())


def _convolution_flops(attributes: str, lhs: tuple, rhs: tuple, out: tuple) -> float:
    """TPU programs write products as convolutions, those of a batch with one spatial dim a batch
    dim, of whose window only one place hits."""
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    window = {
        key: value.split("x")
        for key, value in re.findall(
            r"(\w+)=([\w\-x]+)", (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1]
        )
    }
    hits = 1
    for dim in sorted(set(left) & set("0123456789")):
        n = int(dim)

        def of(key, default, n=n):
            return window[key][n] if key in window else default

        hits *= _window_hits(
            int(of("size", 1)),
            int(of("stride", 1)),
            int(of("pad", "0_0").split("_")[0]),
            int(of("lhs_dilate", 1)),
            int(of("rhs_dilate", 1)),
            lhs[left.index(dim)],
            out[result.index(dim)],
        )
    return 2.0 * hits * out[result.index("b")] * out[result.index("f")] * rhs[right.index("i")]


def _flops(instruction: Instruction, shape_of: Callable[[str], str]) -> float:
    opcode = instruction.opcode
    attributes = instruction.attributes
    if opcode == "convolution":
        lhs, rhs = (dims_of(shape_of(name)) for name in instruction.operands[:2])
        return _convolution_flops(attributes, lhs, rhs, dims_of(instruction.shape))
    if opcode == "dot":
        contracted = _numbers(attributes, "lhs_contracting_dims")
    elif opcode == "custom-call" and re.search(
        r'target="(__cublas\$|__onednn\$matmul)', attributes
    ):
        contracted = _numbers(attributes, "lhs_contracting_dimensions")
    else:
        return 0.0
    lhs = dims_of(shape_of(instruction.operands[0]))
    return (
        2.0
        * math.prod(dims_of(arrays_of(instruction.shape)[0]))
        * math.prod(lhs[d] for d in contracted)
    )


def kernel_of(instruction: Instruction) -> tuple[str, float] | None:
    """(name, FLOPs) of a kernel of ours; what a compiler cannot see into tells them by the scope it
    is called in (mtnlg_jax.model.kernels.blocks.scope)."""
    if not re.search(r'custom_call_target="(tpu_custom_call|mosaic_gpu)', instruction.attributes):
        return None
    found = re.findall(r"(\w+):(\d+)flops", instruction.op_name)
    return (
        (found[-1][0], float(found[-1][1]))
        if found
        else (re.sub(r"[.\d]+$", "", instruction.name), 0.0)
    )


# --- collectives
# --------------------------------------------------------------------------------------------------


def groups_of(attributes: str, mesh: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """(mesh axes along which devices of one group differ, size of a group) of a collective.

    The devices of the program are numbered along the mesh, its last axis fastest. Four ways of
    writing occur: {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), mesh['x'=2,'y'=4] {'y'}, and
        source_target_pairs={{0,1},{1,0}}."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    if pairs:  # those that pass on to each other are one group
        axes = _differing(_listed(pairs[1]), mesh)
        return axes, math.prod(mesh[axis] for axis in axes)
    groups = _groups(attributes, math.prod(mesh.values()))
    return _differing(groups, mesh), groups.shape[1]


def _listed(text: str) -> np.ndarray:
    return np.array(
        [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    )


def _differing(groups: np.ndarray, mesh: dict[str, int]) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(groups, list(mesh.values())), -1)
    moved = (places != places[:, :1]).any((0, 1))
    return tuple(axis for axis, differs in zip(mesh, moved, strict=True) if differs)


def _groups(attributes: str, count: int) -> np.ndarray:
    """(groups, devices of each)."""
    named = re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", attributes)
    if named:  # of the compiler's own mesh, whose names need not be ours
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = {}
        for axis, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2]):
            chosen.setdefault(axis, []).append((int(before or 1), int(part or sizes[axis])))
        shape = []
        inside = []
        for axis, size in sizes.items():  # an axis may take part with a factor of its size
            for before, part in sorted(chosen.get(axis, [])):
                shape += [before, part]
                inside.append(len(shape) - 1)
                size //= before * part
            shape.append(size)
        outside = [dim for dim in range(len(shape)) if dim not in inside]
        group = math.prod(shape[dim] for dim in inside)
        return (
            np.arange(math.prod(shape))
            .reshape(shape)
            .transpose(outside + inside)
            .reshape(-1, group)
        )
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, reshaped = ([int(n) for n in part.split(",")] for part in iota.groups()[:2])
        ids = np.arange(math.prod(reshaped)).reshape(reshaped)
        return (ids.transpose([int(n) for n in iota[3].split(",")]) if iota[3] else ids).reshape(
            shape
        )
    listed = re.search(r"replica_groups=\{(.*?\})\}", attributes)
    return _listed(listed[1]) if listed else np.arange(count)[None]


def _sent(kind: str, whole: float, size: int) -> float:
    if kind == "collective-permute":
        return whole
    return (2 if kind == "all-reduce" else 1) * whole * (size - 1) / size


def _collective(instruction: Instruction, shape_of, mesh, scattered: bool):
    """((kind, axes, group), bytes that a device sends), or None."""
    kind = instruction.opcode.removesuffix("-start")
    between = kind == "send" and re.search(
        r'megascale_target="\{([\d,]+)\}.*megascale_transfer_type="(\w+)"', instruction.attributes
    )
    if kind not in KINDS and not between:
        return None
    given = sum(bytes_of(shape_of(name)) for name in instruction.operands)
    if between:  # the part of a collective that leaves a TPU slice
        kind = between[2].lower().replace("_", "-")
        size = between[1].count(",") + 1
        return (kind, ("slices",), size), _sent(
            kind, given * size if kind == "all-gather" else given, size
        )
    axes, size = groups_of(instruction.attributes, mesh)
    if size == 1:  # the CPU compiler keeps these
        return None
    whole = given * size if kind == "all-gather" else given
    if kind == "all-reduce" and scattered:
        kind = "reduce-scatter"
    return (kind, axes, size), _sent(kind, whole, size)


# --- adding up
# ----------------------------------------------------------------------------------------------------

_INLINE = ("calls", "to_apply", "called_computations")


def cost_of(
    program: Program, mesh: dict[str, int], dynamic_trips: Callable[[int], float] = lambda depth: 1
) -> Cost:
    """FLOPs and collectives of one run of ``program`` on one device.

    Args:
      mesh: {axis: size}, in the order in which the program's devices are numbered.
      dynamic_trips: trips of a loop that only knows them when it runs, given the number of loops
          around it.
    """
    guessed = set()

    @functools.cache
    def walk(computation: str, depth: int, scattered: bool = False):
        shapes = program.index(computation)
        flops = 0.0
        found = Counter()

        def shape_of(name):
            return shapes[name].shape

        def add(result, times=1.0):
            nonlocal flops
            flops += times * result[0]
            for key, value in result[1].items():
                found[key] += times * value

        for instruction in program.computations[computation]:
            opcode = instruction.opcode
            flops += _flops(instruction, shape_of)
            kernel = kernel_of(instruction) if opcode == "custom-call" else None
            if kernel:
                found["kernel", kernel[0], depth] += 1
                flops += kernel[1]
            collective = _collective(instruction, shape_of, mesh, scattered)
            if collective:
                found[*collective[0], depth, "count"] += 1
                found[*collective[0], depth, "bytes"] += collective[1]
            elif opcode == "while":
                trips = trips_of(program, computation, instruction)
                if trips is None:
                    guessed.add(instruction.name)
                    trips = dynamic_trips(depth)
                for body in program.called(instruction, "body"):
                    add(walk(body, depth + 1), trips)
            elif opcode == "conditional":
                branches = program.called(
                    instruction, "branch_computations", "true_computation", "false_computation"
                )
                add(max((walk(branch, depth) for branch in branches), key=_weight))
            elif opcode not in (
                "async-update",
                "async-done",
            ):  # these name what async-start has started
                for name in program.called(instruction, *_INLINE):
                    # The TPU compiler writes a sum of which each device keeps its part as such a
                    # fusion.
                    part = "all-reduce-scatter" in instruction.name or "all-reduce-scatter" in name
                    add(walk(name, depth, part))
        return flops, found

    flops, found = walk(program.entry, 0)
    kernels = tuple(
        Kernel(*key[1:], found[key])
        for key in sorted(k for k in found if k[0] == "kernel")
        if found[key]
    )
    keys = sorted(
        {key[:4] for key in found if key[0] != "kernel"},
        key=lambda key: ((*KINDS, key[0]).index(key[0]), key[3], key[1:3]),
    )
    rows = tuple(Collective(*key, found[*key, "count"], found[*key, "bytes"]) for key in keys)
    return Cost(flops, tuple(row for row in rows if row.count), kernels, len(guessed))


def _weight(result):
    return result[0], sum(value for key, value in result[1].items() if key[-1] == "bytes")


def trips_of(program: Program, computation: str, loop: Instruction) -> int | None:
    """Trips of a while loop: what the compiler has noted, or what its start, step and condition
    say.

    The counter may start anywhere, count up or down by any step, and be compared in any direction,
    with a constant or with another number that the loop carries; all may stand behind copies and
    inside fusions. None where the trips are known only when the loop runs, or are so many that the
    bound is none (``NEVER``)."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    trips = int(noted[1]) if noted else _counted(program, computation, loop)
    return None if trips is None or trips >= NEVER else trips


NEVER = 2**31 - 1  # as large a bound is "until something else ends it", and would drown every sum


@dataclasses.dataclass(frozen=True)
class _Number:
    """An integer of a loop: ``offset``, or ``offset`` more than element ``place`` of what the loop
    carries."""

    offset: int
    place: int | None = None


_ALL = -1  # the place of a loop that carries one number, and no tuple

# These pass on the value of their first operand.
_PASSES = (
    "copy",
    "copy-start",
    "copy-done",
    "bitcast",
    "convert",
    "reshape",
    "optimization-barrier",
)
# Trips of ``while (distance DIRECTION 0) distance += step``; with a step of another sign the loop
# never ends.
_ENDS = {
    "LT": lambda distance, step: _until(-distance, step),
    "LE": lambda distance, step: _until(1 - distance, step),
    "GT": lambda distance, step: _until(distance, -step),
    "GE": lambda distance, step: _until(1 + distance, -step),
    "NE": lambda distance, step: (
        None if step == 0 or distance % step or -distance // step < 0 else -distance // step
    ),
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
    """Steps to come ``far`` or farther."""
    return -(-far // step) if step > 0 else None


def _counted(program: Program, computation: str, loop: Instruction) -> int | None:
    """Trips by arithmetic, or None."""
    condition, body = (next(iter(program.called(loop, key)), None) for key in ("condition", "body"))
    if condition not in program.roots or body not in program.roots:
        return None
    test, values = _seen_through(program, condition, program.roots[condition].name, None)
    direction = (
        re.search(r"direction=(\w\w)", test.attributes) if test.opcode == "compare" else None
    )
    if not direction:
        return None
    sides = [values(name) for name in test.operands]
    if None in sides:
        return None
    first = []
    steps = []
    for side in sides:
        if side.place is None:
            first.append(side.offset)
            steps.append(0)
            continue
        place = None if side.place == _ALL else side.place
        begin = _number_of(program, computation, loop.operands[0], None, place)
        after = _number_of(program, body, program.roots[body].name, None, place)
        if begin is None or begin.place is not None or after is None or after.place != side.place:
            return None
        first.append(begin.offset + side.offset)
        steps.append(after.offset)
    distance = first[0] - first[1]
    if not _HOLDS[direction[1]](distance, 0):
        return 0
    return _ENDS[direction[1]](distance, steps[0] - steps[1])


def _seen_through(program: Program, computation: str, name: str, given: Callable | None):
    """(the instruction that makes ``name``'s value, a function from the names of its operands to
    _Number or None): behind copies, and inside the fusions that wrap it."""
    instruction = program.index(computation)[name]
    while instruction.opcode in _PASSES and instruction.operands[0] in program.index(computation):
        instruction = program.index(computation)[instruction.operands[0]]

    def value(operand: str):
        return _number_of(program, computation, operand, given)

    inner = next(iter(program.called(instruction, "calls", "to_apply")), None)
    if instruction.opcode in ("fusion", "call") and inner in program.roots:
        operands = instruction.operands
        return _seen_through(
            program, inner, program.roots[inner].name, lambda place: value(operands[place])
        )
    return instruction, value


def _number_of(
    program: Program, computation: str, name: str, given: Callable | None, place: int | None = None
) -> _Number | None:
    """The integer that ``name`` has in a computation of a loop, or element ``place`` of the tuple
    that it is.

    ``given``: of a fusion, from the number of a parameter to what it stands for; None where the
    parameter is what the loop carries."""
    index = program.index(computation)
    instruction = index.get(name)
    if instruction is None:
        return None
    opcode = instruction.opcode
    operands = instruction.operands

    def of(operand: str, place: int | None = None):
        return _number_of(program, computation, operand, given, place)

    if opcode == "parameter":
        if given is not None:
            return given(int(operands[0])) if place is None else None
        return _Number(0, _ALL if place is None else place)
    if opcode == "get-tuple-element":
        return (
            of(operands[0], int(re.search(r"index=(\d+)", instruction.attributes)[1]))
            if place is None
            else None
        )
    if opcode in _PASSES:
        return of(operands[0], place)
    if opcode == "tuple":
        return of(operands[place]) if place is not None and place < len(operands) else None
    if opcode in ("fusion", "call"):
        inner = next(iter(program.called(instruction, "calls", "to_apply")), None)
        root = program.roots.get(inner)
        return root and _number_of(
            program, inner, root.name, lambda number: of(operands[number]), place
        )
    if place is not None:
        return None
    if opcode == "constant":
        return _Number(int(operands[0])) if re.fullmatch(r"-?\d+", operands[0]) else None
    if opcode in ("add", "subtract", "multiply", "negate"):
        return _sum(opcode, [of(operand) for operand in operands])
    return None


def _sum(opcode: str, numbers: list[_Number | None]) -> _Number | None:
    if None in numbers:
        return None
    if opcode == "negate":
        numbers = [_Number(0), *numbers]
        opcode = "subtract"
    left, right = numbers
    if opcode == "multiply":
        known = left.place is None and right.place is None
        return _Number(left.offset * right.offset) if known else None
    if opcode == "add":
        if None not in (left.place, right.place):
            return None
        return _Number(
            left.offset + right.offset, right.place if left.place is None else left.place
        )
    if right.place is None:
        return _Number(left.offset - right.offset, left.place)
    return _Number(left.offset - right.offset) if left.place == right.place else None
