"""Prompts behind an image or features.

Token -1 - p of a prompt stands for position p of its prefix (`Transformer.embed`). A prefix takes
positions of the context, and a text behind it begins with <bos>, as in training.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mtnlg_jax.config import DecodeConfig, ModelConfig, PrefixConfig
from mtnlg_jax.decode.results import encode_prompt

# Scorers that read other texts than the prompt with a candidate behind it.
_READ_OTHER_TEXTS = ("pmi", "noisy_channel", "pseudo_log_likelihood", "coherence")


def encode_behind(model: ModelConfig, tokenizer, prefix: Any, text: str) -> list[int]:
    """Return the tokens of a text behind ``prefix``, or those of `encode_prompt` if it is None."""
    if prefix is None:
        return encode_prompt(tokenizer, text)
    return marked(model, [tokenizer.bos_id, *tokenizer.encode(text)])


def marked(model: ModelConfig, tokens: Sequence[int]) -> list[int]:
    """Return ``tokens`` behind those that stand for the positions of a prefix."""
    return [*(-1 - position for position in range(model.prefix.positions)), *tokens]


def checked(model: ModelConfig, prefix: Any, what: str = "the prefix") -> np.ndarray:
    """Return ``prefix`` as an array that ``model`` takes.

    Raises ValueError if the model takes none, or another shape or type.
    """
    wanted = model.prefix
    if not wanted.positions:
        raise ValueError(
            f"{what} is for a model with model.prefix, and this one reads text alone; leave it out"
        )
    array = np.asarray(prefix)
    if array.shape != wanted.shape:
        raise ValueError(
            f"{what} has shape {array.shape}, and the model takes {_described(wanted)}"
        )
    if wanted.image_size and array.dtype != np.uint8:
        raise ValueError(f"{what} holds {array.dtype}, and an image is uint8, 0 to 255; convert it")
    array = array.astype(wanted.dtype)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} holds a number that is not finite; look into what made it")
    return array


def stacked(model: ModelConfig, prefixes: Sequence[Any], rows: int) -> np.ndarray | None:
    """Return prefixes (rows, *model.prefix.shape), zeros for rows without one; None if no row has
    one. Raises ValueError as `checked` does."""
    if all(prefix is None for prefix in prefixes):
        return None
    found = np.zeros((rows, *model.prefix.shape), model.prefix.dtype)
    for row, prefix in enumerate(prefixes):
        if prefix is not None:
            found[row] = checked(model, prefix, f"prefix {row + 1} of {len(prefixes)}")
    return found


def check_ways(configs: Iterable[DecodeConfig], *, draft: bool) -> None:
    """Raise ValueError if a text behind a prefix cannot be written in one of these ways."""
    if draft:
        raise ValueError(
            "a draft model reads tokens alone, and a prompt has a prefix; give no draft model"
        )
    if any(config.penalty_alpha for config in configs):
        raise ValueError(
            "contrastive search compares hidden states of tokens alone, and a prompt has a prefix; "
            "set penalty_alpha=0"
        )


def check_scorers(names: Iterable[str]) -> None:
    """Raise ValueError if a text behind a prefix cannot be ranked by one of these scorers."""
    refused = [name for name in _READ_OTHER_TEXTS if name in names]
    if refused:
        raise ValueError(
            f"{refused[0]} reads texts without the prefix, which the model was not trained to do; "
            "rank by logprob, gnmt, mbr or self_consistency"
        )


def _described(prefix: PrefixConfig) -> str:
    if prefix.image_size:
        return f"images {prefix.shape} (height, width, channels)"
    return f"features {prefix.shape} (positions, width)"
