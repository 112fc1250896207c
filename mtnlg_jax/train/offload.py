"""Moments in the memory of the host, parameter after parameter (train.offload).

Between steps they lie in ``pinned_host``, split like the parameters. The update brings those of one
parameter to the device, computes, and takes them back; only then those of the next one come. So the
device holds the moments of one parameter, and that only once the gradients are complete: before,
activations need the memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding

from mtnlg_jax.config import Config
from mtnlg_jax.config.memory_rules import offloads_moments
from mtnlg_jax.model.params import name_of
from mtnlg_jax.train.moments import moment_of, stored

HOST = "pinned_host"


def check_backend(config: Config, mesh: Mesh) -> None:
    """Raise ValueError if train.offload needs a memory that the devices of ``mesh`` lack."""
    if config.train.offload == "none":
        return
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(
            f"train.offload={config.train.offload} needs memory of kind {HOST}, and the backend "
            f"{device.platform} has {', '.join(kinds) or 'none'}; set train.offload=none, and "
            "optimizer.moments_dtype=bfloat16 or train.recompute=full to save memory"
        )


def shardings_of_state(config: Config, shardings: Any) -> Any:
    """Return the ``shardings`` of an optimizer's state with the moments in the memory of the host, if
    train.offload says so."""
    if not offloads_moments(config):
        return shardings

    def one(path: Any, sharding: NamedSharding) -> NamedSharding:
        return sharding.with_memory_kind(HOST) if moment_of(path) else sharding

    return jax.tree_util.tree_map_with_path(one, shardings)


def hold(
    inner: optax.GradientTransformation, dtype: str, seed: int, on_host: bool
) -> optax.GradientTransformation:
    """Return ``inner`` with its moments held in ``dtype`` (`moments.stored`), and in the memory of
    the host if ``on_host``.

    Then ``update`` takes one more argument, ``finite``: where it is False, moments stay as they are.
    """
    inner = stored(inner, dtype, seed)
    if not on_host:
        return inner

    def update(updates: Any, state: Any, params: Any = None, *, finite: jax.Array, **_: Any):
        return _in_turn(inner.update, updates, state, params, finite)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def select(finite: jax.Array, new: Any, old: Any) -> Any:
    """Return ``new`` where ``finite``, else ``old``. Leaves in the memory of the host are those of
    ``new``: `hold` has selected them."""

    def one(n: jax.Array, o: jax.Array) -> jax.Array:
        return n if jax.typeof(n).memory_space == jax.memory.Space.Host else jnp.where(finite, n, o)

    return jax.tree.map(one, new, old)


def _in_turn(
    update: Callable, updates: Any, state: Any, params: Any, finite: jax.Array
) -> tuple[Any, Any]:
    """Return (updates, new state) of ``update``, which runs for one parameter after the other."""
    named, state_tree = jax.tree_util.tree_flatten_with_path(state)
    states = [leaf for _, leaf in named]
    owners = [_owner(path, leaf) for path, leaf in named]
    named, tree = jax.tree_util.tree_flatten_with_path(updates)
    gradients = [leaf for _, leaf in named]
    names = [name_of(path) if name_of(path) in owners else _ON_DEVICE for path, _ in named]
    weights = tree.flatten_up_to(params)
    new_states = list(states)
    new_updates = list(gradients)
    before: Any = finite
    for name in dict.fromkeys([_ON_DEVICE, *filter(None, owners)]):
        mine = {at: states[at] for at, owner in enumerate(owners) if owner == name}
        if name != _ON_DEVICE:
            # They come once all gradients are there, and the update before this one is done.
            mine, _ = lax.optimization_barrier((mine, before))
            mine = jax.device_put(mine, jax.memory.Space.Device)
        given = [
            mine.get(at, states[at] if owner == _COUNT else _LEFT_OUT)
            for at, owner in enumerate(owners)
        ]
        chosen = [at for at, own in enumerate(names) if own == name]
        part, new = update(
            _only(tree, gradients, chosen),
            state_tree.unflatten(given),
            _only(tree, weights, chosen),
        )
        for at, leaf in zip(chosen, jax.tree.leaves(part), strict=True):
            new_updates[at] = leaf
        taken = [at for at, owner in enumerate(owners) if owner in (name, _COUNT)]
        found = dict(zip(taken, jax.tree.leaves(new), strict=True))
        if name != _ON_DEVICE:
            kept = {at: jnp.where(finite, found[at], old) for at, old in mine.items()}
            found |= jax.device_put(kept, jax.memory.Space.Host)
            before = kept
        for at, leaf in found.items():
            new_states[at] = leaf
    return tree.unflatten(new_updates), state_tree.unflatten(new_states)


# Owners of a state's leaves, beside the parameters whose moments they are.
_ON_DEVICE = "on device"  # such as moments of norms and biases
_COUNT = ""  # which each update needs
_LEFT_OUT = optax.MaskedNode()  # Optax's own mark of what a transformation does not see


def _owner(path: Any, leaf: jax.Array) -> str:
    moment = moment_of(path)
    if moment is not None:
        return moment.parameter
    return _ON_DEVICE if leaf.ndim else _COUNT


def _only(tree: Any, leaves: list, chosen: list[int]) -> Any:
    return tree.unflatten([leaf if at in chosen else _LEFT_OUT for at, leaf in enumerate(leaves)])
