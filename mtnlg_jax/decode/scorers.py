"""The scorers of ranking: each gives a candidate a number, the higher the better, and its parts.

Below, log p is the sum of log-probabilities (natural logarithm), in the model's own distribution,
of a candidate's tokens y given the prompt x. |y| is the candidate's length: 1, or its number of
tokens, characters or UTF-8 bytes, as ``normalise`` says.
"""

import collections
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mtnlg_jax.config import StageConfig
from mtnlg_jax.decode.pool import (
    NORMALIZATIONS,
    Pool,
    ScorerOptions,
    Scores,
    check_behind,
    length_of,
    sums_behind,
    sums_of,
)
from mtnlg_jax.decode.results import check_context, encode_prompt
from mtnlg_jax.decode.scoring import score_masked, score_rows
from mtnlg_jax.decode.text_scorers import coherence, diversity, repetition
from mtnlg_jax.decode.utilities import UTILITIES, extract_answer, utility_of

# The scorers that use each option.
_ACTS_IN = {
    "gnmt_alpha": ("gnmt",),
    "neutral": ("pmi", "noisy_channel"),
    "source": ("noisy_channel",),
    "reverse": ("noisy_channel",),
    "channel_weight": ("noisy_channel",),
    "language_weight": ("noisy_channel",),
    "within_word_l2r": ("pseudo_log_likelihood",),
    "utility": ("mbr",),
    "answer": ("self_consistency",),
    "votes": ("self_consistency",),
}


def _logprob(pool: Pool) -> Callable[[np.ndarray], Scores]:
    """log p(y|x) / |y|."""
    return lambda sums: Scores({"logprob": sums / pool.lengths()})


def _gnmt(pool: Pool):
    """log p(y|x) / ((5 + tokens) / 6) ** alpha (Wu 2016, equation 14, without coverage)."""
    penalties = ((5 + pool.lengths("per_token")) / 6) ** pool.options.gnmt_alpha
    return lambda sums: Scores({"gnmt": sums / penalties, "gnmt.penalty": penalties})


def _pmi(pool: Pool):
    """(log p(y|x) - log p(y|neutral)) / |y|.

    Measures how much more likely the prompt makes a candidate, so that texts which are likely
    anywhere do not win (Holtzman 2021, Surface Form Competition; Brown 2020, section 2.4).
    """
    neutral = _neutral(pool.tokenizer, pool.options.neutral, pool.prompt)
    for each in pool.candidates:
        _check_neutral(pool.options, neutral, each.row[: each.start])
    check_behind(pool, neutral, "the neutral context")

    def run(sums):
        alone = sums_behind(pool, neutral)
        return Scores({"pmi": (sums - alone) / pool.lengths(), "pmi.neutral": alone})

    return run


def _noisy_channel(pool: Pool):
    """log p(y|x) / |y| + channel_weight log p(x|y) / |x| + language_weight log p(y) / |x|.

    Yee 2019, with a weight for each term; Li 2016. For log p(x|y), x is ``source`` after
    ``reverse`` with the candidate in it; the two are tokenized separately, so that every candidate
    explains the same tokens. The context of log p(y) is ``neutral``.
    """
    options = pool.options
    tokenizer = pool.tokenizer
    text = pool.prompt if options.source is None else options.source
    source = tokenizer.encode(text)
    neutral = _neutral(tokenizer, options.neutral, pool.prompt)
    check_behind(pool, neutral, "the neutral context")
    contexts = [
        encode_prompt(tokenizer, options.reverse.replace("{candidate}", each))
        for each in pool.texts
    ]
    for each, context in zip(pool.texts, contexts, strict=True):
        check_context(
            pool.decoder,
            len(context) + len(source),
            f"the source behind reverse with {each[:40]!r}",
        )
    # |x| and not |y| for both terms of the channel, as in Yee 2019.
    length = length_of(pool.normalise, text.encode(), source)

    def run(sums):
        rows = [[*context, *source] for context in contexts]
        channel = sums_of(score_rows(pool.decoder, rows, list(map(len, contexts))))
        language = sums_behind(pool, neutral)
        direct = sums / pool.lengths()
        total = (
            direct
            + (options.channel_weight * channel + options.language_weight * language) / length
        )
        return Scores(
            {
                "noisy_channel": total,
                "noisy_channel.direct": direct,
                "noisy_channel.channel": channel,
                "noisy_channel.language": language,
                "noisy_channel.source_length": np.full(len(sums), length),
            }
        )

    return run


