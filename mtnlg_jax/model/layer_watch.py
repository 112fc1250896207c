"""What statistics read of a layer while it runs: sums and maxima over this device's part of it.

`train.activations` adds them up over layers, micro-batches and the mesh.
"""

# Shapes: B rows, S query positions, D width, N query heads, K key/value heads, H head width,
# F MLP width, E experts, U visits of a token to an expert

from typing import Any

import jax
import jax.numpy as jnp

from mtnlg_jax.model.context_attention import context_attention_entropy

PEAK = "peak_"  # beginning of the names of maxima; all others are sums


def square_of(x_BSD: jax.Array, used_B: jax.Array) -> jax.Array:
    """Return the sum of the squares of rows with ``used_B`` True, float32."""
    squares_B = jnp.square(x_BSD.astype(jnp.float32)).sum((1, 2))
    return jnp.where(used_B, squares_B, 0.0).sum()


class LayerWatch:
    """Reads one layer; ``figures`` then has a number or an array by name.

    ``used_B``: whether a row counts. ``causal`` and ``segment_ids_BS`` are those of attention.
    """

    def __init__(self, used_B: jax.Array, causal: bool, segment_ids_BS: jax.Array | None):
        self.used_B = used_B
        self._causal = causal
        self._segment_ids_BS = segment_ids_BS
        self.figures: dict[str, jax.Array] = {}

    def attention(
        self, q_BSNH: jax.Array, k_BSKH: jax.Array, sinks_N: jax.Array | None, options: dict
    ) -> None:
        """Read the entropies of attention() of ``q_BSNH`` and ``k_BSKH`` with ``options``."""
        entropy_BNS = context_attention_entropy(
            q_BSNH,
            k_BSKH,
            causal=self._causal,
            segment_ids=self._segment_ids_BS,
            sinks=sinks_N,
            **options,
        )
        used_BNS = self.used_B[:, None, None]
        self.figures["entropy_N"] = jnp.where(used_BNS, entropy_BNS, 0.0).sum((0, 2))

    def branch(self, half: int, y_BSD: jax.Array) -> None:
        """Read what half block ``half`` adds to the residual stream: 0 attention, 1 MLP."""
        self.figures["mlp" if half else "attention"] = square_of(y_BSD, self.used_B)

    def output(self, x_BSD: jax.Array) -> None:
        """Read the residual stream after the layer."""
        self.figures["residual"] = square_of(x_BSD, self.used_B)

    def units(self, h_BSF: jax.Array) -> None:
        """Read the inner state of an MLP, or of the expert of all tokens."""
        h_BSF = jnp.where(self.used_B[:, None, None], h_BSF, 0).astype(jnp.float32)
        self.figures["units"] = jnp.square(h_BSF).sum()
        self.figures[PEAK + "F"] = jnp.abs(h_BSF).max((0, 1))

    def visits(self, h_UF: jax.Array, used_U: jax.Array, experts_U: jax.Array, experts: int):
        """Read the inner states of this device's ``experts``; visits without ``used_U`` do not
        count."""
        h_UF = jnp.where(used_U[:, None], h_UF, 0).astype(jnp.float32)
        self.figures["visited_units"] = jnp.square(h_UF).sum()
        self.figures["visits"] = used_U.sum().astype(jnp.float32)
        peaks_EF = jax.ops.segment_max(jnp.abs(h_UF), experts_U, experts)
        # Of an expert without visits it is -inf.
        self.figures[PEAK + "EF"] = jnp.maximum(peaks_EF, 0.0)


def figures_of(watch: LayerWatch | None) -> Any:
    """Return the figures of ``watch``; () without one."""
    return () if watch is None else watch.figures
