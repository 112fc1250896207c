"""Tokenizers: SentencePiece, the byte-level BPE of GPT-2, and Hugging Face's tokenizer.json.

`load_tokenizer` opens any of them from a folder or a file; `train_tokenizer` trains SentencePiece.

Models trained here and GPT-2's are lossless: every text survives encoding and decoding unchanged.
For other tokenizers `Tokenizer.losses` lists what a text can lose. Text that spells a special token
does not become that token unless ``parse_special`` is set, so a document cannot end itself. Each
token adds fixed bytes to a text, so a text can be decoded while it is generated.
"""

from mtnlg_jax.data.tokenizer.base import Tokenizer
from mtnlg_jax.data.tokenizer.byte_level import ByteLevelBPETokenizer
from mtnlg_jax.data.tokenizer.hub import HubTokenizer
from mtnlg_jax.data.tokenizer.load import load_tokenizer, tokenizer_for_data
from mtnlg_jax.data.tokenizer.sentence_piece import SENTENCEPIECE_FILES, SentencePieceTokenizer
from mtnlg_jax.data.tokenizer.training import train_tokenizer

__all__ = [
    "SENTENCEPIECE_FILES",
    "ByteLevelBPETokenizer",
    "HubTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_for_data",
    "train_tokenizer",
]
