"""Rank candidates, given or generated, after one shared prefix, by one scorer or several."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mtnlg_jax.config import DecodeConfig, StageConfig, validate_decode
from mtnlg_jax.decode.batched_settings import check_tokens
from mtnlg_jax.decode.cache import Decoder, capacity, prefill
from mtnlg_jax.decode.generate import continue_prefix
from mtnlg_jax.decode.results import Generated, check_context, encode_prompt
from mtnlg_jax.decode.scorers import (
    NORMALIZATIONS,
    SCORERS,
    Candidate,
    Pool,
    ScorerOptions,
    Scores,
    check_request,
    weights_of,
)
from mtnlg_jax.decode.scoring import score_from, score_rows


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A candidate, its score and the parts of the score.

    Log-probabilities are natural logarithms, in the model's own distribution.
    """

    rank: int  # from 1
    text: str  # the candidate as it was given or generated
    scored: str  # the text of ``tokens``, on which sum and per_... are based: see ``rank``
    tokens: tuple[int, ...]  # the tokens scored
    score: float  # the sort key: the sum of weight x parts[scorer] over the scorers
    sum: float  # log p(tokens | all tokens before them)
    per_token: float
    per_char: float  # characters of ``scored``
    per_byte: float  # bytes of ``scored`` in UTF-8
    index: int  # of its first occurrence among the candidates
    count: int  # how often it occurred
    # each scorer's score by its name, and the terms it was computed from by "scorer.part"
    parts: dict[str, float]
    answer: str | None = None  # found by self_consistency


@dataclasses.dataclass(frozen=True)
class Ranking(Sequence):
    """The candidates, best first. Better texts may exist that were not among the candidates."""

    candidates: tuple[Ranked, ...]
    size: int  # number of candidates, duplicates included
    duplicates: int  # those equal to an earlier one
    weights: dict[str, float]  # of the scorers
    normalise: str
    # of mbr: each candidate (row) against each, best first
    utilities: tuple[tuple[float, ...], ...] | None = None

    def __getitem__(self, index):
        return self.candidates[index]

    def __len__(self) -> int:
        return len(self.candidates)


def rank(
    decoder: Decoder,
    tokenizer,
    prompt: str,
    candidates: Sequence[str] | None = None,
    *,
    decode: DecodeConfig | None = None,
    written: Sequence[Generated] | None = None,
    scorers: str | Sequence[str] | Mapping[str, float] = "logprob",
    normalise: str = "per_token",
    options: ScorerOptions | None = None,
    stages: Sequence[StageConfig] | None = None,
) -> Ranking:
    """Return the candidates by falling score.

    Ties keep their order, and equal candidates become one with a count.

    Args:
      candidates: texts that continue ``prompt``, each with its own leading space if it has one.
        None: generate ``decode.num_return_sequences`` of them, by sampling or, with num_beams
        above 1, as beams; if that number is 1, all beams.
      written: results that were generated behind ``prompt`` already, such as in the slots of a
        server, in place of ``candidates`` and ``decode``; those without tokens are left out.
      scorers: a name of ``scorers.SCORERS``, several of equal weight, or {name: weight}.
      normalise: "sum", or what to divide log-probabilities by: "per_token", "per_char" or
        "per_byte" (UTF-8).
      options: settings of single scorers.
      stages: the stages that trained the model, if known; pseudo_log_likelihood needs one with
        masks.

    Each given candidate is scored at its own boundary, whatever else is in the list, as
    lm-evaluation-harness does it (``_encode_pair``): whitespace that ends the prompt is moved to
    the candidate, prompt and prompt + candidate are tokenized as one text each, and the tokens
    scored are those of the second behind the first. Where the candidate joins the prompt's last
    tokens ("we saw th" + "e"), the harness is undefined. Here scoring starts at the first token
    that the candidate changes, and ``scored`` begins with the end of the prompt (" the"). Such a
    sum includes that end; the values per token, character and byte, which divide by all that the
    sum covers, compare better.

    Generated candidates are equal if both text and tokens are, and are scored in the tokens that
    were generated, including those of a stop string.

    Raises ValueError, where possible before the model does any work, on an empty candidate or list,
    on more tokens than the context holds, on unknown scorers, on weights that are all 0 and on
    options in conflict.
    """
    weights = weights_of(scorers)
    options = options or ScorerOptions()
    check_request(weights, normalise, options, tokenizer, prompt, stages)
    prefix = None
    known = {}
    if candidates is None:
        if written is None:
            prompt_tokens, prefix, written = _write(
                decoder, tokenizer, prompt, decode or DecodeConfig(), weights
            )
        else:
            prompt_tokens = tuple(encode_prompt(tokenizer, prompt))
            written = _with_tokens(written)
        found = [_generated(tokenizer, prompt_tokens, result) for result in written]
        # With an int8 cache, generated tokens were read less exactly than given ones.
        if not decoder.int8_cache:
            known = {each: result.logprobs for each, result in zip(found, written, strict=True)}
    elif decode is not None or written is not None:
        raise ValueError(
            f"decode writes candidates, and {len(candidates)} are given; leave one of the two out"
        )
    else:
        prompt_tokens, found = _read(decoder, tokenizer, prompt, candidates)
    first: dict[Candidate, int] = {}
    counts = collections.Counter(found)
    for index, each in enumerate(found):
        first.setdefault(each, index)
    counted = np.array([counts[each] for each in first])
    pool = Pool(decoder, tokenizer, prompt, list(first), counted, normalise, options)
    # All checks come before any scorer runs the model.
    planned = {name: SCORERS[name](pool) for name in weights}
    # The log-probabilities of generated candidates are already known.
    if known:
        logprobs = [known[each] for each in first]
    else:
        logprobs = _score(decoder, prefix, prompt_tokens, list(first))
    sums = np.array([np.sum(each, dtype=np.float64) for each in logprobs])
    scored = {name: run(sums) for name, run in planned.items()}
    totals = sum(weight * scored[name].parts[name] for name, weight in weights.items())
    _check_finite(totals, pool)
    # A stable sort keeps ties in the order in which the candidates came.
    order = np.argsort(-totals, kind="stable")
    ranked = tuple(
        _ranked(number, i, totals, sums, scored, pool, list(first.values()))
        for number, i in enumerate(order.tolist(), 1)
    )
    utilities = _utilities(scored, order)
    return Ranking(ranked, len(found), len(found) - len(first), weights, normalise, utilities)


