"""Experts in place of the MLP (Shazeer 2017): a router sends each token to a few of them.

Nothing is dropped. Tokens are sorted by expert, and one grouped product computes all experts
(Gale 2022, MegaBlocks).
"""

# Shapes: B rows, S query positions, D width, F width of an expert, E experts, X experts of a token,
# T tokens (B x S), U visits (T x X, sorted by expert)

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.model.parts import activate, add_bias, constant, multiply, normal
from mtnlg_jax.parallel.collectives import own_part, scatter_sum


class Moe(nnx.Module):
    """A router and its experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        F = config.mlp_width
        E = config.moe.num_moe_experts
        std = config.init_method_std
        out_std = config.init_method_std / math.sqrt(2 * config.num_layers)
        self.config = config.moe
        self.activation = config.activation
        bias = config.has_bias("mlp")
        self.w_router_DE = normal(rngs, std, D, E)
        self.b_router_E = constant(0.0, E) if config.moe.moe_router_bias else None
        self.w_in_EDF = normal(rngs, std, E, D, F)
        self.w_gate_EDF = normal(rngs, std, E, D, F) if config.gated else None
        self.w_out_EFD = normal(rngs, out_std, E, F, D)
        self.b_in_EF = constant(0.0, E, F) if bias else None
        self.b_gate_EF = constant(0.0, E, F) if bias and config.gated else None
        self.b_out_ED = constant(0.0, E, D) if bias else None

    def route(self, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the experts of each token, int32 (T, X), and their weights, float32 (T, X)."""
        config = self.config
        logits_TE = multiply("TD,DE->TE", x_TD, self.w_router_DE[...]).astype(jnp.float32)
        logits_TE = add_bias(logits_TE, self.b_router_E)
        if config.moe_router_score_function == "sigmoid":
            scores_TE = jax.nn.sigmoid(logits_TE)
        elif config.moe_router_pre_softmax:
            scores_TE = jax.nn.softmax(logits_TE, -1)
        else:
            scores_TE = logits_TE
        weights_TX, experts_TX = lax.top_k(scores_TE, config.moe_router_topk)
        if config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax:
            weights_TX = jax.nn.softmax(weights_TX, -1)
        elif config.moe_router_norm:
            weights_TX = weights_TX / weights_TX.sum(-1, keepdims=True)
        return experts_TX, weights_TX * config.moe_router_topk_scaling_factor

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        batch, length, width = x_BSD.shape
        x_TD = x_BSD.reshape(-1, width)
        experts_TX, weights_TX = self.route(x_TD)
        number, visits = experts_TX.shape
        experts = self.config.num_moe_experts
        order_U = jnp.argsort(experts_TX.reshape(-1), stable=True)
        experts_U = experts_TX.reshape(-1)[order_U]
        sizes_E = jnp.bincount(experts_TX.reshape(-1), length=experts).astype(jnp.int32)
        x_UD = x_TD[order_U // visits]

        def product(x, weight, bias):
            weight = weight[...]
            # Decoding may hold a quantized weight, which computes the same product.
            y = (
                weight.grouped(x, sizes_E, experts_U)
                if hasattr(weight, "grouped")
                else lax.ragged_dot(x, weight, sizes_E)
            )
            return y if bias is None else y + bias[...][experts_U]

        h_UF = product(x_UD, self.w_in_EDF, self.b_in_EF)
        gate_UF = None
        if self.w_gate_EDF is not None:
            gate_UF = product(x_UD, self.w_gate_EDF, self.b_gate_EF)
        y_UD = product(activate(self.activation, h_UF, gate_UF), self.w_out_EFD, None)
        y_UD = y_UD * weights_TX.reshape(-1)[order_U][:, None].astype(y_UD.dtype)
        # Back in the order of the tokens, whose visits are then neighbors.
        y_TD = y_UD[jnp.argsort(order_U)].reshape(number, visits, width).sum(1)
        y_BSD = scatter_sum(y_TD.reshape(batch, length, width), "tensor", 1)
        if self.b_out_ED is None:
            return y_BSD
        shares_TE = (jax.nn.one_hot(experts_TX, experts) * weights_TX[..., None]).sum(1)
        shares_BSE = own_part(shares_TE.reshape(batch, length, experts), "tensor", 1)
        return y_BSD + multiply("BSE,ED->BSD", shares_BSE.astype(y_BSD.dtype), self.b_out_ED[...])
