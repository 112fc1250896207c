"""Describe a run: in text at its start, and in files in its folder."""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from mtnlg_jax.config import Config, TrainConfig, to_json
from mtnlg_jax.data.provenance import paths_of, provenance
from mtnlg_jax.parallel.mesh import described, plan_table
from mtnlg_jax.storage import write_file
from mtnlg_jax.train import lora
from mtnlg_jax.train.metrics import environment, read_metrics
from mtnlg_jax.train.schedule import samples_at_end

README = """A run of mtnlg_jax (launch/pretrain.py). The same command resumes it.

checkpoints/      the last states and the best one; a folder for each step, with parameters and
                  optimizer state
config.json       all settings of the last start; starts.jsonl: every start and what it changed
data.json         counts of the data, as their preparation recorded them
environment.json  date, command, commit, versions, devices and compiler flags of the last start
tokenizer/        the tokenizer of the data and of generated text
huggingface/      of a run that came from a model of another format: its config.json, tokenizer and
                  settings of generation, which launch/convert.py writes again
privacy.json      with differential privacy, what its checkpoints have spent: epsilon, delta
metrics.jsonl     a line for each step (kind train), each evaluation (kind eval) and each evaluation
                  of tasks (kind tasks), loss in nats per token; statistics by layer (kind stats),
                  spikes (kind spike), shares of the time (kind goodput), samples of text (kind
                  samples), the slowest process (kind processes), compared replicas (kind replicas)
report.html       curves, time, samples and starts on one page; launch/report.py writes it again
spikes.jsonl      with train.spike_policy=rewind, the batches that the run leaves out, and why
loss.png          the curves;  tensorboard/ the same for TensorBoard (pip install tensorboard)
stats.png         statistics by layer, of runs with train.stats_every
trackers.json     the id of the run in trackers;  wandb/ its files of Weights & Biases
profile/          steps recorded by the profiler (pip install xprof; xprof --logdir=profile)
why/, inspect/    results of launch/why.py and launch/inspect.py
certificate.json  what launch/prove.py proved of its config
stacks-N.txt      stacks of process N when it no longer made progress; .lock-N: the process that
                  writes here

python launch/generate.py --workdir=THIS --prompt="Once upon a time"
python launch/evaluate.py --workdir=THIS --input=FILE
python launch/model_card.py --workdir=THIS
"""


def at_start(
    config: Config,
    mesh: Mesh,
    workdir: str,
    first: int,
    samples: int,
    training_tokens: int,
    restored: bool = False,
    more: Sequence[str] = (),
) -> str:
    """Return the block that is printed before the first step.

    ``samples`` were read before step ``first``, and the data hold ``training_tokens``. ``restored``
    says that the state is from a checkpoint of this folder. ``more`` are further lines.
    """
    train = config.train
    model = config.model
    batch = train.global_batch_size
    length = config.sequence_length
    processes = f"{jax.process_count()} process" + ("es" if jax.process_count() > 1 else "")
    ramp = f" (from {train.rampup_batch_size[0]} on)" if train.rampup_batch_size else ""
    # From here on, since earlier steps may have had other batch sizes.
    total = samples_at_end(train, min(first, train.steps), samples) * length
    # More than one means that text is read again.
    epochs = ""
    if training_tokens:
        epochs = f", {total / training_tokens:,.3g} times the data's {training_tokens:,}"
    sources = " + ".join(shlex.quote(path) for path, _ in config.data.sources)
    devices = f"{mesh.size} of {jax.device_count()} {jax.devices()[0].device_kind} in {processes}"
    axes = described(mesh.shape)
    folder = shlex.quote(workdir)
    lines = [
        f"{folder} {_beginning(config, first, restored)}",
        f"  model   {model.parameter_count():,} parameters: {model.num_layers} layers, "
        f"width {model.hidden_size}, {model.num_attention_heads} heads, "
        f"vocabulary {model.vocab_size:,}",
        *_adapters(config, mesh),
        f"  mesh    {axes}, zero {config.mesh.zero}: {devices}",
        f"  tokens  {batch} x {length} = {batch * length:,} a step{ramp}; "
        f"{total:,} by the end{epochs}",
        f"  data    {sources}",
        *_tasks(train),
        *more,
        f"  writes  {folder}: checkpoints/ {_every(train.save_every)}, metrics.jsonl, loss.png; "
        "README.txt there explains the files",
    ]
    if first < train.steps:
        lines.append("preparing the first step ...")
    return "\n".join(lines)


def _adapters(config: Config, mesh: Mesh) -> list[str]:
    """Return the line of low-rank adapters, if there are any, with the memory of the base."""
    if not lora.used(config):
        return []
    optimizer = config.optimizer
    rows = plan_table(lora.abstract_parameters(config), dict(mesh.shape), config.mesh.zero)
    base = sum(row.bytes for row in rows if not row.path.startswith("lora."))
    trained = sum(math.prod(row.shape) for row in rows if row.path.startswith("lora."))
    plain = plan_table(
        lora.abstract_parameters(lora.without(config)), dict(mesh.shape), config.mesh.zero
    )
    whole = sum(row.bytes for row in plain)
    compared = "" if base == whole else f" (float32: {whole / 2**20:,.1f})"
    return [
        f"  adapt   {trained:,} parameters: rank {optimizer.lora_rank} of "
        f"{', '.join(optimizer.lora_targets)}; the {optimizer.lora_base} base takes "
        f"{base / 2**20:,.1f} MiB a device{compared}"
    ]


