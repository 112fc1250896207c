"""The flags that launch/generate.py and launch/task.py have in common."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("Model"):
    ADAPTER = command.define_path(
        "adapter",
        None,
        "adapter of the model at --workdir: the name of one in the run, its file, or the folder of "
        "a PEFT adapter",
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
