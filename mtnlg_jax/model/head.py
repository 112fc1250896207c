"""The output head: from hidden states to logits, over a vocabulary that ``tensor`` may split."""

# Shapes: B rows or tokens, D width, V vocabulary

import dataclasses

import jax
import jax.numpy as jnp

from mtnlg_jax.parallel.collectives import axis_index, axis_size

# The logit of padding: its probability is 0. It is finite, since 0 x infinity is not a number.
NEVER = -1e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """An output head: logits = cap(multiplier x (x W^T) + bias), cap(y) = c tanh(y / c).

    ``table_VD`` and ``bias_V`` are this device's part of the vocabulary. In decoding the table may
    be a quantized weight, which is called instead of multiplied.
    """

    table_VD: jax.Array
    bias_V: jax.Array | None = None
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    multiplier: float = dataclasses.field(default=1.0, metadata={"static": True})
    # Rows at the end of the whole table that no token has.
    padding: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def vocabulary(self) -> int:
        """Rows of this device's part of the table."""
        return self.table_VD.shape[0]

    def logits(self, x: jax.Array) -> jax.Array:
        """Return float32 logits (..., V) of hidden states (..., D)."""
        product = jnp.einsum("...D,VD->...V", x, self.table_VD, preferred_element_type=jnp.float32)
        return self.finish(product)

    def finish(self, product: jax.Array) -> jax.Array:
        """Return the logits, given the product with the table."""
        if self.multiplier != 1:
            product = self.multiplier * product
        if self.bias_V is not None:
            bias = self.bias_V.astype(jnp.float32)
            product = product + jnp.expand_dims(bias, tuple(range(product.ndim - 1)))
        if self.softcap is not None:
            product = self.softcap * jnp.tanh(product / self.softcap)
        real = self.real(product.shape[-1])
        if real is not None:
            product = jnp.where(real, product, NEVER)
        return product

    def real(self, own: int) -> jax.Array | None:
        """Return which of this device's ``own`` logits belong to tokens, bool (V,); None if all
        do."""
        if not self.padding:
            return None
        last = own * axis_size("tensor") - self.padding
        return axis_index("tensor") * own + jnp.arange(own) < last

    def before_cap(self, d_logits: jax.Array, logits: jax.Array) -> jax.Array:
        """Return the gradient by the capped quantity, given that by the ``logits``."""
        if self.softcap is None:
            return d_logits
        return d_logits * (1 - jnp.square(logits / self.softcap))
