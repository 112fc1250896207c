"""A model's parameters, in two parts."""

from typing import Any, NamedTuple

import jax
from flax import nnx


class Params(NamedTuple):
    """A model's parameters in two parts: pipelines and ZeRO-3 treat the layers separately."""

    rest: nnx.State  # embeddings, final norm and head
    blocks: nnx.State  # the layers, stacked: L is the first dim of every leaf


def split_params(params: nnx.State) -> Params:
    """Split a model's parameters; `join_params` undoes it."""
    rest = {name: part for name, part in params.raw_mapping.items() if name != "blocks"}
    return Params(type(params)(rest), params["blocks"])


def join_params(params: Params) -> nnx.State:
    """Join what `split_params` has split."""
    whole = {**params.rest.raw_mapping, "blocks": params.blocks.raw_mapping}
    return type(params.rest)(whole)


def name_of(path: tuple) -> str:
    """Return the dotted name of the leaf at ``path``, such as blocks.mlp.w_in_DF.

    A variable of Flax NNX adds ".value" to the path of its array, or of the arrays in its place;
    names have none.
    """
    parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    return ".".join(part for part in parts if part != "value")


def names_of(tree: Any) -> dict[str, Any]:
    """Return the leaves of ``tree`` by `name_of`."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
