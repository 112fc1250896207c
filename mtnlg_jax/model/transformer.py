"""The Transformer of MT-NLG in Flax NNX: parameters named by their dims, every product written out.

Inside the manual region of the train step each device sees its own shapes: heads, MLP width and
vocabulary split over ``tensor``, and between the half blocks the sequence too. Outside it the
collectives vanish.
"""

import functools
import math
from collections.abc import Callable

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
    sequence_places,
)


def _normal(rngs: nnx.Rngs, std: float, *shape: int) -> nnx.Param:
    # Drawn as a matrix: XLA takes seconds to compile a draw of more dims.
    flat = jax.random.normal(rngs.params(), (shape[0], math.prod(shape[1:])), jnp.float32)
    return nnx.Param(std * flat.reshape(shape))


def _constant(value: float, *shape: int) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32))


@jax.custom_vjp
def look_up(table, ids):
    """Rows ``ids`` of ``table``. Its gradient adds in float32: a frequent token's thousands of
    parts, in the bfloat16 of the table, would lose most of them."""
    return table[ids]


def _look_up_backward(residuals, grad):
    table, ids = residuals
    _, back = jax.vjp(lambda table: table[ids], table.astype(jnp.float32))
    return back(grad.astype(jnp.float32))[0].astype(table.dtype), None


look_up.defvjp(lambda table, ids: (table[ids], (table, ids)), _look_up_backward)


def multiply(dims: str, x, weight):
    """An einsum; a weight that is no array, as decoding may hold it, brings the same product
    itself."""
    return weight(x) if callable(weight) else jnp.einsum(dims, x, weight)


class Norm(nnx.Module):
    """LayerNorm (Ba 2016) or RMSNorm (Zhang 2019), computed in float32."""

    def __init__(self, config: ModelConfig):
        self.epsilon = config.norm_epsilon
        self.scale_D = _constant(1.0, config.hidden_size)
        self.bias_D = (
            _constant(0.0, config.hidden_size) if config.normalization == "layernorm" else None
        )

    def __call__(self, x_BSD):
        x = x_BSD.astype(jnp.float32)
        if self.bias_D is not None:
            x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        x = x * self.scale_D[...].astype(jnp.float32)
        if self.bias_D is not None:
            x = x + self.bias_D[...].astype(jnp.float32)
        return x.astype(x_BSD.dtype)


