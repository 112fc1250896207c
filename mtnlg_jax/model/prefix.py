"""What stands ahead of the tokens: an image or features, brought to the width of the model.

The projector is a matrix and a bias (Liu 2023, LLaVA, equation 1). Its output takes the place of a
token's row of the embedding table: positions, norms and factors of the embedding act on both alike.
An image first passes a patch encoder: each patch is embedded, its learned position is added
(Dosovitskiy 2021, ViT, equation 1), and gelu follows. Patches do not see each other before the
layers of the model.
"""

# Shapes: B rows, P positions of the prefix, I numbers of a patch, C width of a feature, D width

import jax
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.model.parts import ACTIVATIONS, add_bias, constant, multiply, normal


class PrefixEncoder(nnx.Module):
    """The projector, and for images the patch encoder before it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        prefix = config.prefix
        D = config.hidden_size
        std = config.init_method_std
        self.patch_size = prefix.patch_size
        self.of_images = prefix.image_size > 0
        if self.of_images:
            # Inputs of about unit variance keep it.
            numbers = prefix.patch_numbers
            self.w_patch_IC = normal(rngs, numbers**-0.5, numbers, prefix.width)
            self.b_patch_C = constant(0.0, prefix.width)
            self.positions_PC = normal(rngs, std, prefix.positions, prefix.width)
        self.w_project_CD = normal(rngs, std, prefix.width, D)
        self.b_project_D = constant(0.0, D)

    def __call__(self, prefix: jax.Array) -> jax.Array:
        """Return (B, P, D) of features (B, P, C), or of uint8 images (B, size, size, channels)."""
        w_CD = self.w_project_CD[...]
        x_BPC = prefix.astype(w_CD.dtype)
        if self.of_images:
            x_BPI = patches_of(x_BPC / 127.5 - 1, self.patch_size)
            x_BPC = multiply("BPI,IC->BPC", x_BPI, self.w_patch_IC[...])
            x_BPC = add_bias(x_BPC, self.b_patch_C) + self.positions_PC[...][None]
            x_BPC = ACTIVATIONS["gelu"](x_BPC)
        return add_bias(multiply("BPC,CD->BPD", x_BPC, w_CD), self.b_project_D)


def patches_of(images: jax.Array, size: int) -> jax.Array:
    """Return the patches of square images (B, height, width, channels), row by row: (B, P, I)."""
    rows, height, _, channels = images.shape
    side = height // size
    cut = images.reshape(rows, side, size, side, size, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(rows, side * side, -1)
