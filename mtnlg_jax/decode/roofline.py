"""The upper limit on decoding speed: the bytes a step reads, at the measured memory bandwidth.

A step reads every weight of its products once, whatever the number of rows, and the whole cache,
even past a row's end; windowed layers hold only their window (rolling.py). At small batches this
takes most of the time; sampling, norms and sums are not counted.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtnlg_jax.decode.cache import Decoder, capacity
from mtnlg_jax.decode.rolling import slots_of


def step_bytes(decoder: Decoder, rows: int, length: int, *, rolling: bool = True) -> dict[str, int]:
    """Return the bytes that a step of ``rows`` rows reads.

    ``weights`` is for the weights, ``cache`` for a cache of ``length`` tokens a row, of which
    windowed layers hold only their windows if ``rolling``.
    """
    config = decoder.config
    outer, layers = decoder.params
    weights = _size(layers)
    for path, leaf in nnx.to_pure_dict(outer).items():
        # A row reads only one entry of an embedding table. A tied table is the head as well, of
        # which every step reads all.
        looked_up = path == "positions_PD" or path == "tokens_VD" and not config.tie_embeddings
        weights += 0 if looked_up else _size(leaf)
    item = np.dtype(jax.tree.leaves(nnx.to_pure_dict(layers[0])["norm_1"])[0].dtype).itemsize
    # An int8 cache has a float32 scale for each token and head, for keys and for values.
    wide = config.head_width + 4 if decoder.int8_cache else config.head_width * item
    size = capacity(min(length, decoder.context), decoder.context)
    numbers = range(config.num_layers)
    slots = sum(slots_of(config, number, size) if rolling else size for number in numbers)
    return {"weights": weights, "cache": 2 * config.kv_heads * wide * slots * rows}


def _size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def copy_bandwidth(size: int = 2**28, rounds: int = 5) -> float:
    """Measure the bytes a second that the default device reads and writes.

    Reads, changes and writes ``size`` bytes, which should be well above the caches. Returns the
    best of ``rounds``, since other processes can only lower it.
    """
    # In place, since on a CPU it takes longer to write to memory that is new to the process.
    change = jax.jit(lambda x: x + 1, donate_argnums=0)
    # The first run compiles and is not measured.
    x = change(jnp.zeros(size // 4, jnp.float32)).block_until_ready()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        x = change(x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    # Read once and written once.
    return 2 * x.nbytes / min(seconds)


def roofline(
    decoder: Decoder, rows: int, length: int, bandwidth: float, *, rolling: bool = True
) -> dict[str, float]:
    """Return the bytes of a step, the bandwidth, and the tokens/s of all rows they allow.

    Guesses of speculative decoding are not counted; ``rolling`` as in `step_bytes`.
    """
    read = step_bytes(decoder, rows, length, rolling=rolling)
    return {
        "weight_bytes_per_step": read["weights"],
        "cache_bytes_per_step": read["cache"],
        "copy_gigabytes_per_second": round(bandwidth / 1e9, 2),
        "roofline_tokens_per_second": round(rows * bandwidth / sum(read.values()), 2),
    }
