"""The flags of --longtext, and what it does after they are checked."""

import json
import os
from typing import TYPE_CHECKING

from absl import flags

from mtnlg_jax import command, storage
from mtnlg_jax.cli.decoding import devices, fitting
from mtnlg_jax.cli.evaluation import score

if TYPE_CHECKING:
    from mtnlg_jax.config import Config

with command.flag_group("Long texts"):
    LONGTEXT = flags.DEFINE_bool(
        "longtext",
        False,
        "measure repetition, diversity, coherence and loss by position in place of the score",
    )
    REFERENCES = command.define_path(
        "references",
        None,
        "file or folder of real texts to compare with, read like --input",
    )
    PLOTS = command.define_path("plots", None, "folder for plots, as PNG; also of --tasks")
    SENTENCES = flags.DEFINE_integer(
        "sentences", 64, "sentences that the model scores for coherence", lower_bound=1
    )
    # scikit-learn takes 32 bits.
    SEED = flags.DEFINE_integer(
        "seed", 0, "seed of every draw", lower_bound=0, upper_bound=2**32 - 1
    )
    NEEDLE = flags.DEFINE_bool("needle", False, "measure recall of a pass key by length and depth")
    NEEDLE_LANGUAGE = flags.DEFINE_enum(
        "needle_language", None, ["en", "zh"], "of the pass keys; default: that of the texts"
    )
    NEEDLE_LENGTHS = flags.DEFINE_list(
        "needle_lengths",
        None,
        "tokens of prompts with pass keys; default: quarters of the model's context",
    )
    NEEDLE_TRIALS = flags.DEFINE_integer(
        "needle_trials", 4, "pass keys for each length and depth", lower_bound=1
    )

_OF_NEEDLE = (NEEDLE_LANGUAGE, NEEDLE_LENGTHS, NEEDLE_TRIALS)
_SHARED = (PLOTS, SEED)  # with --tasks
_OF_LONGTEXT = (REFERENCES, SENTENCES, NEEDLE, *_OF_NEEDLE)
_OF_SCORE = (score.STRIDE, score.ADAPT, score.CACHE)


def check(shared: bool = False) -> None:
    """Raise ValueError on flags that have no effect together, before anything is read.

    ``shared``: another part of the script writes plots and draws.
    """
    if LONGTEXT.value:
        command.refuse(
            _OF_SCORE, "is of the score, which --longtext does not compute; leave it out"
        )
        if not NEEDLE.value:
            command.refuse(_OF_NEEDLE, "has no effect without --needle")
        _lengths()
    else:
        command.refuse(_OF_LONGTEXT, "has no effect without --longtext")
        if not shared:
            command.refuse(_SHARED, "has no effect without --longtext or --tasks")


def check_folder() -> None:
    """Raise ValueError if no folder for plots can be made."""
    folder = PLOTS.value
    if folder is None or storage.is_remote(folder):
        return
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--plots={folder} is a file; give a folder")
    os.makedirs(folder, exist_ok=True)


def _lengths() -> tuple[int, ...] | None:
    if NEEDLE_LENGTHS.value is None:
        return None
    try:
        # An empty value is no number either.
        return tuple(map(int, NEEDLE_LENGTHS.value or [""]))
    except ValueError:
        given = ",".join(NEEDLE_LENGTHS.value)
        raise ValueError(
            f"--needle_lengths={given} is not a list of numbers, such as 128,256"
        ) from None


def _check_memory(config: "Config", held: dict[str, str]) -> None:
    """Raise ValueError if the model and the caches do not fit."""
    from mtnlg_jax.decode.memory import Caches, Choices, Plan

    mesh = devices.mesh()
    rows = NEEDLE_TRIALS.value if NEEDLE.value else 1
    caches = (Caches(rows, config.model.max_position_embeddings, floats=True, whole=True),)
    plan = Plan(config.model, mesh=mesh, caches=caches, **held)  # type: ignore[arg-type]
    fitting.check(score.WORKDIR.value, [plan], Choices(cache=False), mesh)


def measure(held: dict[str, str]) -> None:
    """Measure the texts, print the report and write the plots. ``held``: dtype and weights."""
    from mtnlg_jax import compat
    from mtnlg_jax.evaluate.texts import read_texts

    def read(path: str) -> tuple[list[str], dict[str, int]]:
        return devices.on_first(
            lambda: read_texts(
                path, score.TEXT_KEY.value, score.ON_ERROR.value, score.ENCODING.value
            )
        )

    texts, left_out = read(score.INPUT.value)
    references, missed = (None, {}) if REFERENCES.value is None else read(REFERENCES.value)
    # The JSON object has the counts of the texts.
    for path, counts in ((score.INPUT, {} if score.JSON.value else left_out), (REFERENCES, missed)):
        if counts:
            shown = ", ".join(f"{count:,} {what}" for what, count in counts.items())
            devices.note(f"{path.value}: {shown}")
    compat.configure_cache()

    # Imported here: bad input is reported before JAX is imported, which takes longer.
    from mtnlg_jax.evaluate.longtext import LongTextSettings
    from mtnlg_jax.evaluate.longtext_run import NeedleSettings, describe, measure_run, score_json

    found = measure_run(
        score.WORKDIR.value,
        score.CHECKPOINT.value,
        texts,
        references,
        LongTextSettings(seed=SEED.value, sentences=SENTENCES.value),
        NeedleSettings(NEEDLE_LANGUAGE.value, _lengths(), NEEDLE_TRIALS.value)
        if NEEDLE.value
        else None,
        held,
        devices.mesh(),
        before=lambda config, _: _check_memory(config, held),
    )
    if score.JSON.value:
        print(json.dumps(score_json(found, left_out), allow_nan=False), flush=True)
    else:
        print(describe(score.INPUT.value, found), flush=True)
    # Last, so that a full disk costs the plots alone.
    if PLOTS.value is not None and devices.on_first_process():
        from mtnlg_jax.evaluate.longtext_plots import write_plots

        names = write_plots(PLOTS.value, found.texts, found.real, found.needles)
        devices.note(f"{PLOTS.value}: {', '.join(names)}")
