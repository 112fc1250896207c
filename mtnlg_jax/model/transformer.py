"""The Transformer in Flax NNX: embedding, stacked blocks, final norm and head. Parameters are named
by their dims.

The same code runs in two settings. Inside the manual region of the train step each device sees its
own shards: heads, MLP width and vocabulary are split over ``tensor``, and between half blocks the
sequence is too. Outside the region the collectives do nothing.
"""

# Shapes: B rows, S query positions, D width, V vocabulary, P learned positions, L layers,
# C width of the masked head's transform

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.model import mup
from mtnlg_jax.model.block import Block
from mtnlg_jax.model.head import Head
from mtnlg_jax.model.hooks import LAYER_INPUT, PLAIN, Hooks, dropout, policy_of
from mtnlg_jax.model.layer_watch import figures_of
from mtnlg_jax.model.parts import (
    ACTIVATIONS,
    Norm,
    add_bias,
    constant,
    look_up,
    multiply,
    normal,
)
from mtnlg_jax.model.prefix import PrefixEncoder
from mtnlg_jax.parallel.collectives import axis_index, axis_size, gather, own_part, scatter_sum


class MaskedHead(nnx.Module):
    """The transform before BERT's output embedding: norm(activation(x W + b)) (Devlin 2018)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        self.activation = config.activation
        self.w_mlm_DC = normal(rngs, config.init_method_std, D, D)
        self.b_mlm_D = constant(0.0, D) if config.has_bias("mlm") else None
        self.norm = Norm(config)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        h_BSC = add_bias(multiply("BSD,DC->BSC", x_BSD, self.w_mlm_DC[...]), self.b_mlm_D)
        return self.norm(ACTIVATIONS[self.activation](h_BSC))


class Transformer(nnx.Module):
    """Token embedding, stacked Blocks, final norm and output embedding.

    ``config.vocab_size`` must be set. Layers are stacked: block parameters have a leading L.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        V = config.vocabulary  # raises ValueError if it is not known yet
        D = config.hidden_size
        std = config.init_method_std
        self.config = config
        self.tokens_VD = normal(rngs, std, V, D)
        self.positions_PD = (
            normal(rngs, std, config.max_position_embeddings, D)
            if config.position_embedding_type == "learned"
            else None
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Block(config, rngs=rngs)

        self.blocks = stacked(rngs)
        self.embedding_norm = Norm(config) if config.embedding_norm else None
        self.prefix = PrefixEncoder(config, rngs=rngs) if config.prefix.positions else None
        self.final_norm = None if config.norm_placement == "post" else Norm(config)
        self.mlm = MaskedHead(config, rngs=rngs) if config.mlm_head else None
        self.head_VD = None if config.tie_embeddings else normal(rngs, std, V, D)
        self.b_head_V = constant(0.0, V) if config.has_bias("head") else None

    # --- the plain forward pass

    def __call__(self, tokens_BS: jax.Array, **options) -> jax.Array:
        """Return float32 logits (B, S, V) of every position; ``options`` are those of `hidden`.

        The vocabulary must be whole, so this runs outside the manual region only.
        """
        return self.head().logits(self.hidden(tokens_BS, **options))

    def hidden(
        self,
        tokens_BS: jax.Array,
        *,
        positions_BS: jax.Array | None = None,
        segment_ids_BS: jax.Array | None = None,
        prefix: jax.Array | None = None,
        causal: bool = True,
        hooks: Hooks = PLAIN,
    ) -> jax.Array:
        """Return the last hidden states after the final norm, (B, S, D), whole in S.

        Positions count from 0 by default. Tokens attend within equal ``segment_ids_BS``.
        ``prefix`` (B, *config.prefix.shape) stands where tokens are below 0; see `embed`.
        """
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        layers = nnx.state(self.blocks)
        x_BSD = self.start(tokens_BS, positions_BS, hooks, prefix)
        x_BSD = self.run_layers(
            layers, 0, x_BSD, positions_BS, segment_ids_BS, causal=causal, hooks=hooks
        )
        return self.finish(x_BSD)

    # --- its parts, between which the trainer puts a pipeline

    def embed(
        self, tokens_BS: jax.Array, positions_BS: jax.Array, prefix: jax.Array | None = None
    ) -> jax.Array:
        """Embed ids below vocab_size, (B, S, D); in the manual region this device's part of S.

        With a ``prefix``, token -1 - p stands for its position p.
        """
        table = self.tokens_VD[...]
        given_BS = tokens_BS
        if prefix is not None:
            tokens_BS = jnp.maximum(tokens_BS, 0)
        if axis_size("tensor") == 1:
            x_BSD = look_up(table, tokens_BS)
        else:
            # Each token is in the table of one device. The others contribute zeros to the sum.
            local = tokens_BS - axis_index("tensor") * table.shape[0]
            mine = (local >= 0) & (local < table.shape[0])
            x_BSD = jnp.where(mine[..., None], look_up(table, jnp.where(mine, local, 0)), 0)
            x_BSD = scatter_sum(x_BSD, "tensor", 1)
        if prefix is not None:
            x_BSD = self.put_prefix(x_BSD, own_part(given_BS, "tensor", 1), prefix)
        return self.place(x_BSD, own_part(positions_BS, "tensor", 1))

    def put_prefix(self, x_BSD: jax.Array, tokens_BS: jax.Array, prefix: jax.Array) -> jax.Array:
        """Return the tokens' rows of the table ``x_BSD`` with the projected ``prefix`` in place of
        those of tokens below 0."""
        assert self.prefix is not None, "a model without a prefix was given one"
        prefix_BPD = self.prefix(prefix).astype(x_BSD.dtype)
        at_BS = jnp.clip(-1 - tokens_BS, 0, prefix_BPD.shape[1] - 1)
        found_BSD = jnp.take_along_axis(prefix_BPD, at_BS[..., None], 1)
        return jnp.where((tokens_BS < 0)[..., None], found_BSD, x_BSD)

    def place(self, x_BSD: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """Return the embedding, (B, S, D), given the tokens' rows of the table."""
        if self.config.multipliers.embedding != 1:
            x_BSD = x_BSD * jnp.asarray(self.config.multipliers.embedding, x_BSD.dtype)
        if self.positions_PD is not None:
            x_BSD = x_BSD + look_up(self.positions_PD[...], positions_BS)
        return x_BSD if self.embedding_norm is None else self.embedding_norm(x_BSD)

    def start(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        hooks: Hooks,
        prefix: jax.Array | None = None,
    ) -> jax.Array:
        """Return the input of the first layer, (B, S, D)."""
        return self._drop(self.embed(tokens_BS, positions_BS, prefix), 0, hooks)

    def run_layers(
        self,
        layers: nnx.State,
        first: int | jax.Array,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        segment_ids_BS: jax.Array | None = None,
        *,
        causal: bool = True,
        hooks: Hooks = PLAIN,
    ) -> jax.Array:
        """Apply the stacked ``layers`` to ``x_BSD``.

        ``layers`` are consecutive layers of this model, such as those of a pipeline stage, and
        ``first`` is the number of the first one in the model: a multiple of the length of
        layer_pattern.
        """
        return self.watch_layers(
            layers, first, x_BSD, positions_BS, segment_ids_BS, causal=causal, hooks=hooks
        )[0]

    def watch_layers(
        self,
        layers: nnx.State,
        first: int | jax.Array,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        segment_ids_BS: jax.Array | None = None,
        *,
        causal: bool = True,
        hooks: Hooks = PLAIN,
    ) -> tuple[jax.Array, Any]:
        """Do the same as `run_layers`, and return also the figures that ``hooks.watch`` reads,
        each with a leading L; () where it reads nothing."""
        graph = nnx.graphdef(self.blocks)
        count = jax.tree.leaves(layers)[0].shape[0]
        numbered = (first + jnp.arange(count), layers)
        pattern = self.config.layer_pattern

        def attend(q, k, v, **options):
            return hooks.attend(
                q,
                k,
                v,
                causal=causal,
                segment_ids=segment_ids_BS,
                impl=self.config.attention_impl,
                **options,
            )

        def layer(spec, at, x_BSD, numbered):
            if hooks.offload:
                x_BSD = checkpoint_name(x_BSD, LAYER_INPUT)
            number, params = jax.tree.map(lambda a: a[at], numbered)
            block = nnx.merge(graph, hooks.prepare(params))

            def drop(x_BSD, half):
                # Mask 0 is that of the embedding; every half block has its own.
                return self._drop(x_BSD, 1 + 2 * number + half, hooks)

            watch = None if hooks.watch is None else hooks.watch(causal, segment_ids_BS)
            x_BSD = block(
                x_BSD,
                positions_BS,
                attend,
                drop,
                spec,
                hooks.penalty_B,
                hooks.counted_B,
                hooks.overlap,
                watch,
            )
            if watch is not None:
                watch.output(x_BSD)
            return x_BSD, figures_of(watch)

        def run(specs, x_BSD, numbered, in_scan=True):
            """Apply one layer for each of ``specs``, and save what the policy names of each. Return
            also the figures of each."""
            found = []
            for at, spec in enumerate(specs):
                # XLA cannot merge the body of a scan with that of its backward pass, so the
                # barriers of prevent_cse are not needed there.
                one = jax.checkpoint(
                    functools.partial(layer, spec, at),
                    policy=policy_of(hooks.recompute, hooks.offload),
                    prevent_cse=not in_scan,
                )
                x_BSD, figures = one(x_BSD, numbered)
                found.append(figures)
            return x_BSD, found

        # The scan runs whole periods of the pattern; the remaining layers are unrolled.
        period = len(pattern)
        whole = count // period * period
        periods = jax.tree.map(lambda a: a[:whole].reshape(-1, period, *a.shape[1:]), numbered)
        found: list = []
        if whole:
            x_BSD, of_periods = lax.scan(lambda x, part: run(pattern, x, part), x_BSD, periods)
            # Layers of the pattern, each with all periods -> layers in order.
            by_period = jax.tree.map(lambda *a: jnp.stack(a, 1), *of_periods)
            found.append(jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), by_period))
        rest = jax.tree.map(lambda a: a[whole:], numbered)
        x_BSD, last = run(pattern[: count - whole], x_BSD, rest, in_scan=False)
        found += [jax.tree.map(lambda a: a[None], figures) for figures in last]
        return x_BSD, jax.tree.map(lambda *a: jnp.concatenate(a), *found)

    def finish(self, x_BSD: jax.Array) -> jax.Array:
        """Apply the final norm to the last layer's output and gather S for the head."""
        return gather(self.normed(x_BSD), "tensor", 1)

    def normed(self, x_BSD: jax.Array) -> jax.Array:
        """Return the input of the head, given the last layer's output."""
        if self.final_norm is not None:
            x_BSD = self.final_norm(x_BSD)
        return x_BSD if self.mlm is None else self.mlm(x_BSD)

    def head(self) -> Head:
        """Return the output head."""
        return Head(
            (self.tokens_VD if self.head_VD is None else self.head_VD)[...],
            None if self.b_head_V is None else self.b_head_V[...],
            self.config.final_logit_softcapping,
            self.config.logits_multiplier,
            self.config.vocab_padding,
        )

    def _drop(self, x_BSD: jax.Array, number: int | jax.Array, hooks: Hooks) -> jax.Array:
        if hooks.dropout_key is None or self.config.dropout_rate == 0:
            return x_BSD
        assert hooks.rows_B is not None, "dropout numbers the rows of the global batch"
        key = jax.random.fold_in(hooks.dropout_key, number)
        return dropout(x_BSD, self.config.dropout_rate, key, hooks.rows_B)


def abstract_model(config: ModelConfig) -> tuple[Any, nnx.State]:
    """Return (graphdef, parameters as ShapeDtypeStructs); nothing is allocated, even at 530 B."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def init_parameters(config: ModelConfig, seed: int, shardings: Any = None) -> nnx.State:
    """Draw parameters from ``seed`` on the devices of ``shardings``.

    They are equal on every mesh up to rounding.
    """

    def make():
        params = nnx.split(Transformer(config, rngs=nnx.Rngs(seed)))[1]
        return mup.scale_initial(params, config)

    return jax.jit(make, out_shardings=shardings)()
