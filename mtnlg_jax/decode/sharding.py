"""Split a decoder's parameters over a mesh: the plan of training, without ZeRO.

Heads, MLP width and vocabulary are split over ``tensor``; rows and caches follow in the programs.
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

from mtnlg_jax.decode.quantized import ExpertWeight, RowWeight
from mtnlg_jax.model.params import name_of, names_of
from mtnlg_jax.parallel.auto import spread
from mtnlg_jax.parallel.mesh import local_shape, spec_of, whole_dims

Held = Any  # an array, a RowWeight or an ExpertWeight


class Placement:
    """Where the parameters of a model lie on ``mesh``.

    Raises ValueError on an axis that decoding does not use, and naming the first parameter with a
    dim that the mesh does not divide.
    """

    def __init__(self, abstract: tuple[Any, Any], mesh: Mesh) -> None:
        for axis in ("pipe", "expert", "context"):
            if mesh.shape[axis] > 1:
                raise ValueError(
                    f"mesh.{axis}={mesh.shape[axis]}, but decoding is split over data and tensor; "
                    f"set mesh.{axis}=1 and raise mesh.tensor, which splits every layer"
                )
        self.mesh = mesh
        self._specs: dict[str, P] = {}
        for part in abstract:
            for name, leaf in names_of(part).items():
                self._specs[name] = self._spec(name, leaf.shape)

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
        spec = self._specs[name]

        def place(*axes):
            return NamedSharding(self.mesh, P(*axes))

        if isinstance(held, RowWeight):
            dims = name.rsplit("_", 1)[1]
            # Outputs and inputs are flattened, and the first dim of either may be split: heads.
            first = {"VD": (0, 1)}.get(dims, (held.inputs, 0))
            outputs, inputs = (spec[at] for at in first)
            scale = None if held.scale_O is None else place(outputs)
            return dataclasses.replace(held, number_OI=place(outputs, inputs), scale_O=scale)
        if isinstance(held, ExpertWeight):
            return ExpertWeight(place(*spec), place(spec[0], spec[2]))
        return place(*spec)

    def abstract(self, tree: Any) -> Any:
        """Return a part of a decoder's parameters as ShapeDtypeStructs with their shardings."""

        def one(path, held):
            def struct(x, sharding):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

            return jax.tree.map(struct, held, self.shardings(name_of(path), held))

        return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_held)

    def put(self, name: str, held: Held) -> Held:
        """Return parameter ``name``, held in arrays of the host, on the devices of the mesh."""
        return jax.tree.map(
            lambda x, sharding: spread(np.asarray(x), sharding), held, self.shardings(name, held)
        )

    def move(self, tree: Any) -> Any:
        """Return a part of a decoder's parameters, which are on one device, on the mesh."""

        def one(path, held):
            return jax.device_put(held, self.shardings(name_of(path), held))

        return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_held)


def _is_held(x: Any) -> bool:
    return isinstance(x, RowWeight | ExpertWeight)
