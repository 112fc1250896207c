"""Provide a small bilingual corpus and tokenizers trained on it, created once."""

import itertools
import json
import sys
from pathlib import Path

import pytest

from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.data.tokenizer import load_tokenizer, train_tokenizer

sys.path.append(
    str(Path(__file__).parent)
)  # tests are imported without it; megatron_peer.py stands there

CHINESE = (
    "天下大势，分久必合，合久必分。学而时习之，不亦说乎？有朋自远方来，不亦乐乎？"
    "千里之行，始于足下。知之为知之，不知为不知，是知也。\n"
) * 20


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Return about 100 KB of text: the built-in corpus begins with help topics, so no module is
    parsed for it."""
    return [document.text for document in itertools.islice(embedded_documents(), 30)] + [CHINESE]


@pytest.fixture(scope="session")
def trained(texts) -> dict:
    return {kind: train_tokenizer(texts, 800, kind) for kind in ("bpe", "unigram")}


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory) -> Path:
    """Write a vocabulary in GPT-2's format: 256 bytes, three merges, <|endoftext|> last."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    pieces = [*map(chr, visible), *(chr(256 + number) for number in range(len(hidden)))]
    merges = ["t h", "th e", "\u0120 the"]  # U+0120 is the space
    pieces += [merge.replace(" ", "") for merge in merges] + ["<|endoftext|>"]
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "encoder.json").write_text(
        json.dumps({piece: number for number, piece in enumerate(pieces)})
    )
    (folder / "vocab.bpe").write_text(
        "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="session", params=["bpe", "unigram", "gpt2"])
def tokenizer(request, trained, gpt2_files):
    return load_tokenizer(gpt2_files) if request.param == "gpt2" else trained[request.param]