def rotate(x_BSNH, positions_BS, base: float):
    """Rotary positions (Su 2021), halves layout: pairs (i, i + H/2) turn by position /
    base^(2i/H)."""
    half = x_BSNH.shape[-1] // 2
    angle = positions_BS[..., None].astype(jnp.float32) * base ** (-jnp.arange(half) / half)
    cos = jnp.cos(angle)[:, :, None]
    sin = jnp.sin(angle)[:, :, None]
    left, right = jnp.split(x_BSNH.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
    return turned.astype(x_BSNH.dtype)


class Attention(nnx.Module):
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
        self.b_q_NH, self.b_k_KH, self.b_v_KH, self.b_o_D = (
            (_constant(0.0, N, H), _constant(0.0, K, H), _constant(0.0, K, H), _constant(0.0, D))
            if config.add_bias
            else (None,) * 4
        )

    def project(self, x_BSD, positions_BS):
        """Queries (B, S, N, H), keys and values (B, S, K, H), rotated where positions are
        rotary."""
        q = multiply("BSD,DNH->BSNH", x_BSD, self.w_q_DNH[...])
        k = multiply("BSD,DKH->BSKH", x_BSD, self.w_k_DKH[...])
        v = multiply("BSD,DKH->BSKH", x_BSD, self.w_v_DKH[...])
        if self.b_q_NH is not None:
            q = q + self.b_q_NH[...]
            k = k + self.b_k_KH[...]
            v = v + self.b_v_KH[...]
        if self.rotary_base is not None:
            q = rotate(q, positions_BS, self.rotary_base)
            k = rotate(k, positions_BS, self.rotary_base)
        return checkpoint_name((q, k, v), "qkv")

    def output(self, o_BSNH):
        """Heads back to width; the sum over heads ends as this device's part of the sequence."""
        x_BSD = scatter_sum(multiply("BSNH,NHD->BSD", o_BSNH, self.w_o_NHD[...]), "tensor", 1)
        return x_BSD if self.b_o_D is None else x_BSD + self.b_o_D[...]


# Of an MLP without a gate. "gelu" is the tanh form that GPT-2 and Megatron-LM use (Hendrycks 2016).
ACTIVATIONS = {
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

    def __call__(self, x_BSD):
        h_BSF = multiply("BSD,DF->BSF", x_BSD, self.w_in_DF[...])
        if self.b_in_F is not None:
            h_BSF = h_BSF + self.b_in_F[...]
        if self.w_gate_DF is None:
            h_BSF = ACTIVATIONS[self.activation](h_BSF)
        else:
            g_BSF = multiply("BSD,DF->BSF", x_BSD, self.w_gate_DF[...])
            h_BSF = h_BSF * jax.nn.silu(
                g_BSF if self.b_gate_F is None else g_BSF + self.b_gate_F[...]
            )
        h_BSF = checkpoint_name(h_BSF, "activation")
        y_BSD = scatter_sum(multiply("BSF,FD->BSD", h_BSF, self.w_out_FD[...]), "tensor", 1)
        return y_BSD if self.b_out_D is None else y_BSD + self.b_out_D[...]


class Block(nnx.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)) (MT-NLG; Shoeybi 2019)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.norm_1 = Norm(config)
        self.norm_2 = Norm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_BSD, positions_BS, attend: Callable, drop: Callable = lambda x, part: x):
        """``attend(q, k, v)`` is the attention over whatever keys there are: this sequence, or a
        cache. ``drop(x, part)`` is the dropout of the block's two parts."""
        # Norms are named before the gather: what is kept of them splits over tensor, too, and is
        # gathered again.
        normed = checkpoint_name(self.norm_1(x_BSD), "norm")
        q, k, v = self.attention.project(gather(normed, "tensor", 1), positions_BS)
        x_BSD = checkpoint_name(
            x_BSD + drop(self.attention.output(attend(q, k, v)), 0), "half_block"
        )
        normed = checkpoint_name(self.norm_2(x_BSD), "norm")
        return x_BSD + drop(self.mlp(gather(normed, "tensor", 1)), 1)


def dropout(x_BSD, rate: float, key, rows_B):
    """Inverted dropout whose mask depends on (key, row, position) alone, so that every mesh drops
    the same."""
    positions = sequence_places(x_BSD.shape[1])
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(row_keys, positions)
    kept = jax.vmap(jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, x_BSD.shape[-1:])))(keys)
    return jnp.where(kept, x_BSD / (1 - rate), 0).astype(x_BSD.dtype)


_named = jax.checkpoint_policies.save_only_these_names


def _products_and(*names: str):
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, _named(*names)
    )


# What a layer computes again in its backward pass, by name, and so what its forward pass keeps
# besides its input. Bytes a token and unit of width for the MT-NLG block in bf16 with the blockwise
# attention, split over tensor and context (Korthikanti 2022, section 4, counts 34, two of them for
# dropout masks; tests hold these figures):
RECOMPUTE = {
    "none": _products_and("attention", "half_block", "norm", "activation"),  # 32
    "elementwise": _products_and(
        "attention", "half_block"
    ),  # 20; on CPU faster than none, in 0.4 of the memory
    "mlp": _named("qkv", "attention", "half_block"),  # 12: the first product of the MLP, too
    "projections": _named("attention", "half_block"),  # 6: queries, keys, values, too
    "full": _named(),  # 2: all
}


