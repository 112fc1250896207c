"""What training changes in the plain forward pass: activation recomputation, dropout, and hooks."""

# Shapes: B rows, S query positions, D width

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import Offloadable, Recompute

from mtnlg_jax.model.attention import attention
from mtnlg_jax.model.layer_watch import LayerWatch
from mtnlg_jax.parallel.collectives import sequence_positions


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
    # "product": one that a ring has put together. Its chunks are products too, but nothing reads
    # them again.
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, _named("product", *names)
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


LAYER_INPUT = "layer_input"  # where `policy_of` offloads it


def policy_of(recompute: str, offload: bool) -> Callable:
    """Return the policy of jax.checkpoint for a layer.

    With ``offload`` everything that RECOMPUTE[recompute] keeps, and the layer's input, waits in the
    memory of the host for the backward pass.
    """
    keeps = RECOMPUTE[recompute]
    if not offload:
        return keeps
    is_input = _named(LAYER_INPUT)

    def policy(primitive, *args, **params):
        kept = keeps(primitive, *args, **params) or is_input(primitive, *args, **params)
        return Offloadable("device", "pinned_host") if kept else Recompute

    return policy


class Hooks(NamedTuple):
    """Changes to the plain forward pass; the defaults change nothing.

    Mixed precision and ZeRO-3 use ``prepare``, activation recomputation ``recompute`` and
    ``offload``, context parallelism ``attend``, dropout ``dropout_key`` and ``rows_B``, experts
    ``penalty_B`` and ``counted_B``, tensor parallelism ``overlap``, and statistics ``watch``.
    """

    prepare: Callable = lambda layer: layer  # one layer's stored parameters -> compute weights
    recompute: str = "elementwise"  # a key of RECOMPUTE
    offload: bool = False  # whether what is kept waits in the memory of the host
    attend: Callable = attention  # attention(), or its equivalent over a split sequence
    dropout_key: jax.Array | None = None  # None: no dropout
    rows_B: jax.Array | None = None  # number of each row in the global batch, for dropout
    penalty_B: jax.Array | None = None  # weight of each row's router losses; None: no such losses
    counted_B: jax.Array | None = None  # 1 for rows whose tokens count as loads of experts, else 0
    overlap: bool = False  # mesh.tp_comm_overlap: multiply a chunk while another is sent
    watch: Callable[..., LayerWatch] | None = None  # (causal, segment ids) -> reads one layer


PLAIN = Hooks()
