"""cuDNN's fused attention, through jax.nn, for calls that need no mask array of S x T.

Lengths and segment ids are never passed on, because cuDNN does not define rows that see nothing;
nor is its log-sum-exp used, which it rounds to the output's type.
"""

# Shapes: B rows, S query positions, T key positions, N query heads, H head width

import jax
from jax.ad_checkpoint import checkpoint_name

from mtnlg_jax import compat
from mtnlg_jax.model.kernels.mask import Mask


def cudnn_unsupported_reason(
    queries: int, keys: int, head_width: int, causal: bool, window: bool
) -> str | None:
    """Why cuDNN cannot serve such a call on this machine's GPU, or None if it can."""
    if causal and queries != keys:
        return f"aligns causality in its own way unless S = T, and S={queries}, T={keys}"
    if window and not causal:
        return "takes a window to the left only, so only where causal"
    if compat.described():
        return "cannot be compiled for a GPU that is not in this machine"
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
    """out (B, S, N, H)."""
    # cuDNN counts the keys to the left and to the right without the query's own.
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
