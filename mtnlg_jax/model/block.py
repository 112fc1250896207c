"""The blocks of the Transformer, every product written out.

The default block is MT-NLG's. Switches of ModelConfig turn it into the blocks of today's open
models; docs/models.md says which family sets which switch.
"""

# Shapes: B rows, S query positions, D width, N query heads, K key/value heads, H head width

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mtnlg_jax.config import LayerSpec, ModelConfig
from mtnlg_jax.model.layer_watch import LayerWatch
from mtnlg_jax.model.mlp import Mlp
from mtnlg_jax.model.moe import Moe
from mtnlg_jax.model.parts import HeadNorm, Norm, add_bias, constant, normal
from mtnlg_jax.model.positions import alibi_slopes, layer_frequencies, rotate
from mtnlg_jax.model.tensor_products import Factor, multiply_gathered, multiply_scattered
from mtnlg_jax.parallel.collectives import axis_index, axis_size, gather, own_part

PLAIN_LAYER = LayerSpec()


class Attention(nnx.Module):
    """The projections of grouped-query attention; the caller computes the scores."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        N = config.num_attention_heads
        K = config.kv_heads
        H = config.head_width
        std = config.init_method_std
        out_std = config.init_method_std / math.sqrt(2 * config.num_layers)
        self.config = config
        self.w_q_DNH = normal(rngs, std, D, N, H)
        self.w_k_DKH = normal(rngs, std, D, K, H)
        self.w_v_DKH = normal(rngs, std, D, K, H)
        self.w_o_NHD = normal(rngs, out_std, N, H, D)
        bias = config.has_bias("qkv")
        self.b_q_NH = constant(0.0, N, H) if bias else None
        self.b_k_KH = constant(0.0, K, H) if bias else None
        self.b_v_KH = constant(0.0, K, H) if bias else None
        self.b_o_D = constant(0.0, D) if config.has_bias("out") else None
        normed = config.qk_layernorm != "none"
        self.q_norm = HeadNorm(config, of_keys=False) if normed else None
        self.k_norm = HeadNorm(config, of_keys=True) if normed else None
        self.b_sink_N = constant(0.0, N) if config.attention_sink else None

    def factors(self) -> list[Factor]:
        """Return what the input is multiplied by, for queries, keys and values."""
        return [
            ("BSD,DNH->BSNH", self.w_q_DNH[...]),
            ("BSD,DKH->BSKH", self.w_k_DKH[...]),
            ("BSD,DKH->BSKH", self.w_v_DKH[...]),
        ]

    def project(
        self,
        products: Sequence[jax.Array],
        positions_BS: jax.Array,
        spec: LayerSpec = PLAIN_LAYER,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries (B, S, N, H), keys (B, S, K, H) and values (B, S, K, H).

        ``products`` are those of the input with `factors`. Queries and keys are normed and rotated
        as the config and ``spec`` say.
        """
        q, k, v = map(add_bias, products, (self.b_q_NH, self.b_k_KH, self.b_v_KH))
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        k = self._own_heads(k)
        v = self._own_heads(v)
        frequencies = layer_frequencies(self.config, spec)
        if frequencies is not None:
            q = rotate(q, positions_BS, frequencies)
            k = rotate(k, positions_BS, frequencies)
        return checkpoint_name((q, k, v), "qkv")

    def _own_heads(self, x_BSKH: jax.Array) -> jax.Array:
        """Return the key/value head of this device's queries if every device holds all heads.

        That is so where there are fewer heads than devices along tensor; else return ``x_BSKH``.
        """
        parts = axis_size("tensor")
        heads = self.config.kv_heads
        if heads >= parts:
            return x_BSKH
        own = axis_index("tensor") * heads // parts
        return lax.dynamic_slice_in_dim(x_BSKH, own, 1, 2)

    def attend(
        self,
        attend: Callable,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        spec: LayerSpec,
        watch: LayerWatch | None = None,
    ) -> jax.Array:
        """Return ``attend(q, k, v, **options)``, (B, S, N, H), with this layer's options.

        A sink acts like one more key, with a trained score and value 0. So its share of the softmax
        follows from the log-sum-exp of the other keys (Xiao 2023).
        """
        config = self.config
        options: dict[str, Any] = {}
        if spec.window is not None:
            options["window"] = spec.window
        if config.attn_logit_softcapping is not None:
            options["softcap"] = config.attn_logit_softcapping
        if config.attention_multiplier is not None:
            options["scale"] = config.attention_multiplier
        if config.position_embedding_type == "alibi":
            slopes_N = jnp.asarray(alibi_slopes(config.num_attention_heads))
            options["alibi_slopes"] = own_part(slopes_N, "tensor", 0)
        if watch is not None:
            watch.attention(q, k, None if self.b_sink_N is None else self.b_sink_N[...], options)
        if self.b_sink_N is None:
            return attend(q, k, v, **options)
        out, lse_BNS = attend(q, k, v, return_lse=True, **options)
        sink_N = self.b_sink_N[...].astype(jnp.float32)
        share_BNS = jax.nn.sigmoid(lse_BNS - sink_N[None, :, None])
        return (out * share_BNS.swapaxes(1, 2)[..., None]).astype(out.dtype)

    def output(self, o_BSNH: jax.Array, overlap: bool = False) -> jax.Array:
        """Project heads back to width, (B, S, D); in the manual region this device's part of S."""
        x_BSD = multiply_scattered("BSNH,NHD->BSD", o_BSNH, self.w_o_NHD[...], overlap)
        return add_bias(x_BSD, self.b_o_D)


