"""launch/cluster: the commands of each script, which also run here, with processes over gloo."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from mtnlg_jax import errors
from mtnlg_jax.cli.processes.nodes import Nodes
from mtnlg_jax.config import load_config
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.train import loop
from mtnlg_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "launch" / "cluster"
PATIENCE = 240  # seconds, for a start on a busy machine
HEARTBEAT = 8  # seconds
MEASURED = {"tokens_per_second", "mfu", "time"}  # of the clock, not of the run
# One process reduces in its memory, several reduce over gloo in a different order: the difference
# was measured as one unit in the last place of a float32.
OTHER_ORDER = 4e-7
SETTINGS = [
    "train.steps=8",
    "train.save_every=2",
    "train.eval_every=4",
    f"train.heartbeat_seconds={HEARTBEAT}",
    "train.compare_every=3",
    "mesh.pipe=2",
    "train.micro_batch_size=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    words = np.random.default_rng(0).choice(
        "sun moon tree river stone bird wind road".split(), (150, 60)
    )
    (folder / "text.txt").write_text("\n\n".join(" ".join(line) for line in words))
    prepare(folder / "text.txt", folder / "data", vocab_size=280, heldout=0.1, progress=False)
    return folder


@pytest.fixture(scope="module")
def environment(folder):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "TMPDIR": str(folder),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "MTNLG_WAIT": "0",
    }


def flags_of(folder, name, *more) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        f"--workdir={folder / name}",
        *(f"--set={setting}" for setting in (f"data.path={folder / 'data'}", *SETTINGS, *more)),
    ]


def launch(*flags) -> list[str]:
    return [sys.executable, str(CLUSTER / "launch.py"), *flags]


def local(folder, name, processes, devices, *more) -> list[str]:
    return launch(
        "--cluster=local",
        f"--nodes={processes}",
        f"--local_devices={devices}",
        *flags_of(folder, name, *more),
    )


def numbers(workdir: Path) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key not in MEASURED}
        for record in read_metrics(str(workdir / "metrics.jsonl"))
        if record["kind"] not in ("goodput", "processes")  # seconds
    ]


@pytest.fixture(scope="module")
def two(folder, environment) -> Path:
    """A run of two processes with four devices each, and a pipeline across them."""
    done = subprocess.run(
        local(folder, "two", 2, 4),
        env=environment,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("held out at step 8") == 1 and "\n1: next" not in done.stdout
    return folder / "two"


# tests/train/test_processes.py runs two processes that were not started by launch/cluster
@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(two, folder):
    config = load_config(
        str(ROOT / "configs" / "tiny.py"), [f"data.path={folder / 'data'}", *SETTINGS]
    )
    loop.train(config, str(folder / "one"), show_progress=False)
    here = numbers(folder / "one")
    there = numbers(two)
    assert [r["kind"] for r in here] == [r["kind"] for r in there] == 2 * (["train"] * 4 + ["eval"])
    for ours, theirs in zip(here, there, strict=True):
        for key in ours.keys() & {"loss", "causal_loss", "learning_rate"}:
            assert theirs[key] == pytest.approx(ours[key], rel=OTHER_ORDER), (ours["step"], key)
    assert len(list((two / "tensorboard").iterdir())) == 1  # one process writes
    told = json.loads((two / "environment.json").read_text())
    assert told["processes"] == 2 and told["devices"]["count"] == 8 and told["versions"]["jax"]


def kill_one(
    workdir: Path, process: int, step: int, started: subprocess.Popen, how=signal.SIGKILL
) -> None:
    """Send the signal ``how`` to one process of the run as soon as it has done ``step``."""
    deadline = time.monotonic() + PATIENCE
    while not any(r["step"] >= step for r in read_metrics(str(workdir / "metrics.jsonl"))):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int((workdir / f".lock-{process}").read_text().split()[0]), how)


# tests/train/test_kill.py kills processes that were not started by launch/cluster
@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_next_start_resumes_bit_for_bit(two, folder, environment):
    started = subprocess.Popen(
        local(folder, "killed", 2, 4),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    kill_one(folder / "killed", 1, 5, started)
    killed = time.monotonic()
    for line in started.stdout:
        if "starting again" in line:
            break
    ended = time.monotonic() - killed
    output = line + started.communicate(timeout=PATIENCE)[0]
    assert started.returncode == 0, output
    assert "137" in line and "failure 1" in line, line
    assert ended < HEARTBEAT * 3, ended  # the service checks at intervals
    assert numbers(folder / "killed") == numbers(two)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (4, 2)])
def test_a_killed_run_resumes_with_other_processes_bit_for_bit(
    two, folder, environment, processes, devices
):
    name = f"other-{processes}"
    started = subprocess.Popen(
        [*local(folder, name, 2, 4), "--restarts=0"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    kill_one(folder / name, 0, 5, started)
    assert started.wait(PATIENCE) != 0
    started.stdout.close()
    before = len(numbers(folder / name))
    assert 5 <= before < 10
    done = subprocess.run(
        local(folder, name, processes, devices),
        env=environment,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(folder / name) == numbers(two)


@pytest.mark.slow
def test_a_lost_host_costs_steps_and_its_chips(two, folder, environment):
    """Its near folder is gone as well: its peer has the shards, for the mesh of the nodes left."""
    mesh = ["mesh.pipe=1", "train.save_every=0", "train.near_every=2"]
    near = folder / "hosts"
    started = subprocess.Popen(
        [
            *local(folder, "lost", 2, 4, *mesh, f"train.near_folder={near}"),
            "--replan",
            f"--health=test ! -e {folder}/lost-$MTNLG_NODE",
            "--grace=30",
        ],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    kill_one(folder / "lost", 1, 5, started)
    (folder / "lost-1").touch()
    for host in near.glob("*#1"):
        shutil.rmtree(host)
    output, _ = started.communicate(timeout=PATIENCE)
    assert started.returncode == 0 and "the run goes on with 1 nodes, 4 devices" in output, output
    starts = [json.loads(line) for line in (folder / "lost/starts.jsonl").read_text().splitlines()]
    assert starts[1]["step"] >= 4 and starts[1]["processes"] == 1
    assert any(key.startswith("mesh.") for key in starts[1]["changed"])
    ours = [r["loss"] for r in numbers(folder / "lost") if r["kind"] == "train"]
    theirs = [r["loss"] for r in numbers(two) if r["kind"] == "train"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(two, folder, environment):
    started = subprocess.Popen(
        [*local(folder, "stopped", 2, 4, "train.steps=400"), "--restarts=0"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    kill_one(folder / "stopped", 1, 3, started, signal.SIGTERM)
    output, _ = started.communicate(timeout=PATIENCE)
    assert started.returncode == 75, output
    lines = [
        line.partition(": ")[2]
        for line in output.splitlines()
        if "stopped by a signal after step" in line
    ]
    assert len(lines) == 2 and lines[0] == lines[1]


@pytest.mark.slow
def test_processes_with_different_settings_print_one_line_each(folder, environment):
    commands = subprocess.run(
        [*local(folder, "other", 2, 4), "--dry_run"],
        env=environment,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines()
    started = [
        subprocess.Popen(
            ["bash", "-c", f"{line} --set=train.seed={number}"],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number, line in enumerate(commands)
    ]
    said = [process.communicate(timeout=PATIENCE)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert "train.seed=1 here, 0 in process 0" in said[1] and "disagrees with 1" in said[0]
    assert not (folder / "other").exists()


TINY = ROOT / "configs" / "tiny.py"


def dry_run(*flags, cwd=ROOT) -> str:
    return subprocess.run(
        launch(f"--config={TINY}", "--workdir=/runs/a", "--set=train.steps=5", "--dry_run", *flags),
        text=True,
        capture_output=True,
        check=True,
        cwd=cwd,
    ).stdout


def test_the_commands_of_a_dry_run():
    assert dry_run("--cluster=slurm", "--nodes=4", "--chips=8", "--option=--partition=gpu") == (
        f"MTNLG_RESTARTS=20 MTNLG_ROOT={ROOT} sbatch --job-name=mtnlg-jax --nodes=4 "
        "--gpus-per-node=8 --ntasks-per-node=8 --export=ALL --partition=gpu "
        f"{CLUSTER}/slurm.sbatch --config={TINY} --workdir=/runs/a --set=train.steps=5\n"
    )
    more = "--argument=--executable_folder=/kept"
    pod = ["--cluster=tpu_pod", "--name=pod", "--zone=us-east5-a", "--restarts=3"]
    assert dry_run(*pod, more) == (
        f"MTNLG_RESTARTS=3 bash {CLUSTER}/tpu_pod.sh pod us-east5-a --config=configs/tiny.py "
        "--workdir=/runs/a --set=train.steps=5 --executable_folder=/kept\n"
    )
    assert "MTNLG_REPLAN=4 MTNLG_KIND=H100 sbatch --job-name=mtnlg-jax --nodes=2-4 " in dry_run(
        "--cluster=slurm", "--nodes=4", "--replan", "--least_nodes=2", "--kind=H100"
    )
    here = ["--cluster=local", "--nodes=2", "--local_devices=4", "--flags=off"]
    lines = dry_run(*here, more).splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        f"{ROOT}/launch/pretrain.py --config={TINY} --workdir=/runs/a --set=train.steps=5 "
        "--executable_folder=/kept --flags=off --noprogress --local_devices=4 "
        "--coordinator=localhost:1234 --processes=2 "
        f"--process_id={number}"
        for number in (0, 1)
    ]
    said = subprocess.run(
        ["bash", CLUSTER / "tpu_pod.sh", "--dry_run", "pod", "zone", "--set=a b"],
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    assert said.startswith(
        "gcloud compute tpus tpu-vm ssh pod --zone=zone --worker=all --command=cd"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cluster=gke_gpu",), "needs --image and --accelerator and --claim"),
        (("--cluster=tpu_pod",), "needs --zone"),
        (
            ("--cluster=gke_gpu", "--image=i", "--accelerator=a", "--claim=c", "--name=A_B"),
            "'A_B' is not valid",
        ),
        (("--cluster=local", "--health=true"), "--health is for --replan; add that"),
        (("--cluster=slurm", "--replan", "--health=true"), "is for --cluster=local, not"),
        (("--cluster=local", "--replan", "--kind=Z9"), "unknown --kind=Z9; choose one of"),
        (("--cluster=tpu_pod", "--replan", "--zone=z"), "--replan has nothing to choose"),
        (
            ("--cluster=local", "--replan", "--argument=--executable=/kept/one"),
            "--replan may change the mesh, and the file of --executable is for one mesh",
        ),
        (("--cluster=local", "--set=train.step=3"), "did you mean 'steps'"),
        (("--cluster=slurm", "--config=nowhere.py"), "'nowhere.py' is not a file"),
        (("--cluster=local", "--workdir=~no-one/x"), "no user 'no-one'"),
        (
            ("--cluster=gke_gpu", "--workdir=run"),
            "--workdir: 'run' is relative to a folder of this machine",
        ),
        (("--cluster=gke_tpu", "--workdir=~/run"), "--workdir: '~/run' is relative"),
        (
            ("--cluster=tpu_pod", "--set=data.path=../data"),
            "--set=data.path: '../data' is relative",
        ),
        (
            ("--cluster=tpu_pod", "--set=train.stages=[{'distill': 'RUN0'}]"),
            "--set=train.stages: 'RUN0' is relative",
        ),
        (
            ("--cluster=gke_gpu", "--set=data.blend=[('/a', 1), ('b', 1)]"),
            "--set=data.blend: 'b' is relative",
        ),
        (("--cluster=gke_gpu", "--config={outside}"), "is outside"),
    ],
)
def test_a_missing_flag_or_tool_is_reported_in_one_line(flags, message, tmp_path):
    (tmp_path / "mine.py").write_text(TINY.read_text())
    flags = [flag.replace("{outside}", str(tmp_path / "mine.py")) for flag in flags]
    done = subprocess.run(
        launch(f"--config={TINY}", "--workdir=/W", "--dry_run", *flags),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def manifest(kind: str, *flags) -> dict:
    return yaml.safe_load(
        dry_run(
            f"--cluster={kind}",
            "--name=big",
            "--nodes=2",
            "--image=i",
            "--claim=runs",
            "--set=train.stages=[{'name': 'a: b', 'masked': 0.5}]",
            *flags,
        )
    )


@pytest.mark.parametrize(
    ("kind", "flags", "resource", "replicas"),
    [
        ("gke_gpu", ["--accelerator=nvidia-h100-80gb"], "nvidia.com/gpu", 1),
        (
            "gke_tpu",
            ["--accelerator=tpu-v6e-slice", "--topology=4x4", "--slices=3"],
            "google.com/tpu",
            3,
        ),
    ],
)
def test_manifests_are_jobsets(kind, flags, resource, replicas):
    """Check the fields that the JobSet API (jobset.x-k8s.io/v1alpha2) and its Job API require, and
    those that the restart depends on."""
    found = manifest(kind, *flags)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["name"] == "big"
    assert found["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 20 and policy["rules"] == [
        {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    [jobs] = found["spec"]["replicatedJobs"]
    assert jobs["replicas"] == replicas
    job = jobs["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (2, 2, "Indexed")
    assert job["backoffLimit"] == 0
    [rule] = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy requires
    [container] = pod["containers"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2, 3, 5]},
    }
    assert container["resources"]["limits"] == {resource: 8}
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert container["command"] == ["bash", "-c"] and len(container["args"]) == 1
    words = subprocess.run(
        ["bash", "-c", container["args"][0].replace("exec python", "printf '%s\\n'")],
        text=True,
        capture_output=True,
        check=True,
        env={"JOB_COMPLETION_INDEX": "1"},
    ).stdout.splitlines()
    assert (
        words[:1] == ["launch/pretrain.py"]
        and "--set=train.stages=[{'name': 'a: b', 'masked': 0.5}]" in words
    )
    assert ("--process_id=1" in words) == (kind == "gke_gpu") and ("--distributed=on" in words) == (
        kind == "gke_tpu"
    )


def test_a_home_folder_is_expanded_on_the_hosts():
    said = dry_run(
        "--cluster=tpu_pod",
        "--zone=z",
        "--workdir=~/run",
        "--set=data.path=~/data",
        cwd=ROOT / "tests",
    )
    assert (
        "'--workdir=~/run'" in said
        and "'--set=data.path=~/data'" in said
        and "--config=configs/tiny.py" in said
    )


# Replaces launch/pretrain.py beside a copy of launch.py. It prints its folder and its arguments,
# and does what the file "orders" lists: a line for each start, with a word for each process, which
# is its exit code, "wait" for a signal, or "stop", which no signal but SIGKILL ends.
STAND_IN = """
import os, signal, sys, time
from mtnlg_jax import command

