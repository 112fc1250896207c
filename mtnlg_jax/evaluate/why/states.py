"""The state of a run before a step: the nearest checkpoint, or the run's start, read only."""

import json
from typing import NamedTuple

from absl import logging
from etils import epath
from jax.sharding import Mesh

from mtnlg_jax import storage
from mtnlg_jax.config import Config
from mtnlg_jax.train import checkpoint_arrays, extras, init_from, manifest, spikes
from mtnlg_jax.train.inputs import Data
from mtnlg_jax.train.loop import identity_of_data
from mtnlg_jax.train.state import TrainState, abstract_state, init_state, renew


class Found(NamedTuple):
    """A state of a run and where it is from."""

    step: int  # steps done
    state: TrainState
    source: str  # for people


def kept_steps(workdir: str) -> list[int]:
    """Return the steps of the checkpoints of a run, ascending."""
    return manifest.finished(epath.Path(storage.absolute(workdir)) / "checkpoints")


def left_out(workdir: str, before: int) -> set[tuple[int, int]]:
    """Return (step from 1, samples before it) of the batches that a run had left out when it first
    met the step after ``before`` done ones."""
    folder = epath.Path(workdir).absolute() / "checkpoints"
    kept = kept_steps(workdir)
    record = manifest.read_record(folder / str(kept[-1]))[0] if kept else None
    records = spikes.recorded(workdir, record["meta"] if record else {})
    # Only later spikes lead back across the step; its own was met before it was left out.
    return spikes.left_out([each for each in records if each["step"] <= before])


def choose(
    workdir: str, before: int, wanted: int | None = None, replay: bool = False
) -> int | None:
    """Return which checkpoint to take for the step after ``before`` done ones; None: the start.

    ``wanted`` is that of --checkpoint. Raises ValueError where it is not kept, and names the
    nearest; or where none before the step is kept, unless the step is the first or the run is
    replayed from its start (``replay``).
    """
    kept = kept_steps(workdir)
    listed = ", ".join(map(str, kept)) or "none"
    if wanted is None:
        earlier = [step for step in kept if step <= before]
        if earlier or replay or not before:
            return max(earlier, default=None)
        later = f", --checkpoint={kept[0]} takes the first after it" if kept else ""
        raise ValueError(
            f"no checkpoint before step {before + 1} is kept (kept: {listed}); --replay goes "
            f"forward from the start of the run{later}, --checkpoint=0 takes the start"
        )
    if wanted in kept:
        return wanted
    if wanted == 0:
        return None
    nearest = min([0, *kept], key=lambda step: abs(step - before))
    raise ValueError(
        f"--checkpoint={wanted} is not kept (kept: {listed}); the nearest to step {before + 1} "
        f"is {nearest}" + (", the start of the run" if nearest == 0 else "")
    )


def load(
    workdir: str, step: int | None, config: Config, mesh: Mesh, data: Data, teachers: dict
) -> Found:
    """Return the state of checkpoint ``step`` on ``mesh``; None: that of the run's start.

    Nothing is written, so that the run may go on. Raises ValueError where model, tokenizer or data
    are not those of the checkpoint, OSError where it is damaged, and the errors of train.init.
    """
    folder = epath.Path(storage.absolute(workdir)) / "checkpoints"
    if step is None:
        _refuse_other_data(folder, config, data, teachers)
        init_from.refuse_other_runs(config, data.tokenizer)
        params = init_from.load_start(config, mesh)
        origin = config.train.init or f"train.seed={config.train.seed}"
        return Found(0, init_state(config, mesh, params), f"the start of the run ({origin})")
    path = folder / str(step)
    record, damage = manifest.read_record(path)
    if record is not None:
        _refuse_difference(path, record, config, data, teachers)
        damage = manifest.damage(path, record)
    if record is None or damage is not None:
        raise OSError(f"checkpoint {path} is damaged ({damage}); take another with --checkpoint")
    abstract = abstract_state(config, mesh)
    state = checkpoint_arrays.read_state(path, abstract, record["arrays"])
    lacking = extras.lacking(checkpoint_arrays.flatten(abstract), record["arrays"])
    state = renew(config, state, lacking)
    if int(state.step) != step:
        logging.warning("%s holds the state of step %d", path, int(state.step))
    return Found(step, state, f"checkpoint {step}")


def _refuse_other_data(folder: epath.Path, config: Config, data: Data, teachers: dict) -> None:
    """Compare with any checkpoint: all of a run have one identity."""
    for step in manifest.finished(folder):
        record, _ = manifest.read_record(folder / str(step))
        if record is not None:
            return _refuse_difference(folder / str(step), record, config, data, teachers)
    return None


def _refuse_difference(
    path: epath.Path, record: dict, config: Config, data: Data, teachers: dict
) -> None:
    given = identity_of_data(config, data) | init_from.identity_of(config, teachers)
    saved = record["meta"].get("identity", {})
    # Through JSON, as the saved identity went, so that a tuple equals its list.
    given = json.loads(json.dumps(given))
    # A checkpoint of parameters alone, such as a converted model, names no data.
    given = {key: value for key, value in given.items() if key in saved}
    manifest.refuse_difference(
        path,
        "settings",
        {key: saved[key] for key in given},
        given,
        "the step cannot be replayed with other data; give those of the run by --set=data.path",
    )
