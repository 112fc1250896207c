"""Baselines that a model must beat: a unigram model of the same tokens, and a compressor."""

import lzma

import numpy as np

from mtnlg_jax.data.store.tokens import Tokens
from mtnlg_jax.train.inputs import Data


def held_out_text(data: Data, limit: int) -> str:
    """Return the first ``limit`` tokens of the held-out documents as text."""
    held_out = data.held_out[0][0]
    tokens = held_out.read(0, min(limit, len(held_out)))
    return data.tokenizer.decode([int(t) for t in tokens])


def baselines(data: Data, train: Tokens) -> tuple[float, float]:
    """Return the bits per byte of the held-out text under (a unigram model, xz -9e).

    The unigram model counts the training tokens, each once more than it occurs.
    """
    held_out = data.held_out[0][0]
    counts = np.ones(data.tokenizer.vocab_size)
    for begin in range(0, len(train), 1 << 20):
        counts += np.bincount(
            train.read(begin, min(begin + (1 << 20), len(train))), minlength=len(counts)
        )
    bits = -np.log2(counts / counts.sum())
    text = held_out_text(data, len(held_out)).encode()
    tokens = held_out.read(0, len(held_out))
    predicted = tokens[tokens != data.tokenizer.bos_id]
    compressed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    return float(bits[predicted].sum() / held_out.meta["bytes"]), 8 * len(compressed) / len(text)


def compare(data: Data, train: Tokens, bits_per_byte: float | None) -> str:
    """Return a line that compares the ``bits_per_byte`` of a model with both baselines.

    None stands for a model without a causal objective.
    """
    unigram, compressed = baselines(data, train)
    ours = "not trained for that" if bits_per_byte is None else f"{bits_per_byte:.3f}"
    return (
        f"held-out text, bits per byte: this model {ours}, "
        f"a unigram model of the same tokens {unigram:.3f}, xz -9e {compressed:.3f}"
    )
