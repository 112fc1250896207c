"""Render a measurement as a page for a person. The same measurement gives the same text."""

import math
from collections.abc import Iterator

from mtnlg_jax.config import Config
from mtnlg_jax.decode.results import CHUNK
from mtnlg_jax.hardware import size_of
from mtnlg_jax.parallel.mesh import described, row_shards
from mtnlg_jax.planning.aot import Measurement
from mtnlg_jax.planning.decode_bound import bound_of
from mtnlg_jax.planning.prediction_report import prediction_rows
from mtnlg_jax.planning.topology import GPUS

_INDENT = " " * 13


def render(config: Config, m: Measurement) -> str:
    """Return everything that was measured, without a final line break."""
    lines = [
        f"{config.name}: {m.step} step on {m.topology}, {m.devices:,} devices, {m.compiler}",
        _row("layout", _layout(config, m)),
        _row("verdict", _verdict(m)),
    ]
    lines.insert(2, _row("flags", _flags(m)))
    if not m.failure:
        lines += [
            _row(
                "memory",
                f"arguments {size_of(m.arguments)}, temporaries {size_of(m.temporaries)}, code "
                f"{size_of(m.code)}; peak {size_of(m.peak)} a device",
            ),
            _row("padding", _padding(m)),
        ]
        if m.host:
            lines.append(_row("host", f"{size_of(m.host)} of the host's memory for each device"))
        lines += largest_tensors(m)
        lines += [
            _row("products", _products(m)),
            _row("kernels", _kernels(m)),
            _row("collectives", _collectives_head(m)),
        ]
        lines += [
            f"{_INDENT}{c.kind:<18} {_axes(c, m):<14} {c.depth:>5} {c.count:>9,.0f} "
            f"{size_of(c.bytes):>11}"
            for c in m.collectives
        ]
        lines += [_row("compiler's", _estimate(m))]
        lines += [_row("at best", text) for text in _at_best(config, m)]
        lines += [_row(name, text) for name, text in prediction_rows(m)]
    lines += [
        _row(
            "took",
            f"{m.lower_seconds:.1f} s to trace, {m.compile_seconds:.1f} s to compile "
            f"({m.processor_seconds:.1f} s of processor time), {size_of(m.resident)} of "
            "this machine's memory",
        )
    ]
    if m.saved:
        lines.append(_row("saved", m.saved))
    return "\n".join(lines)


def largest_tensors(m: Measurement) -> list[str]:
    """List the tensors to look at first if memory is short."""
    rows = []
    for t in m.suspects:
        held = f"{size_of(t.bytes):>10}  x{t.count:<3} {t.held:<9}"
        rows.append(f"{_INDENT}{held}  {t.shape}  {_whence(t.name)}".rstrip())
    return [
        _row(
            "largest",
            "size of one, how many in the program, held as, shape, the first one's origin",
        ),
        *rows,
    ]


def _row(name: str, text: str) -> str:
    return f"{name:<{len(_INDENT)}}{text}"


def _layout(config: Config, m: Measurement) -> str:
    text = described(m.mesh)
    if m.step != "train":
        tokens = (
            f"prompts of {config.sequence_length}" if m.step == "prefill" else f"{CHUNK} tokens"
        )
        kinds = (("weights", m.weights), ("cache", m.cache))
        held = "".join(f", {name} {value}" for name, value in kinds if value)
        return f"{text}, {tokens}, {_rows(config.train.micro_batch_size or 1)}{held}"
    text += f", zero {config.mesh.zero}"
    if m.mesh["pipe"] > 1:
        text += f", {config.mesh.schedule}" + (
            f" x{config.mesh.virtual_pipe}" if config.mesh.virtual_pipe > 1 else ""
        )
    rows = config.train.micro_batch_size or config.train.global_batch_size // row_shards(m.mesh)
    return (
        text
        + f", recompute {config.train.recompute}, {m.micro_batches} micro-batches, {_rows(rows)}"
    )


def _flags(m: Measurement) -> str:
    said = " ".join(m.flags) or "none"
    return said + (f"; {m.flags_left_out}" if m.flags_left_out else "")


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)} a data shard"


