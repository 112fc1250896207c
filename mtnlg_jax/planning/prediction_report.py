"""Render a predicted step as lines of the report of compile_ahead."""

from mtnlg_jax.hardware import size_of
from mtnlg_jax.planning.aot import Measurement
from mtnlg_jax.planning.gpu_costs import MEMORY_SHARE, PRODUCT_SHARE
from mtnlg_jax.planning.prediction import BEST_PUBLISHED, Prediction, chip_of, is_beyond
from mtnlg_jax.planning.topology import parse

SHOWN = 0.002  # share of a step below which a class is not shown


def prediction_rows(m: Measurement) -> list[tuple[str, str]]:
    """Return (name, text) of each line; the name is "" where a line goes on. Empty if no step was
    predicted."""
    p = m.predicted
    if p is None:
        return []
    topology = parse(m.topology)
    peak = chip_of(topology).flops
    head = (
        f"{p.seconds:.4g} s a step, {p.tokens_per_second:,.0f} tokens/s; MFU {p.mfu:.1%}, HFU "
        f"{p.hfu:.1%}"
    )
    if is_beyond(topology.kind, p.mfu):
        best = BEST_PUBLISHED[topology.kind]
        head = f"({head}) beyond the best published MFU of {topology.kind}, {best:.1%}"
    rows = [("predicted", head)]
    for label, seconds in p.classes.items():
        if seconds < SHOWN * p.seconds:
            continue
        text = f"{seconds:>9.4f} s  {seconds / p.seconds:>5.1%}  {label}"
        if label in p.flops:
            text += f", at {p.flops[label] / seconds / peak:.0%} of peak"
        rows.append(("", text))
    if p.waits:
        rows.append(("waits", "seconds, times, bytes of one, what for, where it is asked for"))
    for label, source, seconds, count, size in p.waits:
        text = f"{seconds:>9.4f} s  {count:>7,.0f}  {size_of(size):>11}  {label}  {source}"
        rows.append(("", text.rstrip()))
    rows.append(("not known", _not_known(p, m.topology)))
    return rows


def _not_known(p: Prediction, topology: str) -> str:
    parts = ["input and host, gaps between launches, traffic between slices, throttling"]
    if parse(topology).platform == "cuda":
        parts = [
            f"this compiler estimates nothing: rooflines, products at {PRODUCT_SHARE:.0%} of the "
            f"peak and bytes at {MEMORY_SHARE:.0%} of the memory's speed",
            "input and host, throttling",
        ]
    if p.assumed_kernels:
        parts.append(f"{', '.join(p.assumed_kernels)}: taken at half of peak")
    if p.unknown:
        parts.append(f"{', '.join(p.unknown)}: taken as no time")
    return "; ".join(parts)
