"""What candidates are ranked by. A scorer gives each candidate a number, the higher the better, and
its parts.

Written log p below are sums of log-probabilities (natural logarithm) of the model's own
distribution over a candidate's tokens y behind the prompt x; |y| is its length as ``normalise``
counts it, in tokens, characters or UTF-8 bytes, or 1.
"""

import collections
import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mtnlg_jax.config import StageConfig
from mtnlg_jax.decode.cache import Decoder, capacity, prefill
from mtnlg_jax.decode.results import check_context, encode_prompt
from mtnlg_jax.decode.scoring import score, score_masked, score_rows

NORMALISATIONS = ("sum", "per_token", "per_char", "per_byte")
UTILITIES = ("chrf", "bleu", "bleu_zh", "token_f1", "exact")
# A character of a script without spaces is a word.
_SPACELESS = (
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_WORD = re.compile(rf"{_SPACELESS}|(?:(?!{_SPACELESS})\w)+")


@dataclasses.dataclass(frozen=True)
class ScorerOptions:
    """Settings of single scorers; one that acts in none of the scorers asked for is an error."""

    gnmt_alpha: float = 0.6  # any finite number; 0: the sum
    neutral: str = ""  # context of log p(y); of no text only <bos> is left
    source: str | None = (
        None  # x of the noisy channel, without the prompt's other words; None: the prompt
    )
    reverse: str = "{candidate}\n"  # prompt behind which the source is read, for log p(x|y)
    channel_weight: float = 1.0  # of log p(x|y)
    language_weight: float = 1.0  # of log p(y)
    within_word_l2r: bool = False  # also hides the rest of the token's word
    utility: str | Callable[[str, str], float] = (
        "chrf"  # of UTILITIES, or of (candidate, reference)
    )
    answer: str | Callable[[str], str | None] | None = (
        None  # pattern: group 1, or all, of its last match
    )
    votes: str = "count"  # count | probability: count x exp(log p(y|x) / |y|)


# Which scorers an option acts in.
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


class Candidate(NamedTuple):
    """A text to score, in the tokens of the whole that it ends."""

    text: str
    row: tuple[int, ...]  # the prompt's tokens before it, then its own
    start: int  # the first of ``row`` that is scored, 1 or more
    scored: bytes  # the text of those, in UTF-8

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.row[self.start :]

    def length(self, normalise: str) -> int:
        """|y|. A candidate has at least one token; its text may be empty, as that of a stop token,
        and counts 1."""
        return length_of(normalise, self.scored, self.tokens)


class Pool(NamedTuple):
    """The different candidates, and how they are to be scored."""

    decoder: Decoder
    tokenizer: object
    prompt: str
    candidates: list[Candidate]
    counts: np.ndarray
    normalise: str
    options: ScorerOptions

    @property
    def texts(self) -> list[str]:
        return [each.text for each in self.candidates]

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        return [each.tokens for each in self.candidates]

    def lengths(self, normalise: str | None = None) -> np.ndarray:
        return np.array([each.length(normalise or self.normalise) for each in self.candidates])


class Scores(NamedTuple):
    """Of all candidates of a pool: parts by name, each one number a candidate; the scorer's own
    name is its score."""

    parts: dict[str, np.ndarray]
    answers: list[str | None] | None = None
    utilities: np.ndarray | None = None


def length_of(normalise: str, text: bytes, tokens: Sequence[int]) -> int:
    """What ``normalise`` divides by; characters are those that begin in ``text`` (UTF-8)."""
    characters = sum(byte & 0xC0 != 0x80 for byte in text)
    return {
        "sum": 1,
        "per_token": len(tokens),
        "per_char": max(characters, 1),
        "per_byte": max(len(text), 1),
    }[normalise]


def _logprob(pool: Pool) -> Callable[[np.ndarray], Scores]:
    """log p(y|x) / |y|."""
    return lambda sums: Scores({"logprob": sums / pool.lengths()})


def _gnmt(pool: Pool):
    """log p(y|x) / ((5 + tokens) / 6) ** alpha (Wu 2016, equation 14, without coverage)."""
    penalties = ((5 + pool.lengths("per_token")) / 6) ** pool.options.gnmt_alpha
    return lambda sums: Scores({"gnmt": sums / penalties, "gnmt.penalty": penalties})


def _pmi(pool: Pool):
    """(log p(y|x) - log p(y|neutral)) / |y|: how much more likely the prompt makes a candidate, so
    that texts which are likely anywhere do not win (Holtzman 2021, Surface Form Competition; Brown
    2020, section 2.4)."""
    neutral = _neutral(pool.tokenizer, pool.options.neutral, pool.prompt)
    for each in pool.candidates:
        _check_neutral(pool.options, neutral, each.row[: each.start])
    _check_behind(pool, neutral, "the neutral context")

    def run(sums):
        alone = _sums_behind(pool, neutral)
        return Scores({"pmi": (sums - alone) / pool.lengths(), "pmi.neutral": alone})

    return run


def _noisy_channel(pool: Pool):
    """log p(y|x) / |y| + channel_weight log p(x|y) / |x| + language_weight log p(y) / |x| (Yee
    2019, with a weight for each; Li 2016). x is ``source`` behind ``reverse`` with the candidate in
    it, read apart from each other, so that every candidate explains the same tokens; y stands
    behind ``neutral`` in log p(y)."""
    options = pool.options
    tokenizer = pool.tokenizer
    text = pool.prompt if options.source is None else options.source
    source = tokenizer.encode(text)
    neutral = _neutral(tokenizer, options.neutral, pool.prompt)
    _check_behind(pool, neutral, "the neutral context")
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
    length = length_of(pool.normalise, text.encode(), source)

    def run(sums):
        rows = [[*context, *source] for context in contexts]
        channel = _totals(score_rows(pool.decoder, rows, list(map(len, contexts))))
        language = _sums_behind(pool, neutral)
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
    """sum over t of log p(y_t | x, all other y) / |y| by the model read both ways, y_t replaced by
    <mask> (Salazar 2020). ``within_word_l2r`` also masks what follows y_t in its word: else a rare
    word of several pieces, each told by the others, looks likely (Kauf & Ivanova 2023)."""
    rows = [[*each.row, pool.tokenizer.eos_id] for each in pool.candidates]
    starts = [each.start for each in pool.candidates]
    for text, row in zip(pool.texts, rows, strict=True):
        check_context(
            pool.decoder, len(row), f"the prompt with candidate {text[:40]!r} and the end"
        )

    def ends(row, start):
        """Where the word of each token ends."""
        places = []
        end = len(row) - 1
        for place in reversed(range(start, len(row) - 1)):
            places.append((place, end))
            # A special, as of a stop token, belongs to no word.
            if pool.tokenizer.starts_word[row[place]] or pool.tokenizer.is_special[row[place]]:
                end = place
        return places[::-1]

    def run(_):
        hidden = [
            ends(row, start)
            if pool.options.within_word_l2r
            else [(i, i + 1) for i in range(start, len(row) - 1)]
            for row, start in zip(rows, starts, strict=True)
        ]
        totals = _totals(score_masked(pool.decoder, pool.tokenizer.mask_id, rows, hidden))
        return Scores(
            {"pseudo_log_likelihood": totals / pool.lengths(), "pseudo_log_likelihood.sum": totals}
        )

    return run


def _mbr(pool: Pool):
    """Minimum Bayes risk (Kumar & Byrne 2004; Eikema & Aziz 2020): the mean utility against all
    other candidates, of which equal ones count as often as they came; in [0, 1] for UTILITIES.
    Calls the utility once for each pair of different candidates, and once for each of those that
    came more than once."""
    if pool.counts.sum() < 2:
        raise ValueError(
            "mbr compares a candidate with the others, and there is 1 candidate; give or sample more"
        )
    utility = _utility(pool.options.utility)

    def run(_):
        number = len(pool.texts)
        table = np.array(
            [[float(utility(text, other)) for other in pool.texts] for text in pool.texts]
        )
        others = np.broadcast_to(pool.counts, (number, number)) - np.eye(number)
        return Scores({"mbr": (table * others).sum(1) / others.sum(1)}, utilities=table)

    return run


def _self_consistency(pool: Pool):
    """The share of the votes that went to the candidate's answer, in [0, 1] (Wang 2022). A
    candidate votes as often as it came, or with its probability; without an answer it has no vote
    and 0."""
    pattern = pool.options.answer
    answers = [_extract(pattern, text) for text in pool.texts]
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
            votes *= np.exp(
                means - means[voting].max()
            )  # shares stay as they are, and not all become 0
        votes = np.where(voting, votes, 0.0)
        totals = collections.defaultdict(float)
        for answer, vote in zip(answers, votes, strict=True):
            totals[answer] += vote
        shares = np.array([totals[answer] for answer in answers]) / votes.sum()
        return Scores({"self_consistency": shares, "self_consistency.votes": votes}, answers)

    return run


# Each takes a pool, refuses what it cannot score, and gives what does the work from the sums log
# p(y|x).
SCORERS = {
    "logprob": _logprob,
    "gnmt": _gnmt,
    "pmi": _pmi,
    "noisy_channel": _noisy_channel,
    "pseudo_log_likelihood": _pseudo_log_likelihood,
    "mbr": _mbr,
    "self_consistency": _self_consistency,
}


def weights_of(scorers: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """The weight of each scorer: names alone weigh 1 each."""
    if isinstance(scorers, str):
        scorers = [scorers]
    weights = dict(scorers) if isinstance(scorers, Mapping) else dict.fromkeys(scorers, 1.0)
    if not weights:
        raise ValueError(f"there is no scorer to rank by; choose from {', '.join(SCORERS)}")
    for name, weight in weights.items():
        if name not in SCORERS:
            raise ValueError(f"scorer {name!r} is not known; choose from {', '.join(SCORERS)}")
        if (
            isinstance(weight, bool)
            or not isinstance(weight, numbers.Real)
            or not math.isfinite(weight)
        ):
            raise ValueError(f"the weight of {name} is {weight!r}; give a finite number")
    if not any(weights.values()):
        raise ValueError(
            f"all weights are 0 ({', '.join(weights)}), so every score would be; give one another value"
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
    """What can be refused before there are candidates."""
    if normalise not in NORMALISATIONS:
        raise ValueError(
            f"normalise={normalise!r} is not known; choose one of {', '.join(NORMALISATIONS)}"
        )
    for name, scorers in _ACTS_IN.items():
        value = getattr(options, name)
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
            f"utility={options.utility!r} is not known; choose one of {', '.join(UTILITIES)}, or give a "
            "function of two texts"
        )
    if options.votes not in ("count", "probability"):
        raise ValueError(f"votes={options.votes!r} is not known; choose count or probability")
    if "pmi" in weights:
        _check_neutral(
            options, _neutral(tokenizer, options.neutral, prompt), encode_prompt(tokenizer, prompt)
        )
    if "noisy_channel" in weights and not (prompt if options.source is None else options.source):
        raise ValueError(
            f"noisy_channel explains the source, and source={options.source!r} for the prompt {prompt!r}; "
            "give a source that is not empty"
        )
    if "self_consistency" in weights:
        _check_answer(options.answer)
    if "pseudo_log_likelihood" in weights:
        try:
            tokenizer.mask_id  # noqa: B018
        except ValueError as error:
            raise ValueError(f"pseudo_log_likelihood hides tokens: {error}") from None
        if stages is not None and not any(stage.masked for stage in stages):
            raise ValueError(
                "pseudo_log_likelihood needs a model that was trained to fill masks, and every stage of "
                f"this one is causal ({', '.join(f'{each.name}: masked=0' for each in stages)}); train a "
                "stage with masked above 0, or rank by logprob"
            )


def _neutral(tokenizer, neutral: str, prompt: str) -> list[int]:
    """The neutral context. Whitespace that ends the prompt is scored with the candidates, so here
    it is not read."""
    return encode_prompt(tokenizer, neutral.rstrip() if prompt != prompt.rstrip() else neutral)


def _check_neutral(options: ScorerOptions, neutral: Sequence[int], prefix: Sequence[int]) -> None:
    if list(neutral) == list(prefix):
        raise ValueError(
            f"neutral={options.neutral!r} is read as what the candidates stand behind, so that pmi is 0 "
            "for every one; give another neutral, or leave pmi out"
        )


def _check_answer(answer) -> None:
    if not answer:
        raise ValueError(
            f"self_consistency counts answers, and answer={answer!r}; give a pattern that finds one, as "
            r"'answer is (\d+)', or a function"
        )
    if not callable(answer):
        try:
            re.compile(answer)
        except re.error as error:
            raise ValueError(f"answer={answer!r} is not a regular expression: {error}") from None


def _extract(answer, text: str) -> str | None:
    if callable(answer):
        return answer(text)
    matches = list(re.finditer(answer, text))
    if not matches:
        return None
    return matches[-1][1] if matches[-1].re.groups else matches[-1][0]


def _utility(utility) -> Callable[[str, str], float]:
    if callable(utility):
        return utility
    if utility in ("chrf", "bleu", "bleu_zh"):
        from sacrebleu.metrics import BLEU, CHRF

        # Effective order: else a candidate of fewer than four words has no BLEU at all.
        metric = (
            CHRF()
            if utility == "chrf"
            else BLEU(effective_order=True, tokenize="zh" if utility == "bleu_zh" else "13a")
        )
        return lambda text, reference: metric.sentence_score(text, [reference]).score / 100
    return {
        "token_f1": _token_f1,
        "exact": lambda text, reference: float(text.strip() == reference.strip()),
    }[utility]


def _token_f1(text: str, reference: str) -> float:
    """F1 of the words of two texts as bags, whatever their case (Rajpurkar 2016); of two without
    words, equality."""
    ours, theirs = (
        collections.Counter(_WORD.findall(each.casefold())) for each in (text, reference)
    )
    if not ours or not theirs:
        return float(text.strip() == reference.strip())
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def _check_behind(pool: Pool, context: Sequence[int], what: str) -> None:
    for text, tokens in zip(pool.texts, pool.tokens, strict=True):
        check_context(
            pool.decoder, len(context) + len(tokens), f"{what} with candidate {text[:40]!r}"
        )


def _sums_behind(pool: Pool, context: Sequence[int]) -> np.ndarray:
    """log p of the same tokens y behind another context."""
    prefix = prefill(pool.decoder, [context], capacity(len(context), pool.decoder.context))
    return _totals(score(pool.decoder, prefix, pool.tokens))


def _totals(scored: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([each.sum(dtype=np.float64) for each in scored])