def _utilities(scored: Mapping[str, Scores], order: np.ndarray) -> tuple | None:
    """Return the utilities of the scorer that has some, in ``order``."""
    for each in scored.values():
        if each.utilities is not None:
            return tuple(map(tuple, each.utilities[np.ix_(order, order)].tolist()))
    return None


def _generated(tokenizer, prompt_tokens: Sequence[int], result) -> Candidate:
    """Return a generated result as a candidate."""
    tokens = (*prompt_tokens, *result.tokens)
    # Bytes of the tokens and not of the text: a stop string is cut from the text but was generated.
    written = _bytes_of(tokenizer, result.tokens)
    return Candidate(result.text, tokens, len(prompt_tokens), written)


def _check_finite(totals: np.ndarray, pool: Pool) -> None:
    """Raise ValueError that names the first candidate whose score is not finite."""
    if not np.isfinite(totals).all():
        nonfinite = int(np.flatnonzero(~np.isfinite(totals))[0])
        raise ValueError(
            f"the score of {pool.candidates[nonfinite].text[:40]!r} is {totals[nonfinite]}; look "
            "for numbers that are not finite in the model's parameters, or in what a function of "
            "yours returned"
        )


def _ranked(
    rank: int,
    i: int,
    totals: np.ndarray,
    sums: np.ndarray,
    scored: Mapping[str, Scores],
    pool: Pool,
    indices: Sequence[int],
) -> Ranked:
    """Return the result for the pool's candidate ``i``."""
    candidate = pool.candidates[i]
    parts = {
        name: column[i].item() for each in scored.values() for name, column in each.parts.items()
    }
    answer = next((each.answers[i] for each in scored.values() if each.answers is not None), None)
    means = {name: float(sums[i]) / candidate.length(name) for name in NORMALIZATIONS}
    return Ranked(
        rank,
        candidate.text,
        candidate.scored.decode("utf-8", "replace"),
        candidate.tokens,
        float(totals[i]),
        **means,
        index=indices[i],
        count=int(pool.counts[i]),
        parts=parts,
        answer=answer,
    )


def _score(decoder, prefix, prompt_tokens, candidates: Sequence[Candidate]) -> list[np.ndarray]:
    """Return the log-probabilities of the tokens of each candidate, reading the prompt once.

    Candidates that share no token with the prompt follow <bos> alone, and are read in rows of their
    own.
    """
    logprobs = [np.empty(0, np.float32)] * len(candidates)
    behind = [
        i
        for i, each in enumerate(candidates)
        # The row agrees with the prompt up to its start, so the prompt's cache serves it.
        if each.row[: each.start] == prompt_tokens[: each.start]
    ]
    alone = [i for i in range(len(candidates)) if i not in set(behind)]
    if behind:
        prefix = prefix or prefill(
            decoder, [prompt_tokens], capacity(len(prompt_tokens), decoder.context)
        )
        parts = score_from(
            decoder,
            prefix,
            *zip(*((candidates[i].row, candidates[i].start) for i in behind), strict=True),
        )
        for i, part in zip(behind, parts, strict=True):
            logprobs[i] = part
    if alone:
        parts = score_rows(
            decoder, *zip(*((candidates[i].row, candidates[i].start) for i in alone), strict=True)
        )
        for i, part in zip(alone, parts, strict=True):
            logprobs[i] = part
    return logprobs


