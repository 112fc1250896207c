"""Ranking: candidates, given, sampled or beamed, scored behind one shared prefix, by one scorer or several."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mtnlg_jax.config import DecodeConfig, StageConfig, validate_decode
from mtnlg_jax.decode.cache import Decoder, capacity, prefill
from mtnlg_jax.decode.generate import check_context, continue_prefix, encode_prompt
from mtnlg_jax.decode.rows import check_tokens
from mtnlg_jax.decode.scorers import NORMALISATIONS, SCORERS, Pool, ScorerOptions, check_request, length_of, weights_of
from mtnlg_jax.decode.scoring import score


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A candidate, its score, and all that the score is made of; log-probabilities are natural logarithms of the
    model's own distribution."""

    rank: int  # from 1
    text: str
    tokens: tuple[int, ...]  # the tokens scored
    score: float  # what it was sorted by: the sum of weight x parts[scorer] over the scorers
    sum: float  # log p(text | prompt)
    per_token: float
    per_char: float
    per_byte: float  # UTF-8
    index: int  # among the candidates, first occurrence
    count: int  # how many candidates were this one
    parts: dict[str, float]  # each scorer's score by its name, and what it was computed from by "scorer.part"
    answer: str | None = None  # that self_consistency found


@dataclasses.dataclass(frozen=True)
class Ranking(Sequence):
    """The candidates, best first. The best is the best of these alone, however many better texts there may be."""

    candidates: tuple[Ranked, ...]
    size: int  # candidates, equal ones too
    duplicates: int  # those that are equal to an earlier one
    weights: dict[str, float]  # of the scorers
    normalise: str
    utilities: tuple[tuple[float, ...], ...] | None = None  # of mbr, of each candidate (row) against each, best first

    def __getitem__(self, index):
        return self.candidates[index]

    def __len__(self) -> int:
        return len(self.candidates)


def rank(decoder: Decoder, tokenizer, prompt: str, candidates: Sequence[str] | None = None, *,
         decode: DecodeConfig | None = None, scorers: str | Sequence[str] | Mapping[str, float] = "logprob",
         normalise: str = "per_token", options: ScorerOptions | None = None,
         stages: Sequence[StageConfig] | None = None) -> Ranking:
    """Candidates by falling score; ties keep their order, equal candidates are one with a count.

    Args:
      candidates: texts that continue ``prompt``, with their own leading space where there is one. None: writes
        ``decode.num_return_sequences`` of them, sampled or (num_beams above 1) beams; all beams where that is 1.
      scorers: a name of ``scorers.SCORERS``, several that weigh the same, or {name: weight}.
      normalise: "sum", or log-probabilities divided by the number of tokens, characters or UTF-8 bytes of a text.
      options: settings of single scorers.
      stages: those that trained the model, where known: pseudo_log_likelihood is refused to one without masks.

    A given candidate is scored in the tokens of prompt + candidate read as one text, as training saw it, not in
    those of its two parts. Where they differ at the seam, the last tokens of the prompt that some candidate
    changes are scored with every candidate, so that all are compared behind the same prefix. Written candidates are
    equal if both text and tokens are.
    Raises ValueError, before the model does any work where that can be known, on an empty candidate or list, on more
    tokens than the context holds, on unknown scorers, weights that say nothing and options in conflict.
    """
    weights, options = weights_of(scorers), options or ScorerOptions()
    check_request(weights, normalise, options, tokenizer, prompt, stages)
    prefix, known = None, {}
    if candidates is None:
        prefix_tokens, prefix, written = _write(decoder, tokenizer, prompt, decode or DecodeConfig(), weights)
        pairs = [(result.text, result.tokens) for result in written]
        if not decoder.int8_cache:  # else what was written was read less exactly than what is given
            known = {pair: result.logprobs for pair, result in zip(pairs, written, strict=True)}
    elif decode is not None:
        raise ValueError(f"decode writes candidates, and {len(candidates)} are given; leave one of the two out")
    else:
        prefix_tokens, pairs = _read(decoder, tokenizer, prompt, candidates)
    first, counts = {}, collections.Counter(pairs)
    for index, pair in enumerate(pairs):
        first.setdefault(pair, index)
    texts, tokens = map(list, zip(*first, strict=True))
    pool = Pool(decoder, tokenizer, prompt, tuple(prefix_tokens), texts, tokens,
                np.array([counts[pair] for pair in first]), normalise, options)
    planned = {name: SCORERS[name](pool) for name in weights}
    if prefix is None:
        prefix = prefill(decoder, [prefix_tokens], capacity(len(prefix_tokens), decoder.context))
    # What the model wrote, it knows the probability of.
    logprobs = [known[pair] for pair in first] if known else score(decoder, prefix, tokens)
    sums = np.array([np.sum(each, dtype=np.float64) for each in logprobs])
    scored = {name: run(sums) for name, run in planned.items()}
    totals = sum(weight * scored[name].parts[name] for name, weight in weights.items())
    if not np.isfinite(totals).all():
        bad = int(np.flatnonzero(~np.isfinite(totals))[0])
        raise ValueError(f"the score of {texts[bad][:40]!r} is {totals[bad]}; look for numbers that are not finite in "
                         "the model's parameters, or in what a function of yours returned")
    # Stable, and the different candidates stand in the order in which they came.
    order, indices = np.argsort(-totals, kind="stable"), list(first.values())
    ranked = tuple(_ranked(place, i, totals, sums, scored, pool, indices)
                   for place, i in enumerate(order.tolist(), 1))
    utilities = next((each.utilities for each in scored.values() if each.utilities is not None), None)
    if utilities is not None:
        utilities = tuple(map(tuple, utilities[np.ix_(order, order)].tolist()))
    return Ranking(ranked, len(pairs), len(pairs) - len(first), weights, normalise, utilities)


