"""One forward pass that keeps its residual streams, the outputs of its halves, and its attention.

The blocks are the model's own. The pass is hooked where a block lets its caller in: at its input,
at the attention that the caller computes, and where the output of a half block is added.
"""

# Shapes: B rows, S query positions, T key positions, D width, V vocabulary, N query heads,
# H head width, L layers

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtnlg_jax.model.attention import attention
from mtnlg_jax.model.transformer import Transformer

# Points of a block at which a pass may be changed.
RESIDUAL = "residual"  # the input of the block
ATTENTION = "attention"  # what its attention adds to the residual stream
MLP = "mlp"  # what its MLP adds
POINTS = (RESIDUAL, ATTENTION, MLP)
_HALVES = (ATTENTION, MLP)

# (point, number of the layer, the tensor (B, S, D) there) -> what stands in its place.
Change = Callable[[str, int, jax.Array], jax.Array]


class Recorded(NamedTuple):
    """A forward pass of B rows through L layers."""

    # L + 1 residual streams: the input of each layer, and the output of the last.
    residual_LBSD: jax.Array
    # What the halves add, before the model's residual multiplier.
    attention_LBSD: jax.Array
    mlp_LBSD: jax.Array
    # float32 weight of key t for query s; None unless asked for. A row adds up to 1, together with
    # the share of a sink.
    maps_LBNST: jax.Array | None
    sinks_LBNS: jax.Array | None  # float32; None without sinks

    def at(self, point: str) -> jax.Array:
        """Return the (L, B, S, D) tensors of one of POINTS."""
        return {
            RESIDUAL: self.residual_LBSD[:-1],
            ATTENTION: self.attention_LBSD,
            MLP: self.mlp_LBSD,
        }[point]


def run_recorded(
    model: Transformer,
    tokens_BS: jax.Array,
    causal: bool = True,
    maps: bool = False,
    change: Change = lambda point, layer, x_BSD: x_BSD,
) -> Recorded:
    """Run ``model`` on token ids (B, S) and return the inside of the pass.

    ``maps``: also keep the attention weights, L B N S^2 numbers. ``change`` may replace a tensor at
    one of POINTS, which later layers then read.
    """
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    graph, stacked = nnx.split(model.blocks)
    found: dict[str, list] = {point: [] for point in (*POINTS, "maps", "sinks")}
    x_BSD = model.embed(tokens_BS, positions_BS)
    for layer in range(model.config.num_layers):
        block = nnx.merge(graph, jax.tree.map(lambda w, layer=layer: w[layer], stacked))
        x_BSD = change(RESIDUAL, layer, x_BSD)
        found[RESIDUAL].append(x_BSD)

        def added(y_BSD, half, layer=layer):
            y_BSD = change(_HALVES[half], layer, y_BSD)
            found[_HALVES[half]].append(y_BSD)
            return y_BSD

        attend = functools.partial(_attend, causal, block.attention.b_sink_N, found, maps)
        x_BSD = block(x_BSD, positions_BS, attend, added, model.config.layer(layer))
    found[RESIDUAL].append(x_BSD)
    return Recorded(
        jnp.stack(found[RESIDUAL]),
        jnp.stack(found[ATTENTION]),
        jnp.stack(found[MLP]),
        jnp.stack(found["maps"]) if maps else None,
        jnp.stack(found["sinks"]) if found["sinks"] else None,
    )


def _attend(
    causal: bool,
    sink: Any,
    found: dict[str, list],
    maps: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Return the model's attention, and note its weights in ``found`` if ``maps``."""
    result = attention(q, k, v, causal=causal, return_lse=return_lse, **options)
    if maps:
        weights_BNST = attention_weights(q, k, causal, **options)
        if return_lse and sink is not None:
            # As `model.block.Attention.attend` does: a sink takes its share from all keys.
            sink_N = sink[...].astype(jnp.float32)
            share_BNS = jax.nn.sigmoid(result[1] - sink_N[None, :, None])
            weights_BNST = weights_BNST * share_BNS[..., None]
            found["sinks"].append(1 - share_BNS)
        found["maps"].append(weights_BNST)
    return result


def attention_weights(q: jax.Array, k: jax.Array, causal: bool, **options: Any) -> jax.Array:
    """Return the weights (B, N, S, T), float32, that attention() gives these queries and keys.

    With unit vectors as values, the model's own attention returns the weights themselves, so every
    mask, window, bias and cap is in them.
    """
    keys = k.shape[1]
    width = q.shape[-1]
    unit = jnp.eye(keys, dtype=q.dtype)[None, :, None]
    units = jnp.broadcast_to(unit, (*k.shape[:3], keys))
    # Queries and values must have one width.
    pad_qk = ((0, 0), (0, 0), (0, 0), (0, max(0, keys - width)))
    pad_v = ((0, 0), (0, 0), (0, 0), (0, max(0, width - keys)))
    weights = attention(
        jnp.pad(q, pad_qk),
        jnp.pad(k, pad_qk),
        jnp.pad(units, pad_v),
        causal=causal,
        impl="xla",
        **{"scale": 1 / math.sqrt(width), **options},
    )
    return weights[..., :keys].transpose(0, 2, 1, 3).astype(jnp.float32)


def predict(model: Transformer, x_BSD: jax.Array) -> jax.Array:
    """Return the float32 logits (B, S, V) that the final norm and head make of a residual
    stream."""
    return model.head().logits(model.normed(x_BSD))
