"""Name the tensor whose part of the plan is wrong."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config
from mtnlg_jax.model.params import name_of
from mtnlg_jax.parallel.mesh import AXIS_OF, axes_in, dims_of, specs_of, whole_dims
from mtnlg_jax.train import lora


def odd_specs(config: Config) -> dict[str, str]:
    """Return {tensor: what is odd} of tensors whose specs on the mesh of ``config`` are not those
    of the plan's table, or split a dim unlike the other tensors with it; {} in a sound plan."""
    mesh = config.mesh
    tree = lora.abstract_parameters(config)
    specs = jax.tree.leaves(
        specs_of(tree, mesh.zero, mesh.tensor), is_leaf=lambda each: isinstance(each, P)
    )
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found: dict[str, str] = {}
    uses: dict[tuple[str, bool], list[tuple[str, tuple[str, ...]]]] = {}
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        dims = dims_of(path)
        whole = whole_dims(dims, leaf.shape, mesh.tensor)
        entries = [*spec, *[None] * (len(dims) - len(spec))]
        for dim, entry in zip(dims, entries, strict=True):
            axes = axes_in(entry)
            beyond = set(axes) - set(axes_in(AXIS_OF.get(dim)))
            if beyond:
                found[name_of(path)] = f"its dim {dim} is split over {' x '.join(sorted(beyond))}"
            of_experts = "E" in dims[:-1]
            # Experts are not split where they are the outputs of a router.
            if dim not in whole and not (dim == "E" and not of_experts):
                uses.setdefault((dim, of_experts), []).append((name_of(path), axes))
    for (dim, _), tensors in uses.items():
        usual = Counter(axes for _, axes in tensors).most_common(1)[0][0]
        for name, axes in tensors:
            if axes != usual and name not in found:
                split = f"split over {' x '.join(axes)}" if axes else "not split"
                found[name] = f"its dim {dim} is {split}, unlike that of the other tensors"
    return found


def suspects(params: Any, agrees: Callable[[Any, str], bool]) -> list[str]:
    """Return the tensors without which a mesh computes what one device computes, where it does not
    with them.

    Each in turn becomes a constant, the mean of its numbers: then it is the same however it is
    split. ``agrees`` tells, for such parameters and the name of that tensor, whether the loss and
    all other gradients agree.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = name_of(path)
        if not np.issubdtype(leaf.dtype, np.floating):
            continue

        def leveled(other: Any, each: np.ndarray, name: str = name) -> np.ndarray:
            return np.full_like(each, each.mean()) if name_of(other) == name else each

        if agrees(jax.tree_util.tree_map_with_path(leveled, params), name):
            found.append(name)
    return found
