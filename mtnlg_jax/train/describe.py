"""What a run is, for a person: said at its start, and kept in its folder."""

import json
import os
import shlex
import subprocess
import sys
from datetime import datetime

import jax

from mtnlg_jax.config import Config, to_json
from mtnlg_jax.storage import write_file
from mtnlg_jax.train.metrics import environment
from mtnlg_jax.train.schedule import samples_at_end

README = """A run of mtnlg_jax (launch/pretrain.py). The same command goes on where it stopped.

checkpoints/      the last states and the best one; a folder is one step, with parameters and optimizer
config.json       all settings of the last start; every start and what it changed: starts.jsonl
environment.json  date, command, commit, versions, devices and compiler flags of the last start
tokenizer/        of the data, and of what the model writes
metrics.jsonl     a line a step (kind train) and a line an evaluation (kind eval); loss in nats a token
loss.png          the curves;  tensorboard/ the same for TensorBoard (pip install tensorboard)
stacks-N.txt      where process N stood when nothing moved any more; .lock-N: the process that writes here

python launch/generate.py --workdir=THIS --prompt="Once upon a time"
python launch/evaluate.py --workdir=THIS --input=FILE
"""


def at_start(
    config: Config,
    mesh,
    workdir: str,
    first: int,
    samples: int,
    training_tokens: int,
    restored: bool = False,
) -> str:
    """The block that is printed before the first step. ``first`` step and ``samples`` that were
    read before it; ``training_tokens`` that the data hold. ``restored``: from a checkpoint of this
    folder."""
    train = config.train
    model = config.model
    if first >= train.steps:
        begins = f"is finished: step {first:,} of {train.steps:,} is done"
    elif first:
        begins = f"goes on from its checkpoint of step {first:,} of {train.steps:,}"
    elif restored:  # parameters alone, as of a converted model
        begins = f"starts with the parameters of its checkpoint {first}, {train.steps:,} steps"
    elif train.init:
        begins = f"starts with the parameters of {train.init}, {train.steps:,} steps"
    else:
        begins = f"starts from random parameters (train.seed={train.seed}), {train.steps:,} steps"
    processes = f"{jax.process_count()} process" + ("es" if jax.process_count() > 1 else "")
    compiling = "" if first >= train.steps else "\ncompiling the first step ..."
    ramp = f" (from {train.rampup_batch_size[0]} on)" if train.rampup_batch_size else ""
    total = samples_at_end(train, min(first, train.steps), samples) * config.sequence_length
    epochs = (
        f", {total / training_tokens:,.3g} times the data's {training_tokens:,}"
        if training_tokens
        else ""
    )
    sources = " + ".join(shlex.quote(path) for path, _ in config.data.sources)
    devices = f"{mesh.size} of {jax.device_count()} {jax.devices()[0].device_kind} in {processes}"
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"""{shlex.quote(workdir)} {begins}
  model   {model.parameter_count():,} parameters: {model.num_layers} layers, width {model.hidden_size}, \
{model.num_attention_heads} heads, vocabulary {model.vocab_size:,}
  mesh    {axes}, zero {config.mesh.zero}: {devices}
  tokens  {train.global_batch_size} x {config.sequence_length} = \
{train.global_batch_size * config.sequence_length:,} a step{ramp}; {total:,} by the end{epochs}
  data    {sources}
  writes  {shlex.quote(workdir)}: checkpoints/ {_every(train.save_every)}, metrics.jsonl, loss.png; README.txt there \
says what is what{compiling}"""


def _every(steps: int) -> str:
    return f"every {steps:,} steps" if steps else "at the end"


def write(config: Config, workdir: str, first: int) -> None:
    """config.json, environment.json, README.txt, and a line more of starts.jsonl: the first holds
    all settings, later ones those that differ from the start before, as {key: [before, now]}."""
    text = to_json(config)
    now = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command_line(),
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
    settings = (
        {"config": json.loads(text)}
        if before is None
        else {"changed": _changes(before, json.loads(text))}
    )
    line = json.dumps(
        now | {"step": first, "versions": found["versions"]} | settings, ensure_ascii=False
    )
    # A lone surrogate, as of a flag that is not UTF-8, is written as JSON's escape.
    with open(
        os.path.join(workdir, "starts.jsonl"), "a", encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(line + "\n")
    write_file(workdir, "config.json", text.encode())
    write_file(
        workdir,
        "environment.json",
        json.dumps(now | found, indent=1, ensure_ascii=False).encode(errors="backslashreplace"),
    )
    write_file(workdir, "README.txt", README.encode())


def command_line() -> str:
    """The command that started this process, as a shell takes it."""
    return shlex.join(sys.orig_argv)


def commit() -> str | None:
    """The commit of the checkout that this package lies in, with "-dirty" behind it where files
    differ; None where there is no checkout or no git."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if not os.path.exists(os.path.join(here, ".git")):
        return None
    try:
        done = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _changes(before: dict, now: dict, path: str = "") -> dict:
    changed = {}
    for key in {**before, **now}:
        old = before.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= _changes(old, new, f"{path}{key}.")
        elif old != new:
            changed[path + key] = [old, new]
    return changed
