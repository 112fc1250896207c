"""Moments in the memory of the host, parameter after parameter (train.offload).

Between steps they lie in ``pinned_host``, split like the parameters. The update brings those of one
parameter to the device, computes, and takes them back; only then those of the next one come. So the
device holds the moments of one parameter, and that only once the gradients are complete: before,
activations need the memory.
"""

import functools
from collections.abc import Callable, Collection
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
    """Return the ``shardings`` of an optimizer's state with the moments in the memory of the host,
    if train.offload says so."""
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

    Then ``update`` takes one more argument, ``finite``: where it is False, moments stay as they
    are.
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


# Leaves by their position in a flattened tree.
_Leaves = dict[int, jax.Array]

# Owners of a state's leaves, beside the parameters whose moments they are.
_ON_DEVICE = "on device"  # such as moments of norms and biases
_COUNT = ""  # which each update needs


def _in_turn(
    update: Callable, updates: Any, state: Any, params: Any, finite: jax.Array
) -> tuple[Any, Any]:
    """Return (updates, new state) of ``update``, which runs for one parameter after the other."""
    named, state_tree = jax.tree_util.tree_flatten_with_path(state)
    states = dict(enumerate(leaf for _, leaf in named))
    owners = [_owner(path, leaf) for path, leaf in named]
    named, tree = jax.tree_util.tree_flatten_with_path(updates)
    names = [name_of(path) if name_of(path) in owners else _ON_DEVICE for path, _ in named]
    gradients = dict(enumerate(leaf for _, leaf in named))
    weights = dict(enumerate(jax.tree.leaves(params)))

    def one(held: _Leaves, gradients: _Leaves, weights: _Leaves) -> tuple[_Leaves, _Leaves]:
        """Return the updates and the new state of a part of the parameters."""
        found, new = update(
            _spread(tree, gradients), _spread(state_tree, held), _spread(tree, weights)
        )
        leaves = jax.tree.leaves(found), jax.tree.leaves(new)
        return dict(zip(gradients, leaves[0], strict=True)), dict(zip(held, leaves[1], strict=True))

    def from_host(held: _Leaves, *rest: _Leaves, mine: Collection[int]):
        held |= jax.device_put({at: held[at] for at in mine}, jax.memory.Space.Device)
        found, new = one(held, *rest)
        return found, jax.device_put({at: new[at] for at in mine}, jax.memory.Space.Host)

    def unchanged(held: _Leaves, gradients: _Leaves, _, *, mine: Collection[int]):
        return jax.tree.map(jnp.zeros_like, gradients), {at: held[at] for at in mine}

    before: Any = finite
    for name in dict.fromkeys([_ON_DEVICE, *filter(None, owners)]):
        mine = [at for at, owner in enumerate(owners) if owner == name]
        chosen = [at for at, own in enumerate(names) if own == name]
        given = (
            {at: states[at] for at, owner in enumerate(owners) if owner in (name, _COUNT)},
            {at: gradients[at] for at in chosen},
            {at: weights[at] for at in chosen},
        )
        if name == _ON_DEVICE:
            found, new = one(*given)
            counted = {at: leaf for at, leaf in new.items() if owners[at] == _COUNT}
        else:
            # A branch, whose condition is known once all gradients are there and the update before
            # is done: XLA lets copies from the host overtake a barrier, but not a branch.
            condition, _ = lax.optimization_barrier((finite, before))
            branches = (functools.partial(each, mine=mine) for each in (from_host, unchanged))
            found, new = lax.cond(condition, *branches, *given)
            before = found
        gradients |= found
        states |= {at: new[at] for at in mine}
    return _spread(tree, gradients), _spread(state_tree, states | counted)


def _owner(path: Any, leaf: jax.Array) -> str:
    moment = moment_of(path)
    if moment is not None:
        return moment.parameter
    return _ON_DEVICE if leaf.ndim else _COUNT


def _spread(tree: Any, leaves: _Leaves) -> Any:
    """Return ``tree`` with these ``leaves``. Optax's own mark of what a transformation does not see
    is in place of all others."""
    return tree.unflatten([leaves.get(at, optax.MaskedNode()) for at in range(tree.num_leaves)])
