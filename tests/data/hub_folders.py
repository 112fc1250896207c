"""Write small tokenizer folders in Hugging Face's formats, one for each way to define a tokenizer.

They are made with `tokenizers`. With a Python that has transformers,

    python tests/data/hub_folders.py tests/data/hub_ids.json

writes its ids of HUB_TEXTS: by folder, for each text [ids, ids with special tokens as text, ids
decoded without special tokens].
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = [
    "the man in the town where I was born, and the sea",
    "def f(x):\n    return x + 1\n",
    "天地玄黄,宇宙洪荒。",
    "To be, or not to be: that is the question.",
    "ROMEO: it is the east, and Juliet is the sun\n\nJULIET:",
]
HUB_TEXTS = [
    *TEXT,
    "",
    " ",
    "a",
    " the",
    "the  man\n\n\tx ",
    "YORICK is",
    "xYORICKx",
    "a <new> b",
    "<p>x",
    "天 地",
    "caf\u00e9 cafe\u0301",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "[SEP] [CLS]x",
    "<s></s>",
    "１２ ﬁ",
    "🙂龘",
    "THE Man",
    "don't they'll",
    "<mask> x <mask>",
    "12345 3.14",
    "\r\n",
    "</s>a",
]
QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QUIET = {"show_progress": False}


def byte_level(*, alphabet=True, vocab_size=330, special=("<|endoftext|>",)) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    initial = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    made.train_from_iterator(
        TEXT * 9,
        trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=initial, special_tokens=list(special), **QUIET
        ),
    )
    return made


def characters(kind: str, fused: bool = True) -> Tokenizer:
    """Write a model of single characters of the texts, as in nanoGPT's shakespeare_char."""
    numbers = {character: index for index, character in enumerate(sorted(set("".join(TEXT))))}
    model = (
        models.BPE(vocab=numbers, merges=[])
        if kind == "bpe"
        else models.WordLevel(numbers | {"?": len(numbers)}, unk_token="?")
    )
    made = Tokenizer(model)
    if kind == "wordlevel":
        made.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    if fused:
        made.decoder = decoders.Fuse()
    return made


def word_pieces() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyzTBROMEJULI0123456789"
    return [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{letter}" for letter in letters),
        *"天地玄黄宇宙洪荒,。:.()+!",
        "the",
        "man",
        "##wn",
        "born",
    ]


def unigram() -> Tokenizer:
    """Write a tokenizer in the style of T5: U+2581 for spaces, normalized, no bytes for unknown
    text."""
    letters = sorted(set("".join(TEXT)) - {" "})
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581the", "\u2581in", "an", "he", *letters]
    made = Tokenizer(models.Unigram([(piece, -len(piece) / 2) for piece in pieces], unk_id=2))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return made


def byte_fallback() -> Tokenizer:
    """Write a tokenizer in the style of Llama: characters, bytes for the rest, U+2581 for
    spaces."""
    letters = ["\u2581", *sorted(set("".join(TEXT)) - {" ", "\n"})]
    pairs = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "\u2581")]
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *letters,
        *map("".join, pairs),
    ]
    made = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            pairs,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return made


def write(
    folder: Path, fast: Tokenizer | None = None, files: dict | None = None, **settings
) -> Path:
    """Write a folder with tokenizer.json, tokenizer_config.json of ``settings`` and ``files`` by
    name."""
    folder.mkdir(parents=True)
    if fast is not None:
        fast.save(os.fspath(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in (files or {}).items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def older_files(fast: Tokenizer) -> dict:
    """Return vocab.json and merges.txt of a byte-level BPE."""
    model = json.loads(fast.to_str())["model"]
    return {
        "vocab.json": model["vocab"],
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, model["merges"])]),
    }


def _qwen() -> Tokenizer:
    made = byte_level(special=())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return made


def _limited() -> Tokenizer:
    made = byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=40)
    return made


def _word_level_ends() -> Tokenizer:
    """Write a tokenizer whose model itself reads "<s>" in a text."""
    words = sorted(set(" ".join(TEXT).split())) + ["<s>", "</s>", "<", "s", ">", "/", "<unk>"]
    made = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>", "<unk>"])
    return made


def _words_and_masks() -> Tokenizer:
    made = byte_level()
    made.add_tokens(["YORICK", AddedToken("<new>", lstrip=True, rstrip=True)])
    made.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return made


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
FOLDERS = {
    "qwen": lambda folder: write(folder, _qwen(), **FAST),
    "words and masks": lambda folder: write(
        folder,
        _words_and_masks(),
        **FAST,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        mask_token="<mask>",
    ),
    "added_tokens.json": lambda folder: write(
        folder,
        files=older_files(byte_level()) | {"added_tokens.json": {"YORICK": 330, "<p>": 331}},
        tokenizer_class="GPT2Tokenizer",
        pad_token="<p>",
    ),
    "added_tokens_decoder": lambda folder: write(
        folder,
        files=older_files(byte_level()),
        tokenizer_class="GPT2Tokenizer",
        added_tokens_decoder={
            "0": {"content": "<|endoftext|>", "special": True},
            "330": {"content": "<new>", "special": False},
            "331": {"content": "[PAD]", "special": True},
        },
        pad_token="[PAD]",
    ),
    "no alphabet": lambda folder: write(folder, byte_level(alphabet=False, vocab_size=90), **FAST),
    "no alphabet, older files": lambda folder: write(
        folder,
        files=older_files(byte_level(alphabet=False, vocab_size=90)),
        tokenizer_class="GPT2Tokenizer",
    ),
    "characters": lambda folder: write(folder, characters("wordlevel"), **FAST, unk_token="?"),
    "characters, bpe": lambda folder: write(folder, characters("bpe"), **FAST),
    "vocab.txt": lambda folder: write(
        folder,
        files={"vocab.txt": "\n".join(word_pieces()) + "\n"},
        tokenizer_class="BertTokenizer",
    ),
    "vocab.txt, cased": lambda folder: write(
        folder,
        files={"vocab.txt": "\n".join(word_pieces()) + "\n"},
        tokenizer_class="BertTokenizer",
        do_lower_case=False,
    ),
    "unigram": lambda folder: write(
        folder, unigram(), **FAST, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ),
    "byte fallback": lambda folder: write(
        folder, byte_fallback(), **FAST, bos_token="<s>", eos_token="</s>"
    ),
    "limited": lambda folder: write(folder, _limited(), **FAST, pad_token="[PAD]"),
    "word level": lambda folder: write(
        folder, _word_level_ends(), **FAST, bos_token="<s>", eos_token="</s>"
    ),
    "prefix space": lambda folder: write(
        folder,
        files=older_files(byte_level()),
        tokenizer_class="GPT2Tokenizer",
        add_prefix_space=True,
    ),
}


def ids_of_transformers(folder: Path) -> list:
    from transformers import AutoTokenizer

    there = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in HUB_TEXTS:
        ids = there(text, add_special_tokens=False)["input_ids"]
        plain = there(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        rows.append([ids, plain, there.decode(ids, skip_special_tokens=True)])
    return rows


if __name__ == "__main__":
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for name, make in FOLDERS.items():
            found[name] = ids_of_transformers(make(Path(root, name)))
    lines = [
        f"{json.dumps(name)}: {json.dumps(rows, ensure_ascii=False, separators=(',', ':'))}"
        for name, rows in found.items()
    ]
    Path(sys.argv[1]).write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
