"""Block sizes, and which implementation is faster: the committed table ``blocks.json``, and what
holds without it.

An entry is what ``launch/tune_attention.py`` found on one device for one shape; an ``ms`` of null
says that nothing was timed there, and ``source`` then says where its sizes come from. Nothing else
changes the table: no kernel is tuned while a program runs.
"""

import functools
import json
import math
from importlib import resources
from typing import NamedTuple

import jax

TABLE = resources.files(__package__) / "blocks.json"
PASSES = (
    "forward",
    "dq",
    "dkv",
    "decode",
    "both",
)  # both: output and all gradients, of any implementation


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
    """A scope for the call of a kernel, which tells whoever reads the compiled program its name and
    the FLOPs of its ``products`` of (queries x keys x width) for each row and head; where causal,
    of the half that is visible."""
    flops = (
        2 * products * rows * heads * queries * keys * width // (2 if causal and queries > 1 else 1)
    )
    return jax.named_scope(f"{name}:{flops}flops")


class Blocks(NamedTuple):
    """Sizes of one pass of one kernel."""

    q: int = 0  # queries of a block (of one warpgroup, on GPU)
    kv: int = 0  # keys of a block
    compute: int = 0  # TPU: keys of one inner step, divides kv; 0: all of kv
    stages: int = 2  # GPU: blocks in flight


class Entry(NamedTuple):
    """A row of the table."""

    device: str  # as device_name() gives it
    impl: str
    dtype: str
    head_width: int
    length: int  # T and S
    causal: bool
    kind: str  # one of PASSES; "pass" in the file
    blocks: Blocks
    ms: float | None  # milliseconds of one run over `batch` rows and `heads` heads; None: not timed
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


# Parts of jax's device_kind, and the name that the table has for it; the first that fits.
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
    """ "TPU v5 lite" -> "v5e"; what the table does not know stays as it is."""
    return next((name for part, name in _DEVICES.items() if part.lower() in kind.lower()), kind)


def _nearest(
    kind: str, impl: str, device: str, dtype: str, head_width: int, length: float, causal: bool
) -> Entry | None:
    """The entry for this shape: of the same device, type, head width and masking, and of the
    nearest length. What is not a kernel depends on these but little, so there the nearest of each
    will do."""
    loose = impl.startswith("xla")

    def far(entry):
        return (
            entry.causal != causal,
            entry.dtype != dtype,
            abs(math.log(entry.head_width / head_width)),
            abs(math.log(entry.length / max(length, 1))),
        )

    found = [
        entry
        for entry in table()
        if (entry.device, entry.impl, entry.kind) == (device, impl, kind)
        and (loose or far(entry)[:3] == (False, False, 0))
    ]
    return min(found, key=far, default=None)


def blocks_for(
    kind: str, impl: str, device: str, dtype: str, head_width: int, length: float, causal: bool
) -> Blocks:
    """Sizes for pass ``kind`` of ``impl``: the table's for the nearest length, or a rule of
    thumb."""
    entry = _nearest(kind, impl, device, dtype, head_width, length, causal)
    return (
        entry.blocks
        if entry and entry.blocks.kv
        else default_blocks(kind, impl, dtype, head_width, causal)
    )


# On GPU: (keys of a block, stages) by the widest head that they fit, for registers and shared
# memory without spills up to width 160 (tests/planning/test_kernel_profile.py); nothing of it was
# timed.
_GPU = {
    "forward": ((64, 128, 3), (160, 128, 2), (192, 64, 3), (256, 64, 2)),
    "dq": ((96, 64, 3), (192, 64, 2), (256, 64, 1)),
    "dkv": ((96, 64, 3), (128, 64, 2), (160, 64, 3), (256, 64, 2)),
    "decode": ((256, 64, 2),),
}


def default_blocks(kind: str, impl: str, dtype: str, head_width: int, causal: bool) -> Blocks:
    """Sizes for a shape of which the table has no entry: never timed."""
    if impl == "pallas_tpu":
        size = 512 if dtype == "float32" else 1024  # what fits the VMEM of v5e at width 256
        return Blocks(0, 2048) if kind == "decode" else Blocks(size, size, 256 if causal else 512)
    if impl == "pallas_gpu":
        kv, stages = next(row[1:] for row in _GPU[kind] if head_width <= row[0])
        return Blocks(64, kv, stages=stages)
    return Blocks(q=256, kv=512)


def fastest(
    impls, device: str, dtype: str, head_width: int, length: float, causal: bool
) -> tuple[str, str] | None:
    """(the implementation that took the least time for output and gradients at the nearest shape,
    that in words), or None unless each of ``impls`` was timed there."""
    entries = [_nearest("both", impl, device, dtype, head_width, length, causal) for impl in impls]
    if any(entry is None or entry.ms is None for entry in entries):
        return None
    if any(
        not entry.impl.startswith("xla") and abs(math.log2(entry.length / length)) > 1
        for entry in entries
    ):
        return None  # too far away to tell
    best = min(entries, key=lambda entry: entry.ms)
    times = ", ".join(f"{entry.impl} {entry.ms:.3g} ms" for entry in entries)
    return best.impl, f"timed at length {best.length}, head width {best.head_width}: {times}"
