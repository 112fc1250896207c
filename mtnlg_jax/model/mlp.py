"""The MLP of a block: two matrices with an activation between them, or three with a gate."""

# Shapes: B rows, S query positions, D width, F MLP width

import math
from collections.abc import Sequence

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.model.layer_watch import LayerWatch
from mtnlg_jax.model.parts import activate, add_bias, apart, constant, normal
from mtnlg_jax.model.tensor_products import Factor, multiply_each, multiply_scattered


class Mlp(nnx.Module):
    """Two matrices with an activation between them, or three with a gate."""

    def __init__(self, config: ModelConfig, width: int | None = None, *, rngs: nnx.Rngs):
        D = config.hidden_size
        F = width or config.mlp_width
        std = config.init_method_std
        out_std = config.init_method_std / math.sqrt(2 * config.num_layers)
        self.activation = config.activation
        gated = config.gated
        bias = config.has_bias("mlp")
        self.w_in_DF = normal(rngs, std, D, F)
        self.w_gate_DF = normal(rngs, std, D, F) if gated else None
        self.w_out_FD = normal(rngs, out_std, F, D)
        self.b_in_F = constant(0.0, F) if bias else None
        self.b_gate_F = constant(0.0, F) if bias and gated else None
        self.b_out_D = constant(0.0, D) if bias else None

    def factors(self) -> list[Factor]:
        """Return what the input is multiplied by, the gate last."""
        weights = [self.w_in_DF] if self.w_gate_DF is None else [self.w_in_DF, self.w_gate_DF]
        return [("BSD,DF->BSF", weight[...]) for weight in weights]

    def __call__(self, x_BSD: jax.Array, watch: LayerWatch | None = None) -> jax.Array:
        """Return the MLP of the whole sequence; in the manual region this device's part of S."""
        return self.output(multiply_each(x_BSD, self.factors()), watch=watch)

    def output(
        self,
        products: Sequence[jax.Array],
        overlap: bool = False,
        watch: LayerWatch | None = None,
    ) -> jax.Array:
        """Return the same, given the ``products`` of the input with `factors`."""
        h_BSF = add_bias(products[0], self.b_in_F)
        g_BSF = None if self.w_gate_DF is None else add_bias(products[1], self.b_gate_F)
        h_BSF = activate(self.activation, h_BSF, g_BSF)
        if g_BSF is not None:
            h_BSF = apart(h_BSF)
        if watch is not None:
            watch.units(h_BSF)
        h_BSF = checkpoint_name(h_BSF, "activation")
        y_BSD = multiply_scattered("BSF,FD->BSD", h_BSF, self.w_out_FD[...], overlap)
        return add_bias(y_BSD, self.b_out_D)
