"""Baselines that a model must beat: a unigram model of the same tokens, and a compressor."""

import lzma

import numpy as np


def held_out_text(data, limit: int) -> str:
    """Return the first ``limit`` tokens of the held-out documents as text."""
    held_out = data.held_out[0][0]
    tokens = held_out.read(0, min(limit, len(held_out)))
    return data.tokenizer.decode([int(t) for t in tokens])


def baselines(data, train) -> tuple[float, float]:
    """Return bits per byte of the held-out text: by a unigram model of the training tokens, and by
    xz -9e."""
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