def _pseudo_log_likelihood(pool: Pool):
    """sum over t of log p(y_t | x, all other y) / |y|, bidirectionally, y_t replaced by <mask>.

    Salazar 2020. ``within_word_l2r`` also masks the rest of y_t's word. Otherwise a rare word of
    several pieces looks likely, since each piece gives the others away (Kauf & Ivanova 2023).
    """
    # As in training, masked positions see the end of the document.
    rows = [[*each.row, pool.tokenizer.eos_id] for each in pool.candidates]
    starts = [each.start for each in pool.candidates]
    for text, row in zip(pool.texts, rows, strict=True):
        check_context(
            pool.decoder, len(row), f"the prompt with candidate {text[:40]!r} and the end"
        )

    def ends(row, start):
        """Return (position, end of its word) of each token."""
        spans = []
        end = len(row) - 1
        # From the right, since the end of a word is known before its beginning.
        for position in reversed(range(start, len(row) - 1)):
            spans.append((position, end))
            token = row[position]
            # A special token, such as a stop token, is not part of a word.
            if pool.tokenizer.starts_word[token] or pool.tokenizer.is_special[token]:
                end = position
        return spans[::-1]

    def run(_):
        hidden = [
            ends(row, start)
            if pool.options.within_word_l2r
            else [(i, i + 1) for i in range(start, len(row) - 1)]
            for row, start in zip(rows, starts, strict=True)
        ]
        totals = sums_of(score_masked(pool.decoder, pool.tokenizer.mask_id, rows, hidden))
        return Scores(
            {"pseudo_log_likelihood": totals / pool.lengths(), "pseudo_log_likelihood.sum": totals}
        )

    return run


def _mbr(pool: Pool):
    """Minimum Bayes risk: the mean utility against all other candidates, in [0, 1] for UTILITIES.

    Kumar & Byrne 2004; Eikema & Aziz 2020. Equal candidates count as often as they occurred. The
    utility is called once for each ordered pair of different candidates, and once for each
    candidate against itself.
    """
    if pool.counts.sum() < 2:
        raise ValueError(
            "mbr compares a candidate with the others, and there is 1 candidate; give or "
            "sample more"
        )
    utility = utility_of(pool.options.utility)

    def run(_):
        number = len(pool.texts)
        table = np.array(
            [[float(utility(text, other)) for other in pool.texts] for text in pool.texts]
        )
        # A candidate is not compared with itself, but with its other occurrences.
        others = np.broadcast_to(pool.counts, (number, number)) - np.eye(number)
        return Scores({"mbr": (table * others).sum(1) / others.sum(1)}, utilities=table)

    return run


def _self_consistency(pool: Pool):
    """The share of the votes for the candidate's answer, in [0, 1] (Wang 2022).

    A candidate has one vote for each time it occurred, weighted by its probability if ``votes`` is
    "probability". Without an answer it has no vote and score 0.
    """
    pattern = pool.options.answer
    assert pattern is not None, "check_request refuses self_consistency without an answer"
    answers = [extract_answer(pattern, text) for text in pool.texts]
    if not any(answer is not None for answer in answers):
        raise ValueError(
            f"answer={pattern!r} finds none in any of the {len(answers)} candidates, such as "
            f"{pool.texts[0][:40]!r}; write it so that it does"
        )

    def run(sums):
        voting = np.array([answer is not None for answer in answers])
        votes = pool.counts.astype(float)
        if pool.options.votes == "probability":
            means = sums / pool.lengths()
            # Subtracting the maximum keeps the shares, and keeps some vote above 0.
            votes *= np.exp(means - means[voting].max())
        votes = np.where(voting, votes, 0.0)
        totals: dict[str | None, float] = collections.defaultdict(float)
        for answer, vote in zip(answers, votes, strict=True):
            totals[answer] += vote
        shares = np.array([totals[answer] for answer in answers]) / votes.sum()
        return Scores({"self_consistency": shares, "self_consistency.votes": votes}, answers)

    return run


# Each scorer takes a pool, raises ValueError on one it cannot score, and returns a function from
# the sums log p(y|x) to Scores. So all checks come before the model does any work.
SCORERS = {
    "logprob": _logprob,
    "gnmt": _gnmt,
    "pmi": _pmi,
    "noisy_channel": _noisy_channel,
    "pseudo_log_likelihood": _pseudo_log_likelihood,
    "mbr": _mbr,
    "self_consistency": _self_consistency,
    "repetition": repetition,
    "diversity": diversity,
    "coherence": coherence,
}


