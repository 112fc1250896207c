"""What all ways of decoding share: prompts as tokens, which tokens may be written, and results."""

import contextlib
import dataclasses

import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.stopping import TextStream

# Tokens generated per device call, and between two checks whether all rows are done.
CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Generated:
    prompt: int  # index of its prompt
    tokens: tuple[int, ...]  # without the end token; with those of a stop string or a stop sequence
    text: str  # without special tokens and stops; a character cut in two at the end is left out
    # "stop": end token or stop; "length": max_new_tokens or the context's end; "timeout": max_time
    finish_reason: str
    logprobs: tuple[float, ...]  # of ``tokens``, natural logarithm, of the model's own distribution
    score: float | None = (
        None  # of beams: what they are sorted by, as sequences_scores of Hugging Face
    )
    guessed: int = 0  # tokens that speculative decoding guessed
    accepted: int = 0  # those of them that stand in the row


def encode_prompt(tokenizer, text: str) -> list[int]:
    """A text as training saw its beginning: <bos>, where the tokenizer has it so, then its tokens.
    Of no text only <bos> is left: the model then writes a document from its beginning."""
    tokens = tokenizer.encode(text)
    return [tokenizer.bos_id, *tokens] if tokenizer.prompt_bos or not tokens else tokens


def check_context(decoder: Decoder, length: int, what: str = "the prompt") -> None:
    if length > decoder.context:
        raise ValueError(
            f"{what} has {length} tokens and the model's context holds {decoder.context}; shorten it, "
            "or use a model with more positions"
        )


def check_finite(logprobs: np.ndarray, prompt: int, first: int) -> None:
    """Raises ValueError where a log-probability is not finite, of the new tokens from the ``first``
    one on, behind the ``prompt``-th prompt, both from 0. Logits of which one is NaN or +inf give
    none that is."""
    bad = np.flatnonzero(~np.isfinite(logprobs))
    if len(bad):
        raise ValueError(
            f"new token {first + int(bad[0]) + 1} behind prompt {prompt + 1} has log-probability "
            f"{logprobs[bad[0]]}, so the model's logits are not finite; look for parameters that are not "
            "finite or far too large, or take another checkpoint"
        )


def text_stream(tokenizer, config: DecodeConfig) -> TextStream:
    return TextStream(
        tokenizer,
        config.stop_strings,
        [*((token,) for token in config.stop_token_ids), *config.stop_sequences],
    )


def ends_of_config(tokenizer, config: DecodeConfig) -> frozenset[int]:
    return frozenset(config.eos_token_id or (tokenizer.eos_id,))


def writable(tokenizer, vocabulary: int, end: bool = True) -> np.ndarray:
    """Which ids may be written: nothing beyond the tokenizer's vocabulary, no token that marks
    something (pad, bos, mask, sep) but, with ``end``, the end. Rows add their own ends. Other
    special tokens of a tokenizer from elsewhere may be written, as its model learned to, and add
    nothing to the text."""
    size = min(tokenizer.vocab_size, vocabulary)
    allowed = np.zeros(vocabulary, bool)
    allowed[:size] = ~tokenizer.is_special[:size] | _is_learned_special(tokenizer)[:size]
    if tokenizer.eos_id >= 0:
        allowed[tokenizer.eos_id] |= end
    return allowed


def _is_learned_special(tokenizer) -> np.ndarray:
    found = np.zeros(tokenizer.vocab_size, bool)
    if (
        getattr(tokenizer, "kind", "sentencepiece") == "sentencepiece"
    ):  # all of its specials mark something
        return found
    roles = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.sep_id}
    with contextlib.suppress(ValueError):
        roles.add(tokenizer.mask_id)
    found[[index for index in tokenizer.special_names if index not in roles]] = True
    return found
