"""The decoding settings of a batch as arrays, one row each.

Rows with different settings share one compiled step. Static, and so part of a program's cache key,
are only the options that any row uses, the n-gram sizes, the constraint and the tokenizer's end.
Lists become tables padded to powers of two, so that few programs are compiled.
"""

# Shapes: B rows, S positions, V vocabulary, E entries of a table, J tokens of an entry, W words of
# 32 ids

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.config import DecodeConfig

# Of numpy where a batch is put together on the host, of JAX inside the compiled programs.
Array = np.ndarray | jax.Array

_ANY = -1  # in tables of ids: matches everything
_NEVER = -1  # in forced_at: not at all
LAST = -2  # in forced_at: the row's last position


class StaticOptions(NamedTuple):
    """The options compiled into a program: which processors run at all."""

    names: frozenset[str]
    ngrams: tuple[int, ...]
    # A pure JAX function (tokens_BS, lengths_B, prompts_B) -> bool (B, V): which ids may come next.
    # ``tokens_BS`` is known up to ``lengths_B`` and generated from ``prompts_B`` on. Each new
    # function is a new program.
    constraint: Callable | None = None
    # Ask in every step whether a row uses an option, so that one program serves all mixtures. The
    # n-gram sizes are then those of the rows, up to the largest of ``ngrams``.
    skips: bool = False


class Rows(NamedTuple):
    """The settings of each row: values (B,) and tables (B, E ...), as long as the longest list."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    typical_p: np.ndarray
    epsilon_cutoff: np.ndarray
    eta_cutoff: np.ndarray
    mirostat_tau: np.ndarray
    mirostat_eta: np.ndarray
    penalty_alpha: np.ndarray
    repetition_penalty: np.ndarray
    presence_penalty: np.ndarray
    frequency_penalty: np.ndarray
    no_repeat_ngram_size: np.ndarray
    dry_multiplier: np.ndarray
    dry_base: np.ndarray
    dry_allowed_length: np.ndarray
    dry_penalty_last_n: np.ndarray
    min_new_tokens: np.ndarray
    min_length: np.ndarray
    bias_before: np.ndarray  # (B, E, J): tokens that must precede bias_token
    bias_token: np.ndarray  # (B, E)
    bias: np.ndarray  # (B, E)
    bias_first: np.ndarray  # (B, E): acts only on the first new token
    forced_at: np.ndarray  # (B, E): index of the new token
    forced_token: np.ndarray  # (B, E)
    ends: np.ndarray  # (B, E)
    stops: np.ndarray  # (B, E, J), right-aligned
    stop_lengths: np.ndarray  # (B, E); 0: no entry
    breakers: np.ndarray  # uint32 (B, W), a bit for each id; no words where no row uses DRY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the next token of a batch except the model and the tokens so far.

    A pytree: ``rows`` and ``allowed_V`` are traced, the other two are static.
    """

    rows: Rows
    allowed_V: np.ndarray  # ids that may ever be written; a row's own ends always may
    static_options: StaticOptions = dataclasses.field(metadata={"static": True})
    # The ends of rows that name none.
    eos: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def uses(self, *names: str) -> bool:
        """Return whether any row uses one of the options ``names``."""
        return bool(self.static_options.names & set(names))

    def differs(self, name: str) -> jax.Array:
        """Return whether a row uses the option ``name``, as a traced bool."""
        if name in _UNUSED:
            column, unused = _UNUSED[name]
            return (getattr(self.rows, column) != unused).any()
        return (getattr(self.rows, name) != getattr(DecodeConfig, name)).any()

    def map_rows(self, change: Callable) -> "Settings":
        """Return the settings with ``change`` applied to every array of ``rows``."""
        return dataclasses.replace(self, rows=jax.tree.map(change, self.rows))


# Of options with tables: a column, and its value in entries that do nothing.
_UNUSED = {"bias": ("bias", 0.0), "forced": ("forced_at", _NEVER)}
_WHOLE = (
    *("top_k", "no_repeat_ngram_size", "min_new_tokens", "min_length"),
    *("dry_allowed_length", "dry_penalty_last_n"),
)
_VALUES = Rows._fields[: Rows._fields.index("bias_before")]


def batch_settings(
    configs: Sequence[DecodeConfig],
    allowed_V: np.ndarray,
    eos: tuple[int, ...],
    constraint: Callable | None = None,
    breakers_of: Callable[[tuple[str, ...]], np.ndarray] | None = None,
) -> Settings:
    """Return the settings of a batch, one of ``configs`` a row.

    Args:
      eos: the ids that end a row whose config names none.
      breakers_of: returns the tokens that contain one of the strings, as bits (W,); see
        `dry.breaker_bits`. Needed where a row uses DRY.
    """
    values = {name: np.array([getattr(config, name) for config in configs]) for name in _VALUES}
    # A processor is part of the program only if some row differs from its neutral default.
    names = {
        name for name, column in values.items() if (column != getattr(DecodeConfig, name)).any()
    }
    # Sizes are static: each compiles windows of its own width.
    ngrams = tuple(sorted({int(n) for n in values["no_repeat_ngram_size"] if n}))
    biases = [_biases(config) for config in configs]
    forced = [_forced(config) for config in configs]
    # A stop token is a stop sequence of length 1, so one table serves both.
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
        "ends": _table([_ends_of(config, eos) for config in configs], _ANY, np.int32),
        "stops": _right(stops),
        "stop_lengths": _table([list(map(len, row)) for row in stops], 0, np.int32),
        "breakers": _breakers(configs, breakers_of),
    }
    # Fix the types: another type would compile another program.
    values = {
        name: column.astype(np.int32 if name in _WHOLE else np.float32)
        for name, column in values.items()
    }
    static_options = StaticOptions(frozenset(names), ngrams, constraint)
    return Settings(Rows(**values, **tables), allowed_V, static_options, eos)


