"""The loss of one micro-batch, whole or in the three parts between which a pipeline fits."""

# Shapes: G micro-batches, B rows (in x_BD: all tokens), S query positions, D width

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mtnlg_jax.config import Config
from mtnlg_jax.config.memory_rules import offloads_activations
from mtnlg_jax.model.context_attention import context_attention
from mtnlg_jax.model.hooks import Hooks
from mtnlg_jax.model.loss import (
    cross_entropy,
    cross_entropy_by_group,
    distilled_cross_entropy,
    token_log_probs,
)
from mtnlg_jax.model.params import Params, join_params, split_params
from mtnlg_jax.model.transformer import Transformer, abstract_model
from mtnlg_jax.parallel.collectives import sum_over
from mtnlg_jax.parallel.pipeline import BUBBLE
from mtnlg_jax.train.distill import Teacher
from mtnlg_jax.train.weights import make_weights


class MicroBatches:
    """The micro-batches of this device in the manual region; methods select one by its number.

    Losses are this device's share of the mean over the whole batch. Devices along ``tensor``
    compute the same number, but each one's gradient is only its own part, so the parts add up.
    """

    def __init__(
        self,
        config: Config,
        causal: bool,
        batch: dict[str, jax.Array],
        total: float | jax.Array,
        key: jax.Array | None = None,
        teacher: Teacher | None = None,
        counting: bool = False,
        sparse: bool = False,
        sources: int = 0,
    ):
        """``total`` is the weight of the whole batch; without ``key`` there is no dropout.
        ``counting``: the loads of experts are the gradients of their biases. ``sparse``: as in
        `cross_entropy`. ``sources``: above 0 a loss is a pair, of which the second part is
        that of each source (`cross_entropy_by_group`), by the numbers in batch["source"]."""
        self.config = config
        self.causal = causal
        self.batch = batch
        self.total = total
        self.key = key if config.model.dropout_rate else None
        self.teacher = teacher
        self.counting = counting
        self.sparse = sparse
        self.sources = sources
        self.weights = make_weights(config)
        # Only the structure of the module is needed here: its parameters are an argument of each
        # method, so that they can be differentiated.
        graph, shapes = abstract_model(config.model)
        self._graph = graph
        self._block_shapes = split_params(shapes).blocks

    def __len__(self) -> int:
        return self.batch["tokens"].shape[0]

    def whole(self, params: nnx.State, number: int | jax.Array) -> jax.Array:
        """Return the loss of micro-batch ``number`` through all layers."""
        # The same three parts as with a pipeline, so that both ways compute the same loss.
        rest, blocks = split_params(params)
        x_BSD = self.embed(rest, jnp.asarray(number)[None])[0]
        x_BSD = self.layers(rest, blocks, 0, number, x_BSD)
        return self.loss(rest, number, x_BSD)

    def embed(self, rest: nnx.State, numbers: jax.Array) -> jax.Array:
        """Return the inputs of the first layer for micro-batches ``numbers`` (G,), (G, B, S, D)."""
        tokens = self.batch["tokens"][numbers]
        positions = self.batch["positions"][numbers]
        rows = self.batch["rows"][numbers]
        prefix = self.batch["prefix"][numbers] if "prefix" in self.batch else None
        # The rows of all G are embedded at once.
        x_BSD = self._model(rest).start(
            tokens.reshape(-1, tokens.shape[-1]),
            positions.reshape(-1, tokens.shape[-1]),
            self._hooks(rows.reshape(-1)),
            None if prefix is None else prefix.reshape(-1, *prefix.shape[2:]),
        )
        # S may be shorter than that of the tokens: between half blocks it is split over tensor.
        return x_BSD.reshape(*tokens.shape[:2], *x_BSD.shape[1:])

    def layers(
        self,
        rest: nnx.State,
        layers: nnx.State,
        first: int | jax.Array,
        number: int | jax.Array,
        x_BSD: jax.Array,
    ) -> jax.Array:
        """Apply ``layers``, the model's from number ``first`` on, to the input ``x_BSD``."""
        return self.watch_layers(rest, layers, first, number, x_BSD)[0]

    def watch_layers(
        self,
        rest: nnx.State,
        layers: nnx.State,
        first: int | jax.Array,
        number: int | jax.Array,
        x_BSD: jax.Array,
        watch_rows: Callable[[jax.Array], Callable] | None = None,
    ) -> tuple[jax.Array, Any]:
        """Do the same as `layers`, and return also the figures of ``watch_rows``(row numbers), a
        `Hooks.watch`."""
        micro = self._select(number)
        hooks = self._hooks(
            micro["rows"],
            self._penalty(number, micro["weights"]),
            self._counted(number, micro["weights"]),
        )
        if watch_rows is not None:
            hooks = hooks._replace(watch=watch_rows(micro["rows"]))
        return self._model(rest).watch_layers(
            layers,
            first,
            x_BSD,
            micro["positions"],
            micro["segment_ids"],
            causal=self.causal,
            hooks=hooks,
        )

    def loss(self, rest: nnx.State, number: int | jax.Array, x_BSD: jax.Array) -> jax.Array:
        """Return the loss, given the output of the last layer."""
        model = self._model(rest)
        micro = self._select(number)
        train = self.config.train
        # From here on S is whole along tensor again, because the loss splits the vocabulary
        # instead.
        x_BSD = model.finish(x_BSD)
        x_BD = x_BSD.reshape(-1, x_BSD.shape[-1])
        labels = micro["labels"].reshape(-1)
        weights = micro["weights"].reshape(-1)
        chunk = train.loss_chunk
        smoothing = train.label_smoothing
        if self.sources:
            groups = micro["source"].reshape(-1)
            tokens = (x_BD, model.head(), labels, weights, groups)
            pair = cross_entropy_by_group(*tokens, self.sources, chunk, self.sparse)
            return jax.tree.map(lambda nats: nats / self.total, pair)
        if self.teacher is None:
            # Head and loss in one call, which never holds the logits of all tokens.
            nats = cross_entropy(
                x_BD,
                model.head(),
                labels,
                weights,
                chunk,
                smoothing,
                self.sparse,
                train.z_loss_coeff,
            )
        else:
            nats = distilled_cross_entropy(
                x_BD,
                model.head(),
                *self.teacher.hidden(micro),
                labels,
                weights,
                chunk,
                smoothing,
                self.teacher.temperature,
                self.teacher.weight,
                train.z_loss_coeff,
            )
        # Divided by the weight of the whole batch and not of the micro-batch, so that every token
        # counts the same however they are spread, and shares add up to the mean.
        return nats / self.total

    def token_losses(self, rest: nnx.State, number: int | jax.Array, x_BSD: jax.Array) -> jax.Array:
        """Return -log p(label) of every token of weight above 0, float32 (B, S), given the output
        of the last layer; others have any number. Neither smoothing nor a teacher is in it."""
        model = self._model(rest)
        micro = self._select(number)
        x_BSD = model.finish(x_BSD)
        log_probs = token_log_probs(
            x_BSD.reshape(-1, x_BSD.shape[-1]),
            model.head(),
            micro["labels"].reshape(-1),
            self.config.train.loss_chunk,
        )
        return -log_probs.reshape(micro["labels"].shape)

    def _select(self, number: int | jax.Array) -> dict[str, jax.Array]:
        return {
            # The number may be a loop variable or, in a pipeline, depend on the stage.
            name: lax.dynamic_index_in_dim(x, number, 0, keepdims=False)
            for name, x in self.batch.items()
        }

    def _model(self, rest: nnx.State) -> Transformer:
        """Return the module over compute weights.

        Its own blocks are shapes: `layers` is given those that this device applies.
        """
        # With ZeRO-3 this gathers embeddings and head at every use and keeps none of them.
        params = Params(self.weights.of_rest(rest), self._block_shapes)
        return nnx.merge(self._graph, join_params(params))

    def _penalty(self, number: int | jax.Array, weights_BS: jax.Array) -> jax.Array | None:
        """Return the share of each row in the mean loss, or None if routers have no losses."""
        moe = self.config.model.moe
        if not moe.num_moe_experts or not (moe.moe_aux_loss_coeff or moe.moe_z_loss_coeff):
            return None
        # Weighted like the loss itself, so that accumulation and meshes change nothing. A waiting
        # stage computes layers too, and its gradient would not be 0.
        share_B = sum_over(weights_BS.sum(-1), "context") / self.total
        return jnp.where(number < BUBBLE, share_B, 0.0)

    def _counted(self, number: int | jax.Array, weights_BS: jax.Array) -> jax.Array | None:
        """Return 1 for each row with a predicted token and 0 for the others, which fill up the
        batch; None if loads are not counted."""
        if not self.counting:
            return None
        used_B = sum_over(weights_BS.sum(-1), "context") > 0
        return jnp.where((number < BUBBLE) & used_B, 1.0, 0.0)

    def _hooks(
        self,
        rows_B: jax.Array,
        penalty_B: jax.Array | None = None,
        counted_B: jax.Array | None = None,
    ) -> Hooks:
        return Hooks(
            prepare=self.weights.of_layer,
            recompute=self.config.train.recompute,
            offload=offloads_activations(self.config),
            attend=functools.partial(context_attention, mode=self.config.mesh.context_mode),
            dropout_key=self.key,
            rows_B=rows_B,
            penalty_B=penalty_B,
            counted_B=counted_B,
            overlap=self.config.mesh.tp_comm_overlap,
        )
