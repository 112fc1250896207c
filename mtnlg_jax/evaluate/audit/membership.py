"""Membership: can a score tell passages of the training text from passages that were held out?

Each score is higher for what the model seems to know. An AUC of 0.5 is chance. The baseline looks
only at the tokens, without the model: if it tells the two apart, the texts differ, and an AUC of
the model says less about what it remembers (Das 2024, "Blind baselines beat membership
inference").
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.evaluate.audit.scoring import TokenScores
from mtnlg_jax.evaluate.audit.sources import Passage
from mtnlg_jax.evaluate.audit.statistics import auc, true_positives

FOLDS = 5
NAMES = {
    "loss": "log-probability of a token",
    "zlib": "loss over the size by zlib (Carlini 2021)",
    "min_k": "mean of the least probable tokens (min-k %, Shi 2024)",
    "min_k_plus": "the same, standardized by the model's distribution (min-k %++, Zhang 2024)",
    "reference": "log-probability against a reference model's",
}


def scores_of(
    passages: Sequence[Passage],
    scored: Sequence[TokenScores],
    tokenizer: Tokenizer,
    percent: float,
    reference: Sequence[TokenScores] | None = None,
) -> dict[str, np.ndarray]:
    """Return each score of each passage, [passages] float64, higher for members.

    ``percent`` of the tokens of each passage, at least one, are the k of min-k %. ``reference``:
    what another model says of the same tokens.
    """
    logprobs = [each.logprobs.astype(np.float64) for each in scored]
    own = np.array([each.mean() for each in logprobs])
    sizes = [
        len(zlib.compress(tokenizer.decode(passage.tokens.tolist()).encode()))
        for passage in passages
    ]
    nats = np.array([-each.sum() for each in logprobs])
    found = {
        "loss": own,
        "zlib": -nats / np.array(sizes),
        "min_k": np.array([_lowest(each, percent) for each in logprobs]),
        "min_k_plus": np.array(
            [
                # Where all tokens but one are impossible, the deviation is 0.
                _lowest((p - each.means) / np.maximum(each.deviations, 1e-6), percent)
                for p, each in zip(logprobs, scored, strict=True)
            ]
        ),
    }
    if reference is not None:
        theirs = np.array([each.logprobs.mean(dtype=np.float64) for each in reference])
        found["reference"] = own - theirs
    return found


def _lowest(values: np.ndarray, percent: float) -> float:
    """Return the mean of the lowest ``percent`` of some values, of at least one."""
    count = max(1, int(len(values) * percent / 100))
    return float(np.partition(values, count - 1)[:count].mean())


def compare(members: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return, for each score, its AUC with interval and its true positives at 1 % false ones."""
    return {
        name: auc(scores, others[name]) | {"tpr_at_1_fpr": true_positives(scores, others[name])}
        for name, scores in members.items()
    }


def baseline(members: Sequence[Passage], others: Sequence[Passage], seed: int) -> dict | None:
    """Return the AUC of a classifier of the passages' tokens that never saw the model; None if
    there are too few passages for it.

    It is a logistic regression on counts of tokens, and scores each passage by the one of five
    models that was not trained on it.
    """
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    if min(len(members), len(others)) < 2 * FOLDS:
        return None
    rows = [each.tokens for each in (*members, *others)]
    columns = np.concatenate(rows).astype(np.int64)
    names, columns = np.unique(columns, return_inverse=True)
    numbers = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    shape = (len(rows), len(names))
    counts = sparse.csr_matrix((np.ones(len(columns)), (numbers, columns)), shape)
    labels = np.repeat([1, 0], [len(members), len(others)])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed % (1 << 32))
    model = LogisticRegression(C=0.1, max_iter=500)
    scores = cross_val_predict(model, counts.sqrt(), labels, cv=folds, method="decision_function")
    return auc(scores[labels == 1], scores[labels == 0])
