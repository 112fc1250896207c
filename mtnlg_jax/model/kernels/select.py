"""What each implementation of attention can do, and which one a call gets: one table."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from absl import logging

from mtnlg_jax import compat
from mtnlg_jax.model.kernels import blocks as sizes
from mtnlg_jax.model.kernels.gpu import cudnn

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Support:
    """What one implementation can do. ``options`` are the arguments of attention() that it
    takes."""

    runs_on: str  # "anything", or the hardware
    dtypes: tuple[str, ...]
    head_widths: tuple[int, int] | None  # (multiple of, at most); None: all
    options: frozenset[str]
    note: str


_MASKS = frozenset({"segment_ids", "kv_lengths", "q_offset", "window"})
# Drives the choice, the errors, explain_attention() and the table of docs/attention.md.
SUPPORT = {
    "pallas_tpu": Support(
        "TPU",
        ("float32", "bfloat16"),
        (32, 256),
        _MASKS | {"softcap", "return_lse"},
        "our kernels; skips blocks that causality, lengths or segments hide",
    ),
    "pallas_gpu": Support(
        "Hopper",
        ("bfloat16", "float16"),
        (32, 256),
        _MASKS | {"softcap", "return_lse"},
        "our kernels; skips blocks that causality, lengths or segments hide",
    ),
    "cudnn": Support(
        "NVIDIA GPU",
        ("bfloat16", "float16"),
        (8, 256),
        frozenset({"window"}),
        "jax.nn.dot_product_attention; T = S and a window only where causal; widths above 128 on Hopper",
    ),
    "xla_blockwise": Support(
        "anything",
        FLOATS,
        None,
        _MASKS | {"softcap", "return_lse"},
        "online softmax, memory linear in T and S; skips the same blocks",
    ),
    "xla": Support(
        "anything",
        FLOATS,
        None,
        _MASKS | {"softcap", "return_lse", "bias", "dropout"},
        "exact, holds T x S scores",
    ),
}
IMPLS = ("auto", *SUPPORT)

# T x S below which the kernels would mostly compute padding, and above which exact scores are not
# worth holding where the table has no measurement of the two.
SMALL = 1 << 14
LARGE = 1 << 20


class Call(NamedTuple):
    """What the choice looks at."""

    queries: int
    keys: int
    head_width: int
    dtype: str
    causal: bool
    options: frozenset[str]

    @property
    def length(self) -> float:
        return math.sqrt(self.queries * self.keys)


def device() -> str:
    return sizes.device_name(compat.device_kind())


def call_of(q, k, causal: bool, options) -> Call:
    return Call(q.shape[1], k.shape[1], q.shape[3], str(q.dtype), causal, options)


def options_of(
    segment_ids, kv_lengths, q_offset, window, softcap, bias, dropout_rate, return_lse
) -> frozenset[str]:
    used = {
        "segment_ids": segment_ids is not None,
        "kv_lengths": kv_lengths is not None,
        "q_offset": not (isinstance(q_offset, int) and q_offset == 0),
        "window": window is not None,
        "softcap": softcap is not None,
        "bias": bias is not None,
        "dropout": dropout_rate > 0,
        "return_lse": return_lse,
    }
    return frozenset(name for name, use in used.items() if use)


def refusal(name: str, call: Call, decode: bool = False) -> str | None:
    """Why ``name`` cannot serve ``call`` here; None where it can."""
    can = SUPPORT[name]
    platform = compat.platform()
    here = device()
    if decode and name in ("cudnn", "xla_blockwise"):
        return "has no form for one query against a cache"
    if not compat.interpreting() or name == "cudnn":
        fits = {
            "TPU": platform == "tpu",
            "Hopper": here in ("H100", "H200"),
            "NVIDIA GPU": platform == "gpu",
            "anything": True,
        }[can.runs_on]
        if not fits:
            return f"runs on {can.runs_on}, and this is {here}"
    if call.dtype not in can.dtypes:
        return f"takes {' and '.join(can.dtypes)}, not {call.dtype}"
    if can.head_widths is not None:
        unit, most = can.head_widths
        if call.head_width % unit or call.head_width > most:
            return f"takes head widths that are multiples of {unit} up to {most}, not {call.head_width}"
    unable = sorted(call.options - can.options)
    if unable:
        return f"does not take {', '.join(unable)}"
    if name == "pallas_gpu" and call.causal and 12080 <= (compat.cuda_version() or 0) < 12091:
        return "is miscompiled by the assembler of CUDA 12.8.0 to 12.9.0 where causal; install 12.9.1 or newer"
    if name == "cudnn":
        return cudnn.refusal(
            call.queries, call.keys, call.head_width, call.causal, "window" in call.options
        )
    return None


def explain(call: Call, impl: str, decode: bool = False) -> list[tuple[str, str]]:
    verdicts = {name: refusal(name, call, decode) for name in SUPPORT}
    if impl in SUPPORT:
        if verdicts[impl] is None:
            verdicts[impl] = "chosen: asked for"
    elif impl == "auto":
        chosen, why = _pick(call, [name for name, refusal in verdicts.items() if refusal is None])
        verdicts[chosen] = f"chosen: {why}"
    else:
        raise ValueError(f"attention impl={impl!r} is not known; choose auto, {', '.join(SUPPORT)}")
    chosen = next(
        (name for name, verdict in verdicts.items() if (verdict or "").startswith("chosen")), None
    )
    other = f"{chosen} was asked for" if impl != "auto" else f"{chosen} is preferred: {why}"
    return [(name, verdict or other) for name, verdict in verdicts.items()]


def _pick(call: Call, able: list[str]) -> tuple[str, str]:
    """(the implementation that "auto" takes of those that are ``able``, why)."""
    area = call.queries * call.keys
    here = device()
    shape = (here, call.dtype, call.head_width, call.length, call.causal)
    if "pallas_gpu" in able and "cudnn" in able:
        return sizes.fastest(("pallas_gpu", "cudnn"), *shape) or (
            "cudnn",
            f"no entry of the table says that pallas_gpu is faster on {here}",
        )
    for name in ("pallas_tpu", "pallas_gpu", "cudnn"):
        if name in able and (area >= SMALL or call.queries == 1):
            return name, f"the kernel for {here}"
    if "xla_blockwise" not in able:
        return "xla", "the only one that can"
    return sizes.fastest(("xla", "xla_blockwise"), *shape) or (
        ("xla_blockwise", f"T x S = {area} reaches {LARGE}, whose scores are not worth holding")
        if area >= LARGE
        else ("xla", f"T x S = {area} is below {LARGE}, small enough to hold the scores")
    )


def choose(call: Call, impl: str, decode: bool = False) -> str:
    verdicts = explain(call, impl, decode)
    chosen = next((name for name, verdict in verdicts if verdict.startswith("chosen")), None)
    if chosen is None:
        able = [name for name in SUPPORT if refusal(name, call, decode) is None]
        raise ValueError(
            f"attention impl={impl!r} cannot serve this call: {dict(verdicts)[impl]}; use impl='auto', "
            f"or {' or '.join(able)}"
        )
    if impl == "auto" and compat.platform() != "cpu" and SUPPORT[chosen].runs_on == "anything":
        _say_once(
            f"attention falls back to {chosen} for (T, S, H) = ({call.queries}, {call.keys}, {call.head_width}): "
            + "; ".join(
                f"{name} {why}" for name, why in verdicts if SUPPORT[name].runs_on != "anything"
            )
        )
    return chosen


@functools.cache
def _say_once(text: str) -> None:
    logging.warning(text)


def support_table() -> str:
    """SUPPORT as docs/attention.md shows it."""
    lines = [
        "| `impl` | runs on | types | head widths | takes | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, can in SUPPORT.items():
        widths = (
            "all" if can.head_widths is None else "multiples of {} to {}".format(*can.head_widths)
        )
        takes = ", ".join(f"`{option}`" for option in sorted(can.options))
        lines.append(
            f"| `{name}` | {can.runs_on} | {', '.join(can.dtypes)} | {widths} | {takes} | {can.note} |"
        )
    return "\n".join(lines)
