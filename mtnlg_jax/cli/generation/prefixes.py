"""Images and features ahead of prompts: the flags, and the keys of the rows of --prompts."""

import os
from typing import TYPE_CHECKING

from mtnlg_jax import command
from mtnlg_jax.cli.decoding.preset_flag import preset_scorers
from mtnlg_jax.cli.generation import options

if TYPE_CHECKING:
    import numpy as np

    from mtnlg_jax.config import DecodeConfig, ModelConfig

with command.flag_group("Ahead of the prompt"):
    IMAGE = command.define_path(
        "image",
        None,
        "picture (PNG, JPEG, WebP) that a model with model.prefix reads ahead of the prompt, which "
        "may then be left out; in --prompts=FILE.jsonl the key image, relative to the file",
    )
    PREFIX = command.define_path(
        "prefix",
        None,
        "features that such a model reads ahead of the prompt: a .npy file of shape (positions, "
        "width); in --prompts=FILE.jsonl the key prefix",
    )

KEYS = (IMAGE.name, PREFIX.name)


def of_flags() -> dict[str, str]:
    """Return what the flags put ahead of the prompt, by the keys of a row."""
    given = {flag.name: flag.value for flag in (IMAGE, PREFIX) if flag.value is not None}
    if len(given) > 1:
        raise ValueError("--image and --prefix are both given; keep one of them")
    return given


def array_of(row: dict, model: "ModelConfig", folder: str = "") -> "np.ndarray | None":
    """Return what stands ahead of a row's prompt; None if it has nothing under `KEYS`.

    Raises ValueError if it is no image or no features, or not what ``model`` takes.
    """
    from mtnlg_jax.data.prefix.arrays import features_of, image_of
    from mtnlg_jax.decode.prefixes import checked

    found = [key for key in KEYS if row.get(key) is not None]
    if not found:
        return None
    (key, *others) = found
    wanted = model.prefix
    if others:
        raise ValueError("a prompt has both an image and a prefix; keep one of them")
    if not wanted.positions:
        raise ValueError(
            f"a prompt has {key}={str(row[key])[:60]!r}, and this model reads text alone; give one "
            "that was trained with model.prefix, or leave it out"
        )
    if (key == IMAGE.name) != (wanted.image_size > 0):
        kind = "an image (--image)" if wanted.image_size else "features (--prefix)"
        raise ValueError(f"the model takes {kind}, and a prompt has {key}={str(row[key])[:60]!r}")
    try:
        if key == PREFIX.name:
            return checked(model, features_of(row[key], folder), repr(row[key]))
        return image_of(row[key], wanted.image_size, wanted.image_channels, folder)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None


def check_ways(decode: "DecodeConfig", rows: list[dict]) -> None:
    """Raise ValueError if texts behind an image or features are not written or ranked so."""
    from mtnlg_jax.cli.generation.ranking import scorer_weights
    from mtnlg_jax.decode import prefixes

    mode = options.MODE.value
    if mode == "fill":
        raise ValueError(
            "--mode=fill reads text alone, and a prompt has an image or features; leave them out"
        )
    if mode == "ranking" or preset_scorers():
        prefixes.check_scorers(scorer_weights())
    given = bool(options.CANDIDATES.value) or all("candidates" in row for row in rows)
    if mode == "generative" or not given:
        prefixes.check_ways([decode], draft=options.DRAFT.value is not None)


def folder_of(prompts: str | None) -> str:
    """Return the folder to which the paths in the rows of --prompts are relative."""
    return os.path.dirname(prompts) if prompts and prompts != "-" else ""


def check(rows: list[dict], model: "ModelConfig", folder: str) -> int:
    """Raise ValueError with the number of the first row whose image or features do not fit.

    Returns the positions that they take of the context.
    """
    positions = 0
    for number, row in enumerate(rows, 1):
        try:
            if array_of(row, model, folder) is not None:
                positions = model.prefix.positions
        except ValueError as error:
            where = f"prompt {number:,} of {len(rows):,}: " if len(rows) > 1 else ""
            raise ValueError(f"{where}{error}") from None
    return positions
