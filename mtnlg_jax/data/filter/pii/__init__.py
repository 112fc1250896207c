"""Personal data and secrets of known shapes, masked by placeholders such as <EMAIL>."""

from mtnlg_jax.data.filter.pii.masking import KINDS, find, lines_with, mask

__all__ = ["KINDS", "find", "lines_with", "mask"]
