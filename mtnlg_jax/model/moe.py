"""Experts in place of the MLP (Shazeer 2017): a router sends each token to a few of them.

Nothing is dropped. Tokens are sorted by expert, and one grouped product computes all experts
(Gale 2022, MegaBlocks).
"""

# Shapes: B rows, S query positions, D width, F width of an expert, E experts, X experts of a token,
# T tokens (B x S), U visits of a token to an expert (T x X), C 1 (the gate of the shared expert).
# Where experts are split, T and U are the tokens and visits of all devices along expert.

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.model.grouped import grouped_product
from mtnlg_jax.model.layer_watch import LayerWatch
from mtnlg_jax.model.mlp import Mlp
from mtnlg_jax.model.parts import activate, add_bias, constant, multiply, normal
from mtnlg_jax.parallel.auto import auto_size, axes_of
from mtnlg_jax.parallel.collectives import (
    axis_index,
    axis_size,
    gather,
    own_part,
    scatter_sum,
    sum_over,
    vary,
)
from mtnlg_jax.parallel.mesh import AXES, spec_of


@jax.custom_vjp
def with_penalty(x: jax.Array, penalty: jax.Array) -> jax.Array:
    """Return ``x``; its gradient is that of a loss to which the scalar ``penalty`` is added.

    So scans and pipelines need not return the routers' losses beside their outputs.
    """
    return x


with_penalty.defvjp(
    lambda x, penalty: (x, penalty), lambda penalty, grad: (grad, jnp.ones_like(penalty))
)


@jax.custom_vjp
def with_loads(x: jax.Array, bias_E: jax.Array, loads_E: jax.Array) -> jax.Array:
    """Return ``x``; the gradient of ``bias_E`` is ``loads_E``, whatever the loss is.

    So loads are summed over micro-batches, stages and devices in the same way as gradients.
    """
    return x