command.end_with_launcher()
me = next(flag for flag in sys.argv if flag.startswith("--process_id="))[len("--process_id="):]
heard = []
def hear(number, _):
    heard.append(signal.Signals(number).name)
for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
    if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
        signal.signal(getattr(signal, name), hear)
here = os.environ["STAND_IN"]
starts = os.path.join(here, "starts-" + me)
with open(starts, "a") as file:
    print(os.getpid(), os.getcwd(), *sys.argv[1:], file=file)
number = len(open(starts).readlines()) - 1
order = open(os.path.join(here, "orders")).read().splitlines()[number].split()[int(me)]
print("started", order, flush=True)
if order == "stop":
    os.kill(os.getpid(), signal.SIGSTOP)
while order == "wait" and not heard:
    time.sleep(0.01)
with command.lasting_output():
    print("heard", heard, flush=True)
with open(os.path.join(here, "ended-" + me), "w") as file:
    file.write(" ".join(heard) or "nothing")
sys.exit(75 if heard else int(order))
"""


@pytest.fixture
def stand_in(tmp_path):
    """stand_in(orders, *flags) -> a started launch.py, with a process for each word of a line of
    orders."""
    (tmp_path / "launch/cluster").mkdir(parents=True)
    (tmp_path / "typed").mkdir()
    (tmp_path / "launch/cluster/launch.py").write_text((CLUSTER / "launch.py").read_text())
    (tmp_path / "launch/pretrain.py").write_text(STAND_IN)
    started = []

    def start(orders: str, *flags, before=(), **options) -> subprocess.Popen:
        (tmp_path / "orders").write_text(orders)
        argv = [
            *before,
            sys.executable,
            str(tmp_path / "launch/cluster/launch.py"),
            "--cluster=local",
            f"--nodes={len(orders.splitlines()[0].split())}",
            f"--config={TINY}",
            "--workdir=myrun",
            "--set=data.path=../data",
            *flags,
        ]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "STAND_IN": str(tmp_path),
            "MTNLG_WAIT": "0",
        }
        started.append(
            subprocess.Popen(
                argv,
                cwd=tmp_path / "typed",
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                **options,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for(path: Path, text: str = "") -> str:
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or (found := path.read_text()) == "" or text not in found:
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
    return found


def lines_until_started(process: subprocess.Popen, count: int) -> None:
    while count:
        line = process.stdout.readline()
        assert line, "it ended before its processes had started"
        count -= "started" in line


@pytest.mark.parametrize(
    ("orders", "code", "starts"),
    [
        ("74 6\n134 74\n0 0", 0, 3),  # a failure that may pass is restarted
        ("134 2\n", 2, 1),
        ("5 5\n", 5, 1),
        ("134 74\n6 74\n134 74\n", 74, 3),  # --restarts=2
    ],
)
def test_a_failure_that_may_pass_is_restarted(stand_in, tmp_path, orders, code, starts):
    process = stand_in(orders, "--restarts=2")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, output
    lines = (tmp_path / "starts-0").read_text().splitlines()
    assert len(lines) == starts
    # Relative paths mean the folder in which the command was typed.
    assert lines[0].split()[1] == str(tmp_path / "typed")
    assert "--workdir=myrun --set=data.path=../data --noprogress" in lines[0]


@pytest.mark.parametrize("orders", ["stop 6", "6 stop"])
def test_a_stopped_process_is_killed_after_the_failure_of_another(stand_in, tmp_path, orders):
    process = stand_in(f"{orders}\n0 0\n", "--grace=1")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert str([137 if order == "stop" else 6 for order in orders.split()]) in output
    assert len((tmp_path / "starts-0").read_text().splitlines()) == 2


def test_a_run_goes_on_with_fewer_nodes_and_then_with_all(stand_in, tmp_path):
    """The health command fails the fourth time: for node 1, before the second start, so that its
    second start is the third of process 0."""
    health = "echo >>../asked; test $(wc -l <../asked) -ne 4"
    process = stand_in("137 6\n74 0\n0 0\n", "--replan", "--local_devices=4", f"--health={health}")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    all_nodes, fewer, again = (tmp_path / "starts-0").read_text().splitlines()
    assert all_nodes.split()[1:-3] == again.split()[1:-3] and "--processes=2" in again
    assert "--processes=1" in fewer and "--set=mesh.data=" in fewer
    assert "node 1 of 2 cannot be used" in output
    assert "the run goes on with 1 nodes, 4 devices: pipe" in output


@pytest.mark.slow  # tests/planning/test_replan.py has the message
def test_a_replan_without_a_mesh_is_reported_in_one_line(stand_in):
    process = stand_in("137 6\n", "--replan", "--local_devices=3", "--health=test $MTNLG_NODE = 0")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, output
    assert output.splitlines()[-1].startswith("error: no mesh of 3 devices in nodes of 3 takes")


def test_a_node_whose_process_ends_again_and_again_is_lost(tmp_path):
    nodes = Nodes(2, None, 2, str(tmp_path))

    def start(first: int, last: int) -> None:
        with open(tmp_path / "starts.jsonl", "a") as file:
            print(json.dumps({"step": first}), file=file)
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": last}) + "\n")

    start(0, 7)
    nodes.ended({1: 1}, 2)  # after steps of its own
    nodes.ended({1: 1}, 2)
    start(5, 6)
    nodes.ended({1: 1}, 2)  # it did a step in between
    nodes.ended({1: 1}, 2)
    assert nodes.usable() == [0, 1]
    start(6, 6)
    for _ in range(2):
        nodes.ended({0: 4, 1: 4}, 2)  # all of them
        nodes.ended({1: 74}, 2)  # the disk or the store
        nodes.ended({1: 75}, 2)  # a signal
    assert nodes.usable() == [0, 1]
    nodes.ended({1: 1}, 2)
    assert nodes.usable() == [0]
    for _ in range(2):
        nodes.ended({0: 1}, 1)  # the last one
    assert nodes.usable() == [0]


def test_a_launcher_waits_until_a_node_can_be_used(stand_in, tmp_path):
    """The health command fails the first two times, once for each node."""
    health = "echo >>../asked; test $(wc -l <../asked) -gt 2"
    process = stand_in("0 0\n", "--replan", f"--health={health}", "--restarts=1")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert "none of the 2 nodes can be used: failure 1, starting again in 0 s" in output
    process = stand_in("0 0\n", "--replan", "--health=false", "--restarts=1")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == errors.PROCESS_LOST, output
    assert "error: none of the 2 nodes can be used; start again when one can" in output
    assert len((tmp_path / "starts-0").read_text().splitlines()) == 1


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGHUP", "SIGTERM", "SIGUSR1"])
def test_processes_end_with_their_launcher(stand_in, tmp_path, name):
    process = stand_in("wait wait\n")
    lines_until_started(process, 2)
    process.send_signal(getattr(signal, name))
    expected = "SIGTERM" if name == "SIGKILL" else name
    assert [wait_for(tmp_path / f"ended-{me}") for me in (0, 1)] == [expected] * 2
    assert process.wait(PATIENCE) == (-signal.SIGKILL if name == "SIGKILL" else 75)


def test_a_launcher_under_nohup_survives_a_closed_terminal(stand_in, tmp_path):
    process = stand_in("wait\n", before=["nohup"], stdin=subprocess.DEVNULL)
    lines_until_started(process, 1)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None and not (tmp_path / "ended-0").exists()
    process.terminate()
    assert wait_for(tmp_path / "ended-0") == "SIGTERM" and process.wait(PATIENCE) == 75


def test_a_launcher_without_a_reader_of_its_output_continues(stand_in, tmp_path):
    process = stand_in("wait 0\n")
    lines_until_started(process, 2)
    process.stdout.close()
    wait_for(tmp_path / "ended-1")
    process.terminate()
    wait_for(tmp_path / "ended-0", "SIGTERM")
    assert process.wait(PATIENCE) in (
        75,
        128 + signal.SIGTERM,
    )  # the latter of one that was just ending


def test_exit_codes_are_the_same_everywhere():
    """The scripts and the page repeat those of mtnlg_jax/errors.py."""
    final = sorted(errors.FINAL)
    for name, pattern in {
        "slurm.sbatch": r"([\d |]+)\) echo",
        "tpu_pod.sh": r"case \$code in ([\d |]+)\)",
        "gke_gpu.yaml": r"values: \[([\d, ]+)\]",
        "gke_tpu.yaml": r"values: \[([\d, ]+)\]",
    }.items():
        [found] = re.findall(pattern, (CLUSTER / name).read_text())
        assert sorted(map(int, re.findall(r"\d+", found))) == final, name
    rows = re.findall(
        r"^\| (\d+) \| .* \| (\w+)[^|]* \|$",
        (ROOT / "docs/many_processes.md").read_text(),
        re.MULTILINE,
    )
    said = {int(code): again for code, again in rows}
    assert {code for code, again in said.items() if again == "no"} == set(final)
    assert {errors.STUCK, errors.PROCESS_LOST, errors.PASSING, errors.PREEMPTED} <= {
        code for code, again in said.items() if again == "yes"
    }
    named = (ROOT / "mtnlg_jax/cli/pretrain.py").read_text().split('"""')[1]
    for code in (*final, errors.STUCK, errors.PROCESS_LOST, errors.PASSING, errors.PREEMPTED):
        assert re.search(rf"\b{code}\b", named.partition("Exit codes:")[2]), code


