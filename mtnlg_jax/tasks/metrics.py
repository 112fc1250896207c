"""How good answers are: ROUGE by rouge-score, BLEU and chrF by sacrebleu, accuracy, and exact match and F1 of SQuAD;
each with its 95 % interval, and beside what an answer without a model would get."""

import collections
import dataclasses
import json
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from mtnlg_jax.tasks.prompts import Row
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.text import WORDS, normalise, sentences

RESAMPLES = 1000
METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "accuracy", "exact_match", "f1")


@dataclasses.dataclass(frozen=True)
class Score:
    """In [0, 100], with the interval in which it lies for 95 % of the sets drawn from these rows (bootstrap)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:6.2f} [{self.low:.2f}, {self.high:.2f}]"


class _Characters:
    """Splits for rouge-score, whose own tokenizer leaves nothing of Chinese: characters, and words of other scripts."""

    def tokenize(self, text: str) -> list[str]:
        return WORDS.findall(text.casefold())


def measure(names: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]],
            language: str | Sequence[str], seed: int = 0) -> dict[str, Score]:
    """Each metric of METRICS over all rows; of several references the best counts. ``language`` of the answers, or of
    each: for "zh" characters are words; BLEU takes them so in all rows where it does in one. Raises ValueError where
    a row has no reference or a metric is unknown."""
    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers)} answers for {len(references)} rows; give one answer a row, and at least one")
    for number, each in enumerate(references, 1):
        if not any(reference.strip() for reference in each):
            raise ValueError(f"row {number} of {len(references)} has no reference to compare its answer with; add one, "
                             "or leave the row out")
    languages = [language] * len(answers) if isinstance(language, str) else language
    scores = {}
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metric {name!r} is not known; choose from {', '.join(METRICS)}")
        if name in ("bleu", "chrf"):
            scores[name] = _corpus(name, answers, references, languages)
        else:
            scores[name] = _mean(_rows(name, answers, references, languages), seed)
    return scores


def baseline(task: Task, rows: Sequence[Row]) -> tuple[str, list[str]]:
    """What needs no model, and its answers: the class that most rows have (of choices, the place of the right one),
    the first sentence of the text to summarise or of the given passage, or the input itself."""
    if rows[0].choices:
        places = collections.Counter(row.choices.index(row.references[0]) for row in rows
                                     if row.references[0] in row.choices)
        place = places.most_common(1)[0][0] if places else 0
        return "the commonest place", [row.choices[min(place, len(row.choices) - 1)] for row in rows]
    commonest = collections.Counter(row.references[0] for row in rows).most_common(1)[0][0]
    if task.metrics == ("accuracy",):
        return "majority class", [commonest] * len(rows)
    if task.name == "summarise":
        return "lead sentence", [_lead(row.input) for row in rows]
    if task.name == "answer":
        if all(row.context for row in rows):
            return "lead sentence of the passage", [_lead(row.context) for row in rows]
        return "the commonest answer", [commonest] * len(rows)
    return "copying the source", [normalise(row.input) for row in rows]


def squad_normalise(text: str, language: str) -> str:
    """Lower case, without punctuation, articles and surplus spaces (Rajpurkar 2016); of Chinese, without any space."""
    text = "".join(" " * (language == "zh") if unicodedata.category(c).startswith("P") else c for c in text.lower())
    return "".join(text.split()) if language == "zh" else " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def exact_match(answer: str, reference: str, language: str) -> float:
    return float(squad_normalise(answer, language) == squad_normalise(reference, language))


def token_f1(answer: str, reference: str, language: str) -> float:
    """F1 of the two bags of words, of Chinese of characters and other words; equality where one of them is empty."""
    if language == "zh":
        ours, theirs = (WORDS.findall(text.lower()) for text in (answer, reference))
    else:
        ours, theirs = (squad_normalise(text, language).split() for text in (answer, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    same = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * same / (len(ours) + len(theirs))


def _lead(text: str) -> str:
    found = sentences(normalise(text))
    return found[0].strip() if found else ""


def _rows(name: str, answers, references, languages) -> np.ndarray:
    """The score of each row, in [0, 1]."""
    rows = zip(answers, references, languages, strict=True)
    if name.startswith("rouge"):
        from rouge_score.rouge_scorer import RougeScorer

        tokenizers = {"zh": _Characters()}
        scorers = {language: RougeScorer([name], use_stemmer=True, tokenizer=tokenizers.get(language))
                   for language in dict.fromkeys(languages)}
        return np.array([scorers[language].score_multi(list(several), answer)[name].fmeasure
                         for answer, several, language in rows])
    score = {"accuracy": lambda answer, reference, _: float(answer == reference), "exact_match": exact_match,
             "f1": token_f1}[name]
    return np.array([max(score(answer, reference, language) for reference in several)
                     for answer, several, language in rows])


def _mean(scores: np.ndarray, seed: int) -> Score:
    rng, count = np.random.default_rng(seed), len(scores)
    means = [scores[rng.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Score(100 * float(scores.mean()), 100 * float(low), 100 * float(high))


def _corpus(name: str, answers, references, languages) -> Score:
    """BLEU and chrF belong to the whole set; sacrebleu draws the sets itself."""
    from sacrebleu.metrics import BLEU, CHRF

    metric = CHRF() if name == "chrf" else BLEU(tokenize="zh" if "zh" in languages else "13a")
    most = max(map(len, references))
    # One list for the first reference of each row, one for the second ...; None where a row has no more.
    streams = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    result = metric.corpus_score(list(answers), streams, n_bootstrap=RESAMPLES)
    told = json.loads(result.format(6, is_json=True, signature=metric.get_signature().format()))
    middle, half = told.get("confidence_mean", result.score), told.get("confidence_var", 0.0)
    return Score(result.score, max(0.0, middle - half), min(100.0, middle + half))
