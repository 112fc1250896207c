"""Convert token arrays to Megatron's files and back, and either to JSON lines of text."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mtnlg_jax import storage
from mtnlg_jax.data.output import check_output, new_folder
from mtnlg_jax.data.store.megatron import (
    MegatronTokens,
    kept_documents,
    open_megatron,
    prefix_of,
    write_megatron,
)
from mtnlg_jax.data.store.prepared import PREPARED, prepared_info, tokenizer_info, write_prepared
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import Tokens, TokenWriter
from mtnlg_jax.data.tokenizer import Tokenizer, tokenizer_for_data

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

HELDOUT = 0.01  # share of the documents
_PIECE = 1 << 22  # tokens read at once, or one document
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def convert(
    source: str,
    target: str,
    tokenizer: str = "",
    heldout: float | None = None,
    overwrite: bool = False,
) -> str:
    """Convert ``source`` to ``target``, and return a line that describes the result.

    ``source`` is a folder of token arrays (OUT/train) or a Megatron prefix. A target named .jsonl
    (.gz, .zst) gets the text of each document, {"text": ...}, or of pairs {"prompt": ...,
    "answer": ...}. Otherwise arrays become Megatron's files, token by token, and Megatron's files
    become a prepared folder: missing bos and eos are added to each document, and the last
    documents, a share of ``heldout`` (0 to 0.5; None: HELDOUT), are held out. ``tokenizer`` is a
    folder; that of arrays is next to them.

    The target is written completely or not at all. Raises ValueError (also for an argument that has
    no use in this direction), FileNotFoundError or FileExistsError (the target exists and not
    ``overwrite``) before any work.
    """
    if heldout is not None and not 0 <= heldout <= 0.5:
        raise ValueError(f"--heldout={heldout:g} must be in 0 to 0.5")
    if storage.is_remote(target):
        raise ValueError(f"{target} is a URL; convert to a local path and copy that")
    if prefix_of(target) and prefix_of(target) == prefix_of(source):
        raise ValueError(f"{target} is the source itself; choose another --to")
    tokens = open_tokens(source)
    if tokens.prefixes is not None:
        raise ValueError(
            f"{source} has images or features ahead of its tokens, which neither Megatron's files "
            "nor lines of text hold; train from it as it is"
        )
    lines = target.lower().endswith(_LINES)
    to_arrays = isinstance(tokens, MegatronTokens) and not lines
    if heldout is not None and not to_arrays:
        raise ValueError(
            f"--heldout={heldout:g} is for Megatron's files that become a prepared folder; "
            f"{target} is {'text' if lines else 'a prefix of them'}, so leave it out"
        )
    if isinstance(tokens, MegatronTokens) or lines:
        found = _tokenizer_of(tokens, source, tokenizer)
    elif tokenizer:
        raise ValueError(
            f"--tokenizer={tokenizer} is for text or a prepared folder; {target} becomes "
            "Megatron's files, which hold the same tokens and no tokenizer, so leave it out"
        )
    if lines:
        return write_lines(tokens, target, found, overwrite)
    if isinstance(tokens, MegatronTokens):
        return write_arrays(
            tokens, target, found, HELDOUT if heldout is None else heldout, overwrite
        )
    write_megatron(tokens, target, overwrite)
    return f"{prefix_of(target)}.bin, .idx: {tokens.documents:,} documents, {len(tokens):,} tokens"


def write_lines(tokens: Tokens, target: str, tokenizer: Tokenizer, overwrite: bool = False) -> str:
    """Write the text of each document as a line of JSON. Special tokens are removed; invalid
    characters become U+FFFD."""
    if tokens.conversations:
        raise ValueError(
            f"{tokens.location} holds conversations, whose turns cannot be read back from their "
            "tokens; use the rows that they were prepared from"
        )
    if os.path.exists(target) and not overwrite:
        raise FileExistsError(
            f"{target} exists; choose another --to or replace it with --overwrite"
        )
    count = 0
    beside = f"{target}.partial-{os.getpid()}"
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        with _open_lines(beside, target) as file:
            for count, ids in enumerate(documents_of(tokens), 1):
                if tokens.prompt_lengths is None:
                    row = {"text": tokenizer.decode(ids)}
                else:
                    asked = tokens.prompt_lengths[count - 1]
                    row = {
                        "prompt": tokenizer.decode(ids[:asked]),
                        "answer": tokenizer.decode(ids[asked:]),
                    }
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        os.replace(beside, target)
    finally:
        Path(beside).unlink(missing_ok=True)
    return f"{target}: {count:,} documents, {os.path.getsize(target):,} bytes"


def write_arrays(
    tokens: MegatronTokens,
    target: str,
    tokenizer: Tokenizer,
    heldout: float = HELDOUT,
    overwrite: bool = False,
) -> str:
    """Write a prepared folder, as `prepare` does, from Megatron's files."""
    target = target.rstrip("/")
    check_output(target, PREPARED, overwrite=overwrite, flag="--to")
    kept = kept_documents(tokens.documents, heldout)
    tokenizer.check_end()
    with new_folder(target, overwrite) as (work, _):
        tokenizer.save(storage.join(work, "tokenizer"))
        train = _write_part(tokens.location, 0, kept, tokenizer, storage.join(work, "train"))
        held = _write_part(
            tokens.location, kept, tokens.documents, tokenizer, storage.join(work, "heldout")
        )
        settings = {"input": tokens.location, "heldout": heldout}
        info = prepared_info(tokenizer_info(tokenizer), train, held, settings=settings)
        # The fingerprint is that of Megatron's files: the two hold the same data.
        write_prepared(work, info | {"fingerprint": tokens.meta["sha256"]})
    return (
        f"{target}: {train['documents']:,} documents to train on, {held['documents']:,} held out, "
        f"{train['tokens'] + held['tokens']:,} tokens"
    )


