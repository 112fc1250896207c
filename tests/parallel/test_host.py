"""Bring arrays of the host to a device: every bit, whatever their layout and size."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.interop.shards import finite
from mtnlg_jax.parallel import host


def _values(shape, dtype):
    """Return values with all exponents of ``dtype``, the smallest numbers included."""
    kind = jnp.dtype(dtype)
    bits = np.random.default_rng(0).integers(0, 1 << 8 * kind.itemsize, shape, np.uint64)
    values = bits.astype(f"u{kind.itemsize}").view(kind)
    return np.where(np.isfinite(values), values, kind.type(1))


@pytest.mark.parametrize("shape", [(3, 5), (700, 1100, 2)], ids=["small", "large"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_arrays_arrive_with_every_bit(shape, stored, dtype):
    values = _values(shape, stored)
    turned = values.T
    assert (turned.nbytes > host.LARGE) == (len(shape) == 3) and not turned.flags.c_contiguous
    with np.errstate(over="ignore"):  # of float32 in bfloat16
        expected = turned.astype(np.float32).astype(jnp.dtype(dtype))
        found = host.on_device(turned, dtype)
        straight = host.on_device(values, dtype)
    assert found.dtype == dtype
    assert np.asarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()
    assert np.asarray(straight).tobytes() == np.ascontiguousarray(expected.T).tobytes()
    target = host.empty(turned.shape, np.float32)
    host.write(target, turned)
    assert target.tobytes() == np.ascontiguousarray(turned.astype(np.float32)).tobytes()


def test_a_large_array_is_taken_over_by_the_cpu():
    made = host.empty((host.LARGE,), np.int8)
    made[:] = 3
    cpu = jax.local_devices(backend="cpu")[0]
    assert host.on_device(made, np.int8, cpu).unsafe_buffer_pointer() == made.ctypes.data


@pytest.mark.parametrize("large_pages", [True, False])
def test_a_large_array_is_zero_with_and_without_large_pages(large_pages, monkeypatch):
    monkeypatch.setattr(host, "_HAS_LARGE_PAGES", large_pages and host._HAS_LARGE_PAGES)
    monkeypatch.setattr(np, "empty", np.ones)  # memory that another array has used
    assert not host.empty((host.LARGE,), np.int8).any()
    assert host.empty((host.LARGE - 1,), np.int8).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
def test_values_that_are_not_finite_are_found_by_their_bits(dtype, bad):
    values = _values((40, 50), dtype)
    assert finite("it", values) is values
    assert finite("it", -abs(values)).shape == values.shape
    for sign in (1, -1):
        broken = sign * abs(values)
        broken[3, 7] = bad
        with pytest.raises(ValueError, match=r"it has 1 values that .* at \[3, 7\]"):
            finite("it", broken)


def test_values_are_made_one_ahead_in_order():
    made = []

    def make():
        for number in range(4):
            made.append(number)
            yield number
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for number in host.one_ahead(make()):
            deadline = time.monotonic() + 10
            while len(made) < min(number + 2, 4) and time.monotonic() < deadline:
                time.sleep(0.001)
            assert len(made) == min(number + 2, 4)
            found.append(number)
    assert found == [0, 1, 2, 3]
