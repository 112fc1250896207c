"""Fill masks with a bidirectional model (the masked objective)."""

# Shapes: S positions, U masks, D width, V vocabulary

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.decode.cache import Decoder, bucket
from mtnlg_jax.decode.forward import run_layers
from mtnlg_jax.decode.results import check_context, writable
from mtnlg_jax.model.attention import attention
from mtnlg_jax.parallel.auto import fetch, over_its_mesh

# A mask includes the space before it, since tokens begin with theirs.
_MASK = re.compile(r" ?(?:<mask>|\[MASK\])")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A token for a mask."""

    token: int
    text: str  # without the space that the text already has; part of a character shows as U+FFFD
    probability: float  # in the model's own distribution, over its whole vocabulary


@dataclasses.dataclass(frozen=True)
class Filled:
    """A text with its masks filled."""

    text: str  # with the best candidate at each mask
    masks: tuple[tuple[Candidate, ...], ...]  # best first, for each mask in order


def has_mask(text: str) -> bool:
    """Return whether a text has a <mask> or [MASK] to fill."""
    return _MASK.search(text) is not None


@over_its_mesh
def fill(decoder: Decoder, tokenizer, text: str, top_k: int = 5) -> Filled:
    """Return the ``top_k`` best tokens for each <mask> or [MASK] in ``text``.

    One mask is one token. Several masks are filled at once, each independently of the others.

    Raises ValueError on a text without a mask or longer than the context, and on top_k below 1.
    """
    marks = _MASK.findall(text)
    if not marks:
        raise ValueError(
            "the text has no mask to fill; write <mask> or [MASK] where a word is missing"
        )
    allowed_V = writable(tokenizer, decoder.config.vocabulary)
    allowed_V[list(tokenizer.eos_ids)] = False
    if not 1 <= top_k <= allowed_V.sum():
        raise ValueError(
            f"top_k={top_k} is outside [1, {allowed_V.sum()}], the number of tokens to choose from"
        )
    parts = _MASK.split(text)
    tokens = [tokenizer.bos_id, *tokenizer.encode(parts[0])]
    positions = []
    for part in parts[1:]:
        positions.append(len(tokens))
        tokens += [tokenizer.mask_id, *tokenizer.encode(part)]
    tokens.append(tokenizer.eos_id)
    check_context(decoder, len(tokens), "the text")

    row_S = np.zeros(bucket(len(tokens), decoder.context), np.int32)
    row_S[: len(tokens)] = tokens
    # Padded with copies of the first, so that few programs are compiled.
    positions_U = np.full(1 << (len(positions) - 1).bit_length(), positions[0], np.int32)
    positions_U[: len(positions)] = positions
    probabilities, best = map(
        fetch,
        _guess(
            decoder.params,
            row_S,
            np.int32(len(tokens)),
            positions_U,
            allowed_V,
            config=decoder.config,
            top_k=top_k,
        ),
    )
    if not np.isfinite(probabilities[: len(positions)]).all():
        raise ValueError(
            "the probabilities of what fills the masks are not finite; look for parameters of the "
            "model that are not finite or far too large, or take another checkpoint"
        )
    masks = []
    content = parts[0].encode()
    for index, (mark, part) in enumerate(zip(marks, parts[1:], strict=True)):
        spaced = mark.startswith(" ")
        pieces = [tokenizer.token_bytes(int(token)) for token in best[index]]
        pieces = [piece.removeprefix(b" ") if spaced else piece for piece in pieces]
        masks.append(
            tuple(
                Candidate(int(token), piece.decode("utf-8", "replace"), float(probability))
                for token, piece, probability in zip(
                    best[index], pieces, probabilities[index], strict=True
                )
            )
        )
        content += b" " * spaced + pieces[0] + part.encode()
    return Filled(content.decode("utf-8", "replace"), tuple(masks))


@functools.partial(jax.jit, static_argnames=("config", "top_k"))
def _guess(params, row_S, length, positions_U, allowed_V, *, config, top_k):
    """Return (probabilities, ids), each (U, top_k), of the best tokens at ``positions_U``."""

    def attend(layer, q, k, v, **options):
        return attention(
            q,
            k,
            v,
            causal=False,
            kv_lengths=layer.rows,
            impl=config.attention_impl,
            **options,
        )

    positions_1S = jnp.arange(row_S.shape[0])[None]
    x_1SD, head = run_layers(
        config, params, row_S[None], positions_1S, attend, rows=jnp.asarray(length)[None]
    )
    logits_UV = head.logits(x_1SD[0, positions_U])
    return jax.lax.top_k(jnp.where(allowed_V[None, :], jax.nn.softmax(logits_UV, -1), -1.0), top_k)
