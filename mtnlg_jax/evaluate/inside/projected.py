"""Gradients of single examples by the matrices of the blocks, projected to a small size.

For a matrix W (inputs x outputs) with gradient G, the projection is A^T G B^T with fixed random
A (inputs x R) and B (R x outputs): R^2 numbers (Choe 2024, "What is Your Data Worth to GPT?",
LoGra, section 3). It is the gradient by X, at X = 0, of the loss with W + A X B in place of W. That
is a low-rank adapter (`train.lora`), so G itself is never computed.
"""

# Shapes: L layers, R rank, B examples, S positions

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from mtnlg_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from mtnlg_jax.model.params import names_of
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.train import lora
from mtnlg_jax.train.micro_batches import MicroBatches


class Examples(NamedTuple):
    """Token rows whose losses are differentiated, each on its own; padding has weight 0."""

    tokens_BS: np.ndarray  # int32
    labels_BS: np.ndarray  # int32
    weights_BS: np.ndarray  # float32


def examples_of(rows: list[tuple[np.ndarray, np.ndarray]], length: int) -> Examples:
    """Return the rows as arrays of ``length`` positions.

    A row is (ids [n + 1], weights [n] of predicting each id after the first), n up to ``length``.
    """
    found = Examples(
        np.zeros((len(rows), length), np.int32),
        np.zeros((len(rows), length), np.int32),
        np.zeros((len(rows), length), np.float32),
    )
    for number, (ids, weights) in enumerate(rows):
        size = len(ids) - 1
        found.tokens_BS[number, :size] = ids[:-1]
        found.labels_BS[number, :size] = ids[1:]
        found.weights_BS[number, :size] = weights
    return found


def projecting_config(model: ModelConfig, rank: int, seed: int) -> Config:
    """Return the settings of a run whose adapters are the projections: all matrices of the blocks,
    with scale 1.

    Router losses, which are of no single example, are left out. Raises ValueError on a rank above
    the model's width, whose projections would be larger than the matrices.
    """
    if not 1 <= rank <= model.hidden_size:
        raise ValueError(f"--rank={rank} is outside [1, {model.hidden_size}], the model's width")
    blocks = abstract_model(model)[1]["blocks"]
    targets = {lora.target_of(name.rpartition(".")[2]) for name in names_of(blocks)}
    moe = dataclasses.replace(model.moe, moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.0)
    return Config(
        model=dataclasses.replace(model, moe=moe, dropout_rate=0.0),
        optimizer=OptimizerConfig(
            lora_rank=rank,
            lora_alpha=float(rank),
            lora_targets=tuple(sorted(target for target in targets if target)),
        ),
        train=TrainConfig(compute_dtype="float32", seed=seed),
    )


def draw_projections(config: Config) -> dict[str, jax.Array]:
    """Return A and B of every matrix by the names of `train.lora`, stacked over layers.

    Their numbers have variance 1 / R, so that the projection keeps the expected square of a norm.
    """
    key = jax.random.key(config.train.seed)
    rank = config.optimizer.lora_rank

    def one(number, shape):
        drawn = jax.random.normal(
            jax.random.fold_in(key, number), (shape[0], math.prod(shape[1:])), jnp.float32
        )
        return drawn.reshape(shape) / math.sqrt(rank)

    factors = lora.abstract_adapters(config)["blocks"].items()
    return {name: one(number, leaf.shape) for number, (name, leaf) in enumerate(factors)}


def no_insertion(config: Config, projections: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return X = 0 of every matrix, (L, R, R), by the name of its A."""
    rank = config.optimizer.lora_rank
    return {
        name: jnp.zeros((leaf.shape[0], rank, rank), jnp.float32)
        for name, leaf in projections.items()
        if name.startswith("lora_a_")
    }


def example_loss(
    config: Config,
    params: nnx.State,
    projections: Mapping[str, jax.Array],
    inserted: Mapping[str, jax.Array],
    example: Any,
) -> jax.Array:
    """Return the mean loss of one example, in nats a predicted token, with W + A X B in place of
    each W.

    ``inserted`` holds X. ``example`` is (tokens, labels, weights), each (S,).
    """
    tokens_S, labels_S, weights_S = example
    factors = dict(projections)
    for first, x_LRR in inserted.items():
        # lora_a_q_DR belongs to lora_b_q_R...; R of B is summed over, which leaves that of X.
        target = first.split("_")[2]
        second = next(name for name in projections if name.startswith(f"lora_b_{target}_"))
        factors[second] = jax.vmap(lambda x, b: jnp.tensordot(x, b, 1))(x_LRR, projections[second])
    mapping = params.raw_mapping
    blocks = {**mapping["blocks"], "lora": factors}
    batch = {
        "tokens": tokens_S,
        "labels": labels_S,
        "segment_ids": jnp.ones_like(tokens_S),
        "positions": jnp.arange(tokens_S.shape[0]),
        "weights": weights_S,
    }
    batch = {name: array[None, None] for name, array in batch.items()}
    batch["rows"] = jnp.zeros((1, 1), jnp.int32)
    total = jnp.maximum(weights_S.sum(), 1.0)
    # The loss of training: one micro-batch of one row.
    losses = MicroBatches(config, True, batch, total)
    return losses.whole(type(params)({**mapping, "blocks": blocks}), 0)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _gradients(config, params, projections, examples, batch):
    zeros = no_insertion(config, projections)
    one = jax.value_and_grad(functools.partial(example_loss, config, params, projections))
    # Grouped products of experts have no form for several examples at once.
    size = None if config.model.moe.num_moe_experts else batch
    return lax.map(lambda example: one(zeros, example), tuple(examples), batch_size=size)


def project_gradients(
    config: Config,
    params: nnx.State,
    projections: dict[str, jax.Array],
    examples: Examples,
    batch: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Return each example's mean loss [n] and projected gradient [n, blocks, R^2], float32.

    A block of the gradient is a matrix of a layer. ``batch`` examples are computed together.
    """
    count = len(examples.tokens_BS)
    losses, found = _gradients(config, params, projections, examples, min(batch, count))
    rank = config.optimizer.lora_rank
    parts = [np.asarray(found[name]).reshape(count, -1, rank * rank) for name in sorted(found)]
    return np.asarray(losses), np.concatenate(parts, 1)
