"""Arrays of the host on their way to a device, with as few copies as the device allows.

JAX's CPU backend uses aligned host memory as it is, so a parameter that is read into `empty` is on
the device without a copy. Large pages save time as well: the kernel clears memory in pages of 4 KB
several times as slowly as the processor copies.
"""

import contextlib
import math
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LARGE = 1 << 20  # bytes from which an array has pages of its own
_PIECE = 4 << 20  # bytes that are transposed at once
_END: Any = object()
_HAS_LARGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")  # Linux


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array for values that are written once and then given to `on_device`.

    A large one is zero, and on Linux in large pages and aligned for every backend. A small one has
    any values.
    """
    kind = jnp.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size < LARGE:
        return np.empty(shape, kind)
    if not _HAS_LARGE_PAGES:
        return np.zeros(shape, kind)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, kind).reshape(shape)


def one_ahead[T](values: Iterator[T]) -> Iterator[T]:
    """Yield ``values``, each made by a thread while the one before it is in use.

    The thread runs beside the caller, since reading a file and copying an array release the GIL.
    """
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, values, _END)
        while (value := following.result()) is not _END:
            following = pool.submit(next, values, _END)
            yield value


def contiguous(values: np.ndarray) -> np.ndarray:
    """Return ``values`` in C order."""
    if values.flags.c_contiguous:
        return values
    if values.nbytes >= LARGE:
        # JAX transposes block by block, several times as fast as numpy.
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the CPU out
            cpu = jax.local_devices(backend="cpu")[0]
            return np.asarray(jax.device_put(values, cpu))
    return np.ascontiguousarray(values)


def write(target: np.ndarray, values: np.ndarray) -> None:
    """Write ``values`` into an array of their shape, which may have another dtype."""
    if values.flags.c_contiguous or values.nbytes <= _PIECE:
        np.copyto(target, contiguous(values), casting="unsafe")
        return
    # In pieces that caches hold, along the longest dim: the last of several parts is often short.
    dim = int(np.argmax(values.shape))
    rows = max(1, _PIECE * values.shape[dim] // values.nbytes)
    for start in range(0, values.shape[dim], rows):
        piece = (*(slice(None),) * dim, slice(start, start + rows))
        np.copyto(target[piece], contiguous(values[piece]), casting="unsafe")


def on_device(
    values: np.ndarray, dtype: Any, where: jax.Device | jax.sharding.Sharding | None = None
) -> jax.Array:
    """Return ``values`` as ``dtype`` on a device, the first one by default.

    The caller must not change them afterwards: on CPUs the result may be the same memory.
    """
    kind = jnp.dtype(dtype)
    if values.dtype != kind:
        if kind != np.float32:  # float32 holds every stored type exactly, so this rounds once
            values = values.astype(np.float32, copy=False)
        made = empty(values.shape, kind)
        write(made, values)
        values = made
    return jax.device_put(values, where)
