"""What a compiled program does, read from its text: collectives, products, what its loops hold.

XLA's own cost analysis counts the body of a loop once. Here every count is multiplied by the trips of the loops
around it. Loops whose trips are known only when they run are asked for (``dynamic_trips``). Of a conditional, the
costlier branch counts. The text is that of ``jax.stages.Compiled.as_text()``, of any backend.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

# Bytes of an element; what is not listed ends with its bits (f32, u8, f8e4m3fn).
_ODD_SIZES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25,
              "f4e2m1fn": 0.5}


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # as written: f32[2,3]{1,0:T(8,128)}, or a tuple of these in parentheses
    opcode: str
    operands: tuple[str, ...]  # names; of a parameter or constant what stands in the parentheses
    attributes: str

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from; empty where the compiler does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind, over one set of mesh axes, at one depth of loops."""

    kind: str  # one of KINDS
    axes: tuple[str, ...]  # mesh axes along which the devices of a group differ; empty: no whole axes
    depth: int  # loops around it
    count: float  # executions a step
    bytes: float  # that a device sends in them, by the ring's count: (n - 1)/n of the whole, twice for a sum


@dataclasses.dataclass(frozen=True)
class Cost:
    flops: float  # of the products a device computes, 2 for a multiplication and addition
    collectives: tuple[Collective, ...]
    guessed_loops: int  # loops whose trips were asked for


# --- reading ----------------------------------------------------------------------------------------------------


def _close(text: str, start: int) -> int:
    """Index behind the parenthesis that closes the one at ``start``. Names in quotes may hold some, too."""
    depth, quoted = 0, False
    for index in range(start, len(text)):
        letter = text[index]
        if letter == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (letter in "([{") - (letter in ")]}")
            if depth == 0:
                return index + 1
    raise ValueError(f"HLO text with an open parenthesis: {text[start:start + 80]}")


def split_top(text: str) -> list[str]:
    """"a, b{1,0}, (c, d)" -> its parts at the outermost commas."""
    parts, depth, begin = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[begin:index].strip())
            begin = index + 1
    return [*parts, text[begin:].strip()] if text.strip() else []


