"""Score documents by a linear classifier of good and bad samples, and keep them by GPT-3's Pareto
rule.

Words or characters are hashed into a vector (scikit-learn's MurmurHash3, the same in every process)
and weighted by logistic regression. Samples are sorted by their hashes, so a classifier does not
depend on their order.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

_BATCH = 256  # documents vectorized at a time
_HELD_OUT = 10  # one sample in ten is held out


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of a classifier.

    ``units``: "words", n-grams of 1 and 2 for text with spaces, or "characters", n-grams of 1 to 3
    for Chinese; hashed into 2^``bits`` features. ``strength``: the inverse of the regularization.
    ``limit``: characters used at the start of each text.
    """

    units: str = "words"
    bits: int = 18
    strength: float = 10.0
    limit: int = 20_000
    minimum: int = 20  # distinct samples of each class

    def __post_init__(self):
        if self.units not in ("words", "characters"):
            raise ValueError(f"unknown value units={self.units!r}; use 'words' or 'characters'")
        if not 1 <= self.bits <= 30:
            raise ValueError(f"bits={self.bits} must be between 1 and 30")
        if not self.strength > 0 or self.limit < 1 or self.minimum < 1:
            raise ValueError(
                f"strength={self.strength}, limit={self.limit} and minimum={self.minimum} must be "
                "above 0"
            )


@dataclass(frozen=True, eq=False)
class Classifier:
    """``weights`` float32 [2^bits] and ``bias``; ``result`` is its accuracy on held-out samples."""

    config: ClassifierConfig
    weights: np.ndarray
    bias: float
    result: dict[str, float | int]

    def scores(self, texts: Iterable[str]) -> np.ndarray:
        """Return float64 [texts], from 0 (like the bad samples) to 1 (like the good ones)."""
        parts = [features @ self.weights for features in _features(texts, self.config)]
        logits = np.concatenate([np.zeros(0), *parts]) + self.bias
        return 1 / (1 + np.exp(-logits.clip(-500, 500)))

    def files(self) -> dict[str, bytes]:
        """Return quality.json and quality.npz, which contain no code and open everywhere."""
        weights = io.BytesIO()
        np.savez_compressed(weights, weights=self.weights)
        description = {"config": asdict(self.config), "bias": self.bias, "result": self.result}
        return {
            "quality.json": json.dumps(description, indent=1).encode(),
            "quality.npz": weights.getvalue(),
        }

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> "Classifier":
        """Return the classifier of `files`. Raises ValueError if they do not fit together."""
        try:
            description = json.loads(files["quality.json"])
            config = ClassifierConfig(**description["config"])
            with np.load(io.BytesIO(files["quality.npz"]), allow_pickle=False) as file:
                weights = file["weights"]
            if weights.shape != (1 << config.bits,):
                raise ValueError(f"{weights.shape[0]} weights for {1 << config.bits} features")
            return cls(config, weights, float(description["bias"]), description["result"])
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"not a classifier ({error}); train it again") from None


def _features(texts: Iterable[str], config: ClassifierConfig) -> Iterator:
    """Yield sparse float32 [up to 256, 2^bits] of unit length."""
    from sklearn.feature_extraction.text import HashingVectorizer

    kinds = {
        "words": {"token_pattern": r"\w+|[^\w\s]", "ngram_range": (1, 2)},
        "characters": {"analyzer": "char", "ngram_range": (1, 3)},
    }
    vectorizer = HashingVectorizer(
        n_features=1 << config.bits, dtype=np.float32, **kinds[config.units]
    )
    batch = []
    for text in texts:
        batch.append(text[: config.limit])
        if len(batch) == _BATCH:
            yield vectorizer.transform(batch)
            batch = []
    if batch:
        yield vectorizer.transform(batch)