class Block(nnx.Module):
    """Two half blocks, attention and MLP. With pre-norm (MT-NLG; Shoeybi 2019):
    x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.placement = config.norm_placement
        self.parallel = config.parallel_residual != "none"
        self.multiplier = config.multipliers.residual
        sandwich = config.norm_placement == "sandwich"
        self.norm_1 = Norm(config)
        self.norm_1_out = Norm(config) if sandwich else None
        self.norm_2 = Norm(config) if config.parallel_residual != "one_norm" else None
        self.norm_2_out = Norm(config) if sandwich else None
        self.attention = Attention(config, rngs=rngs)
        experts = config.moe.num_moe_experts
        self.mlp = Moe(config, rngs=rngs) if experts else Mlp(config, rngs=rngs)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        attend: Callable,
        drop: Callable = lambda x, half: x,
        spec: LayerSpec = PLAIN_LAYER,
        penalty_B: jax.Array | None = None,
        counted_B: jax.Array | None = None,
        overlap: bool = False,
        watch: LayerWatch | None = None,
    ) -> jax.Array:
        """Return the block's output, (B, S, D).

        ``attend(q, k, v, **options)`` is the attention over the keys of this sequence, or of a
        cache. ``drop(x, half)`` is the dropout after half block 0 or 1. ``penalty_B`` and
        ``counted_B`` are those of `Moe`. ``overlap`` is mesh.tp_comm_overlap. ``watch`` reads what
        the half blocks do.
        """

        def attended(products):
            q, k, v = self.attention.project(products, positions_BS, spec)
            o_BSNH = self.attention.attend(attend, q, k, v, spec, watch)
            return self.attention.output(o_BSNH, overlap)

        def attention(x_BSD):
            return attended(multiply_gathered(x_BSD, self.attention.factors(), overlap))

        def mlp(x_BSD):
            if isinstance(self.mlp, Moe):
                return self.mlp(gather(x_BSD, "tensor", 1), penalty_B, counted_B, watch)
            products = multiply_gathered(x_BSD, self.mlp.factors(), overlap)
            return self.mlp.output(products, overlap, watch)

        def added(y_BSD, half):
            y_BSD = drop(y_BSD, half)
            y_BSD = y_BSD if self.multiplier == 1 else self.multiplier * y_BSD
            if watch is not None:
                watch.branch(half, y_BSD)
            return y_BSD

        if self.parallel:
            first = checkpoint_name(self.norm_1(x_BSD), "norm")
            second = first if self.norm_2 is None else checkpoint_name(self.norm_2(x_BSD), "norm")
            if second is first and not isinstance(self.mlp, Moe):
                # Both halves read one ring, or one gather.
                factors = self.attention.factors()
                products = multiply_gathered(first, factors + self.mlp.factors(), overlap)
                y_BSD = attended(products[: len(factors)])
                z_BSD = self.mlp.output(products[len(factors) :], overlap, watch)
                return x_BSD + added(y_BSD, 0) + added(z_BSD, 1)
            return x_BSD + added(attention(first), 0) + added(mlp(second), 1)
        norm_1 = self.norm_1 if spec.first_norm else None
        x_BSD = self._half(x_BSD, norm_1, self.norm_1_out, attention, lambda y: added(y, 0))
        x_BSD = checkpoint_name(x_BSD, "half_block")
        return self._half(x_BSD, self.norm_2, self.norm_2_out, mlp, lambda y: added(y, 1))

    def _half(self, x_BSD, norm, norm_out, branch, added):
        y_BSD = x_BSD
        # Norms are named before the gather, so that a kept norm is split over tensor. The backward
        # pass gathers it again.
        if self.placement in ("pre", "sandwich") and norm is not None:
            y_BSD = checkpoint_name(norm(y_BSD), "norm")
        y_BSD = branch(y_BSD)
        if self.placement == "sandwich":
            y_BSD = norm_out(y_BSD)
        elif self.placement == "output":
            y_BSD = norm(y_BSD)
        y_BSD = x_BSD + added(y_BSD)
        return norm(y_BSD) if self.placement == "post" else y_BSD
