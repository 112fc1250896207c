"""Split a decoder's parameters over a mesh: the plan of training, without ZeRO.

Heads, MLP width and vocabulary are split over ``tensor``, experts over ``expert``, and layers, as
stages.py stacks them, over ``pipe``; rows and caches follow in the programs.
A vocabulary that ``tensor`` does not divide is not padded, since the padding would change what a
seed draws: the table is split along D instead.
"""

# Shapes: O outputs, I inputs, E experts, V vocabulary, D width

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.quantized import ExpertWeight, RowWeight
from mtnlg_jax.decode.stages import check_stages
from mtnlg_jax.model.params import name_of, names_of
from mtnlg_jax.parallel.auto import spread
from mtnlg_jax.parallel.mesh import local_shape, spec_of, whole_dims

Held = Any  # an array, a RowWeight or an ExpertWeight


class Placement:
    """Where the parameters of a model lie on ``mesh``.

    Raises ValueError on axes that do not go together, on stages that would differ, on ``expert``
    for a model without experts, and naming the first parameter with a dim that the mesh does not
    divide.
    """

    def __init__(self, config: ModelConfig, abstract: tuple[Any, Any], mesh: Mesh) -> None:
        for axis in ("expert", "context"):
            if mesh.shape["pipe"] > 1 and mesh.shape[axis] > 1:
                raise ValueError(
                    f"mesh.pipe={mesh.shape['pipe']} and mesh.{axis}={mesh.shape[axis]}: decoding "
                    f"splits layers over stages or over {axis}, not both; set one of them to 1 "
                    "and raise mesh.tensor"
                )
        others = [axis for axis in ("data", "tensor") if mesh.shape[axis] > 1]
        if mesh.shape["pipe"] > 1 and config.moe.num_moe_experts and others:
            raise ValueError(
                f"mesh.pipe={mesh.shape['pipe']} and mesh.{others[0]}={mesh.shape[others[0]]}: a "
                "model with experts decodes over stages alone; set mesh.pipe=1 and raise "
                "mesh.expert or mesh.tensor"
            )
        self.mesh = mesh
        self.stages = mesh.shape["pipe"]
        self._layers = config.num_layers
        check_stages(config, self.stages)
        self._specs: dict[str, P] = {}
        # Blocks are stacked over stages.
        self._stacked = set(names_of(abstract[1])) if self.stages > 1 else set()
        for part in abstract:
            for name, leaf in names_of(part).items():
                self._specs[name] = self._spec(name, leaf.shape)
        if mesh.shape["expert"] > 1 and not any("expert" in each for each in self._specs.values()):
            raise ValueError(
                f"mesh.expert={mesh.shape['expert']} splits experts, and this model has none "
                "(model.moe.num_moe_experts=0); set mesh.expert=1 and raise mesh.data"
            )

    def _spec(self, name: str, shape: tuple[int, ...]) -> P:
        last = name.rpartition(".")[2]
        dims = last.rsplit("_", 1)[1]
        tensor = self.mesh.shape["tensor"]
        if "V" in dims and shape[dims.index("V")] % tensor:
            return P(
                *(
                    "tensor" if dim == "D" and size % tensor == 0 else None
                    for dim, size in zip(dims, shape, strict=True)
                )
            )
        local_shape(last, dims, shape, self.mesh.shape, zero=0)  # raises where it does not divide
        return spec_of(dims, 0, whole_dims(dims, shape, tensor))

    def shardings(self, name: str, held: Held) -> Held:
        """Return the sharding of parameter ``name``, or those of the arrays of its `Held` form."""
        return self._on(self.mesh, name, held)

    def _on(self, mesh: Mesh, name: str, held: Held) -> Held:
        spec = self._specs[name]
        stack = ("pipe",) if name in self._stacked else ()

        def place(*axes):
            return NamedSharding(mesh, P(*stack, *axes))

        if isinstance(held, RowWeight):
            dims = name.rsplit("_", 1)[1]
            # Outputs and inputs are flattened, and the first dim of either may be split: heads.
            first = {"VD": (0, 1)}.get(dims, (held.inputs, 0))
            outputs, inputs = (spec[at] for at in first)
            scale = None if held.scale_O is None else place(outputs)
            return dataclasses.replace(held, number_OI=place(outputs, inputs), scale_O=scale)
        if isinstance(held, ExpertWeight):
            return jax.tree.map(lambda each: place(*each), ExpertWeight.specs(spec))
        return place(*spec)

    def abstract(self, tree: Any) -> Any:
        """Return a part of a decoder's parameters as ShapeDtypeStructs with their shardings."""

        def one(path, held):
            def struct(x, sharding):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

            return jax.tree.map(struct, held, self.shardings(name_of(path), held))

        return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_held)

    def put(self, name: str, held: Held, layer: int | None = None) -> Held:
        """Return parameter ``name``, held in arrays of the host, on the devices of the mesh.

        With stages, ``layer`` is put on those of its stage, for `join`.
        """
        mesh = self.mesh
        if name in self._stacked:
            assert layer is not None, "each layer of a block is put by itself"
            mesh = self._mesh_of(layer)
            held = jax.tree.map(lambda x: np.asarray(x)[None], held)
        shardings = self._on(mesh, name, held)
        return jax.tree.map(lambda x, sharding: spread(np.asarray(x), sharding), held, shardings)

    def _mesh_of(self, layer: int) -> Mesh:
        """Return the devices of the stage that holds ``layer``."""
        stage = layer * self.stages // self._layers
        axis = self.mesh.axis_names.index("pipe")
        devices = np.take(self.mesh.devices, [stage], axis)
        return Mesh(devices, self.mesh.axis_names, axis_types=self.mesh.axis_types)

    def holds(self, layer: int) -> bool:
        """Return whether a device of this process holds ``layer``."""
        here = jax.process_index()
        return any(each.process_index == here for each in self._mesh_of(layer).devices.flat)

    def join(self, name: str, layers: dict[int, Held]) -> list[Held]:
        """Return the stacks of parameter ``name``, given its layers that this process `holds`.

        Nothing is copied: each device's part becomes its part of a stack.
        """
        here = self._layers // self.stages

        def one(sharding, *parts):
            arrays = [shard.data for part in parts for shard in part.addressable_shards]
            shape = (self.stages, *parts[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

        stacks = []
        for number in range(here):
            parts = [layers[each] for each in sorted(layers) if each % here == number]
            stacks.append(jax.tree.map(one, self.shardings(name, parts[0]), *parts))
        return stacks

    def move(self, tree: Any) -> Any:
        """Return a part of a decoder's parameters, which are on one device, on the mesh."""

        def one(path, held):
            return jax.device_put(held, self.shardings(name_of(path), held))

        return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_held)


def _is_held(x: Any) -> bool:
    return isinstance(x, RowWeight | ExpertWeight)
