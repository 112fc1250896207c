"""Attention weights of each head, and the predictions after each layer (logit lens)."""

# Shapes: B rows (here 1), S query positions, T key positions, D width, V vocabulary, N query heads,
# L layers

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtnlg_jax.model.attention import attention
from mtnlg_jax.model.transformer import Transformer


class Inside(NamedTuple):
    attention_LNST: jax.Array  # float32; how head n of layer l at s weights each token t
    logits_LSV: jax.Array  # float32, L + 1 layers: after the embedding, then after each layer


def look_inside(model: Transformer, tokens, causal: bool = True) -> Inside:
    """Return attention weights and the predictions of every layer for one sequence of token ids.

    A layer's prediction is the final norm and the output embedding applied to its residual stream
    ("logit lens", nostalgebraist 2020); the last one is the model's own. Memory is L N S^2 and
    L S V, so texts must be short.
    """
    tokens_BS = jnp.asarray(tokens, jnp.int32)[None]
    positions_BS = jnp.arange(tokens_BS.shape[1])[None]
    graph, stacked = nnx.split(model.blocks)
    maps = []

    def attend(q, k, v):
        # With unit vectors as values, the model's own attention returns the weights themselves.
        ones = jnp.eye(k.shape[1], dtype=q.dtype)[None, :, None].repeat(k.shape[2], 2)
        width = q.shape[-1]
        keys = k.shape[1]
        pad_qk = ((0, 0), (0, 0), (0, 0), (0, max(0, keys - width)))
        pad_v = ((0, 0), (0, 0), (0, 0), (0, max(0, width - keys)))
        weights = attention(
            jnp.pad(q, pad_qk),
            jnp.pad(k, pad_qk),
            jnp.pad(ones, pad_v),
            causal=causal,
            scale=1 / math.sqrt(width),
            impl="xla",
        )
        maps.append(weights[0, :, :, :keys].transpose(1, 0, 2).astype(jnp.float32))
        return attention(q, k, v, causal=causal)

    def predict(x_BSD):
        return jnp.einsum(
            "BSD,VD->BSV", model.final_norm(x_BSD), model.head(), preferred_element_type=jnp.float32
        )[0]

    x_BSD = model.embed(tokens_BS, positions_BS)
    logits = [predict(x_BSD)]
    for layer in range(model.config.num_layers):
        x_BSD = nnx.merge(graph, jax.tree.map(lambda w, layer=layer: w[layer], stacked))(
            x_BSD, positions_BS, attend
        )
        logits.append(predict(x_BSD))
    return Inside(jnp.stack(maps), jnp.stack(logits))
