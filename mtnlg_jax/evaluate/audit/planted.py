"""The canaries of a run's data: found, and checked to stand in its training text."""

import os
from collections.abc import Sequence

import numpy as np

from mtnlg_jax import storage
from mtnlg_jax.data.canaries import CANARIES, Canary, read_canaries
from mtnlg_jax.data.store.megatron import prefix_of
from mtnlg_jax.evaluate.audit.sources import Source


def canaries_of(sources: Sequence[Source], given: str | None = None) -> list[Canary]:
    """Return the canaries that were planted in ``sources``, or those of the file ``given``; [] if
    nothing records any. Raise ValueError or FileNotFoundError if a file is damaged or missing."""
    if given is not None:
        folder, name = os.path.split(given)
        found = read_canaries(folder or os.curdir, name)
        if found is None:
            raise FileNotFoundError(
                f"{given} does not exist; give the {CANARIES} of a folder of launch/prepare_data.py"
            )
        return found
    canaries: list[Canary] = []
    for source in sources:
        if prefix_of(source.path):
            continue
        # One source of a recipe's output has the file of the whole output.
        output, _, name = source.path.rstrip("/").rpartition("/sources/")
        whole = not output or storage.exists(source.path, CANARIES)
        here = {each.location.rstrip("/").split("/")[-2] for each in source.train}
        for each in read_canaries(source.path if whole else output) or []:
            if not each.source or each.source in (here if whole else {name}):
                canaries.append(each)
    return canaries


def check_planted(
    canaries: Sequence[Canary], counts: np.ndarray, sources: Sequence[Source]
) -> None:
    """Raise ValueError unless each canary stands in the training text as often as was recorded."""
    missing = [
        (each, int(count))
        for each, count in zip(canaries, counts, strict=True)
        if count != each.copies
    ]
    if missing:
        canary, count = missing[0]
        paths = ", ".join(source.path for source in sources)
        raise ValueError(
            f"{len(missing)} of {len(canaries)} canaries are not in {paths} as {CANARIES} records "
            f"them: {canary.prefix.rstrip()!r} was planted {canary.copies} times and stands there "
            f"{count} times; give the data that it belongs to (--data, --canaries), or leave "
            "canaries out of --parts"
        )