def _verdict(m: Measurement) -> str:
    if m.failure and m.fits is None:
        return f"UNKNOWN: {m.failure}"
    if m.fits is None:
        return (
            f"compiles, peak {size_of(m.peak)} a device; the memory of a device is not known "
            "(give --memory=GIB)"
        )
    if m.limit is None:
        return f"DOES NOT FIT: {m.failure}"
    spare = m.limit - m.most
    if m.fits:
        text = (
            f"FITS: peak {size_of(m.peak)} of {size_of(m.limit)} a device, {size_of(spare)} "
            f"({spare / m.limit:.0%}) to spare"
        )
        share = m.peak / m.limit
        if m.topology.split(":")[0] in GPUS and share > 0.75:  # JAX takes 75 % of a card by default
            text += f"; set XLA_PYTHON_CLIENT_MEM_FRACTION={min(share + 0.02, 0.98):.2f}"
        return text
    source = "at least, by the compiler's first estimate" if m.failure else "peak"
    return (
        f"DOES NOT FIT: {size_of(m.most)} a device ({source}) of {size_of(m.limit)}, "
        f"{size_of(-spare)} too much"
    )


def _padding(m: Measurement) -> str:
    lost = m.arguments - m.arguments_exact
    if lost < m.arguments_exact / 10000:
        return "none in the arguments"
    most = ", ".join(f"{_whence(name)} {size_of(size)}" for name, size in m.padded[:3])
    return (
        f"{size_of(lost)} of the arguments ({lost / m.arguments_exact:.1%}), tiles that dims do "
        f"not fill; the most in {most}"
    )


def _whence(name: str) -> str:
    """Shorten the origin of a tensor: state.params['blocks']['mlp']['w_in_DF'].value becomes
    params.blocks.mlp.w_in_DF."""
    if not name.startswith("jit("):
        words = (
            name.removeprefix("state").removesuffix(".value").replace("']", "").replace("['", ".")
        )
        return words.strip(".")
    parts = [part for part in name.split("/") if part not in ("eval_jaxpr", "body", "shard_map")]
    return "/".join(parts[1:][-4:])


def _products(m: Measurement) -> str:
    if not m.flops:  # of one row times a matrix
        return "none left: the compiler replaced them by sums over elements"
    text = f"{m.flops:.4g} FLOPs a device and step"
    if m.guessed_loops:
        loops = (
            "1 loop knows its" if m.guessed_loops == 1 else f"{m.guessed_loops} loops know their"
        )
        text += f"; {loops} trips only at run time: counted for the full batch and causal attention"
    return text


def _kernels(m: Measurement) -> str:
    if not m.kernels:
        return "none of ours"
    return (
        ", ".join(f"{kernel.name} {kernel.count:,.0f} times" for kernel in m.kernels)
        + " a device and step"
    )


def _axes(collective, m: Measurement) -> str:
    """Name the axes: data+tensor, or data:16 if a group is 16 devices of a larger axis."""
    name = "+".join(collective.axes)
    whole = math.prod(m.mesh.get(axis, collective.group) for axis in collective.axes)
    return name if collective.group == whole else f"{name}:{collective.group}"


def _collectives_head(m: Measurement) -> str:
    if not m.collectives:
        return "none"
    return f"{'kind':<18} {'axes':<14} {'loops':>5} {'times':>9} {'sent':>11}  a device and step"


def _at_best(config: Config, m: Measurement) -> Iterator[str]:
    bound = bound_of(config, m)
    if bound is None:
        return
    yield (
        f"{bound.seconds * 1e3:,.2f} ms a call: reads {bound.read * 1e3:,.2f}, products "
        f"{bound.products * 1e3:,.2f}, sends {bound.sent * 1e3:,.2f}; at most "
        f"{bound.tokens_per_second:,.1f} tokens/s a device (a bound, not a prediction)"
    )


def _estimate(m: Measurement) -> str:
    if m.compiler_seconds is None:
        return "estimate of the step's time: none"
    return (
        f"estimate {m.compiler_seconds:.4f} s, which counts the body of each loop once: not a step "
        "time"
    )