def _ranked(place, i, totals, sums, scored, pool: Pool, indices) -> Ranked:
    text, tokens = pool.texts[i], pool.tokens[i]
    parts = {name: column[i].item() for each in scored.values() for name, column in each.parts.items()}
    answer = next((each.answers[i] for each in scored.values() if each.answers is not None), None)
    means = {name: float(sums[i]) / length_of(name, text, tokens) for name in NORMALISATIONS}
    return Ranked(place, text, tokens, float(totals[i]), **means, index=indices[i], count=int(pool.counts[i]),
                  parts=parts, answer=answer)


def _write(decoder, tokenizer, prompt, decode, weights):
    """The tokens and the prefix of ``prompt``, and what was written behind it; the prompt is read once."""
    validate_decode(decode)
    check_tokens(decode, decoder.config.vocab_size)
    if decode.num_beams > 1 and decode.num_return_sequences == 1:
        decode = dataclasses.replace(decode, num_return_sequences=decode.num_beams)
    number = decode.num_return_sequences
    if decode.temperature == 0 and decode.num_beams == 1 and number > 1:
        raise ValueError(f"{number} candidates at temperature 0 would all be the same; set temperature above 0, or "
                         "num_beams, or give the candidates")
    if "mbr" in weights and number == 1:
        raise ValueError("mbr compares a candidate with the others, and num_return_sequences=1; ask for more")
    tokens = encode_prompt(tokenizer, prompt)
    # The model read both ways sees the end of the text, too.
    ends = int("pseudo_log_likelihood" in weights)
    check_context(decoder, len(tokens) + 1 + ends, f"the prompt with {'a token and the end' if ends else 'one token'}")
    longest = min(decode.max_new_tokens, decoder.context - len(tokens) - ends)
    # A candidate has at least one token, else there were nothing to score.
    decode = dataclasses.replace(decode, max_new_tokens=longest,
                                 min_new_tokens=min(max(1, decode.min_new_tokens), longest))
    prefix = prefill(decoder, [tokens], capacity(len(tokens) + longest, decoder.context))
    written = [result for result in continue_prefix(decoder, tokenizer, prefix, [decode]) if result.tokens]
    if not written:
        raise ValueError("the settings let nothing be written, so there are no candidates to rank; allow more tokens")
    return tokens, prefix, written


def _read(decoder, tokenizer, prompt, candidates):
    """The tokens that all candidates share, and those of each behind them."""
    if isinstance(candidates, str):
        raise ValueError(f"candidates={candidates[:40]!r} is one text; give a list of texts")
    candidates = list(candidates)
    if not candidates:
        raise ValueError("there are no candidates to rank; give at least one")
    if "" in candidates:
        raise ValueError(f"candidate {candidates.index('') + 1} of {len(candidates)} is empty; leave it out")
    for number, text in enumerate(candidates, 1):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"candidate {number} of {len(candidates)}, {text[:40]!r}, is not Unicode text; decode it "
                             "from bytes with its encoding")
    # Candidates that come often are read once.
    whole = {text: encode_prompt(tokenizer, prompt + text) for text in dict.fromkeys(candidates)}
    alone = encode_prompt(tokenizer, prompt)
    seam = min(_common([alone, tokens]) for tokens in whole.values())
    if seam == 0:
        # Where texts have no <bos>, they may differ from their first token on; something must stand before it.
        whole = {text: [tokenizer.bos_id, *tokens] for text, tokens in whole.items()}
        seam = 1
    for text, tokens in whole.items():
        check_context(decoder, len(tokens), f"the prompt with candidate {text[:40]!r}")
        if len(tokens) == seam:
            raise ValueError(f"candidate {text[:40]!r} adds no token to the prompt; leave it out")
    pairs = {text: (text, tuple(tokens[seam:])) for text, tokens in whole.items()}
    return whole[candidates[0]][:seam], [pairs[text] for text in candidates]


def _common(sequences) -> int:
    """How many tokens all sequences begin with alike."""
    return next((i for i, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1),
                min(map(len, sequences)))
