"""Rules that span several settings of decoding: contradictions, and settings that cannot act beside
the others."""

import dataclasses
import math
import typing
from collections.abc import Iterable

from mtnlg_jax.config.checks import (
    Rules,
    check_fields,
    check_rules,
    must_divide,
    refuse_changed,
    within,
)
from mtnlg_jax.config.coerce import coerce, hints_of
from mtnlg_jax.config.schema import DecodeConfig

# Settings that act on sampling only, and settings that act on beam search only.
SAMPLING_LIMITS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_MIROSTAT = ("mirostat_tau", "mirostat_eta")
# Settings that act beside dry_multiplier only.
_DRY = ("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers")
BEAM_ORDER = (
    "length_penalty",
    "length_penalty_type",
    "early_stopping",
    "num_beam_groups",
    "diversity_penalty",
)

_BEAM_RULES: Rules = (
    (
        lambda c: c.num_beam_groups > 1 and c.diversity_penalty == 0,
        "num_beam_groups={c.num_beam_groups} with diversity_penalty=0 would write the same "
        "{c.num_beam_groups} times; set diversity_penalty above 0, or num_beam_groups=1",
    ),
    (
        lambda c: c.num_beam_groups == 1 and c.diversity_penalty > 0,
        "diversity_penalty={c.diversity_penalty} acts between groups, and num_beam_groups=1; set "
        "num_beam_groups to a divisor of num_beams above 1, or diversity_penalty=0",
    ),
    (
        lambda c: c.num_beams > 1 and c.prompt_lookup_num_tokens,
        "prompt_lookup_num_tokens={c.prompt_lookup_num_tokens} guesses the next tokens of one "
        "sequence, and num_beams={c.num_beams} continues several; set one of them to its default, "
        "0 or 1",
    ),
    (
        lambda c: 1 < c.num_beams < c.num_return_sequences,
        "num_return_sequences={c.num_return_sequences} is above num_beams={c.num_beams}; raise "
        "num_beams, or ask for at most {c.num_beams}",
    ),
    (
        lambda c: c.num_beams > 1 and c.stop_strings,
        "stop_strings cannot be searched while num_beams={c.num_beams} beams are chosen; give "
        "stop_sequences (tokens), or num_beams=1",
    ),
    (
        lambda c: c.num_beams == 1 and c.temperature == 0 and c.num_return_sequences > 1,
        "num_return_sequences={c.num_return_sequences} (--n) at temperature=0 would write the same "
        "text that many times; set temperature above 0 to sample, or num_beams, or ask for 1",
    ),
)

_CONTRASTIVE_RULES: Rules = (  # for penalty_alpha above 0
    (
        lambda c: c.temperature > 0,
        "penalty_alpha={c.penalty_alpha} is contrastive search, which does not sample, and "
        "temperature={c.temperature} does; set one of them to 0",
    ),
    (
        lambda c: c.num_beams > 1,
        "penalty_alpha={c.penalty_alpha} compares candidates for one sequence, and "
        "num_beams={c.num_beams} continues several; set num_beams=1, or penalty_alpha=0",
    ),
    (
        lambda c: c.prompt_lookup_num_tokens,
        "penalty_alpha={c.penalty_alpha} compares the candidates for one token, and "
        "prompt_lookup_num_tokens={c.prompt_lookup_num_tokens} guesses several; set one of them "
        "to 0",
    ),
    (
        lambda c: c.top_k < 2,
        "penalty_alpha={c.penalty_alpha} compares the top_k most likely tokens, and "
        "top_k={c.top_k} leaves no choice; set top_k=4, or penalty_alpha=0",
    ),
)

_MIROSTAT_RULES: Rules = (  # for mirostat_tau above 0, where it can act
    (
        lambda c: c.num_beams > 1,
        "mirostat_tau={c.mirostat_tau} is steered by the tokens of one sequence, and "
        "num_beams={c.num_beams} draws several at once; set num_beams=1, or mirostat_tau=0",
    ),
    (
        lambda c: c.prompt_lookup_num_tokens,
        "mirostat_tau={c.mirostat_tau} is steered by each token that is drawn, and "
        "prompt_lookup_num_tokens={c.prompt_lookup_num_tokens} verifies several at once; set one "
        "of them to 0",
    ),
)


