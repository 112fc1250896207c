"""The training text and the held-out text of a run, and random passages of them."""

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mtnlg_jax import foreign, storage
from mtnlg_jax.config import Config
from mtnlg_jax.data.provenance import paths_of
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


def open_run_data(
    workdir: str, config: Config, tokenizer: Tokenizer | None, given: Sequence[str] = ()
) -> tuple[Tokenizer, list[Source]]:
    """Open the data that the model in ``workdir`` was trained on: ``given``, or those that its
    config names. Return the tokenizer of the data, which must be the model's, and the sources.

    Raises ValueError or FileNotFoundError, which name the way out, before any token is read.
    """
    if all(stage.masked >= 1 for stage in config.train.stages):
        raise ValueError(
            f"every stage of {workdir} is masked, and an audit reads and writes text from left to "
            "right; give a run with a causal stage"
        )
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
        # One part for all paths where data.heldout names it. An empty one is false, but not absent.
        held = heldout[path] if path in heldout else next(iter(heldout.values()))
        sources.append(Source(path, train, held))
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
    try:
        config = config_of(workdir)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--reference={workdir} holds no model; give a launch/pretrain.py run, a Hugging Face "
            "folder or a GGUF file"
        ) from None
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


def held_out_of(source: Source) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from positions in the held-out text to whether they are of ``source``.

    The held-out text of a recipe's output is of all its sources, also where the run was trained on
    OUT/sources/NAME alone. Its meta.json records which tokens are whose.
    """
    names = {name_in_recipe(each) for each in source.train}
    shared = f"{home_of(source.path)}/heldout" == source.heldout.location.rstrip("/")
    spans = source.heldout.meta.get("sources") if shared else None
    if not spans or sum(count for _, count in spans) != len(source.heldout):
        return lambda starts: np.ones(len(starts), bool)
    ends = np.cumsum([count for _, count in spans])
    own = np.array([name in names for name, _ in spans])
    return lambda starts: own[np.searchsorted(ends, starts, side="right")]


def home_of(path: str) -> str:
    """Return OUT of OUT/sources/NAME, one source of a recipe's output; else ``path``."""
    output, _, name = path.rstrip("/").rpartition("/sources/")
    return output if output and "/" not in name else path.rstrip("/")


def name_in_recipe(tokens: Tokens) -> str:
    """Return NAME of the training text OUT/sources/NAME/train."""
    return tokens.location.rstrip("/").split("/")[-2]


def draw_passages(
    source: str,
    parts: Sequence[Tokens],
    tokenizer: Tokenizer,
    length: int,
    count: int,
    rng: np.random.Generator,
    apart: bool = False,
    wanted: Callable[[np.ndarray], np.ndarray] = lambda starts: np.ones(len(starts), bool),
) -> list[Passage]:
    """Return up to ``count`` random passages of ``length`` tokens, every position being equally
    likely; fewer if there are not as many.

    They are in random order, so the first of them are a random sample of all parts.

    ``apart``: none overlaps another, so that they are independent. ``wanted``: of the positions in
    a part, those at which a passage may start.
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
        starts = rng.integers(0, rooms[chosen])
        read: dict[int, np.ndarray] = {}  # by draw
        for number in np.unique(chosen).tolist():
            part = parts[number]
            own = np.flatnonzero(chosen == number)
            begun = part.document_of(starts[own])[0]
            ended = part.document_of(starts[own] + length - 1)[0]
            own = own[(begun == ended) & wanted(starts[own])]
            own = own[[_is_free(taken[number], start, least) for start in starts[own]]]
            rows = part.read_windows(starts[own], length) if len(own) else []
            read |= zip(own.tolist(), rows, strict=True)
        # Not part by part: of these, the first are taken.
        for draw, row in sorted(read.items()):
            start = int(starts[draw])
            before_it = taken[chosen[draw]]
            if np.isin(row, ends).any() or not _is_free(before_it, start, least):
                continue
            bisect.insort(before_it, start)
            found.append(Passage(source, start, row))
        idle = 0 if len(found) > before else idle + 1
    return found[:count]


def _is_free(taken: list[int], start: int, least: int) -> bool:
    """Return whether ``start`` is at least ``least`` tokens from each of ``taken``."""
    at = bisect.bisect(taken, start)
    return (at == 0 or start - taken[at - 1] >= least) and (
        at == len(taken) or taken[at] - start >= least
    )
