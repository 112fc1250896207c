"""The most that a step of decoding can do: what it reads, at the speed that memory copies with
here.

A step reads every weight of its products once, whatever the number of rows, and the whole cache,
also past a row's end. At small batches that is what it takes; sampling, norms and sums come on top.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtnlg_jax.decode.cache import Decoder, capacity


def step_bytes(decoder: Decoder, rows: int, length: int) -> dict[str, int]:
    """Bytes that a step of ``rows`` rows reads: of ``weights``, and of a ``cache`` for ``length``
    tokens a row."""
    config = decoder.config
    outer, layers = decoder.params
    weights = _size(layers)
    for path, leaf in nnx.to_pure_dict(outer).items():
        # A row reads one entry of a table that tokens or positions are looked up in.
        looked_up = path == "positions_PD" or path == "tokens_VD" and not config.tie_embeddings
        weights += 0 if looked_up else _size(leaf)
    item = np.dtype(jax.tree.leaves(nnx.to_pure_dict(outer)["final_norm"])[0].dtype).itemsize
    # int8 has a float32 scale for each token and head, of keys and of values.
    wide = config.head_width + 4 if decoder.int8_cache else config.head_width * item
    size = capacity(min(length, decoder.context), decoder.context)
    return {
        "weights": weights,
        "cache": 2 * config.num_layers * config.kv_heads * wide * size * rows,
    }


def _size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def copy_bandwidth(size: int = 2**28, rounds: int = 5) -> float:
    """Bytes read and written a second where ``size`` bytes are read, changed and written on the
    default device; the best of ``rounds``, since what else runs only takes away from it. Choose a
    size well above the caches."""
    # In place: memory that is new to the process would first have to be found, which on a CPU takes
    # longer.
    change = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = change(jnp.zeros(size // 4, jnp.float32)).block_until_ready()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        x = change(x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * x.nbytes / min(seconds)


def roofline(decoder: Decoder, rows: int, length: int, bandwidth: float) -> dict[str, float]:
    """Bytes a step, the bandwidth, and the tokens/s of all rows that they allow without guesses."""
    read = step_bytes(decoder, rows, length)
    return {
        "weight_bytes_per_step": read["weights"],
        "cache_bytes_per_step": read["cache"],
        "copy_gigabytes_per_second": round(bandwidth / 1e9, 2),
        "roofline_tokens_per_second": round(rows * bandwidth / sum(read.values()), 2),
    }
