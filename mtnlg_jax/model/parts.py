"""What the modules of the model share: parameters, products, activations and norms."""

# Shapes: B rows, S query positions, D width, N heads, H head width

import functools
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mtnlg_jax import compat
from mtnlg_jax.config import ModelConfig
from mtnlg_jax.parallel.collectives import sum_over


def normal(rngs: nnx.Rngs, std: float, *shape: int) -> nnx.Param:
    # Drawn as a matrix: XLA needs seconds to compile a draw of more dims.
    flat = jax.random.normal(rngs.params(), (shape[0], math.prod(shape[1:])), jnp.float32)
    return nnx.Param(std * flat.reshape(shape))


def constant(value: float, *shape: int) -> nnx.Param:
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


class WholeWeight:
    """A weight in another form than an array, which takes an array's place in a Param."""

    def __getitem__(self, key: Any) -> Self:
        """Return the weight itself for ``param[...]``, as an array does."""
        assert key is ..., "such a weight is read as a whole"
        return self


def multiply(dims: str, x: jax.Array, weight: jax.Array | Callable) -> jax.Array:
    """Return the einsum ``dims`` of ``x`` and ``weight``.

    A weight may be a callable that computes the same product instead of an array: a quantized one
    in decoding, or one with an adapter in training.
    """
    return weight(x) if callable(weight) else jnp.einsum(dims, x, weight)


def apart(x: jax.Array) -> jax.Array:
    """Return ``x``. On TPUs neither what computes it nor its gradient is fused to a product.

    The TPU compiler fuses a gated activation and its gradient to the products beside them, which
    then take 0.70 and 0.61 of the peak by the compiler's own estimate instead of 0.85
    (docs/predicted_step.md). An activation without a gate is better fused: its gradient reads one
    array, not two.
    """
    return lax.optimization_barrier(x) if compat.platform() == "tpu" else x


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return x if bias is None else x + lax.broadcast_to_rank(bias[...], x.ndim)


@jax.custom_jvp
def exact_gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) (Hendrycks 2016), by the complementary error function.

    JAX's own derivative of it does not trace in a manual region (jax 0.12).
    """
    return 0.5 * x * lax.erfc(-x / math.sqrt(2))


@exact_gelu.defjvp
def _exact_gelu_jvp(primals, tangents):
    (x,) = primals
    (dx,) = tangents
    share = 0.5 * lax.erfc(-x / math.sqrt(2))
    density = jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)
    return x * share, (share + x * density) * dx


# Activation of an MLP, or of its gate. "gelu" is the tanh form of GPT-2 and Megatron-LM (Hendrycks
# 2016).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": exact_gelu,
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
    "geglu_exact": exact_gelu,
    "swiglu_oai": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def activate(name: str, h: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Return the inner state of an MLP from the product ``h`` and that of its gate, if it has one
    (Shazeer 2020)."""
    if gate is None:
        return ACTIVATIONS[name](h)
    if name == "swiglu_oai":  # gpt-oss clips both and adds 1
        h = jnp.clip(h, -7, 7) + 1
        gate = jnp.minimum(gate, 7)
    return h * ACTIVATIONS[name](gate)


class Norm(nnx.Module):
    """LayerNorm (Ba 2016) or RMSNorm (Zhang 2019), computed in float32."""

    def __init__(self, config: ModelConfig):
        self.epsilon = config.norm_epsilon
        self.centered = config.normalization == "layernorm"
        self.scale_D = constant(1.0, config.hidden_size)
        self.bias_D = constant(0.0, config.hidden_size) if config.has_bias("norm") else None

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        x = x_BSD.astype(jnp.float32)
        if self.centered:
            x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        x = x * lax.broadcast_to_rank(self.scale_D[...].astype(jnp.float32), x.ndim)
        if self.bias_D is not None:
            x = x + lax.broadcast_to_rank(self.bias_D[...].astype(jnp.float32), x.ndim)
        return x.astype(x_BSD.dtype)


class HeadNorm(nnx.Module):
    """RMSNorm of queries or keys: of each head (Henry 2020), or of all heads together (OLMo 2)."""

    def __init__(self, config: ModelConfig, *, of_keys: bool):
        heads = config.kv_heads if of_keys else config.num_attention_heads
        width = config.head_width
        together = config.qk_layernorm == "full"
        self.epsilon = config.norm_epsilon
        self.numbers = heads * width
        self.scale_H = None if together else constant(1.0, width)
        self.scale_NH = constant(1.0, heads, width) if together and not of_keys else None
        self.scale_KH = constant(1.0, heads, width) if together and of_keys else None

    def __call__(self, x_BSNH: jax.Array) -> jax.Array:
        x = x_BSNH.astype(jnp.float32)
        if self.scale_H is not None:
            scale = self.scale_H[...]
            variance = jnp.square(x).mean(-1, keepdims=True)
        else:
            scaled = self.scale_KH if self.scale_NH is None else self.scale_NH
            assert scaled is not None, "a norm of all heads has one of the two"
            scale = scaled[...]
            squares = jnp.square(x).sum((-2, -1), keepdims=True)
            # A device of tensor has its own heads, or all of them where they are not split.
            whole = math.prod(x.shape[-2:]) == self.numbers
            variance = (squares if whole else sum_over(squares, "tensor")) / self.numbers
        x = x * lax.rsqrt(variance + self.epsilon)
        return (x * lax.broadcast_to_rank(scale.astype(jnp.float32), x.ndim)).astype(x_BSNH.dtype)
