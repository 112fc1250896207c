"""Parts shared by all ways of decoding: prompts as tokens, writable tokens, checks, results."""

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.stopping import TextStream

# Tokens generated per device call, after which the host checks whether all rows are done.
CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Generated:
    """One continuation of a prompt."""

    prompt: int  # index of its prompt
    tokens: tuple[int, ...]  # without the end token; with those of a stop string or stop sequence
    text: str  # without special tokens and stops, nor a character cut in two at the end
    # "stop": end token or stop; "length": max_new_tokens or the context's end; "timeout": max_time
    finish_reason: str
    # of ``tokens``, natural logarithms, in the model's own distribution
    logprobs: tuple[float, ...]
    # of beams: the value they are sorted by, sequences_scores in Hugging Face
    score: float | None = None
    guessed: int = 0  # tokens that speculative decoding guessed
    accepted: int = 0  # the guesses that were accepted


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Return the tokens of a text as training saw its beginning.

    They start with <bos> where the tokenizer adds one. An empty text means <bos> alone: the model
    then writes a document from its beginning.
    """
    tokens = tokenizer.encode(text)
    return [tokenizer.bos_id, *tokens] if tokenizer.prompt_bos or not tokens else tokens


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences of tokens."""
    most = min(len(one), len(other))
    differs = np.flatnonzero(np.array(one[:most]) != np.array(other[:most]))
    return int(differs[0]) if len(differs) else most


def check_context(decoder: Decoder, length: int, what: str = "the prompt") -> None:
    """Raise ValueError if ``length`` tokens do not fit the model's context."""
    if length > decoder.context:
        raise ValueError(
            f"{what} has {length} tokens and the model's context holds {decoder.context}; "
            "shorten it, or use a model with more positions"
        )


def check_finite(logprobs: np.ndarray, prompt: int, first: int) -> None:
    """Raise ValueError if a log-probability is not finite.

    ``logprobs`` are of the new tokens from ``first`` on, for prompt number ``prompt``, both from 0.
    Logits with a NaN or +inf make all of them non-finite.
    """
    nonfinite = np.flatnonzero(~np.isfinite(logprobs))
    if len(nonfinite):
        raise ValueError(
            f"new token {first + int(nonfinite[0]) + 1} behind prompt {prompt + 1} has "
            f"log-probability {logprobs[nonfinite[0]]}, so the model's logits are not finite; "
            "look for parameters that are not finite or far too large, or take another checkpoint"
        )


def time_limits(configs: Sequence[DecodeConfig]) -> np.ndarray:
    """Return the max_time of each config in seconds; inf where there is none."""
    return np.array([np.inf if config.max_time is None else config.max_time for config in configs])


def text_stream(tokenizer, config: DecodeConfig) -> TextStream:
    """Return a stream with the stop strings of ``config``."""
    stop_tokens = [(token,) for token in config.stop_token_ids]
    return TextStream(tokenizer, config.stop_strings, [*stop_tokens, *config.stop_sequences])


def ends_of_config(tokenizer, config: DecodeConfig) -> frozenset[int]:
    """Return the ids that end a row."""
    return frozenset(config.eos_token_id or tokenizer.eos_ids)


def writable(tokenizer, vocabulary: int, end: bool = True) -> np.ndarray:
    """Return which ids may be written, (V,): ids of the tokenizer that are not control tokens.

    Control tokens are pad, bos, mask and sep, and without ``end`` the end tokens; rows add their
    own ends. Other special tokens of an imported tokenizer may be written, as its model was trained
    to do, and add nothing to the text.
    """
    # The model's vocabulary is padded, and a tokenizer may have fewer tokens than an imported
    # model.
    size = min(tokenizer.vocab_size, vocabulary)
    allowed = np.zeros(vocabulary, bool)
    allowed[:size] = ~tokenizer.is_special[:size] | _is_learned_special(tokenizer)[:size]
    for index in tokenizer.eos_ids:
        if 0 <= index < size:
            allowed[index] |= end
    return allowed


def _is_learned_special(tokenizer) -> np.ndarray:
    """Return which ids are special tokens that a model may write as ordinary ones."""
    found = np.zeros(tokenizer.vocab_size, bool)
    # All special tokens of a sentencepiece tokenizer are control tokens.
    if getattr(tokenizer, "kind", "sentencepiece") == "sentencepiece":
        return found
    roles = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.sep_id, *tokenizer.eos_ids}
    # A tokenizer without <mask> raises.
    with contextlib.suppress(ValueError):
        roles.add(tokenizer.mask_id)
    found[[index for index in tokenizer.special_names if index not in roles]] = True
    return found
