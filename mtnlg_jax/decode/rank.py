"""Rank candidates, given or generated, after one shared prefix, by one scorer or several; or those
of many prompts, which the model reads together."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtnlg_jax.config import DecodeConfig, StageConfig, validate_decode
from mtnlg_jax.decode.batched_settings import check_tokens
from mtnlg_jax.decode.cache import Decoder, capacity, prefill
from mtnlg_jax.decode.generate import continue_prefix
from mtnlg_jax.decode.given import read_candidates
from mtnlg_jax.decode.many_prompts import score_behind
from mtnlg_jax.decode.pool import NORMALIZATIONS, Candidate, Pool, ScorerOptions, Scores, sums_of
from mtnlg_jax.decode.prefixes import check_scorers, encode_behind, stacked
from mtnlg_jax.decode.results import Generated, check_context, encode_prompt
from mtnlg_jax.decode.scorers import SCORERS, check_request, weights_of
from mtnlg_jax.decode.scoring import score_from, score_rows
from mtnlg_jax.decode.text_scorers import shuffled_of


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
    prefix: Any = None,
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
      prefix: an image or features that the model reads ahead of the prompt, as for `generate`.
        Scorers that read other texts than the prompt with a candidate behind it (pmi,
        noisy_channel, pseudo_log_likelihood, coherence) take none.

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
    if prefix is not None:
        check_scorers(weights)
    ahead = stacked(decoder.config, [prefix], 1)
    encode = functools.partial(encode_behind, decoder.config, tokenizer, prefix)
    read = None
    known = {}
    if candidates is None:
        if written is None:
            prompt_tokens, read, written = _write(
                decoder, tokenizer, encode(prompt), ahead, decode or DecodeConfig(), weights
            )
        else:
            prompt_tokens = tuple(encode(prompt))
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
        prompt_tokens, found = read_candidates(decoder, tokenizer, encode, prompt, candidates)
    request = _request(
        decoder, tokenizer, prompt, found, weights=weights, normalise=normalise, options=options
    )
    # The log-probabilities of generated candidates are already known.
    if known:
        logprobs = [known[each] for each in request.pool.candidates]
    else:
        logprobs = _score(decoder, read, ahead, prompt_tokens, request.pool.candidates)
    return _ranking(request, logprobs)


def rank_many(
    decoder: Decoder,
    tokenizer,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    scorers: str | Sequence[str] | Mapping[str, float] = "logprob",
    normalise: str = "per_token",
    options: Sequence[ScorerOptions] | None = None,
    stages: Sequence[StageConfig] | None = None,
) -> list[Ranking]:
    """Return for each prompt what `rank` returns for it and its candidates, up to rounding.

    The model reads many prompts at once, those of similar lengths together. ``options`` has an
    entry for each prompt. Raises ValueError as `rank` does, before the model does any work.
    """
    weights = weights_of(scorers)
    options = options or [ScorerOptions()] * len(prompts)
    encode = functools.partial(encode_prompt, tokenizer)
    known: dict = {}
    requests = []
    tokens = []
    for prompt, texts, own in zip(prompts, candidates, options, strict=True):
        check_request(weights, normalise, own, tokenizer, prompt, stages)
        prompt_tokens, found = read_candidates(decoder, tokenizer, encode, prompt, texts)
        tokens.append(prompt_tokens)
        settings = {"weights": weights, "normalise": normalise, "options": own}
        requests.append(_request(decoder, tokenizer, prompt, found, known=known, **settings))
    return [
        _ranking(request, logprobs)
        for request, logprobs in zip(requests, _score_many(decoder, tokens, requests), strict=True)
    ]


class _Request(NamedTuple):
    """Candidates that were checked and are to be scored."""

    pool: Pool
    planned: dict[str, Callable[[np.ndarray], Scores]]  # by the name of the scorer
    weights: dict[str, float]
    indices: list[int]  # of the first occurrence of each of the pool's candidates
    size: int  # number of candidates, duplicates included


def _request(
    decoder,
    tokenizer,
    prompt,
    found: Sequence[Candidate],
    *,
    weights,
    normalise,
    options,
    known=None,
) -> _Request:
    """Check the candidates; raise ValueError if a scorer cannot score them."""
    first: dict[Candidate, int] = {}
    counts = collections.Counter(found)
    for index, each in enumerate(found):
        first.setdefault(each, index)
    counted = np.array([counts[each] for each in first])
    known = {} if known is None else known
    pool = Pool(decoder, tokenizer, prompt, list(first), counted, normalise, options, known)
    # All checks come before any scorer runs the model.
    planned = {name: SCORERS[name](pool) for name in weights}
    return _Request(pool, planned, weights, list(first.values()), len(found))


def _ranking(request: _Request, logprobs: Sequence[np.ndarray]) -> Ranking:
    """Return the ranking by the log-probabilities of the tokens of the pool's candidates."""
    pool, planned, weights, indices, size = request
    sums = sums_of(logprobs)
    scored = {name: run(sums) for name, run in planned.items()}
    weighted = [weight * scored[name].parts[name] for name, weight in weights.items()]
    totals = np.sum(weighted, 0)
    _check_finite(totals, pool)
    # A stable sort keeps ties in the order in which the candidates came.
    order = np.argsort(-totals, kind="stable")
    ranked = tuple(
        _ranked(number, i, totals, sums, scored, pool, indices)
        for number, i in enumerate(order.tolist(), 1)
    )
    utilities = _utilities(scored, order)
    duplicates = size - len(pool.candidates)
    return Ranking(ranked, size, duplicates, weights, pool.normalise, utilities)


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


