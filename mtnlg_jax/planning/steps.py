"""Trace the project's steps over abstract arrays."""

# Shapes: V vocabulary

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtnlg_jax.config import Config, DecodeConfig
from mtnlg_jax.decode import cache, sampling
from mtnlg_jax.decode.batched_settings import batch_settings
from mtnlg_jax.decode.memory import abstract_decoder
from mtnlg_jax.model.attention import mean_key_blocks
from mtnlg_jax.parallel.auto import placed
from mtnlg_jax.parallel.mesh import row_shards
from mtnlg_jax.train.batch import abstract_batch, micro_batch_shape
from mtnlg_jax.train.state import abstract_state
from mtnlg_jax.train.step import make_train_step

STEPS = ("train", "prefill", "decode")


def lower(
    config: Config,
    mesh: Mesh,
    step: str,
    weights: str | None = None,
    cache: str | None = None,
) -> jax.stages.Lowered:
    """Lower ``step`` of ``config`` over ``mesh``: "train" is the full batch, "prefill" prompts as
    long as the sequence, one micro-batch a data shard, "decode" the next tokens after them.
    Decoding has no master weights: each data shard holds all weights in compute_dtype, or as
    ``weights`` and ``cache`` of `unstack` say. Raises ValueError if the step does not fit the
    mesh."""
    if step == "train":
        return lower_train(config, mesh, is_causal(config))
    return _decode(config, mesh, step, weights, cache)


def is_causal(config: Config) -> bool:
    """Return whether the train step that is compiled is that of the causal objective."""
    return any(stage.masked < 1 for stage in config.train.stages)


def lower_train(config: Config, mesh: Mesh, causal: bool) -> jax.stages.Lowered:
    """Lower the train step of the full batch, of the causal or of the masked objective."""
    whole = jax.ShapeDtypeStruct((), jnp.int32)
    step: Any = make_train_step(config, mesh, causal)
    noise = [jax.ShapeDtypeStruct((2,), jnp.uint32)] if config.optimizer.private else []
    return step.lower(
        abstract_state(config, mesh),
        abstract_batch(config, mesh),
        whole,
        whole,
        jax.ShapeDtypeStruct((), jnp.float32),
        *noise,
    )


def _decode(config: Config, mesh: Mesh, step: str, weights: str | None, int8_cache: str | None):
    """Lower a program of `decode.generate`, over the shardings that decoding gives its arguments.

    What the host sends, such as prompts, has none.
    """
    model = config.model
    length = config.sequence_length
    rows = (config.train.micro_batch_size or 1) * row_shards(mesh.shape)
    decoder = abstract_decoder(
        model, config.train.compute_dtype, weights=weights, cache=int8_cache, mesh=mesh
    )
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    # Windowed layers hold their window alone, as in `generate`.
    options: dict[str, Any] = {"config": model, "size": length, "rolling": True}
    with jax.set_mesh(mesh):  # programs and kernels read the mesh from context
        if step == "prefill":
            return cache.prefill_rows.lower(decoder.params, tokens, lengths, **options)
        prefill = functools.partial(cache.prefill_rows, **options)
        prefix = jax.eval_shape(prefill, decoder.params, tokens, lengths)
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
                int8_cache=decoder.int8_cache,
                rolling=model,
            ),
            prefix,
        )
        state = sampling.split_state(state, placed(mesh))
        return sampling.advance.lower(
            decoder.params, state, limits, settings, np.int32(1), config=model
        )


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