def _biases(config: DecodeConfig) -> list[tuple[tuple[int, ...], float, bool]]:
    """Return (tokens, bias, first) for each bias.

    The bias is added to the last token's logit where the other tokens precede it; with ``first``,
    only for the first new token.
    """
    never = -np.inf
    return [
        *(((token,), bias, False) for token, bias in config.logit_bias),
        *((tokens, bias, False) for tokens, bias in config.sequence_bias),
        *((tokens, never, False) for tokens in config.bad_words_ids),
        *(((token,), never, False) for token in config.suppress_tokens),
        *(((token,), never, True) for token in config.begin_suppress_tokens),
    ]


def _breakers(configs: Sequence[DecodeConfig], breakers_of: Callable | None) -> np.ndarray:
    """Return the breakers of each row, (B, W)."""
    if not any(config.dry_multiplier for config in configs):
        return np.zeros((len(configs), 0), np.uint32)
    assert breakers_of is not None, "DRY needs the texts of the tokens"
    return np.stack([breakers_of(config.dry_sequence_breakers) for config in configs])


def _ends_of(config: DecodeConfig, eos: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(config.eos_token_id) or eos


def _forced(config: DecodeConfig) -> list[tuple[int, int]]:
    """Return (index of the new token, id it must have) for each forced token."""
    first = config.forced_bos_token_id
    last = config.forced_eos_token_id
    return [
        *(((0, first),) if first is not None else ()),
        *config.forced_tokens,
        *(((LAST, last),) if last is not None else ()),
    ]


def _width(count: int) -> int:
    # Powers of two: a batch whose longest list is a little longer reuses the program.
    return 1 << (count - 1).bit_length() if count else 0


def _table(lists: Sequence[Sequence], fill, dtype) -> np.ndarray:
    """Return ``lists`` as one array (B, E), padded with ``fill``."""
    table = np.full((len(lists), _width(max(map(len, lists), default=0))), fill, dtype)
    for row, entries in zip(table, lists, strict=True):
        row[: len(entries)] = entries
    return table


def _right(lists: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """Return (B, E, J): sequences aligned to the right; padding matches every id."""
    entries = _width(max(map(len, lists), default=0))
    longest = max((len(tokens) for row in lists for tokens in row), default=0)
    table = np.full((len(lists), entries, _width(longest)), _ANY, np.int32)
    for row, sequences in zip(table, lists, strict=True):
        for padded, tokens in zip(row, sequences, strict=False):
            # Aligned to the right, as `tails` gives the end of a row, so that both compare position
            # by position.
            padded[len(padded) - len(tokens) :] = tokens
    return table


def check_tokens(config: DecodeConfig, vocabulary: int) -> None:
    """Raise ValueError if a setting names a token that the model does not have."""
    first = config.forced_bos_token_id
    last = config.forced_eos_token_id
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
        "forced_bos_token_id": [] if first is None else [first],
        "forced_eos_token_id": [] if last is None else [last],
    }
    for name, tokens in named.items():
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"{name} has token {token}, which is outside the model's vocabulary, "
                    f"0 to {vocabulary - 1}; leave it out, or look it up with this model's "
                    "tokenizer"
                )


def ends_of(settings: Settings) -> jax.Array:
    """Return the ids that end each row, (B, E): its own, or ``eos`` where it names none.

    Entries below 0 are padding.
    """
    rows = settings.rows
    if not settings.uses("ends"):
        shape = (rows.temperature.shape[0], len(settings.eos))
        return jnp.broadcast_to(jnp.array(settings.eos, jnp.int32), shape)
    return jnp.asarray(rows.ends)


def tails(tokens_BS, lengths_B, width: int) -> jax.Array:
    """Return the last ``width`` known tokens of each row, padded on the left with no valid id."""
    at = lengths_B[:, None] - width + jnp.arange(width)[None, :]
    # -3 differs from every id and from the markers of the tables.
    return jnp.where(at >= 0, jnp.take_along_axis(tokens_BS, jnp.maximum(at, 0), 1), -3)


def matches(table_BEJ, tails_BJ) -> jax.Array:
    """Return which sequences of the table end the rows, (B, E)."""
    # Padding matches everything: an entry shorter than the table only decides by its own tokens.
    return ((table_BEJ == _ANY) | (table_BEJ == tails_BJ[:, None])).all(-1)


def stopped(settings: Settings, tokens_BS, lengths_B, prompts_B) -> jax.Array:
    """Return whether each row's known tokens end with a stop sequence that was all generated."""
    if not settings.uses("stops"):
        return jnp.zeros(lengths_B.shape, bool)
    rows = settings.rows
    hit_BE = matches(rows.stops, tails(tokens_BS, lengths_B, rows.stops.shape[-1]))
    # A sequence that begins in the prompt was not written, and does not stop the row.
    generated_B1 = (lengths_B - prompts_B)[:, None]
    whole_BE = (rows.stop_lengths > 0) & (rows.stop_lengths <= generated_B1)
    return (hit_BE & whole_BE).any(-1)
