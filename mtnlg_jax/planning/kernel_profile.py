"""Compile attention alone for a described chip, and read what the compiler reports on its kernels.

As in ``aot.measure``, the compiler runs in a separate process,
``python -m mtnlg_jax.planning.kernel_profile``. If it dies over a call, it is started again with
the next call."""

import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from mtnlg_jax.planning import topology as described
from mtnlg_jax.planning.child import ask_each
from mtnlg_jax.planning.cycles import cycles_of
from mtnlg_jax.planning.text import last_words


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of attention(), or of decode_attention() if ``step`` is "decode", over arrays of
    these shapes."""

    step: str = "both"  # forward | both (forward and all gradients) | decode
    impl: str = "auto"
    dtype: str = "bfloat16"  # int8: bfloat16 against a cache of int8
    rows: int = 1
    queries: int = 2048
    keys: int = 2048
    heads: int = 8
    kv_heads: int = 8
    head_width: int = 128
    causal: bool = True
    # A choice of segment_ids, kv_lengths, q_offset, window and alibi_slopes; for a decode step, of
    # the last two.
    masks: tuple[str, ...] = ()
    blocks: tuple[int, int] | None = None


@dataclasses.dataclass
class Compiled:
    call: Call
    failure: str = ""  # in the compiler's words; empty: it compiled
    # [[name, estimated cycles or None], ...]
    kernels: list = dataclasses.field(default_factory=list)
    temporaries: int = 0  # bytes
    # From a GPU's assembler: [[name, registers of a thread at launch, bytes spilled], ...]
    assembled: list = dataclasses.field(default_factory=list)
    text: str = ""  # the compiled program


def compile_calls(
    topology: described.Topology, calls: Sequence[Call], estimate: bool = False
) -> list[Compiled]:
    """Compile each of ``calls`` for one device of ``topology``.

    ``estimate`` adds the TPU compiler's own cycles of each kernel. It assumes that branches on
    values known only at run time (segments, lengths, offsets in arrays) are not taken.

    Raises ValueError if the compiler is not installed."""
    described.check_installed(topology)
    return ask_each(
        "mtnlg_jax.planning.kernel_profile",
        topology,
        list(map(dataclasses.asdict, calls)),
        _read,
        lambda number, done: Compiled(calls[number], failure=last_words(done)),
        profile=estimate,
        variables={"MOSAIC_GPU_DUMP_PTXAS": "1"},
    )


def _read(said: dict) -> Compiled:
    return Compiled(**said | {"call": _call(said["call"])})


def _call(said: dict) -> Call:
    blocks = said["blocks"]
    return Call(**said | {"masks": tuple(said["masks"]), "blocks": blocks and tuple(blocks)})


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
    with open(request["answer"], "a", encoding="utf-8") as file, described.abstract(device):
        for said in request["calls"]:
            result = Compiled(_call(said))
            function, arguments = function_of(result.call)
            arguments = [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments
            ]
            try:
                with _output() as output:
                    compiled = jax.jit(function).lower(*arguments).compile()
            except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
                result.failure = " ".join(str(error).split())[:1500]
            else:
                result.text = compiled.as_text() or ""
                result.kernels = kernels_of(result.text)
                result.assembled = assembled_of("".join(output))
                sizes: Any = compiled.memory_analysis()
                result.temporaries = sizes.temp_size_in_bytes
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")
            file.flush()


@contextlib.contextmanager
def _output():
    """Yield a list that afterwards holds everything written to standard output and standard error,
    also by compiled code."""
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        kept = [os.dup(stream) for stream in (1, 2)]
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield said
        finally:
            for stream, old in zip((1, 2), kept, strict=True):
                os.dup2(old, stream)
                os.close(old)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def assembled_of(text: str) -> list:
    """Read [[kernel, registers, bytes of spill stores and loads]] from the assembler's output."""
    found = []
    for part in text.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if registers and spills:
            name = part.partition("'")[0].removesuffix("_mosaic_gpu_kernel")
            found.append([name, int(registers[1]), int(spills[1]) + int(spills[2])])
    return found


def function_of(call: Call):
    """Return (function, its arguments as ShapeDtypeStructs) of ``call``."""
    import jax

    from mtnlg_jax.model.attention import attention, decode_attention

    def array(*shape, dtype=None):
        return jax.ShapeDtypeStruct(
            shape, dtype or ("bfloat16" if call.dtype == "int8" else call.dtype)
        )

    window = call.keys // 4 if "window" in call.masks else None
    if call.step == "decode":
        cache = array(call.rows, call.kv_heads, call.keys, call.head_width, dtype=call.dtype)
        rest = {}
        if call.dtype == "int8":
            rest = dict.fromkeys(("k_scale", "v_scale"), array(*cache.shape[:3], dtype="float32"))
        if "alibi_slopes" in call.masks:
            rest["alibi_slopes"] = array(call.heads, dtype="float32")

        def decode(q, k, v, lengths, *values):
            named: dict[str, Any] = dict(zip(rest, values, strict=True))
            return decode_attention(q, k, v, lengths, window=window, impl=call.impl, **named)

        lengths = array(call.rows, dtype="int32")
        return decode, [
            array(call.rows, call.heads, call.head_width),
            cache,
            cache,
            lengths,
            *rest.values(),
        ]

    shapes: dict[str, list[tuple[int, ...]]] = {
        "segment_ids": [(call.rows, call.queries), (call.rows, call.keys)],
        "kv_lengths": [(call.rows,)],
        "q_offset": [(call.rows,)],
        "alibi_slopes": [(call.heads,)],
    }
    arrays = {
        name: [
            array(*shape, dtype="float32" if name == "alibi_slopes" else "int32")
            for shape in shapes[name]
        ]
        for name in call.masks
        if name in shapes
    }

    def attend(q, k, v, arrays):
        given: dict[str, Any] = {
            name: tuple(x) if name == "segment_ids" else x[0] for name, x in arrays.items()
        }
        return attention(
            q,
            k,
            v,
            causal=call.causal,
            window=window,
            impl=call.impl,
            block_sizes=call.blocks,
            **given,
        )

    def both(q, k, v, d_out, arrays):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, arrays), q, k, v)
        return out, back(d_out)

    q = array(call.rows, call.queries, call.heads, call.head_width)
    kv = array(call.rows, call.keys, call.kv_heads, call.head_width)
    flat, tree = jax.tree.flatten(arrays)

    def forward(q, k, v, *flat):
        return attend(q, k, v, jax.tree.unflatten(tree, flat))

    def forward_and_backward(q, k, v, d_out, *flat):
        return both(q, k, v, d_out, jax.tree.unflatten(tree, flat))

    if call.step == "forward":
        return forward, [q, kv, kv, *flat]
    return forward_and_backward, [q, kv, kv, q, *flat]


_KERNEL = re.compile(
    r"""
    ^\ *(?:ROOT\ )?%?(\S+)\ =\ [^\n]*custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"
    (.*(?:\n(?!\ *(?:ROOT\ )?%\S+\ =\ ).*)*)  # metadata may have several lines
    """,
    re.MULTILINE | re.VERBOSE,
)


def kernels_of(text: str) -> list:
    """Read [[name, estimated cycles or None]] of the kernels in a compiled program."""
    found = []
    for name, rest in _KERNEL.findall(text):
        found.append([re.sub(r"\.\d+$", "", name), cycles_of(rest)])
    return found


if __name__ == "__main__":
    _answer()
