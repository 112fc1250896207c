"""Checkpoints whose moments have another optimizer.moments_dtype than the run that resumes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from mtnlg_jax.parallel.mesh import shardings_of
from mtnlg_jax.train.moments import CODES, SCALES, decode, encode

_SECTION = "opt_state."


def in_float32(arrays: Mapping[str, str]) -> dict[str, str]:
    """Return the names and shapes of a state's ``arrays``, such as "int8[2, 64]", with moments as
    they are in float32."""
    found = {}
    for name, shape in arrays.items():
        parent, _, last = name.rpartition(".")
        kind, _, sizes = shape.partition("[")
        if not name.startswith(_SECTION) or kind == "int32":
            found[name] = shape
        elif last.startswith(CODES):
            found[parent] = f"float32[{sizes}"
        elif not last.startswith(SCALES):
            found[name] = f"float32[{sizes}"
    return found


def dtype_of(arrays: Mapping[str, str]) -> str:
    """Return the optimizer.moments_dtype with which a state has its ``arrays``."""
    moments = {name: shape for name, shape in arrays.items() if name.startswith(_SECTION)}
    if any(f".{CODES}" in name for name in moments):
        return "int8"
    rounded = any(shape.startswith("bfloat16") for shape in moments.values())
    return "bfloat16" if rounded else "float32"


def conversion(
    opt_state: Any, saved: Mapping[str, str], wanted: Mapping[str, str]
) -> tuple[Any, Callable[[Any], Any]]:
    """Return (the optimizer's state as it was saved, as ShapeDtypeStructs, and a function from it
    to the one that is ``wanted``), both given by the names and shapes of all arrays.

    Without a difference these are ``opt_state`` and the identity. Moments are rounded once more, by
    random bits that depend on the count of steps alone.
    """
    old = dtype_of(saved)
    new = dtype_of(wanted)
    if old == new or not any(name.startswith(_SECTION) for name in saved):
        return opt_state, lambda state: state
    # Without their memory: nothing is computed in that of the host (train.offload).
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), opt_state)
    shapes = jax.eval_shape(lambda state: encode(decode(state), old, seed=0), plain)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, opt_state)
    mesh = jax.tree.leaves(shardings)[0].mesh
    try:
        placed = shardings_of(shapes, mesh)
    except ValueError:  # a width that data does not divide, which is possible without ZeRO
        placed = shardings_of(shapes, mesh, zero=0)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        placed,
    )
    convert = jax.jit(lambda state: encode(decode(state), new, seed=0), out_shardings=shardings)
    return abstract, convert