with_loads.defvjp(
    lambda x, bias_E, loads_E: (x, loads_E),
    lambda loads_E, grad: (grad, loads_E, jnp.zeros_like(loads_E)),
)


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
        choosing = config.moe.moe_router_enable_expert_bias
        self.b_balance_E = constant(0.0, E) if choosing else None
        self.w_in_EDF = normal(rngs, std, E, D, F)
        self.w_gate_EDF = normal(rngs, std, E, D, F) if config.gated else None
        self.w_out_EFD = normal(rngs, out_std, E, F, D)
        self.b_in_EF = constant(0.0, E, F) if bias else None
        self.b_gate_EF = constant(0.0, E, F) if bias and config.gated else None
        self.b_out_ED = constant(0.0, E, D) if bias else None
        width = config.moe.moe_shared_expert_intermediate_size
        self.shared = Mlp(config, width, rngs=rngs) if width else None
        gated = width and config.moe.moe_shared_expert_gate
        self.w_shared_DC = normal(rngs, std, D, 1) if gated else None

    def router_logits(self, x_TD: jax.Array) -> jax.Array:
        """Return the router's logits, float32 (T, E)."""
        logits_TE = multiply("TD,DE->TE", x_TD, self.w_router_DE[...]).astype(jnp.float32)
        return add_bias(logits_TE, self.b_router_E)

    def route(self, logits_TE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the experts of each token, int32 (T, X), and their weights, float32 (T, X)."""
        config = self.config
        if config.moe_router_score_function == "sigmoid":
            scores_TE = jax.nn.sigmoid(logits_TE)
        elif config.moe_router_pre_softmax:
            scores_TE = jax.nn.softmax(logits_TE, -1)
        else:
            scores_TE = logits_TE
        if self.b_balance_E is None:
            weights_TX, experts_TX = lax.top_k(scores_TE, config.moe_router_topk)
        else:
            # The bias chooses; the weights are the scores without it.
            biased_TE = add_bias(lax.stop_gradient(scores_TE), self.b_balance_E)
            experts_TX = lax.top_k(biased_TE, config.moe_router_topk)[1]
            weights_TX = jnp.take_along_axis(scores_TE, experts_TX, -1)
        if config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax:
            weights_TX = jax.nn.softmax(weights_TX, -1)
        elif config.moe_router_norm:
            weights_TX = weights_TX / weights_TX.sum(-1, keepdims=True)
        return experts_TX, weights_TX * config.moe_router_topk_scaling_factor

    def penalty(
        self, logits_TE: jax.Array, experts_TX: jax.Array, penalty_B: jax.Array
    ) -> jax.Array:
        """Return this device's share of the router's losses, a scalar.

        The loss of a row is moe_aux_loss_coeff x E sum_e f_e P_e, with the share f of visits and
        the mean probability P of each expert, plus moe_z_loss_coeff x mean(logsumexp(logits)^2).
        """
        config = self.config
        rows = penalty_B.shape[0]
        experts = config.num_moe_experts
        logits_BSE = logits_TE.reshape(rows, -1, experts)
        # Devices along context hold parts of a row, and devices along tensor the same numbers.
        tokens = logits_BSE.shape[1] * axis_size("context")
        visits_BSE = jax.nn.one_hot(experts_TX, experts).sum(1).reshape(logits_BSE.shape)
        shares_BE = sum_over(visits_BSE.sum(1), "context") / (tokens * experts_TX.shape[1])
        if config.moe_router_score_function == "sigmoid":
            scores_BSE = jax.nn.sigmoid(logits_BSE)
            scores_BSE = scores_BSE / scores_BSE.sum(-1, keepdims=True)
        else:
            scores_BSE = jax.nn.softmax(logits_BSE, -1)
        # The shares are counts: gradients go through the probabilities of this device's tokens.
        means_BE = scores_BSE.sum(1) / tokens
        balance_B = experts * (lax.stop_gradient(shares_BE) * means_BE).sum(-1)
        z_B = jnp.square(jax.nn.logsumexp(logits_BSE, -1)).sum(1) / tokens
        losses_B = config.moe_aux_loss_coeff * balance_B + config.moe_z_loss_coeff * z_B
        return jnp.dot(losses_B, penalty_B) / axis_size("tensor")

    def loads(self, experts_TX: jax.Array, counted_B: jax.Array) -> jax.Array:
        """Return this device's share of the tokens of each expert, float32 (E,)."""
        counted_TX = jnp.repeat(counted_B, experts_TX.size // counted_B.size)
        experts = self.config.num_moe_experts
        # Devices along tensor count the same tokens.
        loads_E = jnp.bincount(experts_TX.reshape(-1), weights=counted_TX, length=experts)
        return loads_E / axis_size("tensor")

    def __call__(
        self,
        x_BSD: jax.Array,
        penalty_B: jax.Array | None = None,
        counted_B: jax.Array | None = None,
        watch: LayerWatch | None = None,
    ) -> jax.Array:
        """Return the experts' output, (B, S, D); in the manual region this device's part of S.

        ``penalty_B`` weights the router's losses of each row. Tokens of rows with ``counted_B`` 1
        count as loads of their experts. ``watch`` reads the units of all experts. None leaves each
        of these out.
        """
        batch, length, width = x_BSD.shape
        x_TD = x_BSD.reshape(-1, width)
        logits_TE = self.router_logits(x_TD)
        experts_TX, weights_TX = self.route(logits_TE)
        if penalty_B is not None:
            x_TD = with_penalty(x_TD, self.penalty(logits_TE, experts_TX, penalty_B))
        if counted_B is not None and self.b_balance_E is not None:
            x_TD = with_loads(x_TD, self.b_balance_E[...], self.loads(experts_TX, counted_B))
        y_BSD = self._visit(x_TD, experts_TX, weights_TX, (batch, length), watch)
        if self.shared is not None:
            y_BSD = y_BSD + self._gated(self.shared(x_BSD, watch), x_BSD)
        if self.b_out_ED is None:
            return y_BSD
        experts = self.config.num_moe_experts
        shares_TE = (jax.nn.one_hot(experts_TX, experts) * weights_TX[..., None]).sum(1)
        shares_BSE = own_part(shares_TE.reshape(batch, length, experts), "tensor", 1)
        # Few numbers, so each device gathers the biases of all experts.
        bias_ED = gather(self.b_out_ED[...], "expert", 0)
        return y_BSD + multiply("BSE,ED->BSD", shares_BSE.astype(y_BSD.dtype), bias_ED)

    def _visit(
        self,
        x_TD: jax.Array,
        experts_TX: jax.Array,
        weights_TX: jax.Array,
        rows: tuple[int, int],
        watch: LayerWatch | None,
    ) -> jax.Array:
        """Return the weighted outputs of each token's experts, this device's part of (B, S, D).

        ``rows`` is (B, S). Where experts are split, every device gathers the tokens of all devices
        along expert, computes the visits to its own experts, and a reduce-scatter adds the outputs.
        An exact all-to-all with fixed shapes would send as much: in the worst case all tokens of a
        device visit the experts of one other, so each pair needs room for all of them.
        """
        batch, length = rows
        tokens = (x_TD, experts_TX, weights_TX)
        if math.prod(map(auto_size, AXES)) > 1:
            return self._visit_over_mesh(*(x.reshape(batch, length, -1) for x in tokens))
        gathered = [gather(x, "expert", 0) for x in tokens]
        y_TD = self._own_visits(self._matrices(), *gathered, watch=watch)
        # Rows of all devices along expert: the sum over tensor comes first and leaves less to send.
        y_BSD = scatter_sum(y_TD.reshape(-1, length, y_TD.shape[-1]), "tensor", 1)
        return scatter_sum(y_BSD, "expert", 0)

    def _visit_over_mesh(
        self, x_BSD: jax.Array, experts_BSX: jax.Array, weights_BSX: jax.Array
    ) -> jax.Array:
        """Do the same as `_visit` where XLA splits the program, (B, S, D).

        XLA would gather the experts' weights for the sort and the loops of grouped products, so
        this part has collectives of its own: each device computes the visits of its tokens to its
        experts, and a sum over ``expert`` and ``tensor`` adds the outputs.
        """
        batch, length, width = x_BSD.shape
        rows = tuple(axis for axis in axes_of("B", batch) if axis != "expert")
        positions = axes_of("Q", length)
        by_token = P(rows or None, positions or None)
        # XLA may abort on a sort that it splits in part, so it splits nothing here.
        used = {"expert", "tensor", *rows, *positions}
        unused = tuple(axis for axis in AXES if auto_size(axis) > 1 and axis not in used)
        matrices = self._matrices()
        specs: dict[str, Any] = {}
        for name, weight in matrices.items():
            spec = spec_of(name.rpartition("_")[2], zero=0)
            # A quantized weight has several arrays.
            specs[name] = weight.specs(spec) if hasattr(weight, "specs") else spec

        def own(x_BSD, experts_BSX, weights_BSX, matrices):
            # The two products of `grouped_product` differ in type unless all vary.
            tokens = vary([x.reshape(-1, x.shape[-1]) for x in (x_BSD, experts_BSX, weights_BSX)])
            y_TD = self._own_visits(matrices, *tokens)
            y_TD = lax.psum(y_TD, ("expert", "tensor"))
            # Equal on all devices of other axes, which only a reduction tells JAX.
            y_TD = lax.pmean(y_TD, unused) if unused else y_TD
            return y_TD.reshape(x_BSD.shape)

        return jax.shard_map(
            own,
            in_specs=(by_token, by_token, by_token, specs),
            out_specs=by_token,
            axis_names=used.union(unused),
        )(x_BSD, experts_BSX, weights_BSX, matrices)

    def _matrices(self) -> dict[str, Any]:
        """Return the weights and biases of grouped products by their names."""
        names = ("w_in_EDF", "b_in_EF", "w_gate_EDF", "b_gate_EF", "w_out_EFD")
        held = {name: getattr(self, name) for name in names}
        return {name: value[...] for name, value in held.items() if value is not None}

    def _own_visits(
        self,
        matrices: dict[str, Any],
        x_TD: jax.Array,
        experts_TX: jax.Array,
        weights_TX: jax.Array,
        *,
        watch: LayerWatch | None = None,
    ) -> jax.Array:
        """Return the weighted outputs of this device's experts for tokens (T, D)."""
        number, visits = experts_TX.shape
        parts = axis_size("expert")
        experts = self.config.num_moe_experts // parts
        # This device's experts are numbered from 0. Visits to others are sorted behind theirs.
        own_U = experts_TX.reshape(-1) - axis_index("expert") * experts
        if parts > 1:
            own_U = jnp.where((own_U >= 0) & (own_U < experts), own_U, experts)
        order_U = jnp.argsort(own_U, stable=True)
        places_U = jnp.argsort(order_U)
        # A token visits an expert at most once, so a device has at most this many visits.
        most = number * min(visits, experts)
        order_U = order_U[:most]
        # Rows behind the last visit read a bias as well, so their expert must exist.
        experts_U = jnp.minimum(own_U[order_U], experts - 1)
        sizes_E = jnp.bincount(own_U, length=experts).astype(jnp.int32)
        x_UD = x_TD[order_U // visits]
        if parts > 1:
            # Rows behind the last visit are in no group: they and their gradients are 0.
            mine_U = own_U[order_U] < experts
            x_UD = jnp.where(mine_U[:, None], x_UD, 0)

        def product(x, name, bias=None):
            weight = matrices[name]
            # Decoding may hold a quantized weight, which computes the same product.
            y = (
                weight.grouped(x, sizes_E, experts_U)
                if hasattr(weight, "grouped")
                else grouped_product(x, weight, sizes_E)
            )
            return y if bias not in matrices else y + matrices[bias][experts_U]

        h_UF = product(x_UD, "w_in_EDF", "b_in_EF")
        gate_UF = product(x_UD, "w_gate_EDF", "b_gate_EF") if "w_gate_EDF" in matrices else None
        h_UF = activate(self.activation, h_UF, gate_UF)
        if watch is not None:
            used_B = gather(watch.used_B, "expert", 0)
            used_T = jnp.repeat(used_B, number // used_B.shape[0])
            mine = own_U[order_U] < experts
            watch.visits(h_UF, used_T[order_U // visits] & mine, experts_U, experts)
        y_UD = product(h_UF, "w_out_EFD")
        y_UD = y_UD * weights_TX.reshape(-1)[order_U][:, None].astype(y_UD.dtype)
        if parts > 1:
            y_UD = jnp.where(mine_U[:, None], y_UD, 0)
        # Back to the order of tokens, in which the visits of a token are neighbors.
        y_UD = y_UD.at[places_U].get(mode="fill", fill_value=0) if parts > 1 else y_UD[places_U]
        return y_UD.reshape(number, visits, -1).sum(1)

    def _gated(self, y_BSD: jax.Array, x_BSD: jax.Array) -> jax.Array:
        """Return the output of the shared expert through its gate, if it has one."""
        if self.w_shared_DC is None:
            return y_BSD
        own_BSD = own_part(x_BSD, "tensor", 1)
        return y_BSD * jax.nn.sigmoid(multiply("BSD,DC->BSC", own_BSD, self.w_shared_DC[...]))
