"""Trace the project's steps over abstract arrays."""

# Shapes: V vocabulary

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config, DecodeConfig
from mtnlg_jax.decode import cache, sampling
from mtnlg_jax.decode.batched_settings import batch_settings
from mtnlg_jax.decode.stages import check_stages
from mtnlg_jax.model.attention import mean_key_blocks
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import shardings_of, whole_dims
from mtnlg_jax.train.batch import abstract_batch, micro_batch_shape
from mtnlg_jax.train.state import abstract_state
from mtnlg_jax.train.step import make_train_step

STEPS = ("train", "prefill", "decode")


def lower(config: Config, mesh: Mesh, step: str) -> jax.stages.Lowered:
    """Lower ``step`` of ``config`` over ``mesh``: "train" is the full batch, "prefill" prompts as
    long as the sequence, one micro-batch a data shard, "decode" the next tokens after them.
    Decoding has no master weights: each data shard holds all weights in compute_dtype, as with
    mesh.zero=0. Raises ValueError if the step does not fit the mesh."""
    return _train(config, mesh) if step == "train" else _decode(config, mesh, step)


def _train(config: Config, mesh: Mesh):
    whole = jax.ShapeDtypeStruct((), jnp.int32)
    causal = any(stage.masked < 1 for stage in config.train.stages)
    step: Any = make_train_step(config, mesh, causal)
    return step.lower(
        abstract_state(config, mesh),
        abstract_batch(config, mesh),
        whole,
        whole,
        jax.ShapeDtypeStruct((), jnp.float32),
    )


def _decode(config: Config, mesh: Mesh, step: str):
    for axis in ("expert", "context"):
        if mesh.shape[axis] > 1:
            raise ValueError(
                f"--step={step} runs over data, tensor and pipe only, not over "
                f"mesh.{axis}={mesh.shape[axis]}; add --set=mesh.{axis}=1 --set=mesh.data=-1"
            )
    model = config.model
    length = config.sequence_length
    rows = (config.train.micro_batch_size or 1) * mesh.shape["data"]
    tensor = mesh.shape["tensor"]
    pipe = mesh.shape["pipe"]
    check_stages(model, pipe)

    def split(tree, *spec):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec[: x.ndim]))
            ),
            tree,
        )

    unstack = functools.partial(
        cache.unstack_params, config=model, dtype=config.train.compute_dtype
    )
    params = jax.eval_shape(unstack, abstract_model(model)[1])
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        shardings_of(params, mesh, zero=0),
    )
    if pipe > 1:
        outer, layers = params
        params = outer, tuple(_stack_of(layer, pipe) for layer in layers[: len(layers) // pipe])
    tokens, lengths = split(
        (jax.ShapeDtypeStruct((rows, length), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)),
        "data",
    )
    if step == "prefill":
        with jax.set_mesh(mesh):  # kernels read the mesh from context
            return cache.prefill_rows.lower(
                params, tokens, lengths, config=model, size=length, rolling=True
            )

    # Windowed layers hold their window alone, as in `generate`.
    prefill = functools.partial(cache.prefill_rows, config=model, size=length, rolling=True)
    with jax.set_mesh(mesh):
        prefix = jax.eval_shape(prefill, params, tokens, lengths)
    allowed_V = np.ones(model.vocabulary, dtype=np.bool_)
    settings = batch_settings([DecodeConfig()] * rows, allowed_V, eos=(0,))
    whole = np.arange(rows, dtype=np.int32)
    state, limits = jax.eval_shape(
        lambda prefix: sampling.begin(
            prefix,
            whole,
            whole,
            whole.astype(np.uint32),
            settings,
        ),
        prefix,
    )
    # Fewer key/value heads than parts are held by every device.
    heads = whole_dims("BKTH", (rows, model.kv_heads, length, model.head_width), tensor)
    held = split(state.cache, "data", "pipe" if heads else ("pipe", "tensor"))
    state = split(state._replace(cache=()), "data")._replace(cache=held)
    with jax.set_mesh(mesh):
        return sampling.advance.lower(
            params,
            state,
            limits,
            settings,
            np.int32(1),
            config=model,
        )


def _stack_of(layer, stages: int):
    """Return a layer's parameters, as they are stacked over the stages of a pipeline."""

    def stack(x):
        spec = P("pipe", *x.sharding.spec)
        sharding = NamedSharding(x.sharding.mesh, spec)
        return jax.ShapeDtypeStruct((stages, *x.shape), x.dtype, sharding=sharding)

    return jax.tree.map(stack, layer)


def dynamic_trips(config: Config, mesh: Mesh, step: str):
    """Return the trips of loops that only know them at run time, as a function of the number of
    loops around them. The outermost loop is the schedule of the full batch; inner ones go over the
    blocks of keys that causal attention visits."""
    pipe = mesh.shape["pipe"]
    flush = config.mesh.flush
    turns = 1  # decoding: one device call
    if step == "train":
        turns = micro_batch_shape(config, mesh)[0]
        if pipe > 1:
            if config.mesh.schedule == "1f1b":
                turns += 2 * (pipe - 1)
            else:
                turns = -(-turns // (flush or turns))
    keys = mean_key_blocks(
        config.sequence_length, config.model.head_width, config.train.compute_dtype
    )
    return lambda depth: turns if depth == 0 else keys