@pytest.fixture
def tools(tmp_path, environment):
    """tools(name, text) -> an environment whose PATH has a program of that name before all
    others."""
    (tmp_path / "bin").mkdir()

    def add(name: str, text: str) -> dict:
        program = tmp_path / "bin" / name
        program.write_text("#!/usr/bin/env bash\n" + text)
        program.chmod(0o755)
        return environment | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
        }

    return add


@pytest.mark.parametrize(
    ("codes", "calls"),
    [
        ([0], []),
        ([75, 75, 0], ["requeue", "requeue"]),
        ([74, 0], ["requeue"]),
        ([134, 6, 0], ["requeue", "requeue"]),
        ([2], []),
        ([3], []),
        ([6, 134, 6], ["requeue", "requeue"]),  # no third one: MTNLG_RESTARTS=2
    ],
)
def test_slurm_requeues_failures_that_may_pass(tools, tmp_path, codes, calls):
    tools("scontrol", 'echo "$1" >>"$CALLS"\n')
    environment = tools("srun", 'echo "$@" >>"$CALLS.srun"; exit "$CODE"\n') | {
        "MTNLG_RESTARTS": "2"
    }
    for code in codes:
        done = subprocess.run(
            ["bash", CLUSTER / "slurm.sbatch", "--workdir=a b"],
            env=environment | {"CODE": str(code)},
            text=True,
            capture_output=True,
        )
        assert done.returncode == code, done.stderr
    queued = tmp_path / "calls"
    assert (queued.read_text().split() if queued.exists() else []) == calls
    assert (
        (tmp_path / "calls.srun")
        .read_text()
        .splitlines()[0]
        .endswith("launch/pretrain.py --distributed=on --noprogress --workdir=a b")
    )


