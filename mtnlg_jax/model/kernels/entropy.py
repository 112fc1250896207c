"""The entropy of attention weights, without all of them at once."""

# Shapes: B rows, S query positions, T key positions, N query heads, K key/value heads, H head width

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import entr

from mtnlg_jax.model.kernels.blocks import Blocks
from mtnlg_jax.model.kernels.call import AttentionCall
from mtnlg_jax.model.kernels.checks import check_attention
from mtnlg_jax.model.kernels.xla import Loop, softmax

MOST_SCORES = 2**24  # that are held at once, where one query of every head has fewer: 64 MiB


def attention_entropy(
    q,
    k,
    *,
    causal: bool = True,
    segment_ids=None,
    q_offset=0,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes=None,
    scale: float | None = None,
    sinks=None,
    most: int = MOST_SCORES,
) -> jax.Array:
    """Return the entropy of the weights with which each query attends, nats, float32 (B, N, S).

    It is between 0 (one key has all the weight) and ln of the keys that the query sees; 0 for a
    query that sees none.

    Args:
      q: (B, S, N, H). k: (B, T, K, H). They and the options are those of `attention`.
      sinks: (N,). The score of one more key, with which every query of a head may attend to
          nothing; it counts as a key.
      most: scores that are held at once, at least those of one query of every row and head.
    """
    call = AttentionCall(
        q,
        k,
        k,
        causal=causal,
        segment_ids=segment_ids,
        q_offset=q_offset,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        scale=scale,
    )
    check_attention(call)
    rows, queries, heads, _ = q.shape
    keys = k.shape[1]
    blocks = Blocks(max(1, min(queries, most // (rows * heads * keys))), keys)
    loop = Loop(q, k, k, call.mask(), call.score_scale, softcap, call.slopes, blocks)

    def of_queries(_, start):
        scores, _ = loop.scores(loop.of_queries(loop.q, start), loop.k, start, 0)
        if sinks is not None:
            sink = sinks.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
            scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], -1)
        return None, entr(softmax(scores)[0]).sum(-1)

    # (blocks, B, K, query heads of a key/value head, queries of a block) -> (B, N, S)
    found = jnp.moveaxis(lax.scan(of_queries, None, loop.starts)[1], 0, 3)
    return found.reshape(rows, heads, -1)[:, :, :queries]
