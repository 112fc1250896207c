"""The flags that launch/generate.py and launch/task.py have in common."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("Model"):
    CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "which checkpoint")
    DTYPE = flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "type of the products and the cache"
    )
    WEIGHTS = flags.DEFINE_enum(
        "weights",
        None,
        ["int8"],
        "type of the stored weights; launch/evaluate.py measures the loss in quality",
    )
    CACHE = flags.DEFINE_enum("cache", None, ["int8"], "type of the cached keys and values")

    ADAPTER = command.define_path(
        "adapter", None, "folder of a PEFT adapter to merge into the model at --workdir"
    )

with command.flag_group("Output"):
    JSON = flags.DEFINE_bool("json", False, "print one JSON object")

with command.flag_group("Any setting of decoding"):
    SET = flags.DEFINE_multi_string(
        "set",
        [],
        "decode.KEY=VALUE: a setting of the section decode of docs/configuration.md; "
        "mesh.KEY=VALUE: devices to split the model over (data, tensor, expert, context)",
    )
