"""The flags of the command that writes certificates."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("The config"):
    CONFIG = command.define_path(
        "config", None, "a file of configs/ or a Hugging Face folder; default: that of --workdir"
    )
    SET = flags.DEFINE_multi_string("set", [], "a value of the config, such as mesh.tensor=4")
with command.flag_group("The small copy"):
    DEVICES = flags.DEFINE_integer(
        "devices", 8, "number of devices to simulate on the CPU, at most"
    )
with command.flag_group("The result"):
    WORKDIR = command.define_path(
        "workdir", None, "folder of a run: its config; the certificate becomes its certificate.json"
    )
    OUTPUT = command.define_path(
        "output", None, "file for the certificate, as JSON; with --workdir in place of its"
    )
    PROGRESS = flags.DEFINE_bool("progress", True, "tell what is computed, on standard error")