@pytest.mark.parametrize("nodes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_slurm_job_of_fewer_nodes_has_a_mesh_for_them(tools, tmp_path, nodes):
    environment = tools("srun", 'echo "$@" >"$CALLS.srun"\n') | {
        "MTNLG_REPLAN": "2",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_NTASKS": "4",  # as some versions count for --nodes=1-2
    }
    flags = [f"--config={TINY}", "--set=data.path=a b", "--workdir=a b"]
    done = subprocess.run(
        ["bash", CLUSTER / "slurm.sbatch", *flags], env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "calls.srun").read_text()
    assert called.startswith(f"--nodes={nodes} --ntasks={4 * nodes} ")
    assert (nodes == 1) == ("--set=mesh.data=" in called)
    assert "--set=data.path=a b --workdir=a b" in called


@pytest.mark.parametrize(
    ("runs", "code"),
    [
        (["0 0"], 0),
        (["6 134", "0 0"], 0),
        (["74 134", "0 0"], 0),
        (["6 2"], 2),
        (["134 6", "6 6", "75 75"], 1),
        (["", "0 0"], 0),
    ],
)
def test_a_tpu_pod_restarts_failures_that_may_pass(tools, tmp_path, runs, code):
    (tmp_path / "runs").write_text("".join(run + "\n" for run in runs))
    environment = tools(
        "gcloud",
        f"""
        codes=$(head -n 1 {tmp_path}/runs); sed -i 1d {tmp_path}/runs
        for code in $codes; do echo "host ended with $code"; done
        echo "$@" >>"$CALLS"
    """,
    ) | {"MTNLG_RESTARTS": "2"}
    done = subprocess.run(
        ["bash", CLUSTER / "tpu_pod.sh", "pod", "zone", "--set=x"],
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "runs").read_text() == "" and len(
        (tmp_path / "calls").read_text().splitlines()
    ) == len(runs)


@pytest.mark.slow
def test_the_slurm_script_runs_here(two, folder, tools):
    """The script of srun starts the tasks and numbers them."""
    environment = tools(
        "srun",
        """
        while [[ "$1" == -* ]]; do shift; done
        export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_JOB_ID=$RANDOM
        SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
        SLURM_PROCID=1 SLURM_LOCALID=1 "$@" || exit
        wait $first
    """,
    ) | {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", CLUSTER / "slurm.sbatch", *flags_of(folder, "slurm"), "--local_devices=4"],
        env=environment,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(folder / "slurm") == numbers(two)


@pytest.mark.slow
def test_the_tpu_pod_script_runs_here(two, folder, tools, tmp_path):
    """The script of gcloud runs the command on every host; variables of SLURM replace the metadata
    of a TPU."""
    home = tmp_path / "mtnlg_jax"
    (home / ".venv/bin").mkdir(parents=True)
    (home / ".venv/bin/python").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    (home / ".venv/bin/python").chmod(0o755)
    (home / "launch").symlink_to(ROOT / "launch")
    environment = tools(
        "gcloud",
        """
        for argument; do
            case $argument in --command=*) command="${argument#--command=}" ;; esac
        done
        export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_JOB_ID=$RANDOM
        for host in 0 1; do SLURM_PROCID=$host SLURM_LOCALID=$host bash -c "$command" & done
        wait
    """,
    )
    done = subprocess.run(
        [
            "bash",
            CLUSTER / "tpu_pod.sh",
            "pod",
            "zone",
            *flags_of(folder, "pod"),
            "--local_devices=4",
        ],
        env=environment,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and done.stdout.count("host ended with 0") == 2, (
        done.stdout + done.stderr
    )
    assert numbers(folder / "pod") == numbers(two)


@pytest.mark.slow
def test_the_command_of_a_manifest_runs_here(two, folder, tools):
    """A pod only brings its number; here the name of the first pod is localhost."""
    tools("python", f'exec {sys.executable} "$@"\n')
    found = manifest("gke_gpu", "--accelerator=x")
    [text] = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]["args"]
    text = text.partition(" --config")[0].replace("big-workers-0-0.big:1234", "localhost:$PORT")
    port = str(20000 + os.getpid() % 20000)
    started = [
        subprocess.Popen(
            ["bash", "-c", f'{text} "$@"', "bash", *flags_of(folder, "gke"), "--local_devices=4"],
            env=tools("true", "") | {"JOB_COMPLETION_INDEX": str(number), "PORT": port},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in (0, 1)
    ]
    said = [process.communicate(timeout=PATIENCE)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert numbers(folder / "gke") == numbers(two)
