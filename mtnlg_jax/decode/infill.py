"""Filling masks with the model read both ways (the masked objective)."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.decode.cache import Decoder, bucket, run_layers
from mtnlg_jax.decode.results import check_context, writable
from mtnlg_jax.model.attention import attention

# A mask is a token with the space before it, since pieces begin with theirs.
_MASK = re.compile(r" ?(?:<mask>|\[MASK\])")


@dataclasses.dataclass(frozen=True)
class Candidate:
    token: int
    text: (
        str  # without the space that the text has already; a part of a character is shown as U+FFFD
    )
    probability: float  # the model's own, over its whole vocabulary


@dataclasses.dataclass(frozen=True)
class Filled:
    text: str  # with the best candidate at each mask
    masks: tuple[tuple[Candidate, ...], ...]  # best first, for each mask in order


def fill(decoder: Decoder, tokenizer, text: str, top_k: int = 5) -> Filled:
    """The ``top_k`` best tokens for each <mask> or [MASK] in ``text``. One mask is one token;
    several are guessed at once, each without knowing the others' guesses.

    Raises ValueError on a text without a mask or longer than the context, and on top_k below 1.
    """
    marks = _MASK.findall(text)
    if not marks:
        raise ValueError(
            "the text has no mask to fill; write <mask> or [MASK] where a word is missing"
        )
    allowed_V = writable(tokenizer, decoder.config.vocabulary)
    allowed_V[tokenizer.eos_id] = False
    if not 1 <= top_k <= allowed_V.sum():
        raise ValueError(
            f"top_k={top_k} lies outside [1, {allowed_V.sum()}], the tokens that there are"
        )
    parts = _MASK.split(text)
    tokens = [tokenizer.bos_id, *tokenizer.encode(parts[0])]
    places = []
    for part in parts[1:]:
        places.append(len(tokens))
        tokens += [tokenizer.mask_id, *tokenizer.encode(part)]
    tokens.append(tokenizer.eos_id)
    check_context(decoder, len(tokens), "the text")

    row_S = np.zeros(bucket(len(tokens), decoder.context), np.int32)
    row_S[: len(tokens)] = tokens
    # Padded with repetitions of the first, so that compiles are few.
    places_M = np.full(1 << (len(places) - 1).bit_length(), places[0], np.int32)
    places_M[: len(places)] = places
    probabilities, best = map(
        np.asarray,
        _guess(
            decoder.params,
            row_S,
            np.int32(len(tokens)),
            places_M,
            allowed_V,
            config=decoder.config,
            top_k=top_k,
        ),
    )
    if not np.isfinite(probabilities[: len(places)]).all():
        raise ValueError(
            "the probabilities of what fills the masks are not finite; look for parameters of the model "
            "that are not finite or far too large, or take another checkpoint"
        )
    masks = []
    content = parts[0].encode()
    for place, (mark, part) in enumerate(zip(marks, parts[1:], strict=True)):
        spaced = mark.startswith(" ")
        pieces = [tokenizer.token_bytes(int(token)) for token in best[place]]
        pieces = [piece.removeprefix(b" ") if spaced else piece for piece in pieces]
        masks.append(
            tuple(
                Candidate(int(token), piece.decode("utf-8", "replace"), float(probability))
                for token, piece, probability in zip(
                    best[place], pieces, probabilities[place], strict=True
                )
            )
        )
        content += b" " * spaced + pieces[0] + part.encode()
    return Filled(content.decode("utf-8", "replace"), tuple(masks))


@functools.partial(jax.jit, static_argnames=("config", "top_k"))
def _guess(params, row_S, length, places_M, allowed_V, *, config, top_k):
    """(probabilities, ids), each (M, top_k), of the best tokens that may stand at ``places_M``."""

    def attend(_, q, k, v):
        return attention(q, k, v, causal=False, kv_lengths=length[None], impl=config.attention_impl)

    positions_1S = jnp.arange(row_S.shape[0])[None]
    x_1SD, head_VD = run_layers(config, params, row_S[None], positions_1S, attend)
    logits_MV = jnp.einsum(
        "MD,VD->MV", x_1SD[0, places_M], head_VD, preferred_element_type=jnp.float32
    )
    return jax.lax.top_k(jnp.where(allowed_V, jax.nn.softmax(logits_MV, -1), -1.0), top_k)
