"""The forward pass of decoding: embedding, layers, head, over whatever attention a caller gives."""

# Shapes: B rows, S query positions, D width, V vocabulary

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.quantized import RowWeight, by_rows, rows_of
from mtnlg_jax.decode.stages import (
    Flow,
    Layer,
    by_parts,
    cost_of,
    in_flight,
    stages_of,
    stream,
    through,
)
from mtnlg_jax.model.head import Head
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.auto import split


@functools.cache
def graphs(config: ModelConfig):
    """Return the graphdefs of the model without its blocks, and of one block."""
    model = nnx.merge(*abstract_model(config))
    block_graph, _ = nnx.split(model.blocks)
    model.blocks = None
    return nnx.split(model)[0], block_graph


def run_layers(
    config: ModelConfig,
    params,
    tokens_BS,
    positions_BS,
    attend: Callable,
    *,
    shared=None,
    rows=(),
    units: int | None = None,
):
    """Return the input of the head, (B, S, D), and the `Head`, with its table as an array.

    Does the same as ``run`` where nothing is cached: ``attend`` returns the attention alone.
    """

    def attend_only(*args, **options):
        return attend(*args, **options), None

    x_BSD, head, _ = run(
        config,
        params,
        tokens_BS,
        positions_BS,
        attend_only,
        shared=shared,
        rows=rows,
        units=units,
    )
    if isinstance(head.table_VD, RowWeight):
        head = dataclasses.replace(head, table_VD=head.table_VD.array(x_BSD.dtype))
    return x_BSD, head


def run(
    config: ModelConfig,
    params,
    tokens_BS,
    positions_BS,
    attend: Callable,
    *,
    cache=None,
    shared=None,
    rows=(),
    units: int | None = None,
    prefix=None,
):
    """Run the model, over the stages of a pipeline if its layers are split over them.

    Args:
      attend: ``attend(layer, q, k, v, **options)`` returns the attention of a `Layer`, and what it
        holds of the keys and values in the cache. Other arrays it must take from ``layer``.
      cache, shared: for each layer; see `Layer`.
      rows: a pytree of arrays of the rows; see `Flow`.
      units: rows that attend to each other's keys are a unit; B is a multiple. Default B.
      prefix: what stands where tokens are below 0, (B, *config.prefix.shape).

    Returns: the input of the head (B, S, D), the `Head`, whose table may be a RowWeight, and what
    ``attend`` returned for each layer.
    """
    model, layers = _model(config, params)
    tokens_BS = split(tokens_BS, "BS")
    x_BSD, written = through(
        _stage(config, attend),
        layers,
        Flow(_embed(config, model, layers, tokens_BS, positions_BS, prefix), positions_BS, rows),
        cache,
        shared,
        stages=stages_of(config, layers),
        units=units or tokens_BS.shape[0],
    )
    return model.normed(x_BSD), model.head(), written


def flying(config: ModelConfig, params, cache, rows: int) -> int:
    """Return the micro-batches with which ``rows`` should write by `write_in_flight`, or 0."""
    layers = params[1]
    return in_flight(rows, stages_of(config, layers), cost_of(layers, rows, cache))


def write_in_flight(
    config: ModelConfig,
    params,
    cache,
    state,
    fixed,
    *,
    attend: Callable,
    newest: Callable,
    append: Callable,
    steps: int,
    count: int,
):
    """Write ``steps`` tokens of every row over the stages of a pipeline.

    Args:
      state, fixed: pytrees of arrays of the rows; a step changes ``state`` alone.
      attend: as for `run`, with the positions (B,) as ``layer.rows``.
      newest: state -> (tokens (B,), positions (B,)) to read.
      append: (float32 logits (B, V), state, fixed) -> state with the next tokens.
      count: the number of micro-batches, from `flying`.

    Returns: the cache and the state.
    """
    model, layers = _model(config, params)

    def enter(state):
        tokens_B, positions_B = newest(state)
        return _embed(config, model, layers, tokens_B[:, None], positions_B[:, None])

    def leave(x_BSD, state, fixed):
        return append(logits_of(model.normed(x_BSD)[:, 0], model.head()), state, fixed)

    def flow_of(state):
        positions_B = newest(state)[1]
        return positions_B[:, None], positions_B

    return stream(
        _stage(config, attend),
        layers,
        cache,
        state,
        fixed,
        enter=enter,
        leave=leave,
        flow_of=flow_of,
        steps=steps,
        count=count,
        stages=stages_of(config, layers),
        units=jax.tree.leaves(state)[0].shape[0],
    )


def _model(config: ModelConfig, params):
    """Return the model without its blocks, and the parameters of the blocks."""
    outer, layers = params
    return nnx.merge(graphs(config)[0], outer), layers


def _stage(config: ModelConfig, attend: Callable) -> Callable:
    """Return the function that applies the layers of a stage; see `through`."""
    block_graph = graphs(config)[1]

    def apply(layers, flow: Flow, cache, shared, live):
        x_BSD = split(flow.x_BSD, "BQD")
        written = []

        def attend_layer(number, *qkv, **options):
            held, read = (None if each is None else each[number] for each in (cache, shared))
            layer = Layer(number, held, read, flow.rows, live)
            if live is None:
                found, new = attend(layer, *qkv, **options)
            else:
                found, new = by_parts(attend, layer, *qkv, **options)
            written.append(new)
            return found

        for number, params in enumerate(layers):
            x_BSD = nnx.merge(block_graph, params)(
                x_BSD,
                flow.positions_BS,
                functools.partial(attend_layer, number),
                spec=config.layer(number),
            )
            x_BSD = split(x_BSD, "BQD")
        return x_BSD, tuple(written)

    return apply


def _embed(config: ModelConfig, model, layers, tokens_BS, positions_BS, prefix=None):
    """Do the same as ``model.embed``, also from a quantized table."""
    table = model.tokens_VD[...]
    if not isinstance(table, RowWeight):
        return split(model.embed(tokens_BS, positions_BS, prefix), "BQD")
    dtype = nnx.merge(graphs(config)[1], layers[0]).norm_1.scale_D[...].dtype
    if prefix is None:
        x_BSD = table.rows(tokens_BS, dtype)
    else:
        x_BSD = table.rows(jnp.maximum(tokens_BS, 0), dtype)
        x_BSD = model.put_prefix(x_BSD, tokens_BS, prefix)
    return split(model.place(x_BSD, positions_BS), "BQD")


def logits_of(x, head: Head):
    """Return float32 logits (..., V) of the head's input ``x`` (..., D)."""
    table: Any = head.table_VD
    if not isinstance(table, RowWeight):
        if not by_rows():
            return head.logits(x)
        table = rows_of(table, 1, False, table.dtype, outputs_first=True)
    return head.finish(table.float32(x))
