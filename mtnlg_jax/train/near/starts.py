"""From which step each start of a run went on: it tells which near copies a later start has left
behind, on a host that was away or in a folder that it did not look at."""

import json
import os
from collections.abc import Sequence

from mtnlg_jax import storage
from mtnlg_jax.train.near.files import Copy

NAME = "near_starts"  # of the file in the folder of checkpoints

# (start of `files.Copy`, step) in the order of time; one that goes back has several. Steps never
# fall: where one goes on from an earlier step, those behind it go, since none of their copies
# counts.
Starts = Sequence[tuple[str, int]]


def read(checkpoints: str | os.PathLike) -> Starts:
    """Return the starts of the run with these ``checkpoints``; none where none was recorded."""
    found = storage.read_file(checkpoints, NAME)
    try:
        return [(start, step) for start, step in json.loads(found or b"[]")]
    except (ValueError, TypeError):  # edited by hand
        return []


def write(checkpoints: str | os.PathLike, starts: Starts) -> None:
    storage.write_file(checkpoints, NAME, json.dumps(starts).encode())


def going_on(starts: Starts, start: str, step: int) -> Starts:
    """Return ``starts`` with ``start``, which goes on from ``step``."""
    own = (start, step)
    return [*(each for each in starts if each[1] <= step and each != own), own]


def is_current(starts: Starts, copy: Copy) -> bool:
    """Return whether no start behind that of ``copy`` went on from a smaller step.

    A start that is not recorded counts as older than all others.
    """
    own = max((place for place, (start, _) in enumerate(starts) if start == copy.start), default=-1)
    return all(copy.step <= step for _, step in starts[own + 1 :])
