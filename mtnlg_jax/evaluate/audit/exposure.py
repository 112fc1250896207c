"""Exposure of canaries: the rank of a planted secret among those that could have been planted.

exposure = log2 |R| - log2 rank, for a space R of secrets behind one prefix, ranked by the model's
probability of the text (Carlini 2019, "The Secret Sharer", definition 4). A secret that the model
never saw has a uniform rank, so its expected exposure is about log2 e = 1.44 bits. All candidates
are scored behind the canary's prefix, which the model reads once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import integrate, stats

from mtnlg_jax.data.canaries import DIGIT, Canary, all_secrets, pattern_of, secrets
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.decode.cache import Decoder, bucket, prefill
from mtnlg_jax.decode.results import check_context, common_prefix
from mtnlg_jax.decode.scoring import narrow, score_block
from mtnlg_jax.evaluate.audit.statistics import mean
from mtnlg_jax.parallel.auto import over_its_mesh, padded_positions

_CANDIDATES = 0xCA4  # purpose of the draw
_LEAST_FIT = 100  # candidates to fit a distribution to


class Exposure(NamedTuple):
    """Exposure of a canary, in bits.

    ``rank``: of the secret among ``ranked`` secrets, itself included, from 1; ties count half.
    ``by_rank``: log2 ranked - log2 rank. ``fitted``: by a skew normal distribution fitted to the
    candidates' log-probabilities, None if all secrets were ranked or too few.
    ``bits``: the estimate: by rank, and if no candidate is more probable than the secret and not
    all secrets were ranked, the fitted one where it is larger; at most log2 |R|.
    """

    rank: float
    ranked: int
    by_rank: float
    fitted: float | None
    bits: float


def candidates_for(
    canary: Canary, most: int, seed: int, cache: dict[str, list[str]] | None = None
) -> list[str]:
    """Return the secrets to rank against that of ``canary``: all others if they are at most
    ``most``, otherwise ``most`` different random ones. The same for all canaries of one format but
    for their own secrets."""
    pattern = pattern_of(canary.format)
    drawn = {} if cache is None else cache
    if pattern not in drawn:
        if canary.space <= most + 1:
            drawn[pattern] = all_secrets(pattern)
        else:
            rng = np.random.default_rng([abs(seed), _CANDIDATES, pattern.count(DIGIT)])
            several = dict.fromkeys(secrets(pattern, most + 1, rng))
            while len(several) < most + 1:
                several |= dict.fromkeys(secrets(pattern, most + 1 - len(several), rng))
            drawn[pattern] = list(several)
    return [each for each in drawn[pattern] if each != canary.secret][:most]


def score_canary(
    decoder: Decoder, tokenizer: Tokenizer, canary: Canary, others: Sequence[str]
) -> np.ndarray:
    """Return [1 + candidates] float64: log-probabilities of the canary's text, and of the texts
    with each of ``others`` in place of its secret, behind what their tokens have in common."""
    rest = canary.text[len(canary.prefix) + len(canary.secret) :]
    texts = [canary.prefix + secret + rest for secret in [canary.secret, *others]]
    begin = [tokenizer.bos_id] if tokenizer.prompt_bos else []
    rows = [begin + ids for ids in tokenizer.encode_batch(texts)]
    # Pieces may span the end of the prefix, so it is what the texts have in common as tokens. Each
    # is scored behind at least one token.
    shared = min(common_prefix(rows[0], row) for row in rows[1:]) if others else 1
    shared = min(shared, min(map(len, rows)) - 1)
    if shared < 1:
        begin = [tokenizer.bos_id]
        rows = [begin + row for row in rows]
        shared = 1
    check_context(decoder, max(map(len, rows)), f"the canary {canary.prefix!r}")
    return score_secrets(decoder, rows[0][:shared], [row[shared:] for row in rows])


@over_its_mesh
def score_secrets(
    decoder: Decoder, prefix: Sequence[int], secrets: Sequence[Sequence[int]]
) -> np.ndarray:
    """Return [secrets] float64, the log-probability of each behind ``prefix``, which is read once.

    A secret has few tokens, so blocks are as narrow as they are: padding would be half of the work.
    """
    read = prefill(decoder, [list(prefix)], bucket(len(prefix), decoder.context))
    found = np.empty(len(secrets))
    order = np.argsort([len(each) for each in secrets], kind="stable")
    while len(order):
        width = padded_positions(narrow(len(secrets[order[-1]]), decoder.context))
        rows = 1 << (max(1, decoder.block_tokens // width).bit_length() - 1)
        chosen = order[-rows:]
        order = order[: len(order) - len(chosen)]
        block = [secrets[number] for number in chosen]
        rows = 1 << (len(block) - 1).bit_length()
        scores = score_block(decoder, read, block, rows, width)
        found[chosen] = [each.sum(dtype=np.float64) for each in scores]
    return found


def exposure_of(own: float, others: np.ndarray, space: int) -> Exposure:
    """Return the exposure of a secret with log-probability ``own`` among ``space`` secrets, of
    which ``others`` are the log-probabilities of those that were ranked."""
    ranked = len(others) + 1
    rank = 1 + float((others > own).sum()) + float((others == own).sum()) / 2
    by_rank = math.log2(ranked) - math.log2(rank)
    fitted = None
    if ranked < space and len(others) >= _LEAST_FIT and rank <= 1:
        fitted = min(_fitted(own, others), math.log2(space))
    bits = by_rank if fitted is None else max(by_rank, fitted)
    return Exposure(rank, ranked, by_rank, fitted, min(bits, math.log2(space)))


def _fitted(own: float, others: np.ndarray) -> float:
    """Return -log2 of the probability that a random secret is more probable than ``own``, by a skew
    normal distribution (section 4.3 of the paper, "approximating exposure by extrapolation")."""
    scale = float(others.std()) or 1.0
    losses = (others.mean() - others) / scale
    shape, place, width = stats.skewnorm.fit(losses)
    z = (float((others.mean() - own) / scale) - place) / width

    def log_density(x: float) -> float:
        return float(math.log(2) + stats.norm.logpdf(x) + stats.norm.logcdf(shape * x))

    # scipy's own distribution function subtracts two nearly equal numbers in this tail.
    top = log_density(z)
    area, _ = integrate.quad(lambda s: math.exp(log_density(z - s) - top), 0, math.inf)
    return -(top + math.log(area)) / math.log(2)


def chance(ranked: int) -> float:
    """Return the expected exposure of a secret that the model knows nothing of: log2 n minus the
    mean of log2 rank over the ranks 1 to n."""
    return math.log2(ranked) - math.lgamma(ranked + 1) / math.log(2) / ranked


def chance_probability(exposures: Sequence[float]) -> float:
    """Return the probability that as many canaries that are unknown to the model have at least this
    sum of exposures. Theirs in nats follow the exponential distribution, so their sum a gamma."""
    total = math.fsum(exposures) * math.log(2)
    return float(stats.gamma.sf(total, len(exposures)))


def measure_canaries(
    decoder: Decoder,
    tokenizer: Tokenizer,
    canaries: Sequence[Canary],
    most: int,
    seed: int,
    on_canary: Callable[[], None] = lambda: None,
) -> list[Exposure]:
    """Return the exposure of each canary among at most ``most`` candidates."""
    found = []
    drawn: dict[str, list[str]] = {}
    for canary in canaries:
        others = candidates_for(canary, most, seed, drawn)
        logprobs = score_canary(decoder, tokenizer, canary, others)
        found.append(exposure_of(logprobs[0], logprobs[1:], canary.space))
        on_canary()
    return found


def summarize(canaries: Sequence[Canary], found: Sequence[Exposure]) -> list[dict[str, Any]]:
    """Return a row for each number of copies: the mean exposure with its interval, its range, and
    how probable such a sum of exposures by rank is by chance."""
    rows = []
    for copies in sorted({each.copies for each in canaries}):
        own = [e for c, e in zip(canaries, found, strict=True) if c.copies == copies]
        bits = [each.bits for each in own]
        # An exposure is between 0 and log2 |R|, and so is its mean.
        found_mean = mean(bits)
        if found_mean["low"] is not None:
            most_bits = math.log2(max(c.space for c in canaries if c.copies == copies))
            found_mean["low"] = max(0.0, found_mean["low"])
            found_mean["high"] = min(most_bits, found_mean["high"])
        rows.append(
            {
                "copies": copies,
                "exposure": found_mean,
                "least": min(bits),
                "most": max(bits),
                "chance": float(np.mean([chance(each.ranked) for each in own])),
                "chance_probability": chance_probability([each.by_rank for each in own]),
                "first": sum(each.rank <= 1 for each in own),
                "ranked": max(each.ranked for each in own),
            }
        )
    return rows