def _tasks(train: TrainConfig) -> list[str]:
    """Return the line of tasks that are scored while the run trains, if there are any."""
    if not train.eval_tasks:
        return []
    rows = "all rows" if train.eval_tasks_rows is None else f"{train.eval_tasks_rows:,} rows each"
    return [f"  tasks   {', '.join(train.eval_tasks)}: {rows}, {_every(train.eval_tasks_every)}"]


def _beginning(config: Config, first: int, restored: bool) -> str:
    train = config.train
    if first >= train.steps:
        return f"is finished: step {first:,} of {train.steps:,} is done"
    if first:
        return f"resumes from its checkpoint of step {first:,} of {train.steps:,}"
    if restored:  # parameters alone, such as a converted model
        return f"starts with the parameters of its checkpoint {first}, {train.steps:,} steps"
    if train.init:
        return f"starts with the parameters of {train.init}, {train.steps:,} steps"
    return f"starts from random parameters (train.seed={train.seed}), {train.steps:,} steps"


def _every(steps: int) -> str:
    return f"every {steps:,} steps" if steps else "at the end"


def write(config: Config, workdir: str, first: int) -> None:
    """Write config.json, data.json, environment.json and README.txt, and append a line to
    starts.jsonl.

    The first line of starts.jsonl holds all settings; later lines hold those that differ from the
    previous start, as {key: [before, now]}. "reached" is the last record of metrics.jsonl before
    this start, which drops the records of steps that it repeats. Call this before `MetricsLog`.
    """
    text = to_json(config)
    now: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command_line(),
        # Relative paths in the command begin here.
        "folder": os.getcwd(),
        "commit": commit(),
    }
    found = environment()
    path = os.path.join(workdir, "config.json")
    before = None
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                before = json.load(file)
        except ValueError:  # cut short or edited: all settings are written again
            pass
    # The first start of this folder, or a file that cannot be compared.
    if before is None:
        settings = {"config": json.loads(text)}
    else:
        settings = {"changed": _changes(before, json.loads(text))}
    start = (
        now | {"step": first} | {key: found[key] for key in ("versions", "devices", "processes")}
    )
    start |= settings
    if records := read_metrics(os.path.join(workdir, "metrics.jsonl")):
        start["reached"] = {key: records[-1].get(key) for key in ("step", "time")}
    # A lone surrogate, from a flag that is not UTF-8, is written as JSON's escape.
    line = json.dumps(start, ensure_ascii=False) + "\n"
    # Before config.json is replaced: a kill in between repeats a change in the next line instead of
    # losing it.
    with open(os.path.join(workdir, "starts.jsonl"), "a+b") as file:
        # A kill or a full disk may have torn the last line: this one must not become its end.
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read() not in (b"", b"\n")
        file.write(b"\n" * torn + line.encode(errors="backslashreplace"))
    described = json.dumps(now | found, indent=1, ensure_ascii=False)
    write_file(workdir, "config.json", text.encode())
    write_file(workdir, "data.json", _data(config))
    write_file(workdir, "environment.json", described.encode(errors="backslashreplace"))
    write_file(workdir, "README.txt", README.encode())


def _data(config: Config) -> bytes:
    paths = paths_of(config)
    # A file that cannot be read matters to no step; opening the data has told what does.
    try:
        found = provenance(paths)
    except (OSError, ValueError):
        found = [{"path": path} for path in paths]
    return json.dumps({"sources": found}, indent=1).encode()


def command_line() -> str:
    """Return the command that started this process, quoted for a shell."""
    return shlex.join(sys.orig_argv)


def commit() -> str | None:
    """Return the commit of the checkout of this package, with "-dirty" where files differ.

    Return None without a checkout or without git.
    """
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    # An installed package may lie inside the checkout of another project, whose commit is not ours.
    if not os.path.exists(os.path.join(here, ".git")):
        return None
    try:
        done = subprocess.run(
            # ``--exclude=*`` leaves tags out, so that the name is always the hash.
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            # A slow network file system must not hold up the start.
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _changes(before: dict, now: dict, path: str = "") -> dict[str, list]:
    changed: dict[str, list] = {}
    for key in {**before, **now}:
        old = before.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= _changes(old, new, f"{path}{key}.")
        elif old != new:
            changed[path + key] = [old, new]
    return changed


def header(kind: str, step: int | None, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return the keys that every file of results has: its kind, the step of the checkpoint, the
    commit of the code, the versions of libraries, those of ``packages`` as well, and the time."""
    versions = environment()["versions"]
    return {
        "kind": kind,
        "step": step,
        "commit": commit(),
        "versions": versions | {name: metadata.version(name) for name in packages},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
