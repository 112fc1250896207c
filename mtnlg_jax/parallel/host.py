"""Arrays of the host on their way to a device, with as few copies as the device allows.

JAX's CPU backend uses aligned host memory as it is, so a parameter that is read into `empty` is on
the device without a copy. Large pages save time as well: the kernel clears memory in pages of 4 KB
several times as slowly as the processor copies.
"""

import contextlib
import functools
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
    return jax.device_put(as_type(values, dtype), where)


def as_type(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Return ``values`` as ``dtype`` on the host."""
    kind = jnp.dtype(dtype)
    if values.dtype == kind:
        return values
    if kind != np.float32:  # rounds once, from what every stored type is exactly
        values = values.astype(np.float32, copy=False)
    made = empty(values.shape, kind)
    write(made, values)
    return made


class Filling:
    """A parameter that is filled on its devices, some rows of its first dim at a time, so
    that the host never holds it. Rows that are not written are zeros."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding) -> None:
        self._shape = shape
        self._sharding = sharding
        self._parts = [
            _Part(device, index or (), shape, dtype)
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        ]

    def holds(self, row: int) -> bool:
        """Return whether a device of this process has ``row`` of the first dim."""
        return any(part.bounds[0][0] <= row < part.bounds[0][1] for part in self._parts)

    def write(self, start: int, rows: np.ndarray) -> None:
        """Write ``rows`` from row ``start`` on."""
        for part in self._parts:
            part.write(start, rows)

    def array(self) -> jax.Array:
        arrays = [part.array() for part in self._parts]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, arrays)


class _Part:
    """What one device holds of a `Filling`."""

    def __init__(
        self, device: jax.Device, index: tuple, shape: tuple[int, ...], dtype: Any
    ) -> None:
        self.bounds = [each.indices(size)[:2] for each, size in zip(index, shape, strict=True)]
        sizes = tuple(stop - start for start, stop in self.bounds)
        self._device = device
        self._dtype = dtype
        self._host: np.ndarray | None = None
        self._array: jax.Array | None = None
        if device.platform == "cpu":  # whose memory is the host's
            self._host = empty(sizes, dtype)
            if self._host.nbytes < LARGE:
                self._host[...] = 0
        else:
            self._array = jnp.zeros(sizes, dtype, device=device)

    def write(self, start: int, rows: np.ndarray) -> None:
        first, last = self.bounds[0]
        begin = max(first, start)
        end = min(last, start + len(rows))
        if begin >= end:
            return
        columns = tuple(slice(*each) for each in self.bounds[1:])
        part = rows[begin - start : end - start][:, *columns]
        if self._host is not None:
            write(self._host[begin - first : end - first], part)
            return
        sent = on_device(part, self._dtype, self._device)
        self._array = _put_rows(self._array, sent, begin - first)
        # Else copies on the host wait for the devices, and pile up.
        self._array.block_until_ready()

    def array(self) -> jax.Array:
        """Return what was written, which is not written to any more."""
        if self._array is None:
            self._array = jax.device_put(self._host, self._device)
        return self._array


@functools.partial(jax.jit, donate_argnums=0)
def _put_rows(array: jax.Array, rows: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows, start, 0)
