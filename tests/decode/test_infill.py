"""Compare filled masks with the model's own bidirectional probabilities, and check the filled
text."""

import numpy as np
import pytest

from mtnlg_jax.decode import infill as module
from mtnlg_jax.decode.infill import fill

ROUNDING = 1e-5


def _probabilities(tiny, tokens):
    """Return probabilities (S, V) by a full bidirectional forward pass, with the padding of the
    fixture as another segment."""
    segments = np.zeros((1, 64), np.int32)
    segments[0, : len(tokens)] = 1
    logits = tiny.logits([tokens], causal=False, segment_ids_BS=segments)[0].astype(np.float64)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.parametrize("mask", ["<mask>", "[MASK]"])
def test_probabilities_and_text_of_filled_masks(tiny, tokenizer, mask):
    filled = fill(tiny.decoder, tokenizer, f"The {mask} sat on{mask} mat.", top_k=4)
    tokens = [
        tokenizer.bos_id,
        *tokenizer.encode("The"),
        tokenizer.mask_id,
        *tokenizer.encode(" sat on"),
        tokenizer.mask_id,
        *tokenizer.encode(" mat."),
        tokenizer.eos_id,
    ]
    expected = _probabilities(tiny, tokens)
    forbidden = np.ones(tiny.config.vocab_size, bool)
    forbidden[: tokenizer.vocab_size] = tokenizer.is_special
    places = [place for place, token in enumerate(tokens) if token == tokenizer.mask_id]
    assert len(filled.masks) == len(places) == 2
    for place, candidates in zip(places, filled.masks, strict=True):
        order = np.argsort(-np.where(forbidden, -1, expected[place]), kind="stable")[:4]
        assert [each.token for each in candidates] == order.tolist()
        np.testing.assert_allclose(
            [each.probability for each in candidates], expected[place][order], atol=ROUNDING
        )
    spaced, plain = (tokenizer.token_bytes(candidates[0].token) for candidates in filled.masks)
    written = spaced.removeprefix(b" "), plain
    assert [candidates[0].text for candidates in filled.masks] == [
        x.decode("utf-8", "replace") for x in written
    ]
    assert filled.text == b"The %b sat on%b mat.".__mod__(written).decode("utf-8", "replace")


def test_the_text_after_a_mask_changes_the_guess(learned, tokenizer):
    """A causal model would guess the same for both."""
    left, right = (
        fill(learned.decoder, tokenizer, f"The <mask> {end}").masks[0] for end in ("sat.", "在")
    )
    assert left[0].probability != pytest.approx(right[0].probability, abs=1e-3)


def test_a_piece_with_a_space_does_not_double_the_space(learned, tokenizer, monkeypatch):
    ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    for piece, text, expected in (
        (b" the", "on <mask> mat", "on the mat"),
        (b" the", "on<mask> mat", "on the mat"),
        (b"t", "on <mask> mat", "on t mat"),
        (b"t", "ca<mask> mat", "cat mat"),
    ):
        guesses = np.ones((1, 1)), np.array([[ids[piece]]])
        monkeypatch.setattr(module, "_guess", lambda *args, guesses=guesses, **static: guesses)
        assert fill(learned.decoder, tokenizer, text, top_k=1).text == expected


def test_byte_pieces_of_one_character_are_joined(learned, tokenizer, monkeypatch):
    """Three adjacent masks filled with the bytes of one character give that character."""
    byte_ids = [
        next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte]))
        for byte in "你".encode()
    ]
    guesses = np.ones((4, 1)), np.array(byte_ids + [0])[:, None]
    monkeypatch.setattr(module, "_guess", lambda *args, **static: guesses)
    filled = fill(learned.decoder, tokenizer, "天<mask><mask><mask>地", top_k=1)
    assert filled.text == "天你地"
    assert [candidates[0].text for candidates in filled.masks] == ["\ufffd"] * 3


def test_invalid_prompts_raise_an_error(learned, tokenizer):
    def refused(message, *args, **options):
        with pytest.raises(ValueError, match=message):
            fill(learned.decoder, tokenizer, *args, **options)

    refused("no mask to fill; write <mask> or", "The cat sat.")
    refused("no mask", "")
    refused("top_k=0", "a <mask>", top_k=0)
    refused("top_k=9999", "a <mask>", top_k=9999)
    refused("the text has .* 64; shorten", "天" * 70 + "<mask>")