def train(
    good: Iterable[str], bad: Iterable[str], config: ClassifierConfig = ClassifierConfig()
) -> Classifier:  # noqa: B008
    """Train a classifier of two classes with equal weight, however many samples each has.

    One sample in ten, chosen by its hash, is held out first to compute the ``result``: the number
    of samples of both classes, the accuracy on the held-out ones (``accuracy``) and that of each
    class (``good_accuracy``, ``bad_accuracy``). Then the returned classifier is trained on all
    samples.

    Raises ValueError for a class with fewer than ``minimum`` distinct samples, or for the same text
    in both.
    """
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    samples = [
        _sorted_samples(texts, name, config) for texts, name in ((good, "good"), (bad, "bad"))
    ]
    both = sorted(set(samples[0]) & set(samples[1]))
    if both:
        raise ValueError(
            f"{len(both)} texts are both good and bad samples, such as {both[0][:60]!r}; "
            "remove them from one of the two"
        )
    texts = samples[0] + samples[1]
    labels = np.repeat([1, 0], list(map(len, samples)))
    held_out = np.concatenate([np.arange(len(part)) % _HELD_OUT == 0 for part in samples])
    features = sparse.vstack(list(_features(texts, config)), format="csr")

    def fitted(rows):
        # The solver without random numbers; in float64, so that it stops where it should.
        model = LogisticRegression(
            C=config.strength, class_weight="balanced", solver="lbfgs", max_iter=1000
        )
        return model.fit(features[rows].astype(np.float64), labels[rows])

    right = fitted(~held_out).predict(features[held_out].astype(np.float64)) == labels[held_out]
    model = fitted(np.ones(len(labels), bool))
    of_good = labels[held_out] == 1
    result = {
        "good": len(samples[0]),
        "bad": len(samples[1]),
        "held_out": int(held_out.sum()),
        "accuracy": float(right.mean()),
        "good_accuracy": float(right[of_good].mean()),
        "bad_accuracy": float(right[~of_good].mean()),
    }
    return Classifier(config, model.coef_[0].astype(np.float32), float(model.intercept_[0]), result)


def _sorted_samples(texts: Iterable[str], name: str, config: ClassifierConfig) -> list[str]:
    distinct = {text for text in texts if text.strip()}
    if len(distinct) < config.minimum:
        raise ValueError(
            f"{len(distinct)} distinct {name} samples are too few; give {config.minimum} or more"
        )
    return sorted(distinct, key=lambda text: (_hash(text), text))


def _hash(text: str, seed: int = 0) -> int:
    """Return a hash of 64 bits."""
    data = text.encode(errors="surrogatepass")
    return int.from_bytes(
        hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest(), "little"
    )


def kept(scores: np.ndarray, texts: Sequence[str], seed: int = 0, alpha: float = 9.0) -> np.ndarray:
    """Return bool [texts], true if a draw from the Pareto (Lomax) distribution is above 1 - score.

    The distribution is that of ``numpy.random.pareto(alpha)`` (Brown et al. 2020, appendix A). It
    keeps nearly all of the best texts and a few of the worst: 1 in 512 of those with a score of 0.
    The draw depends only on the text and on ``seed``, so equal texts have the same result.
    """
    if len(scores) != len(texts):
        raise ValueError(f"{len(scores)} scores for {len(texts)} texts")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be above 0")
    # 53 bits give a float64 in (0, 1] exactly.
    uniform = np.array([((_hash(text, seed) >> 11) + 1) * 2.0**-53 for text in texts], np.float64)
    return uniform ** (-1 / alpha) - 1 > 1 - np.asarray(scores)


def border(scores: np.ndarray, texts: Sequence[str], count: int = 10) -> list[tuple[float, str]]:
    """Return (score, text) of the texts with scores nearest to 0.5, the border, by score."""
    order = sorted(range(len(texts)), key=lambda row: (abs(scores[row] - 0.5), texts[row]))[:count]
    return sorted((float(scores[row]), texts[row]) for row in order)