def _score(
    decoder, prefix, ahead, prompt_tokens, candidates: Sequence[Candidate]
) -> list[np.ndarray]:
    """Return the log-probabilities of the tokens of each candidate, reading the prompt once.

    Candidates that share no token with the prompt follow <bos> alone, and are read in rows of their
    own.
    """
    behind, alone = _by_prefix(prompt_tokens, candidates)
    logprobs = {}
    if behind:
        prefix = prefix or prefill(
            decoder,
            [prompt_tokens],
            capacity(len(prompt_tokens), decoder.context),
            prefixes=ahead,
        )
        rows = [candidates[i].row for i in behind]
        starts = [candidates[i].start for i in behind]
        logprobs = dict(zip(behind, score_from(decoder, prefix, rows, starts), strict=True))
    logprobs |= _score_alone(decoder, {i: candidates[i] for i in alone})
    return [logprobs[i] for i in range(len(candidates))]


def _score_many(
    decoder, prompts: Sequence[Sequence[int]], requests: Sequence[_Request]
) -> list[list[np.ndarray]]:
    """Return what `_score` returns for each prompt, reading many prompts at once."""
    pools = [request.pool.candidates for request in requests]
    shares = [_by_prefix(*each) for each in zip(prompts, pools, strict=True)]
    asked = [number for number, (behind, _) in enumerate(shares) if behind]
    given = [[pools[number][i] for i in shares[number][0]] for number in asked]
    found = score_behind(
        decoder,
        [prompts[number] for number in asked],
        [[each.row for each in of_prompt] for of_prompt in given],
        [[each.start for each in of_prompt] for of_prompt in given],
    )
    logprobs = _score_alone(
        decoder,
        {(number, i): pools[number][i] for number, (_, alone) in enumerate(shares) for i in alone},
    )
    for number, parts in zip(asked, found, strict=True):
        keys = [(number, i) for i in shares[number][0]]
        logprobs |= dict(zip(keys, parts, strict=True))
    return [
        [logprobs[number, i] for i in range(len(candidates))]
        for number, candidates in enumerate(pools)
    ]


def _by_prefix(prompt_tokens: Sequence[int], candidates: Sequence[Candidate]):
    """Return (indices of the candidates that the prompt's cache serves, indices of the others)."""
    behind = [
        i
        for i, each in enumerate(candidates)
        # The row agrees with the prompt up to its start.
        if each.row[: each.start] == prompt_tokens[: each.start]
    ]
    return behind, sorted(set(range(len(candidates))) - set(behind))


def _score_alone(decoder, candidates: dict[Any, Candidate]) -> dict[Any, np.ndarray]:
    """Return the log-probabilities of candidates in rows of their own, under their keys."""
    if not candidates:
        return {}
    rows = [each.row for each in candidates.values()]
    starts = [each.start for each in candidates.values()]
    return dict(zip(candidates, score_rows(decoder, rows, starts), strict=True))


def _bytes_of(tokenizer, tokens) -> bytes:
    return b"".join(map(tokenizer.token_bytes, tokens))


def _write(decoder, tokenizer, tokens, ahead, decode, weights):
    """Generate candidates, reading the ``tokens`` of the prompt once.

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
    if "coherence" in weights:
        shuffled_of(tokenizer, tokens)
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
    size = capacity(len(tokens) + longest, decoder.context)
    prefix = prefill(decoder, [tokens], size, prefixes=ahead)
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
