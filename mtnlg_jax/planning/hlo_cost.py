"""Count FLOPs and collectives of a compiled program, each as often as it runs.

XLA's own cost analysis counts the body of a loop once. Here every count is multiplied by the trips
of the loops around it. The caller gives the trips of loops that only know them at run time
(``dynamic_trips``). In a conditional the costlier branch counts.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from mtnlg_jax.planning.hlo import Instruction, Program, arrays_of, bytes_of, dims_of
from mtnlg_jax.planning.trips import trips_of

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind, over one set of mesh axes, at one depth of loops."""

    kind: str  # one of KINDS
    # Mesh axes along which the devices of a group differ; ("slices",) between TPU slices.
    axes: tuple[str, ...]
    # Devices of a group: the product of the axes, or less if a group is a part of them.
    group: int
    depth: int  # loops around it
    count: float  # executions a step
    # Sent by a device, for a ring: (n - 1)/n of the whole, twice for a sum.
    bytes: float


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All runs of one of our kernels at one depth of loops."""

    name: str  # of the scope that calls it: attention_forward, ...
    depth: int  # loops around it
    count: float  # executions a step


@dataclasses.dataclass(frozen=True)
class Cost:
    # Of the products that a device computes, kernels included; 2 for a multiply-add.
    flops: float
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    guessed_loops: int  # loops whose trips the caller gave


# --- products ---


def _numbers(attributes: str, key: str) -> list[int]:
    found = re.search(rf'"?{key}"?[=:][{{\[]([\d",\s]*)[}}\]]', attributes)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


def _window_hits(
    size: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int, length: int, out: int
) -> int:
    """Count the pairs (output position, window position) of one dim that hit an element of the
    input instead of padding."""
    at = np.arange(out)[:, None] * stride - low + np.arange(size)[None] * rhs_dilate
    return int(((at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < length)).sum())


def _convolution_flops(attributes: str, lhs: tuple, rhs: tuple, out: tuple) -> float:
    """FLOPs of a product that a TPU program writes as a convolution. A batch dim is a spatial dim
    in which a single window position hits."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise ValueError(f"HLO convolution without dim_labels: {attributes[:80]}")
    left, right, result = labels.groups()
    sizes = re.search(r"window=\{([^}]*)\}", attributes)
    window = {
        key: value.split("x")
        for key, value in re.findall(r"(\w+)=([\w\-x]+)", sizes[1] if sizes else "")
    }
    hits = 1
    for dim in sorted(set(left) & set("0123456789")):
        n = int(dim)

        def setting(key: str, default: str, n: int = n) -> int:
            value = window[key][n] if key in window else default
            return int(value.split("_")[0])  # of padding only the low side counts

        hits *= _window_hits(
            size=setting("size", "1"),
            stride=setting("stride", "1"),
            low=setting("pad", "0_0"),
            lhs_dilate=setting("lhs_dilate", "1"),
            rhs_dilate=setting("rhs_dilate", "1"),
            length=lhs[left.index(dim)],
            out=out[result.index(dim)],
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
    out = dims_of(arrays_of(instruction.shape)[0])
    return 2.0 * math.prod(out) * math.prod(lhs[d] for d in contracted)


def kernel_of(instruction: Instruction) -> tuple[str, float] | None:
    """Return (name, FLOPs) of one of our kernels. Compilers cannot see into a kernel, so the scope
    that calls it has both in its name (mtnlg_jax.model.kernels.blocks.scope)."""
    if not re.search(r'custom_call_target="(tpu_custom_call|mosaic_gpu)', instruction.attributes):
        return None
    found = re.findall(r"(\w+):(\d+)flops", instruction.op_name)
    if not found:
        return re.sub(r"[.\d]+$", "", instruction.name), 0.0
    name, flops = found[-1]
    return name, float(flops)


_INLINE = ("calls", "to_apply", "called_computations")


def products_of(
    program: Program, computation: str, instruction: Instruction
) -> list[tuple[Instruction, float]]:
    """Return (product or kernel, FLOPs) of an instruction that is not a loop, and of what it
    calls."""
    kernel = kernel_of(instruction) if instruction.opcode == "custom-call" else None
    index = program.index(computation)
    flops = kernel[1] if kernel else _flops(instruction, lambda name: index[name].shape)
    found = [(instruction, flops)] if flops else []
    for name in program.called(instruction, *_INLINE):
        for inner in program.computations[name]:
            found += products_of(program, name, inner)
    return found


# --- collectives ---


def groups_of(attributes: str, mesh: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """Return (mesh axes along which devices of one group differ, size of a group) of a collective.

    The devices of the program are numbered along the mesh, its last axis fastest. Groups have four
    notations: {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), mesh['x'=2,'y'=4] {'y'}, and
    source_target_pairs={{0,1},{1,0}}."""
    members = members_of(attributes, math.prod(mesh.values()))
    axes = _differing(members, mesh)
    if _PAIRS.search(attributes):  # devices that pass on to each other are one group
        return axes, math.prod(mesh[axis] for axis in axes)
    return axes, members.shape[1]


_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


def members_of(attributes: str, count: int) -> np.ndarray:
    """Return device numbers, (groups, devices of each), of a collective among ``count`` devices;
    of a permute (pairs, 2): from where, and to where."""
    pairs = _PAIRS.search(attributes)
    return _listed(pairs[1]) if pairs else _groups(attributes, count)


def _listed(text: str) -> np.ndarray:
    return np.array(
        [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    )


def _differing(groups: np.ndarray, mesh: dict[str, int]) -> tuple[str, ...]:
    positions = np.stack(np.unravel_index(groups, list(mesh.values())), -1)
    moved = (positions != positions[:, :1]).any((0, 1))
    return tuple(axis for axis, differs in zip(mesh, moved, strict=True) if differs)


def _groups(attributes: str, count: int) -> np.ndarray:
    named = re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", attributes)
    if named:  # the compiler's own mesh, whose axes may have other names
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen: dict[str, list[tuple[int, int]]] = {}
        for axis, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2]):
            chosen.setdefault(axis, []).append((int(before or 1), int(part or sizes[axis])))
        shape = []
        inside = []
        for axis, size in sizes.items():  # a factor of an axis may be part of the groups
            for before, part in sorted(chosen.get(axis, [])):
                shape += [before, part]
                inside.append(len(shape) - 1)
                size //= before * part
            shape.append(size)
        outside = [dim for dim in range(len(shape)) if dim not in inside]
        group = math.prod(shape[dim] for dim in inside)
        ids = np.arange(math.prod(shape)).reshape(shape)
        return ids.transpose(outside + inside).reshape(-1, group)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, reshaped = ([int(n) for n in part.split(",")] for part in iota.groups()[:2])
        ids = np.arange(math.prod(reshaped)).reshape(reshaped)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return ids.reshape(shape)
    listed = re.search(r"replica_groups=\{(.*?\})\}", attributes)
    return _listed(listed[1]) if listed else np.arange(count)[None]


def sent(kind: str, whole: float, size: int) -> float:
    """Return the bytes that a device sends in a collective over a ring of ``size`` devices."""
    if kind == "collective-permute":
        return whole
    return (2 if kind == "all-reduce" else 1) * whole * (size - 1) / size


def between_slices(instruction: Instruction) -> tuple[str, int] | None:
    """Return (kind, slices) of the part of a collective that leaves a TPU slice; None if
    ``instruction`` does not send one."""
    if instruction.opcode != "send":
        return None
    found = re.search(
        r'megascale_target="\{([\d,]+)\}.*megascale_transfer_type="(\w+)"', instruction.attributes
    )
    if found is None:
        return None
    return found[2].lower().replace("_", "-"), found[1].count(",") + 1


def _collective(
    instruction: Instruction,
    shape_of: Callable[[str], str],
    mesh: dict[str, int],
    scattered: bool,
) -> tuple[tuple[str, tuple[str, ...], int], float] | None:
    """Return ((kind, axes, group), bytes that a device sends). None if it is not a collective."""
    kind = instruction.opcode.removesuffix("-start")
    between = between_slices(instruction)
    if kind not in KINDS and not between:
        return None
    given = sum(bytes_of(shape_of(name)) for name in instruction.operands)
    if between:
        kind, size = between
        whole = given * size if kind == "all-gather" else given
        return (kind, ("slices",), size), sent(kind, whole, size)
    axes, size = groups_of(instruction.attributes, mesh)
    if size == 1:  # the CPU compiler keeps these
        return None
    whole = given * size if kind == "all-gather" else given
    if kind == "all-reduce" and scattered:
        kind = "reduce-scatter"
    return (kind, axes, size), sent(kind, whole, size)


# --- adding up ---


# Collectives of a computation: {(kind, axes, group, depth, "count" or "bytes"): number}; kernels:
# {("kernel", name, depth): number}.
Found = dict[tuple, float]


def cost_of(
    program: Program, mesh: dict[str, int], dynamic_trips: Callable[[int], float] = lambda depth: 1
) -> Cost:
    """Count FLOPs and collectives of one run of ``program`` on one device.

    Args:
      mesh: {axis: size}, in the order in which the program's devices are numbered.
      dynamic_trips: trips of a loop that only knows them at run time, given the number of loops
          around it.
    """
    guessed = set()

    @functools.cache
    def walk(computation: str, depth: int, scattered: bool = False) -> tuple[float, Found]:
        shapes = program.index(computation)
        flops = 0.0
        found: Found = defaultdict(int)

        def shape_of(name: str) -> str:
            return shapes[name].shape

        def add(result: tuple[float, Found], times: float = 1.0) -> None:
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
                trips: float | None = trips_of(program, computation, instruction)
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
            elif opcode not in ("async-update", "async-done"):  # async-start counts for them
                for name in program.called(instruction, *_INLINE):
                    # The TPU compiler writes a reduce-scatter as a fusion of this name around an
                    # all-reduce.
                    part = "all-reduce-scatter" in instruction.name or "all-reduce-scatter" in name
                    add(walk(name, depth, part))
        return flops, found

    flops, found = walk(program.entry, 0)
    kernels = tuple(
        Kernel(name=key[1], depth=key[2], count=found[key])
        for key in sorted(k for k in found if k[0] == "kernel")
        if found[key]
    )
    keys = sorted(
        {key[:4] for key in found if key[0] != "kernel"},
        key=lambda key: ((*KINDS, key[0]).index(key[0]), key[3], key[1:3]),
    )
    rows = [
        Collective(kind, axes, group, depth, count, found[kind, axes, group, depth, "bytes"])
        for kind, axes, group, depth in keys
        if (count := found[kind, axes, group, depth, "count"])
    ]
    return Cost(flops, tuple(rows), kernels, len(guessed))


def _weight(result: tuple[float, Found]) -> tuple[float, float]:
    return result[0], sum(value for key, value in result[1].items() if key[-1] == "bytes")
