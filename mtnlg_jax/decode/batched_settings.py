"""The settings of a batch as arrays: one row each, so that rows that differ share one compiled
step.

Static, and so part of a program's key, are only which families any row uses, the sizes of the
n-grams and the constraint. Lists become tables that are padded to powers of two, so that programs
are few.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mtnlg_jax.config import DecodeConfig

_ANY = -1  # in tables of ids: matches everything; the tokenizer's end
_OWN_END = -2
_NEVER = -1  # in forced_at: not at all; at the row's last position
LAST = -2


class Families(NamedTuple):
    """The static part: which processors run at all."""

    names: frozenset[str]
    ngrams: tuple[int, ...]
    # A pure JAX function (tokens_BS, lengths_B, prompts_B) -> bool (B, V): which ids may come next.
    # ``tokens_BS`` are known up to ``lengths_B``, and the model's own from ``prompts_B`` on. Each
    # new function is a new program.
    constraint: Callable | None = None


class Rows(NamedTuple):
    """The settings of each row: values (B,), and tables (B, M ...) with as many entries as the
    longest list needs."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    typical_p: np.ndarray
    epsilon_cutoff: np.ndarray
    eta_cutoff: np.ndarray
    repetition_penalty: np.ndarray
    presence_penalty: np.ndarray
    frequency_penalty: np.ndarray
    no_repeat_ngram_size: np.ndarray
    min_new_tokens: np.ndarray
    min_length: np.ndarray
    # bias (B, M) on token (B, M) behind the tokens before (B, M, L); first: only where it is the
    # first new token
    bias_before: np.ndarray
    bias_token: np.ndarray
    bias: np.ndarray
    bias_first: np.ndarray
    forced_at: np.ndarray  # (B, F): which new token
    forced_token: np.ndarray
    ends: np.ndarray  # (B, E)
    stops: np.ndarray  # (B, Q, L), aligned to the right
    stop_lengths: np.ndarray  # (B, Q); 0: no entry


_WHOLE = ("top_k", "no_repeat_ngram_size", "min_new_tokens", "min_length")
_VALUES = Rows._fields[: Rows._fields.index("bias_before")]


def rows_and_families(
    configs: Sequence[DecodeConfig], constraint: Callable | None = None
) -> tuple[Rows, Families]:
    """The settings of all rows as arrays, and the families that any of them uses."""
    values = {name: np.array([getattr(config, name) for config in configs]) for name in _VALUES}
    names = {
        name for name, column in values.items() if (column != getattr(DecodeConfig, name)).any()
    }
    ngrams = tuple(sorted({int(n) for n in values["no_repeat_ngram_size"] if n}))
    biases = [_biases(config) for config in configs]
    forced = [_forced(config) for config in configs]
    stops = [
        [(token,) for token in config.stop_token_ids] + list(config.stop_sequences)
        for config in configs
    ]
    names |= {
        name
        for name, lists in (("bias", biases), ("forced", forced), ("stops", stops))
        if any(lists)
    }
    if any(config.eos_token_id for config in configs):
        names.add("ends")
    tables = {
        "bias_before": _right([[tokens[:-1] for tokens, _, _ in row] for row in biases]),
        "bias_token": _table([[tokens[-1] for tokens, _, _ in row] for row in biases], 0, np.int32),
        "bias": _table([[bias for _, bias, _ in row] for row in biases], 0.0, np.float32),
        "bias_first": _table([[first for _, _, first in row] for row in biases], False, bool),
        "forced_at": _table([[at for at, _ in row] for row in forced], _NEVER, np.int32),
        "forced_token": _table([[token for _, token in row] for row in forced], 0, np.int32),
        "ends": _table([config.eos_token_id or (_OWN_END,) for config in configs], _ANY, np.int32),
        "stops": _right(stops),
        "stop_lengths": _table([list(map(len, row)) for row in stops], 0, np.int32),
    }
    # One type whatever the values are: a second type would be a second compile.
    values = {
        name: column.astype(np.int32 if name in _WHOLE else np.float32)
        for name, column in values.items()
    }
    return Rows(**values, **tables), Families(frozenset(names), ngrams, constraint)


