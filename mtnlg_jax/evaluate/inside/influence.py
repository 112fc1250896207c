"""Which training passages raise the probability of a continuation.

A small step on a passage changes the loss of the continuation by minus the rate times the product
of their gradients (Pruthi 2020, TracIn, equation 1). Gradients are projected
(`evaluate.inside.projected`), and by default the product is that of LoGra (Choe 2024): with the
inverse of the passages' damped second moment, a block for each matrix of a layer, so that common
directions of all text count little. ``relative`` divides by the length of the passage's own
gradient in the same product (Barshan 2020, RelatIF), or long and odd passages come first whatever
is asked for.
"""

from typing import NamedTuple

import numpy as np


class Influence(NamedTuple):
    """Figures of n passages, in their order."""

    influence: np.ndarray  # float64 [n]; above 0: training on it raises the probability
    relative: np.ndarray  # float64 [n]; over the length of the passage's own gradient
    cosine: np.ndarray  # float64 [n], -1 to 1; of the projected gradients, without second moments


def influences(query: np.ndarray, passages: np.ndarray, damping: float | None = 0.1) -> Influence:
    """Return how much a step on each passage raises the probability of the query.

    Args:
      query: projected gradient of the continuation's loss [blocks, features].
      passages: those of the passages [n, blocks, features].
      damping: above 0, in units of the mean eigenvalue of a block's second moment, which is added
        to all of them; None: plain products (TracIn).

    Raises ValueError on a damping that is not above 0.
    """
    if damping is not None and not 0 < damping < float("inf"):
        raise ValueError(f"damping={damping} must be above 0, such as 0.1")
    query = query.astype(np.float64)
    plain = np.einsum("bf,nbf->n", query, passages)
    products = plain
    lengths = np.einsum("nbf,nbf->n", passages, passages, dtype=np.float64)
    cosine = plain / np.maximum(np.sqrt(lengths * (query**2).sum()), 1e-300)
    if damping is not None:
        products = np.zeros(len(passages))
        lengths = np.zeros(len(passages))
        # A block at a time: features^2 numbers.
        for number in range(passages.shape[1]):
            own = passages[:, number].astype(np.float64)
            moment = own.T @ own / len(own)
            mean = np.trace(moment) / len(moment)
            if mean == 0:
                continue
            moment[np.diag_indices_from(moment)] += damping * mean
            solved = np.linalg.solve(moment, np.column_stack([query[number], own.T]))
            products += own @ solved[:, 0]
            lengths += np.einsum("nf,fn->n", own, solved[:, 1:])
    return Influence(products, products / np.maximum(np.sqrt(lengths), 1e-300), cosine)
