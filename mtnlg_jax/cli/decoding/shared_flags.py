"""The flags that launch/generate.py and launch/task.py have in common."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("Model"):
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
