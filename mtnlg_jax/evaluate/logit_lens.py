"""A look inside the model: where each head looks, and what each layer would already say."""

# Shapes: B rows (one here), S query positions, T key positions, D width, V vocabulary, N query
# heads, L layers

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtnlg_jax.model.attention import attention
from mtnlg_jax.model.transformer import Transformer


class Inside(NamedTuple):
    attention_LNTT: (
        jax.Array
    )  # float32; row t: the shares that head n of layer l gives to each token
    logits_LTV: jax.Array  # float32, L + 1 rows: after the embedding, then after each layer


def look_inside(model: Transformer, tokens, causal: bool = True) -> Inside:
    """Attention weights and layer-by-layer guesses for one sequence of token ids, (T,).

    A layer's guess is the final norm and the output embedding on its residual stream ("logit lens",
    nostalgebraist 2020); the last row is the model's own answer. Memory is L N T^2 and L T V: for
    short texts.
    """
    tokens_BS = jnp.asarray(tokens, jnp.int32)[None]
    positions_BS = jnp.arange(tokens_BS.shape[1])[None]
    graph, stacked = nnx.split(model.blocks)
    maps = []

    def attend(q, k, v, return_lse=False, **options):
        # Attention to the unit vectors gives the weights themselves, from the same code that the
        # model runs.
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
            impl="xla",
            **{"scale": 1 / math.sqrt(width), **options},
        )
        maps.append(weights[0, :, :, :keys].transpose(1, 0, 2).astype(jnp.float32))
        return attention(q, k, v, causal=causal, return_lse=return_lse, **options)

    def guess(x_BSD):
        return model.head().logits(model.normed(x_BSD))[0]

    x_BSD = model.embed(tokens_BS, positions_BS)
    guesses = [guess(x_BSD)]
    for layer in range(model.config.num_layers):
        x_BSD = nnx.merge(graph, jax.tree.map(lambda w, layer=layer: w[layer], stacked))(
            x_BSD, positions_BS, attend, spec=model.config.layer(layer)
        )
        guesses.append(guess(x_BSD))
    return Inside(jnp.stack(maps), jnp.stack(guesses))
