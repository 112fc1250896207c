"""The Transformer of MT-NLG in Flax NNX: parameters named by their dims, every product written out.

The same code runs in two settings. Inside the manual region of the train step each device sees its
own shards: heads, MLP width and vocabulary are split over ``tensor``, and between half blocks the
sequence is too. Outside the region the collectives do nothing.
"""

# Shapes: B rows, S query positions, D width, F MLP width, N query heads, K key/value heads,
# H head width, V vocabulary, P learned positions, L layers

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.model.attention import attention
from mtnlg_jax.parallel.collectives import (
    axis_index,
    axis_size,
    gather,
    own_part,
    scatter_sum,
    sequence_positions,
)


def _normal(rngs: nnx.Rngs, std: float, *shape: int) -> nnx.Param:
    # Drawn as a matrix: XLA needs seconds to compile a draw of more dims.
    flat = jax.random.normal(rngs.params(), (shape[0], math.prod(shape[1:])), jnp.float32)
    return nnx.Param(std * flat.reshape(shape))


def _constant(value: float, *shape: int) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32))


@jax.custom_vjp
def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the rows ``ids`` of ``table``; the gradient is summed in float32.

    A frequent token contributes thousands of terms. A sum in the bfloat16 of the table would lose
    most of them.
    """
    return table[ids]


def _look_up_backward(residuals, grad):
    table, ids = residuals
    _, back = jax.vjp(lambda table: table[ids], table.astype(jnp.float32))
    return back(grad.astype(jnp.float32))[0].astype(table.dtype), None


look_up.defvjp(lambda table, ids: (table[ids], (table, ids)), _look_up_backward)


def multiply(dims: str, x: jax.Array, weight: jax.Array | Callable) -> jax.Array:
    """Return the einsum ``dims`` of ``x`` and ``weight``.

    Decoding may hold a quantized weight instead of an array: a callable that computes the same
    product.
    """
    return weight(x) if callable(weight) else jnp.einsum(dims, x, weight)


def _add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return x if bias is None else x + lax.broadcast_to_rank(bias[...], x.ndim)


class Norm(nnx.Module):
    """LayerNorm (Ba 2016) or RMSNorm (Zhang 2019), computed in float32."""

    def __init__(self, config: ModelConfig):
        self.epsilon = config.norm_epsilon
        self.scale_D = _constant(1.0, config.hidden_size)
        self.bias_D = (
            _constant(0.0, config.hidden_size) if config.normalization == "layernorm" else None
        )

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        x = x_BSD.astype(jnp.float32)
        if self.bias_D is not None:
            x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        x = x * self.scale_D[...].astype(jnp.float32)[None, None, :]
        if self.bias_D is not None:
            x = x + self.bias_D[...].astype(jnp.float32)[None, None, :]
        return x.astype(x_BSD.dtype)


def rotate(x_BSNH: jax.Array, positions_BS: jax.Array, base: float) -> jax.Array:
    """Apply rotary positions (Su 2021) in the halves layout.

    The pair (i, i + H/2) turns by the angle position / base^(2i/H).
    """
    half = x_BSNH.shape[-1] // 2
    rates = base ** (-jnp.arange(half) / half)
    angle = positions_BS[:, :, None].astype(jnp.float32) * rates[None, None, :]
    cos = jnp.cos(angle)[:, :, None]
    sin = jnp.sin(angle)[:, :, None]
    left, right = jnp.split(x_BSNH.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
    return turned.astype(x_BSNH.dtype)


class Attention(nnx.Module):
    """The projections of grouped-query attention; the caller computes the scores."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        N = config.num_attention_heads
        K = config.kv_heads
        H = config.head_width
        std = config.init_method_std
        out_std = config.init_method_std / math.sqrt(2 * config.num_layers)
        self.rotary_base = (
            config.rotary_base if config.position_embedding_type == "rotary" else None
        )
        self.w_q_DNH = _normal(rngs, std, D, N, H)
        self.w_k_DKH = _normal(rngs, std, D, K, H)
        self.w_v_DKH = _normal(rngs, std, D, K, H)
        self.w_o_NHD = _normal(rngs, out_std, N, H, D)
        bias = config.add_bias
        self.b_q_NH = _constant(0.0, N, H) if bias else None
        self.b_k_KH = _constant(0.0, K, H) if bias else None
        self.b_v_KH = _constant(0.0, K, H) if bias else None
        self.b_o_D = _constant(0.0, D) if bias else None

    def project(
        self, x_BSD: jax.Array, positions_BS: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries (B, S, N, H), keys (B, S, K, H) and values (B, S, K, H).

        Queries and keys are rotated when positions are rotary.
        """
        q = multiply("BSD,DNH->BSNH", x_BSD, self.w_q_DNH[...])
        k = multiply("BSD,DKH->BSKH", x_BSD, self.w_k_DKH[...])
        v = multiply("BSD,DKH->BSKH", x_BSD, self.w_v_DKH[...])
        q = _add_bias(q, self.b_q_NH)
        k = _add_bias(k, self.b_k_KH)
        v = _add_bias(v, self.b_v_KH)
        if self.rotary_base is not None:
            q = rotate(q, positions_BS, self.rotary_base)
            k = rotate(k, positions_BS, self.rotary_base)
        return checkpoint_name((q, k, v), "qkv")

    def output(self, o_BSNH: jax.Array) -> jax.Array:
        """Project heads back to width, (B, S, D); in the manual region this device's part of S."""
        # Each device has the sum over its own heads only; the reduce-scatter completes it.
        x_BSD = scatter_sum(multiply("BSNH,NHD->BSD", o_BSNH, self.w_o_NHD[...]), "tensor", 1)
        return _add_bias(x_BSD, self.b_o_D)


# Activations of an MLP without a gate. "gelu" is the tanh form of GPT-2 and Megatron-LM
# (Hendrycks 2016).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Mlp(nnx.Module):
    """Two matrices with one of ACTIVATIONS between them, or SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        F = config.mlp_width
        std = config.init_method_std
        out_std = config.init_method_std / math.sqrt(2 * config.num_layers)
        self.activation = config.activation
        gated = config.activation == "swiglu"
        bias = config.add_bias
        self.w_in_DF = _normal(rngs, std, D, F)
        self.w_gate_DF = _normal(rngs, std, D, F) if gated else None
        self.w_out_FD = _normal(rngs, out_std, F, D)
        self.b_in_F = _constant(0.0, F) if bias else None
        self.b_gate_F = _constant(0.0, F) if bias and gated else None
        self.b_out_D = _constant(0.0, D) if bias else None

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        h_BSF = multiply("BSD,DF->BSF", x_BSD, self.w_in_DF[...])
        h_BSF = _add_bias(h_BSF, self.b_in_F)
        if self.w_gate_DF is None:
            h_BSF = ACTIVATIONS[self.activation](h_BSF)
        else:
            g_BSF = multiply("BSD,DF->BSF", x_BSD, self.w_gate_DF[...])
            h_BSF = h_BSF * jax.nn.silu(_add_bias(g_BSF, self.b_gate_F))
        h_BSF = checkpoint_name(h_BSF, "activation")
        y_BSD = scatter_sum(multiply("BSF,FD->BSD", h_BSF, self.w_out_FD[...]), "tensor", 1)
        return _add_bias(y_BSD, self.b_out_D)


class Block(nnx.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)) (MT-NLG; Shoeybi 2019)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.norm_1 = Norm(config)
        self.norm_2 = Norm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        attend: Callable,
        drop: Callable = lambda x, half: x,
    ) -> jax.Array:
        """Return the block's output, (B, S, D).

        ``attend(q, k, v)`` is the attention over the keys of this sequence, or of a cache.
        ``drop(x, half)`` is the dropout after half block 0 or 1.
        """
        # Norms are named before the gather, so that a kept norm is split over tensor. The backward
        # pass gathers it again.
        normed = checkpoint_name(self.norm_1(x_BSD), "norm")
        q, k, v = self.attention.project(gather(normed, "tensor", 1), positions_BS)
        x_BSD = checkpoint_name(
            x_BSD + drop(self.attention.output(attend(q, k, v)), 0), "half_block"
        )
        normed = checkpoint_name(self.norm_2(x_BSD), "norm")
        return x_BSD + drop(self.mlp(gather(normed, "tensor", 1)), 1)


def dropout(x_BSD: jax.Array, rate: float, key: jax.Array, rows_B: jax.Array) -> jax.Array:
    """Apply inverted dropout to ``x_BSD``.

    The mask depends on (key, row, position) alone, so every mesh drops the same elements.
    """
    positions = sequence_positions(x_BSD.shape[1])
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(row_keys, positions)
    kept = jax.vmap(jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, x_BSD.shape[-1:])))(keys)
    return jnp.where(kept, x_BSD / (1 - rate), 0).astype(x_BSD.dtype)


_named = jax.checkpoint_policies.save_only_these_names


def _products_and(*names: str) -> Callable:
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, _named(*names)
    )


# Recompute policies: what the forward pass of a layer keeps besides its input; the backward pass
# recomputes the rest. The numbers are bytes per token and unit of width for the MT-NLG block in
# bf16 with the blockwise attention, split over tensor and context (Korthikanti 2022, section 4,
# counts 34, of which 2 are dropout masks). Tests check these figures.
RECOMPUTE = {
    # 32
    "none": _products_and("attention", "half_block", "norm", "activation"),
    # 20; on CPU faster than "none", in 0.4 of the memory
    "elementwise": _products_and("attention", "half_block"),
    # 12; recomputes also the first product of the MLP
    "mlp": _named("qkv", "attention", "half_block"),
    # 6; recomputes also queries, keys and values
    "projections": _named("attention", "half_block"),
    # 2; recomputes everything
    "full": _named(),
}


class Hooks(NamedTuple):
    """Changes to the plain forward pass. Each field serves one guest; the defaults change nothing.

    Mixed precision and ZeRO-3 use ``prepare``, activation recomputation ``recompute``, context
    parallelism ``attend``, and dropout the last two fields.
    """

    prepare: Callable = lambda layer: layer  # one layer's stored parameters -> compute weights
    recompute: str = "elementwise"  # a key of RECOMPUTE
    attend: Callable = attention  # attention(), or its equivalent over a split sequence
    dropout_key: jax.Array | None = None  # None: no dropout
    rows_B: jax.Array | None = None  # number of each row in the global batch, for dropout


PLAIN = Hooks()


class Transformer(nnx.Module):
    """Token embedding, stacked Blocks, final norm and output embedding.

    ``config.vocab_size`` must be set. Layers are stacked: block parameters have a leading L.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        V = config.vocabulary  # raises ValueError while it is not known
        D = config.hidden_size
        std = config.init_method_std
        self.config = config
        self.tokens_VD = _normal(rngs, std, V, D)
        self.positions_PD = (
            _normal(rngs, std, config.max_position_embeddings, D)
            if config.position_embedding_type == "learned"
            else None
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Block(config, rngs=rngs)

        self.blocks = stacked(rngs)
        self.final_norm = Norm(config)
        self.head_VD = None if config.tie_embeddings else _normal(rngs, std, V, D)

    # --- the plain forward pass

    def __call__(self, tokens_BS: jax.Array, **options) -> jax.Array:
        """Return float32 logits (B, S, V) of every position; ``options`` are those of `hidden`.

        The vocabulary must be whole, so this runs outside the manual region only.
        """
        x_BSD = self.hidden(tokens_BS, **options)
        return jnp.einsum("BSD,VD->BSV", x_BSD, self.head(), preferred_element_type=jnp.float32)

    def hidden(
        self,
        tokens_BS: jax.Array,
        *,
        positions_BS: jax.Array | None = None,
        segment_ids_BS: jax.Array | None = None,
        causal: bool = True,
        hooks: Hooks = PLAIN,
    ) -> jax.Array:
        """Return the last hidden states after the final norm, (B, S, D), whole in S.

        Positions count from 0 by default. Tokens attend within equal ``segment_ids_BS``.
        """
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        layers = nnx.state(self.blocks)
        x_BSD = self.start(tokens_BS, positions_BS, hooks)
        x_BSD = self.run_layers(
            layers, 0, x_BSD, positions_BS, segment_ids_BS, causal=causal, hooks=hooks
        )
        return self.finish(x_BSD)

    # --- its parts, between which the trainer puts a pipeline

    def embed(self, tokens_BS: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """Embed ids below vocab_size, (B, S, D); in the manual region this device's part of S."""
        table = self.tokens_VD[...]
        if axis_size("tensor") == 1:
            x_BSD = look_up(table, tokens_BS)
        else:
            # Each token is in the table of one device. The others contribute zeros to the sum.
            local = tokens_BS - axis_index("tensor") * table.shape[0]
            mine = (local >= 0) & (local < table.shape[0])
            x_BSD = jnp.where(mine[..., None], look_up(table, jnp.where(mine, local, 0)), 0)
            x_BSD = scatter_sum(x_BSD, "tensor", 1)
        if self.positions_PD is not None:
            x_BSD = x_BSD + look_up(self.positions_PD[...], own_part(positions_BS, "tensor", 1))
        return x_BSD

    def start(self, tokens_BS: jax.Array, positions_BS: jax.Array, hooks: Hooks) -> jax.Array:
        """Return the input of the first layer, (B, S, D)."""
        return self._drop(self.embed(tokens_BS, positions_BS), 0, hooks)

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

        ``layers`` are any consecutive layers of this model, such as those of a pipeline stage, and
        ``first`` is the number of the first one in the model.
        """
        graph = nnx.graphdef(self.blocks)
        numbers = first + jnp.arange(jax.tree.leaves(layers)[0].shape[0])

        def attend(q, k, v):
            return hooks.attend(
                q, k, v, causal=causal, segment_ids=segment_ids_BS, impl=self.config.attention_impl
            )

        def layer(x_BSD, numbered):
            number, params = numbered
            block = nnx.merge(graph, hooks.prepare(params))

            def drop(x_BSD, half):
                # Mask 0 is that of the embedding; every half block has its own.
                return self._drop(x_BSD, 1 + 2 * number + half, hooks)

            return block(x_BSD, positions_BS, attend, drop), None

        # XLA cannot merge the body of a scan with that of its backward pass, so the barriers of
        # prevent_cse are not needed.
        layer = jax.checkpoint(layer, policy=RECOMPUTE[hooks.recompute], prevent_cse=False)
        return lax.scan(layer, x_BSD, (numbers, layers))[0]

    def finish(self, x_BSD: jax.Array) -> jax.Array:
        """Apply the final norm to the last layer's output and gather S for the head."""
        return gather(self.final_norm(x_BSD), "tensor", 1)

    def head(self) -> jax.Array:
        """Return the output embedding, (V, D)."""
        return (self.tokens_VD if self.head_VD is None else self.head_VD)[...]

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
        return nnx.split(Transformer(config, rngs=nnx.Rngs(seed)))[1]

    return jax.jit(make, out_shardings=shardings)()
