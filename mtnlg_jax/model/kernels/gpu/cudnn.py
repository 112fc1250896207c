"""cuDNN's fused attention, through jax.nn: where it needs neither a mask of T x S nor what it
cannot give.

It is never asked for lengths or ids (rows that see nothing are not defined there), nor for the
log-sum-exp, which it rounds to the output's type.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

from mtnlg_jax import compat
from mtnlg_jax.model.kernels.mask import Mask


def refusal(queries: int, keys: int, head_width: int, causal: bool, window: bool) -> str | None:
    """Why it cannot serve such a call on a GPU here; None where it can."""
    if causal and queries != keys:
        return f"aligns causality in its own way unless T = S, and T={queries}, S={keys}"
    if window and not causal:
        return "takes a window to the left only, so only where causal"
    if compat.described():
        return "cannot be compiled for a card that is not here"
    if head_width > 128 and not _hopper_or_later():
        return f"takes head widths up to 128 before Hopper, not {head_width}"
    if not _installed():
        return "is not installed: pip install 'mtnlg_jax[gpu]'"
    return None


def _hopper_or_later() -> bool:
    return float(getattr(jax.devices()[0], "compute_capability", 0)) >= 9


def _installed() -> bool:
    from jax._src.lib import cuda_versions

    return cuda_versions is not None and cuda_versions.cudnn_get_version() >= 8904


def attend(q, k, v, mask: Mask, *, scale: float):
    """out (B, T, N, H)."""
    window = None if mask.window is None else (mask.window - 1, 0)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=mask.causal,
        scale=scale,
        local_window_size=window,
        implementation="cudnn",
    )
    return checkpoint_name(out, "attention")
