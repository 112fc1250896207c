"""A decoder of the parameters of a run that trains, made on its devices.

Nothing goes through the host: one program merges adapters, dequantizes a base, gathers what ZeRO
has split and splits the result by the plan of decoding. What a device holds of it is what decoding
on the same devices needs, in the type of the run's products.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from mtnlg_jax.config import Config, ModelConfig
from mtnlg_jax.decode.cache import Decoder, split_abstract, unstack_params
from mtnlg_jax.decode.quantized import by_rows
from mtnlg_jax.decode.sharding import Placement
from mtnlg_jax.model.params import Params, join_params, split_params
from mtnlg_jax.parallel.mesh import AXES
from mtnlg_jax.train import lora


class FromTraining:
    """Make decoders of the parameters of the run ``config`` on ``mesh``.

    Every call uses the same compiled program. All processes of the run call it together.

    Raises ValueError if the model cannot be decoded on these devices.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self._config = config
        self.mesh = decoding_mesh(config, mesh)
        abstract = jax.eval_shape(self._make, lora.abstract_parameters(config))
        shardings: Any = SingleDeviceSharding(mesh.devices.flat[0])
        if mesh.size > 1:
            placement = Placement(config.model, split_abstract(config.model), self.mesh)
            outer, layers = abstract
            placed = placement.abstract(outer), tuple(map(placement.abstract, layers))
            shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
        self._program = jax.jit(self._make, out_shardings=shardings)

    @property
    def hollow(self) -> Decoder:
        """The decoder without its parameters."""
        mesh = None if self.mesh.size == 1 else self.mesh
        return Decoder(self._config.model, (), False, mesh)

    def __call__(self, params: nnx.State) -> Decoder:
        """Return the decoder of ``state.params`` of the run, which stay as they are."""
        return self.hollow._replace(params=self._program(params))

    def _make(self, params: nnx.State) -> tuple:
        config = self._config.model
        options = {"dtype": self._config.train.compute_dtype, "rows": by_rows()}
        merged = lora.merge(params, self._config)
        stages = self.mesh.shape["pipe"]
        if stages == 1:
            return unstack_params(merged, config=config, **options)
        # Stage by stage, so that no layer leaves its devices: the result has the stacks of
        # `decode.stages`, in which a leading P takes the place of L.
        rest, blocks = split_params(merged)
        here = config.num_layers // stages
        blocks = jax.tree.map(lambda x: x.reshape(stages, here, *x.shape[1:]), blocks)
        stage = dataclasses.replace(config, num_layers=here)

        def one(blocks: nnx.State) -> tuple:
            return unstack_params(join_params(Params(rest, blocks)), config=stage, **options)

        return jax.vmap(one, out_axes=(None, 0))(blocks)


def decoding_mesh(config: Config, mesh: Mesh) -> Mesh:
    """Return the devices of a run's ``mesh``, in their order, with axes over which its model can be
    decoded.

    Where decoding does not split over an axis beside ``pipe``, the axis joins data. With ZeRO-3 a
    device may not hold a model that is whole along data, so data joins tensor if the model's heads
    and widths allow it.
    """
    sizes = dict(mesh.shape)
    beside = [axis for axis in AXES if axis != "pipe" and sizes[axis] > 1]
    if sizes["pipe"] > 1 and config.model.moe.num_moe_experts and beside:
        sizes |= {"pipe": 1, "data": sizes["data"] * sizes["pipe"]}
    elif sizes["pipe"] > 1 and sizes["context"] > 1:
        # Devices along an axis of size 1 between them keep their order.
        sizes |= {"context": 1, "data": sizes["data"] * sizes["context"]}
    found = _reshaped(mesh, sizes)
    if config.mesh.zero < 3 or sizes["expert"] * sizes["context"] > 1 or sizes["data"] == 1:
        return found
    sizes |= {"data": 1, "tensor": sizes["data"] * sizes["tensor"]}
    return _reshaped(mesh, sizes) if _fits(config.model, _reshaped(mesh, sizes)) else found


def _reshaped(mesh: Mesh, sizes: dict[str, int]) -> Mesh:
    shape = tuple(sizes[axis] for axis in AXES)
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=mesh.axis_types)


def _fits(config: ModelConfig, mesh: Mesh) -> bool:
    try:
        Placement(config, split_abstract(config), mesh)
    except ValueError:
        return False
    return True
