"""TensorStore zarr arrays of one dimension, in files of `SHARD` numbers."""

import numpy as np
import tensorstore

from mtnlg_jax import storage

# In numbers. A random window decompresses one chunk; a shard is one file, and takes 33 MB of memory
# to write.
CHUNK = 1 << 16
SHARD = 1 << 24


def create_array(
    location: str, dtype: np.dtype, size: int = 0, inner: int | None = None
) -> tensorstore.TensorStore:
    """Create an array of ``size`` numbers; an earlier one is removed. ``inner``: numbers that are
    decompressed together."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    chunk = [little, {"name": "zstd", "configuration": {"level": 3}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [inner or CHUNK],
        "codecs": chunk,
        "index_codecs": [little, {"name": "crc32c"}],
    }
    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": storage.key_value_spec(location),
            # Otherwise a chunk of zeros would not be stored, and would look like a missing one.
            "store_data_equal_to_fill_value": True,
            "metadata": {
                "shape": [size],
                "data_type": dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            },
        },
        create=True,
        delete_existing=True,
        context=storage.CONTEXT,
    ).result()


def open_array(location: str, write: bool = False) -> tensorstore.TensorStore:
    """Open an array that `create_array` created."""
    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": storage.key_value_spec(location),
            "fill_missing_data_reads": False,  # a missing chunk is an error, not zeros
            "recheck_cached_data": "open",  # not at each read: written data do not change
        },
        read=True,
        write=write,
        context=storage.CONTEXT,
    ).result()