def validate_decode(decode: DecodeConfig, standing_by: bool = False) -> None:
    """Raise ValueError if a setting is out of range, contradicts another one, or cannot act beside
    the others. ``standing_by``: allow the last, as the settings of a run may wait until others let
    them act (see ``acting``)."""
    for key, kind in hints_of(DecodeConfig).items():
        if typing.get_origin(kind) is tuple:
            coerce(getattr(decode, key), kind, key)
    check_fields(decode)
    within("min_new_tokens", decode.min_new_tokens, 0, decode.max_new_tokens)
    if "" in decode.stop_strings:
        raise ValueError("a stop string is empty; leave it out")
    if "" in decode.dry_sequence_breakers:
        raise ValueError("dry_sequence_breakers has an empty string; leave it out")
    sequences = {
        "bad_words_ids": decode.bad_words_ids,
        "stop_sequences": decode.stop_sequences,
        "sequence_bias": [tokens for tokens, _ in decode.sequence_bias],
    }
    for key, given in sequences.items():
        if () in given:
            raise ValueError(f"{key} has a sequence without tokens; leave it out")
    for what, bias in (*decode.logit_bias, *decode.sequence_bias):
        within(f"the bias of {what}", bias, -math.inf, math.inf, high_open=True)
    for index, _ in decode.forced_tokens:
        within("forced_tokens, which new token", index, 0, decode.max_new_tokens, high_open=True)
    forced = {decode.forced_bos_token_id, decode.forced_eos_token_id}
    forced |= {token for _, token in decode.forced_tokens}
    for token in decode.suppress_tokens:
        if token in forced:
            raise ValueError(
                f"token {token} is both forced and in suppress_tokens; take it out of one of them"
            )
    if standing_by:
        decode = acting(decode)
    must_divide("num_beams", decode.num_beams, "num_beam_groups", decode.num_beam_groups)
    check_rules(_BEAM_RULES, decode)
    if decode.penalty_alpha > 0:
        check_rules(_CONTRASTIVE_RULES, decode)
    _check_idle(decode)
    if decode.mirostat_tau > 0:
        check_rules(_MIROSTAT_RULES, decode)


def _check_idle(decode: DecodeConfig) -> None:
    """Refuse settings that cannot act beside the others."""
    one = decode.num_beams == 1
    if one:
        why = "affects beams only, and num_beams=1; set num_beams above 1"
        refuse_changed(decode, BEAM_ORDER, why)
    elif decode.temperature > 0:
        why = f"affects beam search only, and temperature={decode.temperature} draws the beams; "
        refuse_changed(decode, BEAM_ORDER, why + "set temperature=0")
    if decode.temperature == 0:
        method = "greedy decoding" if one else "beam search"
        purpose = "to sample" if one else "for stochastic beams"
        why = f"affects sampling only, and {method} at temperature=0 does not sample; "
        why += f"set temperature above 0 {purpose}"
        limits = (name for name in SAMPLING_LIMITS if name != "top_k" or not decode.penalty_alpha)
        refuse_changed(decode, (*limits, *_MIROSTAT, "seed"), why)
    if decode.mirostat_tau > 0:
        why = f"limits sampling, and mirostat_tau={decode.mirostat_tau} sets its own limit for "
        refuse_changed(decode, SAMPLING_LIMITS, why + "each token; set mirostat_tau=0")
    else:
        why = "is for mirostat, and mirostat_tau=0 turns it off; set that to 5"
        refuse_changed(decode, ("mirostat_eta",), why)
    if decode.dry_multiplier == 0:
        why = "is for DRY, and dry_multiplier=0 turns it off; set that to 0.8"
        refuse_changed(decode, _DRY, why)
    elif decode.dry_penalty_last_n == 0:
        raise ValueError(
            "dry_penalty_last_n=0 lets DRY see no token; set -1 for all, or dry_multiplier=0 to "
            "turn it off"
        )
    if decode.prompt_lookup_num_tokens == 0:
        why = "is for prompt lookup, and prompt_lookup_num_tokens=0 guesses none; set that to 5"
        refuse_changed(decode, ("max_matching_ngram_size",), why)


def acting(decode: DecodeConfig, kept: Iterable[str] = ()) -> DecodeConfig:
    """Return ``decode`` with defaults in place of settings that cannot act, such as top_k=50 beside
    temperature=0. Such settings of a run, or of a generation_config.json, wait for a temperature.

    ``kept`` names settings that stay because somebody asked for them: ``validate_decode`` then
    refuses those that cannot act."""
    idle: set[str] = set()
    contrastive = decode.penalty_alpha > 0 and not any(
        breaks(decode) for breaks, _ in _CONTRASTIVE_RULES
    )
    if not contrastive:
        idle.add("penalty_alpha")
    if decode.dry_multiplier == 0:
        idle |= set(_DRY)
    if decode.mirostat_tau == 0 or decode.num_beams > 1 or decode.prompt_lookup_num_tokens:
        idle |= set(_MIROSTAT)
    elif decode.temperature > 0:
        idle |= set(SAMPLING_LIMITS)
    if decode.temperature == 0:
        idle |= {*SAMPLING_LIMITS, *_MIROSTAT, "seed"} - ({"top_k"} if contrastive else set())
        if decode.num_beams == 1:
            idle.add("num_return_sequences")
    if decode.num_beams == 1 or decode.temperature > 0:
        idle |= set(BEAM_ORDER)
    if decode.num_beams > 1:
        idle.add("prompt_lookup_num_tokens")
    if decode.num_beams > 1 or decode.prompt_lookup_num_tokens == 0:
        idle.add("max_matching_ngram_size")
    changes = {name: getattr(DecodeConfig, name) for name in idle - set(kept)}
    return dataclasses.replace(decode, **changes)
