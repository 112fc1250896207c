"""Score answers by ROUGE, BLEU, chrF, accuracy, and SQuAD's exact match and F1.

ROUGE is rouge-score's; BLEU and chrF are sacrebleu's. Each score has a 95 % bootstrap interval.
`baseline` gives answers that need no model.
"""

import collections
import dataclasses
import functools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from mtnlg_jax.data.segment import UNSPACED, WORDS, sentences, words
from mtnlg_jax.tasks.rendering import Row, template_of
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.text import ascii_share, normalize

RESAMPLES = 1000
METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "accuracy", "exact_match", "f1")
# Texts with a larger share of ASCII letters are English: it has few others (naïve, São), and every
# other language that uses any has more.
_ENGLISH_SHARE = 0.99
_RESAMPLED_AT_ONCE = 1 << 24  # row counts drawn at once, which keeps memory below 200 MB


@dataclasses.dataclass(frozen=True)
class Score:
    """A score in [0, 100] with its 95 % bootstrap interval over the rows."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:6.2f} [{self.low:.2f}, {self.high:.2f}]"


class _Characters:
    """Tokenizer for rouge-score that splits Chinese into characters and other scripts into words.

    rouge-score's own tokenizer drops all Chinese text.
    """

    def tokenize(self, text: str) -> list[str]:
        return WORDS.findall(text.casefold())


class _AllScripts:
    """Tokenizer for rouge-score that keeps the words of every script (`words`).

    rouge-score's own tokenizer keeps only a-z and 0-9. ASCII words are stemmed as it does.
    """

    def __init__(self):
        from rouge_score.tokenizers import DefaultTokenizer

        self._stem = functools.lru_cache(1 << 16)(DefaultTokenizer(use_stemmer=True).tokenize)

    def tokenize(self, text: str) -> list[str]:
        return [
            part
            for word in words(text)
            for part in (self._stem(word) if word.isascii() else (word,))
        ]


def measure(
    names: Sequence[str],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str | Sequence[str],
    seed: int = 0,
) -> dict[str, Score]:
    """Return the named METRICS over all rows.

    If a row has several references, the best match counts. An answer that is empty or shares
    nothing with its references scores 0.

    Args:
      language: language of all answers, or a list with one for each. In "zh", characters are words.
        In other languages, ROUGE uses rouge-score's tokenizer if 99 % of the references' letters
        are ASCII, so that English scores are comparable with published ones, and otherwise the
        words of every script (`segment.words`). BLEU uses sacrebleu's tokenizer "zh" for all rows
        if any answer is Chinese, "char" if most letters of the references belong to scripts without
        spaces, and otherwise "13a".

    Raises:
      ValueError: a row has no reference, or a metric is unknown.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(
            f"{len(answers)} answers for {len(references)} rows; give one answer for each row, and "
            "at least one"
        )
    for number, each in enumerate(references, 1):
        if not any(reference.strip() for reference in each):
            raise ValueError(
                f"row {number} of {len(references)} has no reference to compare its answer with; "
                "add one, or leave the row out"
            )
    languages = [language] * len(answers) if isinstance(language, str) else language
    scores = {}
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
        if name in ("bleu", "chrf"):
            scores[name] = _corpus(name, answers, references, languages, seed)
        else:
            scores[name] = mean(_rows(name, answers, references, languages), seed)
    return scores


def baseline(task: Task, rows: Sequence[Row], language: str | None = None) -> tuple[str, list[str]]:
    """Return the name of a baseline that needs no model, and its answers.

    For rows ranked by the labels of their templates this is the most frequent class. Otherwise it
    is the first sentence of the text to summarize or of the given passage, the most common answer,
    or a copy of the input. Rows with their own choices use `chance` instead. ``language`` as in
    `template_of`.
    """
    commonest = collections.Counter(row.references[0] for row in rows).most_common(1)[0][0]
    if all(template_of(task, row.input, language)[1].labels for row in rows):
        return "majority class", [commonest] * len(rows)
    if task.name == "summarise":
        return "lead sentence", [_lead(row.input) for row in rows]
    if task.name == "answer":
        if all(row.context for row in rows):
            return "lead sentence of the passage", [_lead(row.context) for row in rows]
        return "the commonest answer", [commonest] * len(rows)
    return "copying the source", [normalize(row.input) for row in rows]


def chance(rows: Sequence[Row], seed: int = 0) -> Score:
    """Return the accuracy of a random guess: the mean share of correct choices in a row."""
    return mean(
        np.array([len(set(row.references) & set(row.choices)) / len(row.choices) for row in rows]),
        seed,
    )