def _biases(config: DecodeConfig) -> list[tuple[tuple[int, ...], float, bool]]:
    """(tokens, what is added to the last one's logit where the others stand before it, only for the
    first new one)."""
    never = -np.inf
    return [
        *(((token,), bias, False) for token, bias in config.logit_bias),
        *((tokens, bias, False) for tokens, bias in config.sequence_bias),
        *((tokens, never, False) for tokens in config.bad_words_ids),
        *(((token,), never, False) for token in config.suppress_tokens),
        *(((token,), never, True) for token in config.begin_suppress_tokens),
    ]


def _forced(config: DecodeConfig) -> list[tuple[int, int]]:
    first = config.forced_bos_token_id
    last = config.forced_eos_token_id
    return [
        *(((0, first),) if first is not None else ()),
        *config.forced_tokens,
        *(((LAST, last),) if last is not None else ()),
    ]


def _width(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0


def _table(lists, fill, dtype) -> np.ndarray:
    table = np.full((len(lists), _width(max(map(len, lists), default=0))), fill, dtype)
    for row, entries in zip(table, lists, strict=True):
        row[: len(entries)] = entries
    return table


def _right(lists) -> np.ndarray:
    """(B, M, L) of sequences aligned to the right; what is before them matches everything."""
    longest = max((len(tokens) for row in lists for tokens in row), default=0)
    table = np.full(
        (len(lists), _width(max(map(len, lists), default=0)), _width(longest)), _ANY, np.int32
    )
    for row, entries in zip(table, lists, strict=True):
        for place, tokens in zip(row, entries, strict=False):
            place[len(place) - len(tokens) :] = tokens
    return table


def check_tokens(config: DecodeConfig, vocabulary: int) -> None:
    """Raises ValueError where a setting names a token that the model does not have."""
    named = {
        "eos_token_id": config.eos_token_id,
        "stop_token_ids": config.stop_token_ids,
        "stop_sequences": [token for tokens in config.stop_sequences for token in tokens],
        "logit_bias": [token for token, _ in config.logit_bias],
        "sequence_bias": [token for tokens, _ in config.sequence_bias for token in tokens],
        "bad_words_ids": [token for tokens in config.bad_words_ids for token in tokens],
        "suppress_tokens": config.suppress_tokens,
        "begin_suppress_tokens": config.begin_suppress_tokens,
        "forced_tokens": [token for _, token in config.forced_tokens],
        "forced_bos_token_id": [config.forced_bos_token_id]
        if config.forced_bos_token_id is not None
        else [],
        "forced_eos_token_id": [config.forced_eos_token_id]
        if config.forced_eos_token_id is not None
        else [],
    }
    for name, tokens in named.items():
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"{name} has token {token}, which lies outside the model's vocabulary, "
                    f"0 to {vocabulary - 1}; leave it out, or look it up with this model's tokenizer"
                )


def ends_of(rows: Rows, families: Families, eos: int):
    """The ids that end each row, (B, E); ``eos`` where a row has none of its own. Entries below 0
    are none."""
    if "ends" not in families.names:
        return jnp.full((rows.temperature.shape[0], 1), eos, jnp.int32)
    return jnp.where(rows.ends == _OWN_END, eos, rows.ends)


def tails(tokens_BS, lengths_B, width: int):
    """The last ``width`` known tokens of each row, (B, width); before its beginning stands what
    equals no id."""
    at = lengths_B[:, None] - width + jnp.arange(width)
    return jnp.where(at >= 0, jnp.take_along_axis(tokens_BS, jnp.maximum(at, 0), 1), -3)


def matches(table_BML, tails_BL):
    """Which sequences of the table end the rows, (B, M)."""
    return ((table_BML == _ANY) | (table_BML == tails_BL[:, None])).all(-1)


def stopped(rows: Rows, families: Families, tokens_BS, lengths_B, prompts_B):
    """Whether a stop sequence, all of it generated, ends the known tokens; (B,)."""
    if "stops" not in families.names:
        return jnp.zeros(lengths_B.shape, bool)
    hit_BQ = matches(rows.stops, tails(tokens_BS, lengths_B, rows.stops.shape[-1]))
    whole_BQ = (rows.stop_lengths > 0) & (rows.stop_lengths <= (lengths_B - prompts_B)[:, None])
    return (hit_BQ & whole_BQ).any(-1)