_HEAD = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if not head:
        return None
    start = head.end()
    end = _close(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _close(line, opening)
    # An operand may be written with its shape in front.
    operands = tuple(part.rpartition(" ")[2].lstrip("%") for part in split_top(line[opening + 1:closing - 1]))
    return Instruction(head[1], line[start:end], line[end:opening].strip(), operands, line[closing:])


class Program:
    """The computations of a program: {name: [Instruction]} and the name of the entry."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry, current = None, None
        for line in text.splitlines():
            line = re.sub(r"/\*.*?\*/", "", line) if "/*" in line else line
            if not line.startswith(" "):
                head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{\s*$", line)
                if head and not line.startswith("HloModule"):
                    current = head[2]
                    self.computations[current] = []
                    self.entry = current if head[1] else self.entry
                continue
            instruction = _instruction(line)
            if current and instruction:
                self.computations[current].append(instruction)
                if line.lstrip().startswith("ROOT "):
                    self.roots[current] = instruction
        if self.entry is None:
            raise ValueError("this is no HLO text: it has no ENTRY")

    @functools.cache
    def index(self, computation: str) -> dict[str, Instruction]:
        return {i.name: i for i in self.computations[computation]}

    def called(self, instruction: Instruction, *keys: str) -> list[str]:
        """Computations that an instruction names under ``keys`` (body, calls, branch_computations ...)."""
        names = []
        for key in keys:
            for found in re.finditer(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.-]+)", instruction.attributes):
                names += [name.strip(" %") for name in found[1].strip("{}").split(",")]
        return [name for name in names if name in self.computations]


# --- shapes -------------------------------------------------------------------------------------------------------


def arrays_of(shape: str) -> list[str]:
    """The arrays of a shape, tuples taken apart."""
    if shape.startswith("("):
        return [array for part in split_top(shape[1:_close(shape, 0) - 1]) for array in arrays_of(part)]
    return [shape]


def dims_of(array: str) -> tuple[int, ...]:
    found = re.match(r"\w+\[([^\]]*)\]", array)
    return tuple(int(d.lstrip("<=")) for d in found[1].split(",") if d.strip()) if found else ()


def _element_bytes(array: str) -> float:
    kind = re.match(r"\w+", array)[0]
    if kind in _ODD_SIZES:
        return _ODD_SIZES[kind]
    return int(re.match(r"[a-z]+(\d+)", kind)[1]) / 8


def bytes_of(shape: str) -> int:
    """Bytes of the elements, without padding."""
    return sum(math.ceil(_element_bytes(a) * math.prod(dims_of(a))) for a in arrays_of(shape))


def padded_bytes(shape: str) -> int:
    """Bytes that the arrays occupy: a layout's first tile, T(8,128), is never filled in part."""
    total = 0
    for array in arrays_of(shape):
        dims = list(dims_of(array))
        layout = re.search(r"\{([\d,]*):T\(([\d,]+)\)", array)
        if layout and dims:
            order = [int(d) for d in layout[1].split(",")]  # minor first
            tile = [int(t) for t in layout[2].split(",")][::-1]
            if len(order) < len(tile):
                tile = [math.prod(tile)] if len(order) == 1 else tile[: len(order)]
            for dim, size in zip(order, tile, strict=False):
                dims[dim] = -(-dims[dim] // size) * size
        total += math.ceil(_element_bytes(array) * math.prod(dims))
    return total


# --- products -----------------------------------------------------------------------------------------------------


def _numbers(attributes: str, key: str) -> list[int]:
    found = re.search(rf'"?{key}"?[=:][{{\[]([\d",\s]*)[}}\]]', attributes)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


def _window_hits(size, stride, low, lhs_dilate, rhs_dilate, length, out) -> int:
    """Pairs (output place, window place) of one dim that fall on an element of the input and not on padding."""
    place = (np.arange(out)[:, None] * stride - low + np.arange(size)[None] * rhs_dilate)
    return int(((place >= 0) & (place % lhs_dilate == 0) & (place // lhs_dilate < length)).sum())


def _convolution_flops(attributes: str, lhs: tuple, rhs: tuple, out: tuple) -> float:
    """TPU programs write products as convolutions, those of a batch with one spatial dim a batch dim, of whose
    window only one place hits."""
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\w\-x]+)",
              (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1])}
    hits = 1
    for dim in sorted(set(left) & set("0123456789")):
        n = int(dim)

        def of(key, default, n=n):
            return window[key][n] if key in window else default

        hits *= _window_hits(int(of("size", 1)), int(of("stride", 1)), int(of("pad", "0_0").split("_")[0]),
                             int(of("lhs_dilate", 1)), int(of("rhs_dilate", 1)), lhs[left.index(dim)],
                             out[result.index(dim)])
    return 2.0 * hits * out[result.index("b")] * out[result.index("f")] * rhs[right.index("i")]


def _flops(instruction: Instruction, shape_of: Callable[[str], str]) -> float:
    opcode, attributes = instruction.opcode, instruction.attributes
    if opcode == "convolution":
        lhs, rhs = (dims_of(shape_of(name)) for name in instruction.operands[:2])
        return _convolution_flops(attributes, lhs, rhs, dims_of(instruction.shape))
    if opcode == "dot":
        contracted = _numbers(attributes, "lhs_contracting_dims")
    elif opcode == "custom-call" and re.search(r'target="(__cublas\$|__onednn\$matmul)', attributes):
        contracted = _numbers(attributes, "lhs_contracting_dimensions")
    else:
        return 0.0
    lhs = dims_of(shape_of(instruction.operands[0]))
    return 2.0 * math.prod(dims_of(arrays_of(instruction.shape)[0])) * math.prod(lhs[d] for d in contracted)


# --- collectives --------------------------------------------------------------------------------------------------


def groups_of(attributes: str, mesh: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """(mesh axes along which devices of one group differ, size of a group) of a collective.

    The devices of the program are numbered along the mesh, its last axis fastest. Four ways of writing occur:
    {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), mesh['x'=2,'y'=4] {'y'}, and source_target_pairs={{0,1},{1,0}}. Axes are ()
    where the groups are not those of whole axes."""
    sizes = list(mesh.values())
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    if pairs:
        ids = np.array([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
        places = np.stack(np.unravel_index(ids, sizes), -1)
        moved = (places[:, 0] != places[:, 1]).any(0)
        return tuple(axis for axis, differs in zip(mesh, moved, strict=True) if differs), 2
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S+)? *\{(.*?)\}", attributes)
    if named:
        within = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        axes = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2])
        size = math.prod(int(part) if part else within[axis] for axis, _, part in axes)
        if any(part for *_, part in axes) or not set(within) <= set(mesh):
            return (), size
        return tuple(axis for axis in mesh if axis in {a for a, *_ in axes} and mesh[axis] > 1), size
    count = math.prod(sizes)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, reshaped = ([int(n) for n in part.split(",")] for part in iota.groups()[:2])
        ids = np.arange(math.prod(reshaped)).reshape(reshaped)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        ids = ids.reshape(shape)
    else:
        listed = re.search(r"replica_groups=\{(.*?\})\}", attributes)
        ids = (np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
               if listed else np.arange(count)[None])
    places = np.stack(np.unravel_index(ids, sizes), -1)
    moved = (places != places[:, :1]).any((0, 1))
    axes = tuple(axis for axis, differs in zip(mesh, moved, strict=True) if differs)
    return (axes if math.prod(mesh[axis] for axis in axes) == ids.shape[1] else ()), ids.shape[1]


def _sent(kind: str, whole: float, size: int) -> float:
    if kind == "collective-permute":
        return whole
    return (2 if kind == "all-reduce" else 1) * whole * (size - 1) / size


def _collective(instruction: Instruction, shape_of, mesh, scattered: bool):
    """((kind, axes), bytes that a device sends), or None."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    axes, size = groups_of(instruction.attributes, mesh)
    if size == 1:  # the CPU compiler keeps these
        return None
    given = sum(bytes_of(shape_of(name)) for name in instruction.operands)
    whole = given * size if kind == "all-gather" else given
    if kind == "all-reduce" and scattered:
        kind = "reduce-scatter"
    return (kind, axes), _sent(kind, whole, size)


# --- adding up ----------------------------------------------------------------------------------------------------

_INLINE = ("calls", "to_apply", "called_computations")


def cost_of(program: Program, mesh: dict[str, int], dynamic_trips: Callable[[int], float] = lambda depth: 1) -> Cost:
    """FLOPs and collectives of one run of ``program`` on one device.

    Args:
      mesh: {axis: size}, in the order in which the program's devices are numbered.
      dynamic_trips: trips of a loop that only knows them when it runs, given the number of loops around it.
    """
    guessed = set()

    @functools.cache
    def walk(computation: str, depth: int, scattered: bool = False):
        shapes = program.index(computation)
        flops, found = 0.0, Counter()

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
            collective = _collective(instruction, shape_of, mesh, scattered)
            if collective:
                (kind, axes), sent = collective
                found[kind, axes, depth, "count"] += 1
                found[kind, axes, depth, "bytes"] += sent
            elif opcode == "while":
                trips = trips_of(program, computation, instruction)
                if trips is None:
                    guessed.add(instruction.name)
                    trips = dynamic_trips(depth)
                for body in program.called(instruction, "body"):
                    add(walk(body, depth + 1), trips)
            elif opcode == "conditional":
                branches = program.called(instruction, "branch_computations", "true_computation", "false_computation")
                add(max((walk(branch, depth) for branch in branches), key=_weight))
            elif opcode not in ("async-update", "async-done"):  # these name what async-start has started
                for name in program.called(instruction, *_INLINE):
                    # The TPU compiler writes a sum of which each device keeps its part as such a fusion.
                    part = "all-reduce-scatter" in instruction.name or "all-reduce-scatter" in name
                    add(walk(name, depth, part))
        return flops, found

    flops, found = walk(program.entry, 0)
    keys = sorted({key[:3] for key in found}, key=lambda key: (KINDS.index(key[0]), key[2], key[1]))
    rows = tuple(Collective(*key, found[*key, "count"], found[*key, "bytes"]) for key in keys)
    return Cost(flops, tuple(row for row in rows if row.count), len(guessed))


def _weight(result):
    return result[0], sum(value for key, value in result[1].items() if key[3] == "bytes")


def trips_of(program: Program, computation: str, loop: Instruction) -> int | None:
    """Trips of a while loop: what the compiler has noted, or what its condition says; None if known only later."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if noted:
        return int(noted[1])
    condition = next(iter(program.called(loop, "condition")), None)
    test = program.roots.get(condition)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    init = program.index(computation).get(loop.operands[0])

    def value(name: str) -> int | None:
        """A constant of the condition, or one that the loop carries from its start."""
        inside = program.index(condition).get(name)
        if inside is not None and inside.opcode == "get-tuple-element" and init is not None and init.opcode == "tuple":
            place = int(re.search(r"index=(\d+)", inside.attributes)[1])
            inside = program.index(computation).get(init.operands[place])
            while inside is not None and inside.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
                inside = program.index(computation).get(inside.operands[0])
        return int(inside.operands[0]) if inside is not None and inside.opcode == "constant" else None

    first, last = (value(name) for name in test.operands)
    return None if last is None else max(last - (first or 0), 0)


# --- memory -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensor:
    bytes: int  # on a device, with padding
    shape: str  # f32[105,160]
    held: str  # "argument", "loop" (carried by one from its start) or "temporary"
    count: int  # how many of this shape are held so
    name: str  # of the first of them: an argument's name, else where the program makes it


def arguments_of(program: Program) -> list[tuple[str, str]]:
    """(name, shape with layout) of every argument."""
    return [(i.op_name, i.shape) for i in program.computations[program.entry] if i.opcode == "parameter"]


# These make no array of their own.
_NO_ARRAY = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant",
             "optimization-barrier", "after-all"}