def _bytes_of(tokenizer, tokens) -> bytes:
    return b"".join(map(tokenizer.token_bytes, tokens))


def _write(decoder, tokenizer, prompt, decode, weights):
    """Generate candidates, reading the prompt once.

    Returns: the prompt's tokens, its prefix, and the results.
    """
    validate_decode(decode)
    check_tokens(decode, decoder.config.vocabulary)
    # A ranking of one beam is pointless, so all of them are ranked.
    if decode.num_beams > 1 and decode.num_return_sequences == 1:
        decode = dataclasses.replace(decode, num_return_sequences=decode.num_beams)
    number = decode.num_return_sequences
    if "mbr" in weights and number == 1:
        raise ValueError(
            "mbr compares a candidate with the others, and num_return_sequences=1; ask for more"
        )
    tokens = encode_prompt(tokenizer, prompt)
    # The bidirectional model also reads the end of the text.
    ends = int("pseudo_log_likelihood" in weights)
    check_context(
        decoder,
        len(tokens) + 1 + ends,
        f"the prompt with {'a token and the end' if ends else 'one token'}",
    )
    # With room for the end that the bidirectional model reads.
    longest = min(decode.max_new_tokens, decoder.context - len(tokens) - ends)
    # A candidate needs at least one token to score.
    decode = dataclasses.replace(
        decode, max_new_tokens=longest, min_new_tokens=min(max(1, decode.min_new_tokens), longest)
    )
    # Room for the prompt and the longest candidate. Scoring may read behind this prefix again.
    prefix = prefill(decoder, [tokens], capacity(len(tokens) + longest, decoder.context))
    written = _with_tokens(continue_prefix(decoder, tokenizer, prefix, [decode]))
    return tokens, prefix, written


def _with_tokens(written: Sequence[Generated]) -> list[Generated]:
    """Return the results that have tokens to score. Raise ValueError if there are none."""
    kept = [result for result in written if result.tokens]
    if not kept:
        raise ValueError(
            "the settings let nothing be written, so there are no candidates to rank; allow more "
            "tokens"
        )
    return kept


def _read(decoder, tokenizer, prompt: str, candidates) -> tuple[tuple[int, ...], list[Candidate]]:
    """Return the tokens of the prompt, and each candidate after the tokens it leaves unchanged."""
    if isinstance(candidates, str):
        raise ValueError(f"candidates={candidates[:40]!r} is one text; give a list of texts")
    candidates = list(candidates)
    if not candidates:
        raise ValueError("there are no candidates to rank; give at least one")
    if "" in candidates:
        raise ValueError(
            f"candidate {candidates.index('') + 1} of {len(candidates)} is empty; leave it out"
        )
    for number, text in enumerate(candidates, 1):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"candidate {number} of {len(candidates)}, {text[:40]!r}, is not Unicode text; "
                "decode it from bytes with its encoding"
            )
    # Tokenizers join a space with the word behind it, so it belongs to the candidate.
    context = prompt.rstrip()
    spaces = prompt[len(context) :]
    alone = tuple(encode_prompt(tokenizer, context))
    # Equal candidates are tokenized once.
    read = {
        text: _at_its_boundary(decoder, tokenizer, context, spaces, text, alone)
        for text in dict.fromkeys(candidates)
    }
    return alone, [read[text] for text in candidates]


def _at_its_boundary(
    decoder, tokenizer, context: str, spaces: str, text: str, alone: tuple[int, ...]
) -> Candidate:
    row = tuple(encode_prompt(tokenizer, context + spaces + text))
    # The first token that the candidate changes; from there on all is scored.
    start = _common(alone, row)
    # Tokens of the prompt that the candidate changed: their text is part of what is scored.
    joined = alone[start:]
    if start == 0:
        # Without a <bos> the texts may differ in their first token, which needs a token before it.
        row = (tokenizer.bos_id, *row)
        joined = () if alone == (tokenizer.bos_id,) else joined
        start = 1
    check_context(decoder, len(row), f"the prompt with candidate {text[:40]!r}")
    if len(row) == start:
        raise ValueError(f"candidate {text[:40]!r} adds no token to the prompt; leave it out")
    return Candidate(text, row, start, _bytes_of(tokenizer, joined) + (spaces + text).encode())


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (left, right) in pairs if left != right), min(len(one), len(other)))
