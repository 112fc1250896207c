"""Memory of an optimizer's moments, on the device and on its host, and the traffic between them."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from mtnlg_jax.config import Config
from mtnlg_jax.config.memory_rules import offloads_moments
from mtnlg_jax.parallel.mesh import dims_of, local_shape, parameter_name
from mtnlg_jax.train import lora
from mtnlg_jax.train.moments import moment_of
from mtnlg_jax.train.optimizer import optimizer_of


class Moments(NamedTuple):
    """Bytes of a device's part."""

    device: int  # held by the device between steps
    host: int  # held by its host
    coming: int  # of the largest parameter on the host, which the device holds in the update


@functools.lru_cache(maxsize=8)
def _abstract(config: Config) -> list[tuple]:
    """Return (path, leaf) of each array of the optimizer's state."""
    trained, _ = lora.trainable(lora.abstract_parameters(config), config)
    state = jax.eval_shape(optimizer_of(config).init, trained)
    return [pair for pair in jax.tree_util.tree_leaves_with_path(state) if pair[1].ndim]


def moments_of(
    config: Config,
    sizes: Mapping[str, int],
    zero: int,
    size: Callable[[tuple[int, ...]], int] = math.prod,
) -> Moments:
    """Return what moments take on a mesh of ``sizes`` (axis -> size); ``size`` counts the numbers
    stored for a shape. Raises ValueError if a dim is not divisible."""
    on_host = offloads_moments(config)
    device = 0
    coming: dict[str, int] = {}
    for path, leaf in _abstract(config):
        local = local_shape(parameter_name(path), dims_of(path), leaf.shape, sizes, zero)
        taken = leaf.dtype.itemsize * size(local)
        moment = moment_of(path)
        if on_host and moment is not None:
            coming[moment.parameter] = coming.get(moment.parameter, 0) + taken
        else:
            device += taken
    return Moments(device, sum(coming.values()), max(coming.values(), default=0))