def squad_normalize(text: str, language: str) -> str:
    """Return the text in lower case without punctuation, articles and repeated spaces.

    As in SQuAD (Rajpurkar 2016). All spaces are removed from Chinese.
    """
    text = "".join(
        " " * (language == "zh") if unicodedata.category(c).startswith("P") else c
        for c in text.lower()
    )
    return (
        "".join(text.split())
        if language == "zh"
        else " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())
    )


def exact_match(answer: str, reference: str, language: str) -> float:
    return float(squad_normalize(answer, language) == squad_normalize(reference, language))


def token_f1(answer: str, reference: str, language: str) -> float:
    """Return the F1 of two bags of words, or of characters in scripts without spaces.

    If either bag is empty, the result is 1 if both are, else 0.
    """
    ours, theirs = (_bag(text, language) for text in (answer, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    same = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * same / (len(ours) + len(theirs))


def _bag(text: str, language: str) -> list[str]:
    if language == "zh":
        return WORDS.findall(text.lower())
    found = squad_normalize(text, language).split()
    return [part for word in found for part in (words(word) if UNSPACED.search(word) else (word,))]


def _lead(text: str) -> str:
    found = sentences(normalize(text))
    return found[0].strip() if found else ""


def _rows(name: str, answers, references, languages) -> np.ndarray:
    """Return the score of each row, in [0, 1]."""
    rows = zip(answers, references, languages, strict=True)
    if name.startswith("rouge"):
        scorers = {
            language: _rouge(name, language, references, languages)
            for language in dict.fromkeys(languages)
        }
        return np.array(
            [
                scorers[language].score_multi(list(several), answer)[name].fmeasure
                for answer, several, language in rows
            ]
        )
    score = {
        "accuracy": lambda answer, reference, _: float(answer == reference),
        "exact_match": exact_match,
        "f1": token_f1,
    }[name]
    return np.array(
        [
            max(score(answer, reference, language) for reference in several)
            for answer, several, language in rows
        ]
    )


def _rouge(name: str, language: str, references, languages):
    from rouge_score.rouge_scorer import RougeScorer

    if language == "zh":
        return RougeScorer([name], use_stemmer=True, tokenizer=_Characters())
    texts = [
        text
        for several, each in zip(references, languages, strict=True)
        if each == language
        for text in several
    ]
    english = ascii_share(texts) >= _ENGLISH_SHARE
    return RougeScorer([name], use_stemmer=True, tokenizer=None if english else _AllScripts())


def mean(scores: np.ndarray, seed: int = 0) -> Score:
    """Return the mean of scores in [0, 1], one for each row, as a `Score`."""
    count = len(scores)
    rng = np.random.default_rng(seed)
    means = [scores[rng.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Score(100 * float(scores.mean()), 100 * float(low), 100 * float(high))


def _corpus(name: str, answers, references, languages, seed: int) -> Score:
    """Return BLEU or chrF of the whole set.

    They are not means over rows, so each bootstrap resample is scored from the summed counts of its
    rows.
    """
    from sacrebleu.metrics import BLEU, CHRF

    # force suppresses the warning about texts that look tokenized.
    metric = (
        CHRF()
        if name == "chrf"
        else BLEU(tokenize=_bleu_tokenizer(references, languages), force=True)
    )
    most = max(map(len, references))
    # One list of the first reference of each row, one of the second, and so on; None if a row has
    # fewer.
    streams: list = [
        [each[i] if i < len(each) else None for each in references] for i in range(most)
    ]
    # corpus_score(n_bootstrap=...) cannot be used: it calls statistics.mean on a mix of floats and
    # float32s, which raises TypeError.
    statistics = metric._extract_corpus_statistics(list(answers), streams)
    value = float(metric._aggregate_and_compute(statistics).score)
    table = np.array(statistics, np.float64)
    count = len(table)
    rng = np.random.default_rng(seed)
    scores = []
    step = max(1, _RESAMPLED_AT_ONCE // count)
    for start in range(0, RESAMPLES, step):
        drawn = rng.multinomial(count, np.full(count, 1 / count), min(step, RESAMPLES - start))
        scores += [metric._compute_score_from_stats(row).score for row in (drawn @ table).tolist()]
    low, high = np.percentile(scores, [2.5, 97.5])
    return Score(value, max(0.0, float(low)), min(100.0, float(high)))


def _bleu_tokenizer(references, languages) -> str:
    if "zh" in languages:
        return "zh"
    letters = [
        letter for several in references for text in several for letter in text if letter.isalpha()
    ]
    unspaced = sum(bool(UNSPACED.match(letter)) for letter in letters)
    return "char" if 2 * unspaced > len(letters) else "13a"
