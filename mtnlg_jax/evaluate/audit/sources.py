"""The training text and the held-out text of a run, and random passages of them."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtnlg_jax import foreign, storage
from mtnlg_jax.config import Config
from mtnlg_jax.data.store.megatron import prefix_of
from mtnlg_jax.data.store.sources import open_sources, spread
from mtnlg_jax.data.store.tokens import Tokens
from mtnlg_jax.data.tokenizer import Tokenizer, load_tokenizer
from mtnlg_jax.train.checkpoint import config_of

# Passages are drawn in groups; the search ends after this many groups without a new one.
_IDLE = 12


class Source(NamedTuple):
    """One path of a run's data: a prepared folder, or the prefix of Megatron's files."""

    path: str
    train: tuple[Tokens, ...]  # of each of a recipe's sources
    heldout: Tokens


class Passage(NamedTuple):
    """Consecutive tokens of one document, without the tokens that begin and end it."""

    source: str
    start: int
    tokens: np.ndarray


def paths_of(config: Config) -> list[str]:
    """Return the data of a run: the paths of all its stages, each once."""
    blends = [stage.blend or config.data.sources for stage in config.train.stages]
    return list(dict.fromkeys(path for blend in blends for path, _ in blend))


def open_run_data(
    workdir: str, config: Config, tokenizer: Tokenizer | None, given: Sequence[str] = ()
) -> tuple[Tokenizer, list[Source]]:
    """Open the data that the model in ``workdir`` was trained on: ``given``, or those that its
    config names. Return the tokenizer of the data, which must be the model's, and the sources.

    Raises ValueError or FileNotFoundError, which name the way out, before any token is read.
    """
    paths = list(dict.fromkeys(given or paths_of(config)))
    if not paths:
        raise ValueError(
            f"{workdir} does not name the data it was trained on; give --data=PREPARED, a folder "
            "of launch/prepare_data.py or the prefix of Megatron's files"
        )
    megatron = any(prefix_of(path) for path in paths)
    other = ""
    if megatron:
        inside = storage.join(workdir, "tokenizer")
        own = inside if foreign.reader_of(workdir) is None else workdir
        other = own if given or not config.data.tokenizer else config.data.tokenizer
    try:
        found, opened, heldout = open_sources(paths, other, config.data.heldout)
    except FileNotFoundError as error:
        if given:
            raise
        raise FileNotFoundError(
            f"{error} (the run's config names it; give --data=PATH if it has moved)"
        ) from None
    _check_tokenizer(workdir, tokenizer, found, paths[0])
    for tokens in opened.values():
        if tokens.answers_only:
            raise ValueError(
                f"{tokens.location} holds prompts with answers or conversations, of which only "
                "the answers are trained on; an audit reads plain text: give other --data"
            )
    sources = []
    for path in paths:
        train = tuple(opened[part] for part, _ in spread([(path, 1.0)]))
        sources.append(Source(path, train, heldout.get(path) or next(iter(heldout.values()))))
    return found, sources


def _check_tokenizer(
    workdir: str, tokenizer: Tokenizer | None, found: Tokenizer, path: str
) -> None:
    """Raise ValueError if the data were tokenized for another model."""
    reader = foreign.reader_of(workdir)
    known = [tokenizer] if tokenizer is not None else []
    if reader is not None:
        known += reader.settings(workdir)[1]
    if known and not any(_same_ids(found, each) for each in known):
        raise ValueError(
            f"{path} has another tokenizer ({found.vocab_size} tokens, {found.fingerprint[:12]}) "
            f"than {workdir} ({known[0].vocab_size}, {known[0].fingerprint[:12]}); give the data "
            "that this model was trained on"
        )


def _same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether the ids of both mean the same text, as those of a run and of the Hugging Face
    folder that it was converted to."""
    if one.fingerprint == other.fingerprint:
        return True
    roles = [(each.vocab_size, each.bos_id, each.eos_ids) for each in (one, other)]
    return roles[0] == roles[1] and all(
        one.token_bytes(index) == other.token_bytes(index) for index in range(one.vocab_size)
    )


def check_reference(workdir: str, tokenizer: Tokenizer, tokens: int) -> None:
    """Raise ValueError if the model in ``workdir`` cannot read passages of ``tokens`` tokens of
    ``tokenizer``, FileNotFoundError if there is none."""
    config = config_of(workdir)
    reader = foreign.reader_of(workdir)
    if reader is None:
        known = [load_tokenizer(storage.join(workdir, "tokenizer"))]
    else:
        known = list(reader.settings(workdir)[1])
    if not any(_same_ids(tokenizer, each) for each in known):
        raise ValueError(
            f"--reference={workdir} has another tokenizer ({known[0].vocab_size} tokens, "
            f"{known[0].fingerprint[:12]}) than the data ({tokenizer.vocab_size}, "
            f"{tokenizer.fingerprint[:12]}); give a model of the same tokenizer"
        )
    if config is not None and config.model.max_position_embeddings < tokens:
        raise ValueError(
            f"--reference={workdir} has a context of {config.model.max_position_embeddings} tokens "
            f"for passages of {tokens}; give --member_tokens of at most that"
        )


def draw_passages(
    source: str,
    parts: Sequence[Tokens],
    tokenizer: Tokenizer,
    length: int,
    count: int,
    rng: np.random.Generator,
    apart: bool = False,
) -> list[Passage]:
    """Return up to ``count`` random passages of ``length`` tokens, every position being equally
    likely; fewer if there are not as many.

    ``apart``: none overlaps another, so that they are independent.
    """
    parts = [part for part in parts if len(part) >= length]
    rooms = np.array([len(part) - length + 1 for part in parts], np.int64)
    if not parts:
        return []
    ends = np.array([tokenizer.bos_id, *tokenizer.eos_ids])
    taken: list[list[int]] = [[] for _ in parts]  # starts, ascending
    least = length if apart else 1
    found: list[Passage] = []
    idle = 0
    while len(found) < count and idle < _IDLE:
        group = max(64, 2 * (count - len(found)))
        before = len(found)
        chosen = rng.choice(len(parts), group, p=rooms / rooms.sum())
        for number in np.unique(chosen).tolist():
            part = parts[number]
            drawn = rng.integers(0, rooms[number], int((chosen == number).sum()))
            inside = part.document_of(drawn)[0] == part.document_of(drawn + length - 1)[0]
            free = [
                start for start in drawn[inside].tolist() if _is_free(taken[number], start, least)
            ]
            rows = part.read_windows(np.array(free, np.int64), length) if free else []
            for start, row in zip(free, rows, strict=True):
                if np.isin(row, ends).any() or not _is_free(taken[number], start, least):
                    continue
                bisect.insort(taken[number], start)
                found.append(Passage(source, start, row))
        idle = 0 if len(found) > before else idle + 1
    return found[:count]


def _is_free(taken: list[int], start: int, least: int) -> bool:
    """Return whether ``start`` is at least ``least`` tokens from each of ``taken``."""
    at = bisect.bisect(taken, start)
    return (at == 0 or start - taken[at - 1] >= least) and (
        at == len(taken) or taken[at] - start >= least
    )
