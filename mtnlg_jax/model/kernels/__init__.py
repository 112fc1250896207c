"""Implementations behind ``mtnlg_jax.model.attention``. Each takes the public arrays, a Mask and
Blocks. Only ``attention`` chooses among them."""
