"""The flags that say which model decodes, and how it is held."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("Model"):
    CHECKPOINT = command.define_checkpoint()
    DTYPE = flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "type of the products and the cache"
    )
    WEIGHTS = flags.DEFINE_enum(
        "weights",
        None,
        ["int8"],
        "type of the stored weights; on a CPU several rows are then much faster; "
        "launch/evaluate.py measures the loss in quality",
    )
    CACHE = flags.DEFINE_enum("cache", None, ["int8"], "type of the cached keys and values")
