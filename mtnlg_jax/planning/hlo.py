"""Read a compiled program from the text of ``jax.stages.Compiled.as_text()``, of any backend:
instructions, shapes and the bytes that they occupy, the largest tensors."""

import dataclasses
import math
import re

# Bytes of an element. The name of any other type contains its bits (f32, u8, f8e4m3fn).
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
    # Names; for a parameter or a constant the text in the parentheses.
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        """Its origin in the traced program; empty if the compiler gives none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""


# --- reading ---


def _close(text: str, start: int) -> int:
    """Return the index after the parenthesis that closes the one at ``start``. Parentheses in
    quoted names do not count."""
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
    """Split at the outermost commas: "a, b{1,0}, (c, d)" has three parts."""
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
    # An operand may come after its shape.
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
        entry = None
        current = None
        for line in text.splitlines():
            line = re.sub(r"/\*.*?\*/", "", line) if "/*" in line else line
            if not line.startswith(" "):
                head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{\s*$", line)
                if head and not line.startswith("HloModule"):
                    current = head[2]
                    self.computations[current] = []
                    entry = current if head[1] else entry
                continue
            instruction = _instruction(line)
            if current and instruction:
                self.computations[current].append(instruction)
                if line.lstrip().startswith("ROOT "):
                    self.roots[current] = instruction
        if entry is None:
            raise ValueError("this is not HLO text: it has no ENTRY")
        self.entry: str = entry

    def index(self, computation: str) -> dict[str, Instruction]:
        if computation not in self._indices:
            self._indices[computation] = {i.name: i for i in self.computations[computation]}
        return self._indices[computation]

    def operand_arrays(self, computation: str, instruction: Instruction) -> list[str]:
        """Return the arrays of the operands of an instruction; tuples are flattened."""
        index = self.index(computation)
        return [
            array
            for name in instruction.operands
            if name in index
            for array in arrays_of(index[name].shape)
        ]

    def operand_bytes(self, computation: str, instruction: Instruction) -> int:
        return sum(map(bytes_of, self.operand_arrays(computation, instruction)))

    def called(self, instruction: Instruction, *keys: str) -> list[str]:
        """Return the computations that an instruction names under ``keys`` (body, calls,
        branch_computations ...)."""
        names = []
        for key in keys:
            for found in re.finditer(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.-]+)", instruction.attributes):
                names += [name.strip(" %") for name in found[1].strip("{}").split(",")]
        return [name for name in names if name in self.computations]


# --- shapes ---


def arrays_of(shape: str) -> list[str]:
    """Return the arrays of a shape; tuples are flattened."""
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
    kind = array.partition("[")[0]
    if kind in _ODD_SIZES:
        return _ODD_SIZES[kind]
    bits = re.match(r"[a-z]+(\d+)", kind)
    if bits is None:
        raise ValueError(f"HLO element type {kind!r} has no size")
    return int(bits[1]) / 8


def bytes_of(shape: str) -> int:
    """Bytes of the elements, without padding."""
    return sum(math.ceil(_element_bytes(a) * math.prod(dims_of(a))) for a in arrays_of(shape))


def padded_bytes(shape: str) -> int:
    """Bytes that the arrays occupy. The first tile of a layout, T(8,128), is always filled up."""
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


# --- memory ---


@dataclasses.dataclass(frozen=True)
class Tensor:
    bytes: int  # on a device, with padding
    shape: str  # f32[105,160]
    held: str  # "argument", "loop" (part of a loop's initial state) or "temporary"
    count: int  # tensors of this shape that are held in this way
    name: str  # of the first one: an argument's name, else its origin in the program


def arguments_of(program: Program) -> list[tuple[str, str]]:
    """Return (name, shape with layout) of every argument."""
    return [
        (i.op_name, i.shape) for i in program.computations[program.entry] if i.opcode == "parameter"
    ]


# Instructions that make no array of their own.
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
    """Return the largest tensors: arguments, loop state and temporaries. They are suspects only:
    the compiler alone knows which of them live at the same time."""
    names: dict[tuple[int, str, str], list[str]] = {}

    def add(shape: str, held: str, name: str) -> None:
        for array in arrays_of(shape):
            short = re.match(r"\w+\[[^\]]*\]", array)
            if short and "S(" not in array:  # S(1) is not in the device's main memory
                names.setdefault((padded_bytes(array), short[0], held), []).append(name)

    bodies = [program.entry]
    for body in bodies:
        state: set[str] = set()
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
                if init is not None and init.opcode == "tuple":
                    state |= set(init.operands)
        for instruction in program.computations[body]:
            if instruction.opcode == "parameter" and body == program.entry:
                add(instruction.shape, "argument", instruction.op_name)
            elif instruction.opcode not in _NO_ARRAY:
                held = "loop" if instruction.name in state else "temporary"
                add(instruction.shape, held, instruction.op_name)
    return [
        Tensor(size, shape, held, len(found), found[0])
        for (size, shape, held), found in sorted(names.items(), reverse=True)[:count]
    ]