def weights_of(scorers: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Return the weight of each scorer; names alone have weight 1."""
    if isinstance(scorers, str):
        scorers = [scorers]
    weights = dict(scorers) if isinstance(scorers, Mapping) else dict.fromkeys(scorers, 1.0)
    if not weights:
        raise ValueError(f"there is no scorer to rank by; choose from {', '.join(SCORERS)}")
    for name, weight in weights.items():
        if name not in SCORERS:
            raise ValueError(f"unknown scorer {name!r}; choose from {', '.join(SCORERS)}")
        if (
            isinstance(weight, bool)
            or not isinstance(weight, numbers.Real)
            or not math.isfinite(weight)
        ):
            raise ValueError(f"the weight of {name} is {weight!r}; give a finite number")
    if not any(weights.values()):
        raise ValueError(
            f"all weights are 0 ({', '.join(weights)}), so every score would be; give one "
            "another value"
        )
    return {name: float(weight) for name, weight in weights.items()}


def check_request(
    weights: Mapping[str, float],
    normalise: str,
    options: ScorerOptions,
    tokenizer,
    prompt: str,
    stages: Sequence[StageConfig] | None,
) -> None:
    """Raise ValueError on a request that is wrong whatever the candidates are."""
    if normalise not in NORMALIZATIONS:
        raise ValueError(
            f"unknown normalise={normalise!r}; choose one of {', '.join(NORMALIZATIONS)}"
        )
    for name, scorers in _ACTS_IN.items():
        value = getattr(options, name)
        # An option that nothing reads is more likely a mistake than a wish.
        if value != getattr(ScorerOptions, name) and not weights.keys() & set(scorers):
            raise ValueError(
                f"{name}={value!r} acts in {' and '.join(scorers)} alone, not among the scorers "
                f"{', '.join(weights)}; add it, or leave {name} out"
            )
    for name in ("gnmt_alpha", "channel_weight", "language_weight"):
        if not math.isfinite(getattr(options, name)):
            raise ValueError(f"{name}={getattr(options, name)} is not finite; give a number")
    if "{candidate}" not in options.reverse:
        raise ValueError(
            f"reverse={options.reverse!r} has no place for the candidate; write {{candidate}} there"
        )
    if not callable(options.utility) and options.utility not in UTILITIES:
        raise ValueError(
            f"unknown utility={options.utility!r}; choose one of {', '.join(UTILITIES)}, or "
            "give a function of two texts"
        )
    if options.votes not in ("count", "probability"):
        raise ValueError(f"unknown votes={options.votes!r}; choose count or probability")
    if "pmi" in weights:
        _check_neutral(
            options, _neutral(tokenizer, options.neutral, prompt), encode_prompt(tokenizer, prompt)
        )
    if "noisy_channel" in weights and not (prompt if options.source is None else options.source):
        raise ValueError(
            f"noisy_channel explains the source, and source={options.source!r} for the prompt "
            f"{prompt!r}; give a source that is not empty"
        )
    if "self_consistency" in weights:
        _check_answer(options.answer)
    if "pseudo_log_likelihood" in weights:
        try:
            tokenizer.mask_id  # noqa: B018
        except ValueError as error:
            raise ValueError(f"pseudo_log_likelihood hides tokens: {error}") from None
        if stages is not None and not any(stage.masked for stage in stages):
            causal = ", ".join(f"{each.name}: masked=0" for each in stages)
            raise ValueError(
                "pseudo_log_likelihood needs a model that was trained to fill masks, and every "
                f"stage of this one is causal ({causal}); train a "
                "stage with masked above 0, or rank by logprob"
            )


def _neutral(tokenizer, neutral: str, prompt: str) -> list[int]:
    """Return the neutral context.

    Whitespace at the end of the prompt is scored with the candidates, so leave it out here.
    """
    return encode_prompt(tokenizer, neutral.rstrip() if prompt != prompt.rstrip() else neutral)


def _check_neutral(options: ScorerOptions, neutral: Sequence[int], prefix: Sequence[int]) -> None:
    if list(neutral) == list(prefix):
        raise ValueError(
            f"neutral={options.neutral!r} is read as what the candidates follow, so that pmi is "
            "0 for every one; give another neutral, or leave pmi out"
        )


def _check_answer(answer) -> None:
    if not answer:
        raise ValueError(
            f"self_consistency counts answers, and answer={answer!r}; give a pattern that "
            r"finds one, as 'answer is (\d+)', or a function"
        )
    if not callable(answer):
        try:
            re.compile(answer)
        except re.error as error:
            raise ValueError(f"answer={answer!r} is not a regular expression: {error}") from None
