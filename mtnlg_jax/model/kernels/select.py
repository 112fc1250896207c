"""The table of attention implementations: what each supports, and which one serves a call."""

# Shapes: S query positions, T key positions, H head width

import functools
from dataclasses import dataclass

from absl import logging

from mtnlg_jax import compat
from mtnlg_jax.model.kernels import blocks as sizes
from mtnlg_jax.model.kernels.call import AttentionCall, DecodeCall
from mtnlg_jax.model.kernels.gpu import cudnn

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Support:
    """The calls that an implementation supports.

    ``options`` are the arguments of attention() that it accepts.
    """

    runs_on: str  # "anything", or the hardware
    dtypes: tuple[str, ...]
    head_widths: tuple[int, int] | None  # (multiple of, at most); None: all
    options: frozenset[str]
    note: str


_MASKS = frozenset({"segment_ids", "kv_lengths", "q_offset", "window"})
# Determines the choice, the errors, explain_attention() and the table of docs/attention.md.
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
        "jax.nn.dot_product_attention; S = T, and a window only where causal; "
        "widths above 128 on Hopper",
    ),
    "xla_blockwise": Support(
        "anything",
        FLOATS,
        None,
        _MASKS | {"softcap", "return_lse"},
        "online softmax, memory linear in S and T; skips the same blocks",
    ),
    "xla": Support(
        "anything",
        FLOATS,
        None,
        _MASKS | {"softcap", "return_lse", "bias", "dropout"},
        "exact, holds S x T scores",
    ),
}

# Below SMALL scores (S x T) a kernel would mostly compute padding. From LARGE scores on, holding
# them all is not worth its memory, unless the table has a measurement of both.
SMALL = 1 << 14
LARGE = 1 << 20


def device() -> str:
    """This process's device, as the table of block sizes names it."""
    return sizes.device_name(compat.device_kind())


def unsupported_reason(name: str, call: AttentionCall | DecodeCall) -> str | None:
    """Why implementation ``name`` cannot serve ``call`` here, or None if it can."""
    support = SUPPORT[name]
    platform = compat.platform()
    here = device()
    if call.decoding and name in ("cudnn", "xla_blockwise"):
        return "does not support single-token decoding"
    if not compat.interpreting() or name == "cudnn":
        fits = {
            "TPU": platform == "tpu",
            "Hopper": here in ("H100", "H200"),
            "NVIDIA GPU": platform == "gpu",
            "anything": True,
        }[support.runs_on]
        if not fits:
            return f"runs on {support.runs_on}, and this is {here}"
    if call.dtype not in support.dtypes:
        return f"takes {' and '.join(support.dtypes)}, not {call.dtype}"
    if support.head_widths is not None:
        unit, most = support.head_widths
        if call.head_width % unit or call.head_width > most:
            return (
                f"takes head widths that are multiples of {unit} up to {most}, not "
                f"{call.head_width}"
            )
    unable = sorted(call.options - support.options)
    if unable:
        return f"does not take {', '.join(unable)}"
    if name == "pallas_gpu" and call.causal and 12080 <= (compat.cuda_version() or 0) < 12091:
        return (
            "is miscompiled by the assembler of CUDA 12.8.0 to 12.9.0 where causal; install "
            "12.9.1 or newer"
        )
    if name == "cudnn":
        return cudnn.cudnn_unsupported_reason(
            call.queries, call.keys, call.head_width, call.causal, "window" in call.options
        )
    return None


def explain(call: AttentionCall | DecodeCall) -> list[tuple[str, str]]:
    """[(implementation, "chosen: why" or why it was not chosen)] in the order of SUPPORT."""
    impl = call.impl
    reasons = {name: unsupported_reason(name, call) for name in SUPPORT}
    if impl in SUPPORT:
        other = f"{impl} was requested"
        if reasons[impl] is None:
            reasons[impl] = "chosen: requested"
    elif impl == "auto":
        able = [name for name, reason in reasons.items() if reason is None]
        chosen, why = _pick(call, able)
        other = f"{chosen} is preferred: {why}"
        reasons[chosen] = f"chosen: {why}"
    else:
        raise ValueError(f"unknown attention impl={impl!r}; choose auto, {', '.join(SUPPORT)}")
    return [(name, reason or other) for name, reason in reasons.items()]


def _pick(call: AttentionCall | DecodeCall, able: list[str]) -> tuple[str, str]:
    """(the implementation that "auto" takes of those that are ``able``, why)."""
    area = call.queries * call.keys
    here = device()
    shape = (here, call.dtype, call.head_width, call.length, call.causal)
    if "pallas_gpu" in able and "cudnn" in able:
        return sizes.fastest(("pallas_gpu", "cudnn"), *shape) or (
            "cudnn",
            f"the table has no entry in which pallas_gpu is faster on {here}",
        )
    for name in ("pallas_tpu", "pallas_gpu", "cudnn"):
        if name in able and (area >= SMALL or call.queries == 1):
            return name, f"the kernel for {here}"
    if "xla_blockwise" not in able:
        return "xla", "the only one that can serve the call"
    timed = sizes.fastest(("xla", "xla_blockwise"), *shape)
    if timed is not None:
        return timed
    if area >= LARGE:
        return "xla_blockwise", f"S x T = {area} reaches {LARGE}, too many scores to hold"
    return "xla", f"S x T = {area} is below {LARGE}, few enough scores to hold"


def choose(call: AttentionCall | DecodeCall) -> str:
    """The implementation that serves ``call``. Raise ValueError if the requested one cannot; log
    once if "auto" falls back to XLA on an accelerator."""
    impl = call.impl
    reasons = explain(call)
    chosen = next((name for name, reason in reasons if reason.startswith("chosen")), None)
    if chosen is None:
        able = [name for name in SUPPORT if unsupported_reason(name, call) is None]
        raise ValueError(
            f"attention impl={impl!r} cannot serve this call: {dict(reasons)[impl]}; use "
            f"impl='auto', or {' or '.join(able)}"
        )
    if impl == "auto" and compat.platform() != "cpu" and SUPPORT[chosen].runs_on == "anything":
        kernels = [f"{name} {why}" for name, why in reasons if SUPPORT[name].runs_on != "anything"]
        _warn_once(
            f"attention falls back to {chosen} for (S, T, H) = ({call.queries}, {call.keys}, "
            f"{call.head_width}): {'; '.join(kernels)}"
        )
    return chosen


@functools.cache
def _warn_once(text: str) -> None:
    logging.warning(text)