def _write_part(location: str, first: int, last: int, tokenizer: Tokenizer, target: str) -> dict:
    """Write documents [first, last) of Megatron's files with bos and eos, and return their
    meta.json."""
    sizes = np.array([len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)])
    chosen = open_megatron(location, first, last)
    chosen.attach(tokenizer)
    writer = TokenWriter(target, tokenizer.vocab_size, tokenizer.fingerprint)
    for ids in documents_of(chosen):
        if not ids.size or ids[0] != tokenizer.bos_id:
            ids = np.append(tokenizer.bos_id, ids)
        if ids.size == 1 or ids[-1] != tokenizer.eos_id:
            ids = np.append(ids, tokenizer.eos_id)
        writer.add(ids, int(sizes[ids].sum()))
    return writer.finish()


def documents_of(tokens: Tokens) -> Iterator[np.ndarray]:
    """Yield the tokens of each document. Memory holds some millions of tokens, or the longest
    document."""
    for _, begins in tokens.blocks_of_offsets():
        first = 0
        while first < len(begins) - 1:
            last = max(
                first + 1, int(np.searchsorted(begins, begins[first] + _PIECE, side="right")) - 1
            )
            piece = tokens.read(begins[first], begins[last])
            yield from np.split(piece, begins[first + 1 : last] - begins[first])
            first = last


def _tokenizer_of(tokens: Tokens, source: str, named: str) -> Tokenizer:
    if not named and isinstance(tokens, MegatronTokens):
        raise ValueError(
            f"{source} is a Megatron data set, which does not hold its tokenizer; give "
            "--tokenizer=FOLDER"
        )
    found = tokenizer_for_data(
        named or storage.join(os.path.dirname(source.rstrip("/")), "tokenizer")
    )
    if isinstance(tokens, MegatronTokens):
        tokens.attach(found)
    elif found.fingerprint != tokens.meta["tokenizer"]:
        raise ValueError(
            f"{source} was tokenized with another tokenizer ({tokens.meta['tokenizer'][:12]}) than "
            f"{named or 'the one beside it'} ({found.fingerprint[:12]}); give the one that made it"
        )
    return found


@contextlib.contextmanager
def _open_lines(path: str, target: str) -> Iterator["SupportsWrite[bytes]"]:
    """Open a file of bytes, compressed according to the name ``target``."""
    with open(path, "wb") as raw, contextlib.ExitStack() as stack:
        file: SupportsWrite[bytes] = raw
        if target.lower().endswith(".gz"):
            import gzip

            # Without a time stamp, so that equal texts give equal bytes.
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        elif target.lower().endswith(".zst"):
            import zstandard

            file = stack.enter_context(
                zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False)
            )
        yield file
