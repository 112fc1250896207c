"""Settings of rows in three tiers, so that no mixture compiles a program while others wait.

A batch runs the program of its widest row: greedy without options, sampling by temperature alone,
or all options. Tables have one width each, and the last program asks in every step which options
its rows use.
"""

# Shapes: B rows, V vocabulary, E entries of a table, J tokens of an entry

import functools
from collections.abc import Sequence

import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.batched_settings import Rows, Settings, StaticOptions, batch_settings
from mtnlg_jax.decode.dry import breaker_bits

_FIRST_TABLE = Rows._fields.index("bias_before")
# The longest n-gram that rows of a running batch may forbid.
NGRAM = 16
GREEDY = StaticOptions(frozenset(), ())
SAMPLED = StaticOptions(frozenset({"temperature"}), ())
ALL = StaticOptions(
    frozenset({*Rows._fields[:_FIRST_TABLE], "bias", "forced", "stops", "ends"}),
    (NGRAM,),
    skips=True,
)
TIERS = (GREEDY, SAMPLED, ALL)

# Entries of a table and tokens of an entry, and what fills the rest.
_WIDTHS = {
    "bias_before": ((512, 8), -1),
    "bias_token": ((512,), 0),
    "bias": ((512,), 0.0),
    "bias_first": ((512,), False),
    "forced_at": ((32,), -1),
    "forced_token": ((32,), 0),
    "ends": ((8,), -1),
    "stops": ((32, 16), -1),
    "stop_lengths": ((32,), 0),
}
_SETTINGS = {
    "bias_before": "logit_bias, sequence_bias, bad_words_ids, suppress_tokens and "
    "begin_suppress_tokens",
    "forced_at": "forced_tokens, forced_bos_token_id and forced_eos_token_id",
    "ends": "eos_token_id",
    "stops": "stop_token_ids and stop_sequences",
}


def row_settings(
    config: DecodeConfig, tokenizer, vocabulary: int, extras: bool = False
) -> tuple[int, Rows]:
    """Return the tier of one row, 0 to 2, and its settings with tables of the fixed widths.

    Args:
      vocabulary: ids of the model.
      extras: the row has a constraint or tells alternatives, which the last tier does.

    Raises ValueError if a list is longer than its table, and on contrastive search.
    """
    if config.penalty_alpha > 0:
        raise ValueError(
            f"penalty_alpha={config.penalty_alpha} computes top_k candidates for a token, and rows "
            "that share steps compute one; set penalty_alpha=0, or call `generate`"
        )
    bits_of = functools.partial(breaker_bits, tokenizer, vocabulary)
    found = batch_settings(
        [config], np.zeros(0, bool), tuple(tokenizer.eos_ids), breakers_of=bits_of
    )
    for name, setting in _SETTINGS.items():
        _check_width(setting, getattr(found.rows, name).shape[1:], _WIDTHS[name][0])
    if config.no_repeat_ngram_size > NGRAM:
        raise ValueError(
            f"no_repeat_ngram_size={config.no_repeat_ngram_size} is above {NGRAM}, the most for "
            "rows that share steps; give a smaller one"
        )
    names = found.static_options.names
    tier = next(i for i, options in enumerate(TIERS) if names <= options.names)
    widths = _WIDTHS | {"breakers": ((-(-vocabulary // 32),), 0)}
    tables = {name: _widened(getattr(found.rows, name), *widths[name]) for name in widths}
    return (len(TIERS) - 1 if extras else tier), found.rows._replace(**tables)


def _check_width(setting: str, shape: tuple[int, ...], most: tuple[int, ...]) -> None:
    for size, limit, what in zip(shape, most, ("entries", "tokens in an entry"), strict=False):
        if size > limit:
            raise ValueError(
                f"{setting}: more than {limit} {what}, the most for rows that share steps; give "
                "fewer"
            )


def _widened(table: np.ndarray, widths: tuple[int, ...], fill) -> np.ndarray:
    wide = np.full((table.shape[0], *widths), fill, table.dtype)
    if table.size:
        # Sequences are aligned to the right, lists of entries to the left.
        tokens = (slice(widths[1] - table.shape[2], None),) if table.ndim == 3 else ()
        wide[(slice(None), slice(table.shape[1]), *tokens)] = table
    return wide


def tier_settings(
    tier: int, rows: Sequence[Rows], allowed_V: np.ndarray, eos: tuple[int, ...]
) -> Settings:
    """Return the settings of a turn whose widest row is of ``tier``."""
    joined = Rows(*(np.concatenate(column) for column in zip(*rows, strict=True)))
    return Settings(joined, allowed_V, TIERS[tier], eos)
