"""The canaries of a run's data: found, and checked to stand in its training text."""

import os
from collections.abc import Sequence

import numpy as np

from mtnlg_jax import storage
from mtnlg_jax.data.canaries import CANARIES, Canary, read_canaries
from mtnlg_jax.data.store.megatron import prefix_of
from mtnlg_jax.evaluate.audit.sources import Source, home_of, name_in_recipe


def canaries_of(sources: Sequence[Source], given: str | None = None) -> list[Canary]:
    """Return the canaries that were planted in ``sources``, or those of the file ``given``; [] if
    nothing records any. Raise ValueError or FileNotFoundError if a file is damaged or missing.

    Folders that were prepared with one --seed have the same canaries: their copies add up.
    """
    if given is not None:
        folder, name = os.path.split(given)
        found = read_canaries(folder or os.curdir, name)
        if found is None:
            raise FileNotFoundError(
                f"{given} does not exist; give the {CANARIES} of a folder of launch/prepare_data.py"
            )
        return found
    # By folder and text: a run may name an output of a recipe and one of its sources as well.
    planted: dict[str, dict[str, Canary]] = {}
    for source in sources:
        if prefix_of(source.path):
            continue
        # One source of a recipe's output has the file of the whole output.
        home = source.path if storage.exists(source.path, CANARIES) else home_of(source.path)
        here = {name_in_recipe(each) for each in source.train}
        for each in read_canaries(home) or []:
            if not each.source or each.source in here:
                planted.setdefault(home.rstrip("/"), {})[each.text] = each
    together: dict[str, Canary] = {}
    for each in (each for own in planted.values() for each in own.values()):
        before = together[each.text].copies if each.text in together else 0
        together[each.text] = each._replace(copies=before + each.copies)
    return list(together.values())


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
