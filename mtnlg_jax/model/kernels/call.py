"""The arguments of attention() and of decode_attention() as one object each: built once, then
checked, dispatched and explained."""

# Shapes: B rows, S query positions, T key positions, N query heads, K key/value heads, H head width

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtnlg_jax.model.kernels.blocks import Blocks
from mtnlg_jax.model.kernels.mask import Mask


class _Call:
    """Values that both kinds of calls derive from q, whose last dim is the head width."""

    q: jax.Array | jax.ShapeDtypeStruct
    scale: float | None

    @property
    def head_width(self) -> int:
        return self.q.shape[-1]

    @property
    def dtype(self) -> str:
        return str(self.q.dtype)

    @property
    def score_scale(self) -> float:
        return 1 / math.sqrt(self.head_width) if self.scale is None else float(self.scale)


@dataclass(frozen=True, eq=False)
class AttentionCall(_Call):
    """One call of attention(), whose docstring explains the fields. The arrays may be
    ShapeDtypeStructs as long as the call is only checked or explained."""

    decoding: ClassVar[bool] = False

    q: jax.Array | jax.ShapeDtypeStruct  # (B, S, N, H)
    k: jax.Array | jax.ShapeDtypeStruct  # (B, T, K, H)
    v: jax.Array | jax.ShapeDtypeStruct  # (B, T, K, H)
    causal: bool = True
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None
    kv_lengths: jax.Array | None = None
    q_offset: int | jax.Array = 0
    window: int | None = None
    softcap: float | None = None
    bias: jax.Array | None = None
    scale: float | None = None
    dropout_rate: float = 0.0
    dropout_key: jax.Array | None = None
    impl: str = "auto"
    block_sizes: tuple[int, int] | Blocks | None = None
    return_lse: bool = False

    @property
    def queries(self) -> int:
        return self.q.shape[1]

    @property
    def keys(self) -> int:
        return self.k.shape[1]

    @property
    def length(self) -> float:
        """The length that the table of block sizes knows: the geometric mean of S and T."""
        return math.sqrt(self.queries * self.keys)

    @property
    def options(self) -> frozenset[str]:
        """The optional arguments in use, by the names that SUPPORT lists."""
        used = {
            "segment_ids": self.segment_ids is not None,
            "kv_lengths": self.kv_lengths is not None,
            "q_offset": not (isinstance(self.q_offset, int) and self.q_offset == 0),
            "window": self.window is not None,
            "softcap": self.softcap is not None,
            "bias": self.bias is not None,
            "dropout": self.dropout_rate > 0,
            "return_lse": self.return_lse,
        }
        return frozenset(name for name, use in used.items() if use)

    @property
    def segment_pair(self) -> tuple:
        """Segment ids of the queries and of the keys, or (None, None)."""
        ids = self.segment_ids
        return ids if isinstance(ids, tuple) else (ids, ids)

    def mask(self) -> Mask:
        arrays = (*self.segment_pair, self.kv_lengths)
        q_ids, kv_ids, lengths = (None if x is None else jnp.asarray(x, jnp.int32) for x in arrays)
        offset = self.q_offset
        if not isinstance(offset, int):
            offset = jnp.asarray(offset, jnp.int32)
        return Mask(bool(self.causal), self.window, offset, q_ids, kv_ids, lengths)


@dataclass(frozen=True, eq=False)
class DecodeCall(_Call):
    """One call of decode_attention(), whose docstring explains the fields."""

    decoding: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    queries: ClassVar[int] = 1

    q: jax.Array  # (B, N, H)
    k_cache: jax.Array  # (B, K, T, H)
    v_cache: jax.Array  # (B, K, T, H)
    lengths: jax.Array  # (B,)
    scale: float | None = None
    softcap: float | None = None
    k_scale: jax.Array | None = None  # (B, K, T)
    v_scale: jax.Array | None = None  # (B, K, T)
    impl: str = "auto"
    num_splits: int | None = None

    @property
    def keys(self) -> int:
        return self.k_cache.shape[2]

    @property
    def length(self) -> float:
        return math.sqrt(self.queries * self.keys)

    @property
    def options(self) -> frozenset[str]:
        """As for AttentionCall. Every implementation that decodes takes the scales of a cache."""
        used = {"kv_lengths", "return_lse"}
        return frozenset(used if self.softcap is None else used | {"softcap"})
