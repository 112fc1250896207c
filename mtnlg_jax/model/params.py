"""A model's parameters, in two parts."""

from typing import NamedTuple

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