class Transformer(nnx.Module):
    """``vocab_size`` of ``config`` must be set. Layers are stacked: block parameters have a leading
    L."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        std = config.init_method_std
        self.config = config
        self.tokens_VD = _normal(rngs, std, config.vocabulary, D)
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
        self.head_VD = None if config.tie_embeddings else _normal(rngs, std, config.vocabulary, D)

    def embed(self, tokens_BS, positions_BS):
        """(B, S) ids below vocab_size -> (B, S, D); in the manual region this device's part of
        S."""
        table = self.tokens_VD[...]
        if axis_size("tensor") == 1:
            x_BSD = look_up(table, tokens_BS)
        else:
            local = tokens_BS - axis_index("tensor") * table.shape[0]
            mine = (local >= 0) & (local < table.shape[0])
            x_BSD = jnp.where(mine[..., None], look_up(table, jnp.where(mine, local, 0)), 0)
            x_BSD = scatter_sum(x_BSD, "tensor", 1)
        if self.positions_PD is not None:
            x_BSD = x_BSD + look_up(self.positions_PD[...], own_part(positions_BS, "tensor", 1))
        return x_BSD

    def head(self):
        """The output embedding, (V, D)."""
        return (self.tokens_VD if self.head_VD is None else self.head_VD)[...]

    def hidden(
        self,
        tokens_BS,
        *,
        positions_BS=None,
        segment_ids_BS=None,
        causal: bool = True,
        prepare: Callable = lambda params: params,
        recompute: str = "elementwise",
        dropout_key=None,
        rows_B=None,
        attend: Callable = attention,
    ):
        """The last hidden states after the final norm, (B, S, D), whole in S: ``start``, ``run``
        over all layers, ``finish``, of which the trainer puts a pipeline between the first and the
        last."""
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        x_BSD = self.start(tokens_BS, positions_BS, dropout_key, rows_B)
        x_BSD = self.run(
            nnx.state(self.blocks),
            0,
            x_BSD,
            positions_BS,
            segment_ids_BS,
            causal=causal,
            prepare=prepare,
            recompute=recompute,
            dropout_key=dropout_key,
            rows_B=rows_B,
            attend=attend,
        )
        return self.finish(x_BSD)

    def start(self, tokens_BS, positions_BS, dropout_key=None, rows_B=None):
        """What the first layer reads, (B, S, D)."""
        return self._drop(self.embed(tokens_BS, positions_BS), 0, dropout_key, rows_B)

    def run(
        self,
        layers,
        first,
        x_BSD,
        positions_BS,
        segment_ids_BS=None,
        *,
        causal: bool = True,
        prepare: Callable = lambda params: params,
        recompute: str = "elementwise",
        dropout_key=None,
        rows_B=None,
        attend: Callable = attention,
    ):
        """``x_BSD`` through the stacked ``layers``, any run of the model's, numbered from ``first``
        on; ``recompute`` is a key of RECOMPUTE.

        ``prepare`` turns one layer's stored parameters into compute weights (ZeRO-3 gathers here);
        ``dropout_key`` turns dropout on, ``rows_B`` then number the rows within the global batch;
        ``attend`` is attention(), or what does the same over a sequence split between devices.
        """
        graph = nnx.graphdef(self.blocks)
        numbers = first + jnp.arange(jax.tree.leaves(layers)[0].shape[0])

        def look(q, k, v):
            return attend(
                q, k, v, causal=causal, segment_ids=segment_ids_BS, impl=self.config.attention_impl
            )

        def layer(x_BSD, numbered):
            number, params = numbered
            block = nnx.merge(graph, prepare(params))
            return block(
                x_BSD,
                positions_BS,
                look,
                lambda x, part: self._drop(x, 1 + 2 * number + part, dropout_key, rows_B),
            ), None

        # A loop's body cannot be merged with its backward's, so nothing needs to be kept apart
        # (prevent_cse).
        layer = jax.checkpoint(layer, policy=RECOMPUTE[recompute], prevent_cse=False)
        return lax.scan(layer, x_BSD, (numbers, layers))[0]

    def finish(self, x_BSD):
        """The last layer's output through the final norm, whole in S for the head."""
        return gather(self.final_norm(x_BSD), "tensor", 1)

    def _drop(self, x_BSD, number, key, rows_B):
        if key is None or self.config.dropout_rate == 0:
            return x_BSD
        return dropout(x_BSD, self.config.dropout_rate, jax.random.fold_in(key, number), rows_B)

    def __call__(self, tokens_BS, **options):
        """Float32 logits (B, S, V) of every position; for whole vocabularies (outside the manual
        region)."""
        x_BSD = self.hidden(tokens_BS, **options)
        return jnp.einsum("BSD,VD->BSV", x_BSD, self.head(), preferred_element_type=jnp.float32)


def abstract_model(config: ModelConfig):
    """(graphdef, parameters as ShapeDtypeStructs): nothing is allocated, also at 530 B."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def init_parameters(config: ModelConfig, seed: int, shardings=None):
    """Parameters from ``seed``, made on the devices where they will live; equal on every mesh to
    rounding."""

    def make():
        return nnx.split(Transformer(config, rngs=nnx.Rngs(seed)))[1]

    return jax.jit(make, out_shardings=shardings)()
