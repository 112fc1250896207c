"""Which document of which source each token of a batch comes from."""

import numpy as np

from mtnlg_jax.data.batches import Batches, packed
from mtnlg_jax.data.store.tokens import Tokens

PADDING = -1  # in place of a document's number


def origins(batches: Batches, sequence_length: int, samples: np.ndarray) -> tuple:
    """Return of sample numbers [n] the index of each one's source in ``batches.sources``, int64
    [n], and the number of each token's document in that source, int64 [n, S + 1].

    The tokens are those of `Batches.rows`. PADDING stands for tokens of no document.
    """
    source, window, starts = batches.locate(samples)
    documents = np.full((len(source), sequence_length + 1), PADDING, np.int64)
    for index in np.unique(source):
        chosen = source == index
        tokens = batches.sources[index]
        if tokens.answers_only:
            documents[chosen] = _of_packed(tokens, sequence_length, window[chosen])
        else:
            at = (starts[chosen][:, None] + np.arange(sequence_length + 1)) % len(tokens)
            documents[chosen] = tokens.document_of(at)[0]
    return source, documents


def _of_packed(tokens: Tokens, sequence_length: int, numbers: np.ndarray) -> np.ndarray:
    """Return the documents of the tokens of packed rows."""
    begins, ends = packed(tokens, sequence_length).stretches[numbers].T
    before = 0 if tokens.prefixes is None else tokens.prefixes.positions
    # Room for an image belongs to the document behind it.
    at = np.maximum(np.arange(sequence_length + 1) - before, 0) + begins[:, None]
    inside = at < ends[:, None]
    found = tokens.document_of(np.where(inside, at, 0))[0]
    return np.where(inside, found, PADDING)
