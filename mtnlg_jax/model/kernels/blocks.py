"""Block sizes, and which implementation is faster: the committed table ``blocks.json``, and
defaults for shapes it does not hold.

``launch/tune_attention.py`` measures the entries, each on one device for one shape. An ``ms`` of
null means that nothing was timed, and ``source`` then names where the sizes come from. No kernel is
tuned while a program runs.
"""

import functools
import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import jax

TABLE = resources.files(__package__) / "blocks.json"
# both: output and all gradients, of any implementation
PASSES = ("forward", "dq", "dkv", "both", "decode")


def scope(
    name: str,
    rows: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    products: int,
    causal: bool = False,
):
    """A scope around the call of a kernel, from which a reader of the compiled program learns the
    kernel's name and its FLOPs: ``products`` of (queries x keys x width) for each row and head, or
    half of them if causal."""
    # A product of (m x k) and (k x n) takes 2 m k n.
    flops = 2 * products * rows * heads * queries * keys * width
    # Half of the scores are hidden, up to the diagonal.
    if causal and queries > 1:
        flops //= 2
    return jax.named_scope(f"{name}:{flops}flops")


class Blocks(NamedTuple):
    """Block sizes of one pass of one kernel."""

    q: int = 0  # queries of a block; on GPU, of one warpgroup
    kv: int = 0  # keys of a block
    compute: int = 0  # TPU: keys of one inner step, divides kv; 0: all of kv
    stages: int = 2  # GPU: blocks in flight


class Entry(NamedTuple):
    """One row of the table."""

    device: str  # as device_name() gives it
    impl: str
    dtype: str
    head_width: int
    length: int  # of queries and of keys
    causal: bool
    kind: str  # one of PASSES; "pass" in the file
    blocks: Blocks
    ms: float | None  # milliseconds of one run; None: not timed
    source: str


@functools.cache
def table() -> tuple[Entry, ...]:
    return read(TABLE.read_text(encoding="utf-8"))


def read(text: str) -> tuple[Entry, ...]:
    rows = json.loads(text)["rows"]
    sizes = [Blocks(**{name: row[name] for name in Blocks._fields if name in row}) for row in rows]
    return tuple(
        Entry(
            row["device"],
            row["impl"],
            row["dtype"],
            row["head_width"],
            row["length"],
            row["causal"],
            row["pass"],
            size,
            row["ms"],
            row["source"],
        )
        for row, size in zip(rows, sizes, strict=True)
    )


# Parts of jax's device_kind -> the table's name for the device; the first match counts.
# The order matters: "v5" is part of the names of v5e.
_DEVICES = {
    "v5 lite": "v5e",
    "v5e": "v5e",
    "v5": "v5p",
    "v6": "v6e",
    "TPU7x": "tpu7x",
    "H100": "H100",
    "H200": "H200",
    "A100": "A100",
    "B200": "B200",
    "cpu": "cpu",
}


def device_name(kind: str) -> str:
    """Return the table's name for a device kind, such as "v5e" for "TPU v5 lite". An unknown kind
    is its own name."""
    return next((name for part, name in _DEVICES.items() if part.lower() in kind.lower()), kind)


def _nearest(
    kind: str, impl: str, device: str, dtype: str, head_width: int, length: float, causal: bool
) -> Entry | None:
    """The entry of the same device, dtype, head width and causality with the nearest length.
    Non-kernel paths are insensitive to all but the device, so for them the nearest entry counts
    even if these differ."""
    loose = impl.startswith("xla")

    def distance(entry: Entry) -> tuple:
        return (
            entry.causal != causal,
            entry.dtype != dtype,
            # Logarithms, since 64 and 128 are as far apart as 128 and 256. The tuple puts causality
            # first and length last.
            abs(math.log(entry.head_width / head_width)),
            abs(math.log(entry.length / max(length, 1))),
        )

    found = [
        entry
        for entry in table()
        if (entry.device, entry.impl, entry.kind) == (device, impl, kind)
        and (loose or distance(entry)[:3] == (False, False, 0))
    ]
    return min(found, key=distance, default=None)


def blocks_for(
    kind: str, impl: str, device: str, dtype: str, head_width: int, length: float, causal: bool
) -> Blocks:
    """Block sizes for pass ``kind`` of ``impl``: the table's for the nearest length, or else
    default_blocks()."""
    entry = _nearest(kind, impl, device, dtype, head_width, length, causal)
    # An entry without sizes says only how long the implementation took.
    if entry and entry.blocks.kv:
        return entry.blocks
    return default_blocks(kind, impl, dtype, head_width, causal)


# GPU: (widest head, keys of a block, stages). These fit registers and shared memory, without spills
# up to width 160 (tests/planning/test_kernel_profile.py). None of them was timed.
_GPU = {
    "forward": ((64, 128, 3), (160, 128, 2), (192, 64, 3), (256, 64, 2)),
    "dq": ((96, 64, 3), (192, 64, 2), (256, 64, 1)),
    "dkv": ((96, 64, 3), (128, 64, 2), (160, 64, 3), (256, 64, 2)),
    "decode": ((256, 64, 2),),
}


def default_blocks(kind: str, impl: str, dtype: str, head_width: int, causal: bool) -> Blocks:
    """Block sizes for a shape that the table does not hold. They were never timed."""
    if impl == "pallas_tpu":
        size = 512 if dtype == "float32" else 1024  # fits the VMEM of v5e at width 256
        return Blocks(0, 2048) if kind == "decode" else Blocks(size, size, 256 if causal else 512)
    if impl == "pallas_gpu":
        kv, stages = next(row[1:] for row in _GPU[kind] if head_width <= row[0])
        return Blocks(64, kv, stages=stages)
    return Blocks(q=256, kv=512)


def fastest(
    impls: Sequence[str], device: str, dtype: str, head_width: int, length: float, causal: bool
) -> tuple[str, str] | None:
    """(the implementation that took the least time for output and gradients at the nearest shape,
    the measurement in words), or None unless each of ``impls`` was timed near that shape."""
    # Only a comparison in which every implementation has a time is fair.
    timed = []
    for impl in impls:
        entry = _nearest("both", impl, device, dtype, head_width, length, causal)
        if entry is None or entry.ms is None:
            return None
        if not impl.startswith("xla") and abs(math.log2(entry.length / length)) > 1:
            return None  # at another length a kernel's time says too little
        timed.append((entry.ms, entry))
    best = min(timed, key=lambda pair: pair[0])[1]
    times = ", ".join(f"{entry.impl} {ms:.3g} ms" for ms, entry in timed)
    return best.impl, f"timed at length {best.length}, head width {best.head_width}: {times}"
