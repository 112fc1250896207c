"""Find the cycles of the attention kernels of a compiled TPU program.

The compiler estimates a kernel only while it profiles it, and it cannot profile every operation of
a step. So each kernel is compiled once more, alone, in a process of its own,
``python -m mtnlg_jax.planning.kernel_cycles``. The estimate takes branches on values that are
known only at run time as not taken, such as those on segments, so our kernels are compiled with
the causal mask alone. One row is profiled: rows are steps of the grid, so its cycles times the
rows are those of all.
"""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from mtnlg_jax.planning import hlo_cost
from mtnlg_jax.planning import topology as described
from mtnlg_jax.planning.child import ask_each
from mtnlg_jax.planning.cycles import cycles_of
from mtnlg_jax.planning.hlo import Instruction, Program, arrays_of, dims_of
from mtnlg_jax.planning.kernel_profile import Call, compile_calls

# (kernel, shape of its queries, shape of its keys)
Key = tuple[str, tuple[int, ...], tuple[int, ...]]
KernelCycles = dict[Key, int]  # cycles of one run

NAMES = ("attention_forward", "attention_backward", "attention_dq", "attention_dkv")
TARGET = "tpu_custom_call"


def key_of(program: Program, computation: str, instruction: Instruction) -> Key | None:
    """Return the key of one of our attention kernels; None for any other instruction."""
    kernel = hlo_cost.kernel_of(instruction)
    if kernel is None or kernel[0] not in NAMES:
        return None
    # Queries and keys come first, (rows, heads, positions, width).
    wide = [
        dims
        for array in program.operand_arrays(computation, instruction)
        if array.startswith(("bf16[", "f32[")) and len(dims := dims_of(array)) == 4
    ]
    return (kernel[0], wide[0], wide[1]) if len(wide) > 1 else None


def profile(program: Program, topology: described.Topology, causal: bool) -> KernelCycles:
    """Return the cycles of the attention kernels of ``program``. Kernels for which the compiler
    has no estimate are left out."""
    keys = {
        key
        for computation, instructions in program.computations.items()
        for instruction in instructions
        if instruction.opcode == "custom-call"
        and (key := key_of(program, computation, instruction))
    }
    shapes = sorted({key[1:] for key in keys})
    found: KernelCycles = {}
    if not shapes:
        return found
    compiled = compile_calls(topology, [_call(*shape, causal) for shape in shapes])
    for shape, each in zip(shapes, compiled, strict=True):
        if not each.text:
            continue
        alone = Program(each.text)
        calls = custom_calls(alone)
        for (name, _), cycles in zip(calls, cycles_alone(topology, calls), strict=True):
            if cycles is not None:
                key = (name, *shape)
                found[key] = found.get(key, 0) + cycles * shape[0][0]
    return found


def _call(queries: tuple[int, ...], keys: tuple[int, ...], causal: bool) -> Call:
    _, heads, length, width = queries
    return Call(
        queries=length,
        keys=keys[2],
        heads=heads,
        kv_heads=keys[1],
        head_width=width,
        causal=causal,
    )


def custom_calls(program: Program) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, description) of each kernel of ``program``, for `cycles_alone`."""
    found = []
    for computation, instructions in program.computations.items():
        for instruction in instructions:
            kernel = hlo_cost.kernel_of(instruction)
            if instruction.opcode != "custom-call" or kernel is None:
                continue
            _, _, written = instruction.attributes.partition("backend_config=")
            config = json.JSONDecoder().raw_decode(written)[0] if written else {}
            description = {
                "operands": list(map(_short, program.operand_arrays(computation, instruction))),
                "results": list(map(_short, arrays_of(instruction.shape))),
                "config": {"custom_call_config": config.get("custom_call_config", {})},
            }
            found.append((kernel[0], description))
    return found


def _short(array: str) -> str:
    found = re.match(r"\w+\[[^\]]*\]", array)
    return found[0] if found else array


def cycles_alone(
    topology: described.Topology, calls: Sequence[tuple[str, dict[str, Any]]]
) -> list[int | None]:
    """Compile each of `custom_calls` alone, and return the compiler's estimates of their cycles;
    None where it has none, or dies over the call."""
    return ask_each(
        "mtnlg_jax.planning.kernel_cycles",
        topology,
        [description for _, description in calls],
        read=lambda cycles: cycles,
        died=lambda number, done: None,
        profile=True,
    )


# --- the other end ---


def _answer() -> None:
    request = json.load(sys.stdin)

    import jax
    from jax.sharding import SingleDeviceSharding

    from mtnlg_jax import compat

    topology = described.parse(request["topology"])
    device = described.devices(topology)[0]
    compat.compile_for(topology.platform, device.device_kind)
    sharding = SingleDeviceSharding(device)
    with open(request["answer"], "a", encoding="utf-8") as file:
        for said in request["calls"]:
            results = [_abstract(array) for array in said["results"]]
            kernel = jax.ffi.ffi_call(
                TARGET,
                results if len(results) > 1 else results[0],
                custom_call_api_version=1,
                legacy_backend_config=json.dumps(said["config"]),
            )
            operands = [_abstract(array, sharding) for array in said["operands"]]
            compiled = jax.jit(lambda *given, kernel=kernel: kernel(*given)).lower(*operands)
            try:
                text = compiled.compile().as_text() or ""
            except jax.errors.JaxRuntimeError:
                text = ""
            cycles = [cycles_of(line) for line in text.splitlines() if f'"{TARGET}"' in line]
            file.write(json.dumps(cycles[0] if cycles else None) + "\n")
            file.flush()


_TYPES = {"bf16": "bfloat16", "f32": "float32", "s32": "int32", "s8": "int8", "pred": "bool"}


def _abstract(array: str, sharding=None):
    import jax

    return jax.ShapeDtypeStruct(dims_of(array), _TYPES[array.partition("[")[0]], sharding=sharding)


if __name__ == "__main__":
    _answer()
