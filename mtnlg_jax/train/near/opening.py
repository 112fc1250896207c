"""Open the near tier of a run, and make a training state from one of its copies."""

import hashlib
import os
import secrets
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from mtnlg_jax import storage
from mtnlg_jax.config import TrainConfig
from mtnlg_jax.train import checkpoint_arrays, extras, moments_dtype, processes
from mtnlg_jax.train.near import starts
from mtnlg_jax.train.near.tier import NearTier
from mtnlg_jax.train.near.whole import Candidate

NAME = "near"  # of the file in the folder of checkpoints that names the run


def open_near(train: TrainConfig, checkpoints: str, abstract: Any, mesh: Mesh) -> NearTier:
    """Return the near tier of a run whose far tier is the folder ``checkpoints``, and whose state
    is ``abstract``."""
    far = os.path.realpath(os.path.dirname(checkpoints))
    near = os.path.realpath(train.near_folder)
    if near == far or near.startswith(far + os.sep):
        raise ValueError(
            f"train.near_folder={train.near_folder} is inside the run folder, which is the far "
            "tier; name a folder of each host, such as /dev/shm/mtnlg_jax"
        )
    return NearTier(train.near_folder, train.near_every, _id_of_run(checkpoints), mesh, abstract)


def _id_of_run(checkpoints: str) -> str:
    """Return the name in near folders of the run with these ``checkpoints``, which its first start
    draws: where the folder is removed, another run begins."""

    def drawn() -> str:
        found = storage.read_file(checkpoints, NAME)
        if found is None:
            found = secrets.token_hex(8).encode()
            storage.write_file(checkpoints, NAME, found)
        # With its path, so that a copy of the folder is another run.
        place = storage.absolute(checkpoints)
        place = place if storage.is_remote(place) else os.path.realpath(place)
        return hashlib.sha256(found.strip() + place.encode(errors="replace")).hexdigest()[:16]

    return processes.run_on_first(drawn)


def candidates_of(near: NearTier, checkpoints: str | os.PathLike) -> list[Candidate]:
    """Return the near copies of which all shards exist, the newest first, without those that a
    later start of the run has left behind."""
    known = processes.run_on_first(lambda: starts.read(checkpoints))
    found = near.candidates()
    current = [each for each in found if starts.is_current(known, each.copy)]
    stale = [f"{each.copy.step:,}" for each in found if each not in current]
    if stale and processes.is_first():
        logging.warning(
            "near copies of step %s are left out: a later start went on from an earlier step",
            ", ".join(stale),
        )
    return current


def record_start(near: NearTier | None, checkpoints: str | os.PathLike, step: int) -> None:
    """Record that this start goes on from ``step``, if the run has or had a near tier."""

    def record() -> None:
        if near is not None or storage.exists(checkpoints, NAME):
            start = near.start if near else ""
            known = starts.going_on(starts.read(checkpoints), start, step)
            starts.write(checkpoints, known)

    processes.run_on_first(record)


def restore_near(near: NearTier, candidate: Candidate, abstract_state: Any) -> tuple[Any, set[str]]:
    """Return the state of ``candidate`` with the structure and the shardings of ``abstract_state``,
    and the parts of its extras that the copy lacks, which are 0. Moments may have been copied in
    another type.

    All other copies are removed.
    """
    known = candidate.about["arrays"]
    wanted = checkpoint_arrays.shapes(checkpoint_arrays.flatten(abstract_state))
    as_saved, convert = moments_dtype.conversion(abstract_state.opt_state, known, wanted)
    abstract_state = abstract_state._replace(opt_state=as_saved)
    flat = checkpoint_arrays.flatten(abstract_state)
    saved = {name: leaf for name, leaf in flat.items() if name in known}
    new = {name: leaf for name, leaf in flat.items() if name not in known}
    arrays = near.read(candidate, saved)
    arrays |= checkpoint_arrays.zeros(new) if new else {}
    near.go_on_from(candidate)
    leaves = [arrays[name] for name in flat]
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
    state = state._replace(opt_state=convert(state.opt_state))
    return state, extras.lacking(flat, known)
