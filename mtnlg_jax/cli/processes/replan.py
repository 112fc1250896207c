"""Print the mesh for what is left of a run: the number of nodes that it takes, and --set flags.

    python -m mtnlg_jax.cli.processes.replan --config=C --devices=12 --node=4
    2 --set=mesh.data=2 --set=mesh.tensor=4 --set=train.micro_batch_size=4

launch.py and slurm.sbatch of launch/cluster call this. It uses no device. Exit code 2: no mesh of
these devices takes the batch; the message has the numbers of devices that would do.
"""

import dataclasses
import os
import sys

from absl import flags

from mtnlg_jax import command

_CONFIG = command.define_path("config", None, "that of the run", required=True)
_SET = flags.DEFINE_multi_string("set", [], "a value of the config, as for the run")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run, which knows its vocabulary")
_DEVICES = flags.DEFINE_integer(
    "devices", None, "number of devices that are left", required=True, lower_bound=1
)
_NODE = flags.DEFINE_integer(
    "node", 1, "devices of a node, which are used together or not at all", lower_bound=1
)
_WHOLE = flags.DEFINE_integer(
    "whole", None, "number of devices of the whole run; default: --devices", lower_bound=1
)
_KIND = flags.DEFINE_string(
    "kind",
    None,
    "kind of chip, such as H100, in whose memory the run must fit; without it, in what the mesh of "
    "the config takes on the whole run",
)


def main() -> None:
    # Before JAX is imported: the devices are the run's.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from mtnlg_jax.config import load_config
    from mtnlg_jax.interop import registry
    from mtnlg_jax.planning import replan

    registry.register()
    config = load_config(_CONFIG.value, _SET.value)
    known = replan.vocabulary_of(_WORKDIR.value)
    size = config.model.vocab_size or known or replan.VOCABULARY
    model = dataclasses.replace(config.model, vocab_size=size)
    config = dataclasses.replace(config, model=model)
    found = replan.replan(config, _DEVICES.value, _NODE.value, _KIND.value, _WHOLE.value)
    line, told = replan.line_of(config, *found)
    print(told, file=sys.stderr)
    print(line)


if __name__ == "__main__":
    command.run(main)
