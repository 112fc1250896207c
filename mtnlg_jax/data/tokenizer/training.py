"""Training of a SentencePiece model."""

import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator
from itertools import chain

from mtnlg_jax.data.tokenizer.base import replace_surrogates
from mtnlg_jax.data.tokenizer.sentence_piece import (
    SPACE,
    UNIT_CHARACTERS,
    SentencePieceTokenizer,
    split_line,
)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "bpe",
    seed: int = 0,
    max_train_bytes: int = 20_000_000,
    num_threads: int = 4,
) -> SentencePieceTokenizer:
    """Train SentencePiece, ``"bpe"`` or ``"unigram"``, with byte fallback and no normalization.

    From a larger corpus, ``max_train_bytes`` of UTF-8 are sampled with ``seed``, evenly over the
    texts. The result depends on the texts, their order and the arguments. Unigram also depends on
    ``num_threads``, because its sums are rounded in a different order; therefore the default is not
    the number of cores.

    Raises ValueError if ``vocab_size`` is more than the texts support or less than their characters
    need.
    """
    from sentencepiece import SentencePieceTrainer

    if model_type not in ("bpe", "unigram"):
        raise ValueError(f"unknown model_type={model_type!r}; use 'bpe' or 'unigram'")
    sentences = sample(chain.from_iterable(map(_sentences, texts)), max_train_bytes, seed)
    if not sentences:
        raise ValueError("there is no text to train a tokenizer on; give a corpus with text")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # With a space before each text, the pieces of a continuation would differ from those
            # of the whole text.
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=4 * UNIT_CHARACTERS,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece="<pad>",
            bos_piece="<bos>",
            eos_piece="<eos>",
            control_symbols=["<mask>", "<sep>"],
            user_defined_symbols=["\n", "\t"],
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(str(error), vocab_size) from None
    return SentencePieceTokenizer(model.getvalue())


def _explained(message: str, vocab_size: int) -> ValueError:
    """Return an error that names the limit on ``vocab_size`` in SentencePiece's message."""
    if largest := re.search(r"too high.*<= (\d+)", message):
        return ValueError(
            f"vocab_size={vocab_size} is more than this text supports; the largest possible "
            f"is {largest[1]}: ask for that or less, or give more text"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return ValueError(
            f"vocab_size={vocab_size} is less than the characters of this text need; the "
            f"smallest possible is {smallest[1]}"
        )
    return ValueError(f"SentencePiece cannot train on this text ({message})")


def _sentences(text: str) -> Iterator[str]:
    """Yield the lines to train on, without the characters that SentencePiece reserves."""
    for line in re.split(f"[\n\t\0\u2047\u2585{SPACE}]+", replace_surrogates(text)):
        if line:
            yield from split_line(line)


def sample(sentences: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """Return sentences of at most ``max_bytes``, in their order.

    Each sentence gets a random number; those with the smallest numbers are kept.
    """
    rng = random.Random(seed)
    kept: list[tuple[float, int, str]] = []
    size = 0
    for number, sentence in enumerate(sentences):
        heapq.heappush(kept, (-rng.random(), number, sentence))
        size += len(sentence.encode())
        while size > max_bytes and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].encode())
    return [sentence for _, _, sentence in sorted(kept, key=lambda item: item[1])]
