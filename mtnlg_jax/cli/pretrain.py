"""Train one run.

From prepared data, OUT; start it again with the same flags to resume it:

    python launch/pretrain.py --config=configs/small.py --set=data.path=OUT --workdir=RUN

From Megatron's PREFIX.bin and PREFIX.idx. The last hundredth of the documents is held out
(--set=data.heldout=SHARE, or another PREFIX):

    python launch/pretrain.py --config=configs/small.py --set=data.path=PREFIX \\
        --set=data.tokenizer=FOLDER --workdir=RUN

From the parameters of another run or of a converted model, for example to fine-tune it. The data
must have been prepared with its tokenizer, and the config must have its model:

    python launch/pretrain.py --config=configs/finetune_sentiment.py --init=RUN \\
        --set=data.path=OUT --workdir=TUNED

With several processes. On SLURM, TPU pods and GKE start it once on every host or for every card
(launch/cluster/launch.py does); elsewhere with the address of process 0:

    python launch/pretrain.py --config=configs/small.py --set=data.path=OUT --workdir=RUN \\
        --coordinator=HOST:1234 --processes=2 --process_id=0

Exit codes: 0 done, 2 bad input, 3 diverged, 4 no step was done in time (RUN/stacks-PROCESS.txt), 5
the processes or the replicas disagree, 6 another process ended (134: detected by JAX), 74 reading
or writing failed for a reason that may pass, 75 stopped by a signal (SIGTERM, SIGINT, SIGHUP,
SIGUSR1, SIGUSR2, SIGXCPU) with its state saved. After 4, 6, 74, 75, 134 and a kill it is worth
starting all processes again. With train.profile_signal=SIGUSR1 that signal records steps with the
profiler instead.
"""

import functools

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.processes import several_processes
from mtnlg_jax.cli.programs import executables
from mtnlg_jax.cli.training import parts, summary

with command.flag_group("The run"):
    _CONFIG = command.define_path("config", None, "file of configs/, or a model", required=True)
    _SET = flags.DEFINE_multi_string("set", [], "a value of the config, such as train.steps=10")
    _WORKDIR = command.define_path("workdir", None, "folder of the run", required=True)
    _INIT = command.define_path("init", None, "run or Hugging Face model to start from")
    _PROGRESS = flags.DEFINE_bool("progress", True, "show a progress bar")
    _FLAGS = flags.DEFINE_enum(
        "flags", "on", ["on", "off"], "set the compiler's flags that mtnlg_jax/xla_flags.py lists"
    )
for module in (executables, several_processes):
    flags.adopt_module_key_flags(module)


def main() -> None:
    from mtnlg_jax import compat, xla_flags
    from mtnlg_jax.config import load_config
    from mtnlg_jax.interop import registry
    from mtnlg_jax.train import goodput, processes
    from mtnlg_jax.train.loop import train

    goodput.count_from_process_start()
    registry.register()
    compat.quiet()
    compat.configure_cache()
    init = [f"train.init={_INIT.value}"] if _INIT.value else []
    config = load_config(_CONFIG.value, [*_SET.value, *init])
    several_processes.start(config.train.heartbeat_seconds)
    if _FLAGS.value == "on":
        xla_flags.set_flags(config.mesh, config.train.recompute)
    with processes.exit_on_failure():
        result = train(
            config,
            _WORKDIR.value,
            _PROGRESS.value,
            functools.partial(print, flush=True),
            tasks=parts.tasks_of(config),
            executables=executables.asked(),
            samples=parts.samples_of(config),
        )
        if processes.is_first():
            print(summary.described(result))


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main, log=True)
