"""The memory that a tensor takes on a TPU, which stores tiles."""

import math


def padded_size(shape: tuple[int, ...]) -> int:
    """Return the numbers that a TPU stores for a tensor of ``shape``: tiles of 8 x 128 over the two
    dims that waste least. XLA orders the dims of a parameter in this way: (L, D, N, H) with H 160
    has D innermost and no padding (compiled for v5p, libtpu 0.0.50)."""
    if len(shape) < 2:
        return math.prod(shape)

    def tiles(size, tile):
        return -(-size // tile) * tile / size

    waste = min(
        tiles(inner, 128) * tiles(rows, min(8, 1 << (rows - 1).bit_length()))
        for i, inner in enumerate(shape)
        for j, rows in enumerate(shape)
        if i != j
    )
    return round(math.prod(shape) * waste)
