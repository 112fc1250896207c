"""A compiled program read from its text, that of ``jax.stages.Compiled.as_text()``, of any backend:
instructions, shapes and the bytes that they occupy, the largest tensors."""

import dataclasses
import math
import re

# Bytes of an element; what is not listed ends with its bits (f32, u8, f8e4m3fn).
_ODD_SIZES = {
    "pred": 1,
    "token": 0,
    "opaque": 0,
    "c64": 8,
    "c128": 16,
    "s4": 0.5,
    "u4": 0.5,
    "s2": 0.25,
    "u2": 0.25,
    "f4e2m1fn": 0.5,
}


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


# --- reading
# ----------------------------------------------------------------------------------------------------


def _close(text: str, start: int) -> int:
    """Index behind the parenthesis that closes the one at ``start``. Names in quotes may hold some,
    too."""
    depth = 0
    quoted = False
    for index in range(start, len(text)):
        letter = text[index]
        if letter == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (letter in "([{") - (letter in ")]}")
            if depth == 0:
                return index + 1
    raise ValueError(f"HLO text with an open parenthesis: {text[start : start + 80]}")


def split_top(text: str) -> list[str]:
    """ "a, b{1,0}, (c, d)" -> its parts at the outermost commas."""
    parts = []
    depth = 0
    begin = 0
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
    operands = tuple(
        part.rpartition(" ")[2].lstrip("%") for part in split_top(line[opening + 1 : closing - 1])
    )
    return Instruction(
        head[1], line[start:end], line[end:opening].strip(), operands, line[closing:]
    )


class Program:
    """The computations of a program: {name: [Instruction]} and the name of the entry."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self._indices: dict[str, dict[str, Instruction]] = {}
        self.entry = None
        current = None
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

    def index(self, computation: str) -> dict[str, Instruction]:
        if computation not in self._indices:
            self._indices[computation] = {i.name: i for i in self.computations[computation]}
        return self._indices[computation]

    def called(self, instruction: Instruction, *keys: str) -> list[str]:
        """Computations that an instruction names under ``keys`` (body, calls, branch_computations
        ...)."""
        names = []
        for key in keys:
            for found in re.finditer(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.-]+)", instruction.attributes):
                names += [name.strip(" %") for name in found[1].strip("{}").split(",")]
        return [name for name in names if name in self.computations]


# --- shapes
# -------------------------------------------------------------------------------------------------------


def arrays_of(shape: str) -> list[str]:
    """The arrays of a shape, tuples taken apart."""
    if shape.startswith("("):
        return [
            array
            for part in split_top(shape[1 : _close(shape, 0) - 1])
            for array in arrays_of(part)
        ]
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


# --- memory
# -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensor:
    bytes: int  # on a device, with padding
    shape: str  # f32[105,160]
    held: str  # "argument", "loop" (carried by one from its start) or "temporary"
    count: int  # how many of this shape are held so
    name: str  # of the first of them: an argument's name, else where the program makes it


def arguments_of(program: Program) -> list[tuple[str, str]]:
    """(name, shape with layout) of every argument."""
    return [
        (i.op_name, i.shape) for i in program.computations[program.entry] if i.opcode == "parameter"
    ]


# These make no array of their own.
_NO_ARRAY = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "constant",
    "optimization-barrier",
    "after-all",
}


def largest(program: Program, count: int) -> list[Tensor]:
    """The largest tensors, arguments, loop state and others. A list of suspects: which of them live
    at the same time only the compiler knows."""
    names: dict[tuple, list[str]] = {}

    def add(shape, held, name):
        for array in arrays_of(shape):
            short = re.match(r"\w+\[[^\]]*\]", array)
            if short and "S(" not in array:  # S(1) is not in the device's main memory
                names.setdefault((padded_bytes(array), short[0], held), []).append(name)

    bodies = [program.entry]
    for body in bodies:
        state = set()
        index = program.index(body)
        for instruction in program.computations[body]:
            if instruction.opcode in ("while", "conditional", "call"):
                called = program.called(
                    instruction,
                    "body",
                    "branch_computations",
                    "true_computation",
                    "false_computation",
                    "to_apply",
                )
                bodies += [name for name in called if name not in bodies]
            if instruction.opcode == "while":
                init = index.get(instruction.operands[0])
                state |= (
                    set(init.operands) if init is not None and init.opcode == "tuple" else set()
                )
        for instruction in program.computations[body]:
            if instruction.opcode == "parameter" and body == program.entry:
                add(instruction.shape, "argument", instruction.op_name)
            elif instruction.opcode not in _NO_ARRAY:
                add(
                    instruction.shape,
                    "loop" if instruction.name in state else "temporary",
                    instruction.op_name,
                )
    return [
        Tensor(*key, len(names[key]), names[key][0]) for key in sorted(names, reverse=True)[:count]
    ]
