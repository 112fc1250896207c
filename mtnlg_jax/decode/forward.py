"""The forward pass of decoding: embedding, layers, head, over whatever attention a caller gives."""

# Shapes: B rows, S query positions, D width, V vocabulary

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.quantized import RowWeight, by_rows, rows_of
from mtnlg_jax.decode.stages import Flow, Layer, by_parts, stages_of, through
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
    config: ModelConfig, params, tokens_BS, positions_BS, attend: Callable, *, shared=None, rows=()
):
    """Return the input of the head, (B, S, D), and the `Head`, with its table as an array.

    Does the same as ``run`` where nothing is cached: ``attend`` returns the attention alone.
    """

    def attend_only(*args, **options):
        return attend(*args, **options), None

    x_BSD, head, _ = run(
        config, params, tokens_BS, positions_BS, attend_only, shared=shared, rows=rows
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
):
    """Run the model, over the stages of a pipeline if its layers are split over them.

    Args:
      attend: ``attend(layer, q, k, v, **options)`` returns the attention of a `Layer`, and what it
        holds of the keys and values in the cache. Other arrays it must take from ``layer``.
      cache, shared: for each layer; see `Layer`.
      rows: a pytree of arrays of the rows; see `Flow`.
      units: rows that attend to each other's keys are a unit; B is a multiple. Default B.

    Returns: the input of the head (B, S, D), the `Head`, whose table may be a RowWeight, and what
    ``attend`` returned for each layer.
    """
    outer_graph, block_graph = graphs(config)
    outer, layers = params
    model = nnx.merge(outer_graph, outer)
    dtype = nnx.merge(block_graph, layers[0]).norm_1.scale_D[...].dtype
    tokens_BS = split(tokens_BS, "BS")
    x_BSD = split(_embed(model, tokens_BS, positions_BS, dtype), "BQD")

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

    x_BSD, written = through(
        apply,
        layers,
        Flow(x_BSD, positions_BS, rows),
        cache,
        shared,
        stages=stages_of(config, layers),
        units=units or tokens_BS.shape[0],
    )
    return model.normed(x_BSD), model.head(), written


def _embed(model, tokens_BS, positions_BS, dtype):
    """Do the same as ``model.embed``, also from a quantized table."""
    table = model.tokens_VD[...]
    if not isinstance(table, RowWeight):
        return model.embed(tokens_BS, positions_BS)
    return model.place(table.rows(tokens_BS, dtype), positions_BS)


def logits_of(x, head: Head):
    """Return float32 logits (..., V) of the head's input ``x`` (..., D)."""
    table: Any = head.table_VD
    if not isinstance(table, RowWeight):
        if not by_rows():
            return head.logits(x)
        table = rows_of(table, 1, False, table.dtype, outputs_first=True)
    return head.finish(table.float32(x))