def largest(program: Program, count: int) -> list[Tensor]:
    """The largest tensors, arguments, loop state and others. A list of suspects: which of them live at the same
    time only the compiler knows."""
    names: dict[tuple, list[str]] = {}

    def add(shape, held, name):
        for array in arrays_of(shape):
            short = re.match(r"\w+\[[^\]]*\]", array)
            if short and "S(" not in array:  # S(1) is not in the device's main memory
                names.setdefault((padded_bytes(array), short[0], held), []).append(name)

    bodies = [program.entry]
    for body in bodies:
        state, index = set(), program.index(body)
        for instruction in program.computations[body]:
            if instruction.opcode in ("while", "conditional", "call"):
                called = program.called(instruction, "body", "branch_computations", "true_computation",
                                        "false_computation", "to_apply")
                bodies += [name for name in called if name not in bodies]
            if instruction.opcode == "while":
                init = index.get(instruction.operands[0])
                state |= set(init.operands) if init is not None and init.opcode == "tuple" else set()
        for instruction in program.computations[body]:
            if instruction.opcode == "parameter" and body == program.entry:
                add(instruction.shape, "argument", instruction.op_name)
            elif instruction.opcode not in _NO_ARRAY:
                add(instruction.shape, "loop" if instruction.name in state else "temporary", instruction.op_name)
    return [Tensor(*key, len(names[key]), names[key][0]) for key in sorted(names, reverse=True)[:count]]
