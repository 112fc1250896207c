"""Start launch/pretrain.py on many hosts, or in several local processes, and restart it on failure.

Other commands run on many hosts as well (--script).

    python launch/cluster/launch.py --cluster=local --nodes=2 --local_devices=4 \\
        --config=C --workdir=RUN
    python launch/cluster/launch.py --cluster=slurm --nodes=4 --chips=8 \\
        --option=--partition=gpu --config=C --workdir=RUN
    python launch/cluster/launch.py --cluster=gke_gpu --nodes=4 --chips=8 \\
        --accelerator=nvidia-h100-80gb --image=I ...
    python launch/cluster/launch.py --cluster=gke_tpu --nodes=4 --chips=4 \\
        --accelerator=tpu-v6e-slice --topology=4x4 ...
    python launch/cluster/launch.py --cluster=tpu_pod --name=TPU --zone=ZONE \\
        --config=C --workdir=RUN

Generate, evaluate, do a task or serve with a model that is split over several processes; --argument
gives any flag of that command. Process 0 prints and listens; nothing is restarted:

    python launch/cluster/launch.py --cluster=local --nodes=2 --local_devices=4 --script=generate \\
        --workdir=RUN --set=mesh.tensor=8 --set=mesh.data=1 --argument=--prompt="Once upon a time"

--dry_run only prints what would run. --config, --set, --workdir and --flags are those of
launch/pretrain.py. Paths are relative to the current folder. The hosts of gke and tpu_pod do not
have it, so paths there must be absolute.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType

from absl import flags

from mtnlg_jax import command, errors
from mtnlg_jax.cli.processes.nodes import Nodes, fitted
from mtnlg_jax.config import Config, load_config, map_paths, override, split_argument
from mtnlg_jax.hardware import CHIPS

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
# Signals that are passed on to the processes of --cluster=local. SIGHUP stays ignored if it was
# ignored at the start, as under nohup.
PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")

_CLUSTER = flags.DEFINE_enum(
    "cluster",
    None,
    ["local", "slurm", "gke_gpu", "gke_tpu", "tpu_pod"],
    "where to run",
    required=True,
)
_SCRIPT = flags.DEFINE_enum(
    "script",
    "pretrain",
    ["pretrain", "generate", "evaluate", "audit", "bias", "task", "serve"],
    "the command of launch/",
)
_ARGUMENT = flags.DEFINE_multi_string(
    "argument", [], "another flag of --script, such as --argument=--prompt=Once"
)
_CONFIG = command.define_path("config", None, "pretrain: a file of configs/")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run, visible to every host", required=True
)
_SET = flags.DEFINE_multi_string("set", [], "a value of the config, such as train.steps=10")
_FLAGS = flags.DEFINE_enum(
    "flags", "on", ["on", "off"], "the compiler flags of mtnlg_jax/xla_flags.py"
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print what would run")
_NAME = flags.DEFINE_string("name", "mtnlg-jax", "name of the job; tpu_pod: of the TPU")
_NODES = flags.DEFINE_integer(
    "nodes", 1, "number of hosts (gke_tpu: per slice); local: of processes", lower_bound=1
)
_CHIPS = flags.DEFINE_integer("chips", 8, "cards or chips per host", lower_bound=1)
_RESTARTS = flags.DEFINE_integer("restarts", 20, "how often to restart a failed run", lower_bound=0)
_OPTION = flags.DEFINE_multi_string(
    "option", [], "slurm: an option of sbatch, such as --option=--partition=gpu"
)
_ZONE = flags.DEFINE_string("zone", None, "tpu_pod: zone of Google Cloud")
_IMAGE = flags.DEFINE_string(
    "image", None, "gke: a container image with the repository as its working directory"
)
_ACCELERATOR = flags.DEFINE_string(
    "accelerator", None, "gke: the node pool's label, such as nvidia-h100-80gb"
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "gke_tpu: topology of a slice, such as 4x4")
_SLICES = flags.DEFINE_integer("slices", 1, "gke_tpu: number of slices", lower_bound=1)
_CLAIM = flags.DEFINE_string(
    "claim", None, "gke: the volume claim that holds --workdir and the data"
)
_MOUNT = flags.DEFINE_string("mount", "/runs", "gke: where the claim is mounted")
_LOCAL_DEVICES = flags.DEFINE_integer(
    "local_devices", None, "local: devices to simulate on the CPU in each process"
)
_GRACE = flags.DEFINE_integer(
    "grace", 120, "local: seconds that the others have to end by themselves after a failure"
)
_REPLAN = flags.DEFINE_bool(
    "replan",
    False,
    "after the loss of nodes go on with the fastest mesh of those that are left (docs/recovery.md)",
)
_HEALTH = flags.DEFINE_string(
    "health", None, "local: a command that fails where node $MTNLG_NODE cannot be used"
)
_STRIKES = flags.DEFINE_integer(
    "strikes",
    2,
    "local, without --health: starts in a row without a step after which a node whose process "
    "ended by itself, while those of other nodes did not, counts as lost",
    lower_bound=1,
)
_LEAST_NODES = flags.DEFINE_integer(
    "least_nodes", 1, "slurm with --replan: nodes with which a job may start", lower_bound=1
)
_KIND = flags.DEFINE_string(
    "kind",
    None,
    "kind of chip, such as H100, in whose memory a mesh of --replan must fit; without it, in what "
    "the config's own mesh takes",
)


def main() -> int:
    _check_script()
    _check_replan()
    here = _CLUSTER.value in ("local", "slurm")
    given = _flags_here() if here else _flags_of_a_host()
    if _FLAGS.value == "off":
        given.append("--flags=off")
    if _CLUSTER.value == "local":
        return local(given)
    environment = {"MTNLG_RESTARTS": str(_restarts())}
    if not _trains():
        environment["MTNLG_SCRIPT"] = _SCRIPT.value
    text = None
    if _CLUSTER.value == "slurm":
        environment["MTNLG_ROOT"] = ROOT
        nodes = str(_NODES.value)
        if _REPLAN.value:
            environment["MTNLG_REPLAN"] = nodes
            environment["MTNLG_KIND"] = _KIND.value or ""
            nodes = f"{_LEAST_NODES.value}-{nodes}"
        argv = [
            "sbatch",
            f"--job-name={_NAME.value}",
            f"--nodes={nodes}",
            f"--gpus-per-node={_CHIPS.value}",
            f"--ntasks-per-node={_CHIPS.value}",
            "--export=ALL",
            *_OPTION.value,
            os.path.join(HERE, "slurm.sbatch"),
            *given,
        ]
    elif _CLUSTER.value == "tpu_pod":
        _need(zone=_ZONE.value)
        argv = ["bash", os.path.join(HERE, "tpu_pod.sh"), _NAME.value, str(_ZONE.value), *given]
    else:
        environment = {}
        if _REPLAN.value:
            given += _planned(given)
        argv = ["kubectl", "apply", "-f", "-"]
        text = manifest(given)
    if _DRY_RUN.value:
        settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        print(f"{text or ''}{'# ' if text else ''}{' '.join([*settings, shlex.join(argv)])}")
        return 0
    try:
        return subprocess.run(argv, env=os.environ | environment, input=text, text=True).returncode
    except FileNotFoundError:
        raise ValueError(
            f"{argv[0]} is not installed here; run this where it is, or print the command with "
            "--dry_run"
        ) from None


def _trains() -> bool:
    return _SCRIPT.value == "pretrain"


def _profile_signal() -> int | None:
    """Return the number of train.profile_signal; None if no signal is for the profiler."""
    if not _trains():
        return None
    config = load_config(_CONFIG.value, _SET.value)
    return getattr(signal, config.train.profile_signal, None)


def _restarts() -> int:
    # A run resumes from its last checkpoint; the other commands would print their output again.
    return _RESTARTS.value if _trains() else 0


def _check_script() -> None:
    """Raise ValueError on flags that do not go with --script."""
    if _trains():
        _need(config=_CONFIG.value)
    for flag in () if _trains() else (_CONFIG, _FLAGS):
        if flag.present:
            raise ValueError(
                f"--{flag.name} is for --script=pretrain, not --script={_SCRIPT.value}; leave it "
                "out"
            )
    for value in _ARGUMENT.value:
        if not re.match(r"--\w", value):
            raise ValueError(
                f"--argument={value!r} is not a flag of launch/{_SCRIPT.value}.py; write "
                "--argument=--NAME=VALUE"
            )


def _check_replan() -> None:
    """Raise ValueError on flags of --replan that would do nothing, or only fail after a loss."""
    anywhere = _CLUSTER.value
    for flag, cluster in (
        (_HEALTH, "local"),
        (_STRIKES, "local"),
        (_LEAST_NODES, "slurm"),
        (_KIND, anywhere),
    ):
        if flag.present and not _REPLAN.value:
            raise ValueError(f"--{flag.name} is for --replan; add that, or leave it out")
        if flag.present and cluster != _CLUSTER.value:
            raise ValueError(
                f"--{flag.name} is for --cluster={cluster}, not --cluster={_CLUSTER.value}; leave "
                "it out"
            )
    if not _REPLAN.value:
        return
    if not _trains():
        raise ValueError(
            f"--replan is for --script=pretrain, not --script={_SCRIPT.value}; leave it out"
        )
    if any(value.startswith("--executable=") for value in _ARGUMENT.value):
        raise ValueError(
            "--replan may change the mesh, and the file of --executable is for one mesh; give "
            "--argument=--executable_folder=FOLDER, which compiles what it lacks"
        )
    if _CLUSTER.value == "tpu_pod":
        raise ValueError(
            "--replan has nothing to choose on --cluster=tpu_pod, whose chips work together or not "
            "at all; leave it out, and give the mesh of another TPU (docs/recovery.md)"
        )
    if _KIND.value is not None and _KIND.value not in CHIPS:
        raise ValueError(f"unknown --kind={_KIND.value}; choose one of {', '.join(CHIPS)}")


def _flags_here() -> list[str]:
    """Return the flags of --script for processes that have the current folder."""
    if not _trains():
        return _decoding_flags(command.expand(_WORKDIR.value))
    load_config(_CONFIG.value, _SET.value)  # report errors once, before anything starts
    return [
        f"--config={_CONFIG.value}",
        f"--workdir={command.expand(_WORKDIR.value)}",
        *(f"--set={value}" for value in _SET.value),
        *_ARGUMENT.value,
    ]


def _decoding_flags(workdir: str) -> list[str]:
    settings = [f"--set={value}" for value in _SET.value]
    return [f"--workdir={workdir}", *settings, *_ARGUMENT.value]


def _flags_of_a_host() -> list[str]:
    """Return the flags of --script for hosts that only have the repository.

    --config is relative to it, all other paths are absolute.
    """
    if not _trains():
        _refuse_relative("--workdir", _WORKDIR.value)
        return _decoding_flags(_WORKDIR.value)
    config = _CONFIG.value
    # An absolute path may exist on the hosts only.
    if os.path.isfile(split_argument(config)[0]) or not os.path.isabs(config):
        load_config(config, _SET.value)
        config = os.path.relpath(os.path.realpath(config), os.path.realpath(ROOT))
    if config.startswith(os.pardir):
        raise ValueError(
            f"--config={_CONFIG.value} is outside {ROOT}, which is all that the hosts of "
            f"--cluster={_CLUSTER.value} have; move it to configs/"
        )
    _refuse_relative("--workdir", _WORKDIR.value)
    for value in _SET.value:
        named: list[str] = []

        def collect(path: str, named: list[str] = named) -> str:
            named.append(path)
            return path

        map_paths(override(Config(), value), collect)
        for path in named:
            _refuse_relative(f"--set={value.partition('=')[0]}", path)
    return [
        f"--config={config}",
        f"--workdir={_WORKDIR.value}",
        *(f"--set={value}" for value in _SET.value),
        *_ARGUMENT.value,
    ]


def _refuse_relative(flag: str, path: str) -> None:
    # Each host of a TPU pod expands ~ to its own home folder.
    home = path.startswith("~") and _CLUSTER.value == "tpu_pod"
    if not (os.path.isabs(path) or "://" in path or home):
        raise ValueError(
            f"{flag}: {path!r} is relative to a folder of this machine; give the absolute path on "
            f"the hosts of --cluster={_CLUSTER.value}, such as /runs/a"
        )


def manifest(given: list[str]) -> str:
    """Return the JobSet of gke_gpu.yaml or gke_tpu.yaml, filled in for this run."""
    _need(image=_IMAGE.value, accelerator=_ACCELERATOR.value, claim=_CLAIM.value)
    if _CLUSTER.value == "gke_tpu":
        _need(topology=_TOPOLOGY.value)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", _NAME.value):
        raise ValueError(
            f"--name={_NAME.value!r} is not valid in Kubernetes: use lowercase letters, digits "
            "and -, at most 40"
        )
    values = {
        "NAME": _NAME.value,
        "NODES": _NODES.value,
        "CHIPS": _CHIPS.value,
        "RESTARTS": _restarts(),
        "SCRIPT": " ".join([f"launch/{_SCRIPT.value}.py", *_no_progress()]),
        "IMAGE": _IMAGE.value,
        "ACCELERATOR": _ACCELERATOR.value,
        "TOPOLOGY": _TOPOLOGY.value,
        "SLICES": _SLICES.value,
        "CLAIM": _CLAIM.value,
        "MOUNT": _MOUNT.value,
        "FLAGS": shlex.join(given),
    }
    with open(os.path.join(HERE, f"{_CLUSTER.value}.yaml")) as file:
        return re.sub(r"@([A-Z]+)@", lambda found: str(values[found[1]]), file.read())


def _need(**values: str | None) -> None:
    missing = [f"--{name}" for name, value in values.items() if not value]
    if missing:
        raise ValueError(
            f"--script={_SCRIPT.value} on --cluster={_CLUSTER.value} needs "
            f"{' and '.join(missing)}; see --help"
        )


def local(given: list[str]) -> int:
    """Run --nodes processes here, restarting them after a failure; return the last exit code."""
    stop = threading.Event()
    running: list[subprocess.Popen] = []
    signaled: list[subprocess.Popen] = []

    # The signal that opens a window of the profiler does not stop the run.
    profile = _profile_signal()

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == profile:
            for process in running:
                if process.poll() is None:
                    process.send_signal(number)
            return
        stop.set()
        for process in running:
            process.send_signal(number)
            signaled.append(process)

    # Each process watches this pipe: it closes when the launcher ends, even by kill -9.
    reading, _ = os.pipe()
    if not _DRY_RUN.value:
        for name in PASSED_ON:
            number = getattr(signal, name)
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, pass_on)
    nodes = Nodes(_NODES.value, _HEALTH.value, _STRIKES.value, command.expand(_WORKDIR.value))
    for failure in range(1, _restarts() + 2):
        used, mesh = _nodes_and_mesh(nodes, given)
        if not used:
            code = errors.PROCESS_LOST
            lost = f"none of the {nodes.count} nodes can be used"
            if _starts_again(failure, lost, stop):
                continue
            print(f"error: {lost}; start again when one can", file=sys.stderr, flush=True)
            break
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = 1234 if _DRY_RUN.value else free.getsockname()[1]
        commands = [
            _local_command([*given, *mesh], port, process, len(used))
            for process in range(len(used))
        ]
        if _DRY_RUN.value:
            print("\n".join(shlex.join(argv) for argv in commands))
            return 0
        running.clear()
        for node, argv in zip(used, commands, strict=True):
            if not stop.is_set():
                running.append(
                    subprocess.Popen(
                        argv,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                        errors="replace",
                        start_new_session=True,
                        pass_fds=[reading],
                        # Near copies of a process lie as on a host of its own.
                        env=os.environ
                        | {command.LAUNCHER_PIPE: str(reading), command.HOST: str(node)},
                    )
                )
        if stop.is_set():  # a signal during the start, which the last process may have missed
            for process in running:
                if process not in signaled:
                    process.send_signal(signal.SIGTERM)
        codes, killed = _follow(running)
        final = [code for code in codes if code in errors.FINAL]
        followed = (errors.PROCESS_LOST, 128 + signal.SIGABRT)  # ended because of another process
        own = [code for code in codes if code and code not in followed]
        nodes.ended(
            {
                node: code
                # A signal during the start leaves out the last ones.
                for number, (node, code) in enumerate(zip(used, codes, strict=False))
                if code in own and number not in killed
            },
            len(used),
        )
        code = final[0] if final else max(own or codes, default=errors.PREEMPTED)
        if not any(codes) or final or not _starts_again(failure, f"exit codes {codes}", stop):
            break
    return code


def _starts_again(failure: int, what: str, stop: threading.Event) -> bool:
    """Wait after failure number ``failure``, ``what``; return False where no start follows."""
    if stop.is_set() or failure > _restarts():
        return False
    wait = float(os.environ.get("MTNLG_WAIT", min(10 * 2 ** (failure - 1), 300)))
    print(f"{what}: failure {failure}, starting again in {wait:g} s", file=sys.stderr, flush=True)
    return not stop.wait(wait)


def _nodes_and_mesh(nodes: Nodes, given: list[str]) -> tuple[list[int], list[str]]:
    """Return the nodes of the next start, and the flags of their mesh: none where all are there.

    Raise ValueError where those that are left have no mesh.
    """
    every = list(range(nodes.count))
    if not _REPLAN.value or _DRY_RUN.value or not _trains():
        return every, []
    left = nodes.usable()
    if left == every:
        return every, []
    if not left:
        return [], []
    devices = _LOCAL_DEVICES.value or _CHIPS.value
    lost = ", ".join(str(node) for node in every if node not in left)
    print(f"node {lost} of {nodes.count} cannot be used", file=sys.stderr, flush=True)
    count, mesh = fitted(given, left, devices, _KIND.value, whole=len(every))
    return left[:count], mesh


def _planned(given: list[str]) -> list[str]:
    """Return the flags of the fastest mesh of all nodes of a cluster that restarts by itself."""
    nodes = _NODES.value * (_SLICES.value if _CLUSTER.value == "gke_tpu" else 1)
    count, mesh = fitted(given, list(range(nodes)), _CHIPS.value, _KIND.value, whole=nodes)
    if count < nodes:
        raise ValueError(
            f"--replan: no mesh takes all {nodes} nodes of {_CHIPS.value}, and one takes {count}; "
            f"give --nodes={count}"
        )
    return mesh


def _local_command(given: list[str], port: int, process: int, count: int) -> list[str]:
    devices = [f"--local_devices={_LOCAL_DEVICES.value}"] if _LOCAL_DEVICES.value else []
    return [
        sys.executable,
        os.path.join(ROOT, "launch", f"{_SCRIPT.value}.py"),
        *given,
        *_no_progress(),
        *devices,
        f"--coordinator=localhost:{port}",
        f"--processes={count}",
        f"--process_id={process}",
    ]


def _no_progress() -> list[str]:
    return ["--noprogress"] if _trains() else []


def _follow(running: list[subprocess.Popen]) -> tuple[list[int], set[int]]:
    """Wait for all processes; return their exit codes (128 + n for signal n), and which of them
    were killed here.

    Their output is printed, each line with the number of its process. Processes that still run
    --grace seconds after the first failure are killed.
    """

    def show(number: int, process: subprocess.Popen) -> None:
        for line in process.stdout or ():
            if not line.startswith("[Gloo] Rank"):  # printed for every group of devices
                print(f"{number}: {line}", end="", flush=True)

    readers = [threading.Thread(target=show, args=pair) for pair in enumerate(running)]
    for reader in readers:
        reader.start()
    failed = None
    killed: set[int] = set()
    # A list, so that each is asked: the first may be stopped and never end by itself.
    while None in [process.poll() for process in running]:
        time.sleep(0.1)
        if failed is None and any(process.returncode for process in running):
            failed = time.monotonic()
        if failed is not None and time.monotonic() - failed > _GRACE.value:
            for number, process in enumerate(running):
                if process.poll() is None:
                    process.kill()
                    killed.add(number)
    for reader in readers:
        reader.join()
    codes = [
        128 - process.returncode if process.returncode < 0 else process.returncode
        for process in running
    ]
    return codes, killed


if __name__ == "__main__":
    command.run(main, log=True)
