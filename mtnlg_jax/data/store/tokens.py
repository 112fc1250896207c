"""Token arrays: documents as <bos> text <eos>, one after another, in TensorStore zarr arrays.

A prepared data set is a folder (or a URL below gs://, s3://):

    prepared.json   fingerprint, settings and counts (`mtnlg_jax.data.store.prepared`); written last
    tokenizer/      for `load_tokenizer`
    train/          tokens (uint16, or uint32 above 65,536 pieces), document_offsets (int64,
                    documents + 1), meta.json; of pairs also prompt_lengths (int64, documents), of
                    conversations answers (uint8, 1 on the tokens to train on)
    heldout/        the same; of several sources meta.json has ``sources``, [[name, tokens], ...]

Each document begins with bos and ends with eos even if both are one token, such as <|endoftext|> in
GPT-2: attention does not leave the document, so its first word must be predicted from something.
(Megatron's own files have only the eos.) A conversation has what its chat template writes instead.
"""

import functools
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore

from mtnlg_jax import errors, storage
from mtnlg_jax.data.store.offsets import Offsets
from mtnlg_jax.data.store.zarr import CHUNK, SHARD, create_array, open_array

_AGAIN = "prepare the data again (launch/prepare_data.py --overwrite)"


class TokenWriter:
    """Stream documents into ``tokens``, ``document_offsets`` and ``meta.json`` below a folder or a
    URL.

    Holds one shard and 8 bytes a document in memory. Nothing can be opened before `finish`.
    """

    def __init__(
        self,
        location: str | os.PathLike,
        vocab_size: int,
        tokenizer_fingerprint: str,
        seed: int = 0,
    ):
        self._location = location
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer_fingerprint
        self._seed = seed
        self._array = create_tokens(location, vocab_size)
        self._buffer = np.empty(SHARD, token_dtype(vocab_size))
        self._filled = 0
        self._shards = 0
        self._lengths = array("q")  # tokens of each document
        self._begun = 0  # tokens of a document that goes on
        self._bytes = 0
        self._prompts = array("q")
        self._prompt_bytes = 0
        # Of conversations: which tokens are trained on, as written and as waiting.
        self._answers: tensorstore.TensorStore | None = None
        self._answer_buffer = np.empty(0, np.uint8)
        self._answer_tokens = 0
        self._answer_bytes = 0
        self._digest = hashlib.sha256()

    def add(
        self,
        tokens: np.ndarray,
        text_bytes: int,
        prompt: tuple[int, int] | None = None,
        continued: bool = False,
        answers: tuple[np.ndarray, int] | None = None,
    ) -> None:
        """Append one document, with its bos and eos.

        ``text_bytes`` is the length of its text as UTF-8. ``prompt`` is (tokens with bos, bytes) of
        a pair's prompt. ``continued``: this is a piece of a document that goes on with the next
        call. ``answers`` is (which tokens of a conversation to train on, bytes of these). All
        documents are pairs, all are conversations, or none.
        """
        tokens = np.asarray(tokens)
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise ValueError(
                f"document {len(self._lengths)} is empty or has tokens outside the "
                f"vocabulary of {self._vocab_size}"
            )
        self._begun += tokens.size
        if not continued:
            self._lengths.append(self._begun)
            self._begun = 0
        self._bytes += text_bytes
        if prompt is not None:
            self._prompts.append(prompt[0])
            self._prompt_bytes += prompt[1]
        trained = None
        if answers is not None:
            trained = answers[0].astype(np.uint8)
            self._answer_tokens += int(trained.sum())
            self._answer_bytes += answers[1]
            if self._answers is None:
                self._answers = create_array(
                    storage.join(self._location, "answers"), np.dtype(np.uint8)
                )
                self._answer_buffer = np.empty(SHARD, np.uint8)
        while tokens.size:
            part = tokens[: SHARD - self._filled]
            place = slice(self._filled, self._filled + part.size)
            self._buffer[place] = part
            if trained is not None:
                self._answer_buffer[place] = trained[: part.size]
                trained = trained[part.size :]
            self._filled += part.size
            tokens = tokens[part.size :]
            if self._filled == SHARD:
                self._flush()

    def finish(self, prefix: dict | None = None) -> dict:
        """Write the rest and, last, meta.json, with what `write_prefixes` returned; return it."""
        tokens = self._shards * SHARD + self._filled
        self._flush()
        lengths = np.frombuffer(self._lengths, np.int64)
        write_offsets(self._location, [lengths], len(lengths), self._digest)
        counts: dict[str, Any] = {"tokens": tokens, "documents": len(lengths)}
        counts["bytes"] = self._bytes
        if self._answers is not None:
            counts |= {
                "answer_tokens": self._answer_tokens,
                "answer_bytes": self._answer_bytes,
                "conversations": True,
            }
        if self._prompts:
            prompts = np.array(self._prompts, "<i8")
            stored = create_array(
                storage.join(self._location, "prompt_lengths"), prompts.dtype, prompts.size
            )
            stored.write(prompts).result()
            self._digest.update(prompts.tobytes())
            counts |= {
                "answer_tokens": tokens - int(prompts.sum()),  # with their eos
                "answer_bytes": self._bytes - self._prompt_bytes,
            }
        if prefix is not None:
            counts["prefix"] = prefix
            self._digest.update(prefix["sha256"].encode())
        digest = self._digest.hexdigest()
        meta = token_meta(self._vocab_size, self._tokenizer, self._seed, counts, digest)
        write_meta(self._location, meta)
        return meta

    def _flush(self) -> None:
        if self._filled:
            part = self._buffer[: self._filled]
            self._array = write_shard(self._array, self._shards, part)
            self._digest.update(part.tobytes())
            if self._answers is not None:
                trained = self._answer_buffer[: self._filled]
                self._answers = write_shard(self._answers, self._shards, trained)
                self._digest.update(trained.tobytes())
            self._shards += 1
            self._filled = 0


def create_tokens(
    location: str | os.PathLike, vocab_size: int, tokens: int = 0
) -> tensorstore.TensorStore:
    """Create the array of ``tokens`` tokens below ``location``; `write_shard` fills it. An earlier
    array is removed."""
    return create_array(storage.join(location, "tokens"), token_dtype(vocab_size), tokens)


def open_for_writing(location: str | os.PathLike) -> tensorstore.TensorStore:
    """Open what `create_tokens` created, in any process."""
    return open_array(storage.join(location, "tokens"), write=True)


def write_shard(
    stored: tensorstore.TensorStore, number: int, tokens: np.ndarray
) -> tensorstore.TensorStore:
    """Write one file: the tokens from ``number * SHARD`` on, `SHARD` of them or the last ones.

    Shards of an array of the final size may come from any process in any order. Returns the array,
    grown if it was too short.
    """
    start = number * SHARD
    stop = start + len(tokens)
    if stop > stored.shape[0]:
        # Growing rewrites only the metadata: a stream has no known length before its end.
        stored = stored.resize(
            exclusive_max=[stop], expand_only=True, resize_metadata_only=True
        ).result()
    stored[start:stop].write(tokens).result()
    return stored


def write_offsets(
    location: str | os.PathLike,
    lengths: Iterable[np.ndarray],
    documents: int,
    digest: "hashlib._Hash | None" = None,
) -> None:
    """Write document_offsets from the lengths of all documents in order, some at a time.

    ``digest`` is updated with the offsets. Memory: one file of them (128 MB).
    """
    # In small chunks: a window needs the offsets around one position, and these are four times as
    # wide as tokens.
    stored = create_array(
        storage.join(location, "document_offsets"), np.dtype("<i8"), documents + 1, CHUNK >> 4
    )
    block = np.zeros(min(SHARD, documents + 1), "<i8")
    filled = 1  # the first offset is 0
    first = 0
    end = 0

    def flush() -> None:
        # Whole files, one after another: part of a file would be read and written again.
        stored[first : first + filled].write(block[:filled]).result()
        if digest is not None:
            digest.update(block[:filled])

    for values in lengths:
        while len(values):
            if filled == len(block):
                flush()
                first += filled
                filled = 0
            part = values[: len(block) - filled]
            target = block[filled : filled + len(part)]
            np.cumsum(part, dtype=np.int64, out=target)
            target += end
            end = int(target[-1])
            filled += len(part)
            values = values[len(part) :]
    flush()


def token_meta(
    vocab_size: int,
    tokenizer_fingerprint: str,
    seed: int,
    counts: Mapping[str, Any],
    sha256: str,
) -> dict:
    """Return the content of meta.json; ``counts`` holds tokens, documents, bytes, and of pairs and
    conversations answer_tokens and answer_bytes."""
    common = ("tokens", "documents", "bytes")
    return {
        "dtype": token_dtype(vocab_size).name,
        **{key: counts[key] for key in common},
        "vocab_size": vocab_size,
        "tokenizer": tokenizer_fingerprint,
        "seed": seed,
        **{key: count for key, count in counts.items() if key not in common},
        "sha256": sha256,
    }


def write_meta(location: str | os.PathLike, meta: dict) -> None:
    """Write meta.json, which makes the tokens below ``location`` openable: the last of all."""
    storage.write_file(location, "meta.json", json.dumps(meta, indent=1).encode())


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Tokens:
    """The tokens of one part (train or heldout), from `open_stored`. ``len`` counts tokens.

    ``prompt_lengths`` [documents] int64: tokens of each pair before its answer; None for plain
    text and for conversations. ``prefixes``: images or features of the documents (`Prefixes`).
    """

    prefixes: Any = None

    def __init__(
        self,
        location: str,
        meta: dict,
        array: tensorstore.TensorStore | np.ndarray,
        offsets: Offsets,
        prompt_lengths: np.ndarray | None = None,
        answers: tensorstore.TensorStore | None = None,
    ):
        self.location = location
        self.meta = meta
        self.prompt_lengths = prompt_lengths
        self._answers: Any = answers
        self._array: Any = array  # a TensorStore here; a subclass may hold a numpy array
        self._offsets = offsets

    def __len__(self) -> int:
        return self.meta["tokens"]

    @property
    def conversations(self) -> bool:
        """Whether the documents are conversations."""
        return self._answers is not None

    @property
    def answers_only(self) -> bool:
        """Whether only answers are trained on: those of pairs or of conversations."""
        return self.conversations or self.prompt_lengths is not None

    @property
    def documents(self) -> int:
        return self.meta["documents"]

    @functools.cached_property
    def document_offsets(self) -> np.ndarray:
        """[documents + 1] int64: document i is tokens ``offsets[i]`` to ``offsets[i + 1]``. Reads
        all offsets."""
        return self._offsets.all()

    def document_of(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return int64 (document, its first token) of each token of ``positions``; reads only the
        offsets it needs."""
        return self._offsets.find(positions)

    def blocks_of_offsets(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first document, offsets of some documents and of their end) for all: a pass in
        little memory."""
        return self._offsets.blocks()

    @property
    def predicted(self) -> tuple[int, int]:
        """The number of tokens to predict, and of UTF-8 bytes they encode: all but bos, or the
        answers of pairs and conversations."""
        if self.answers_only:
            return self.meta["answer_tokens"], self.meta["answer_bytes"]
        return self.meta["tokens"] - self.meta["documents"], self.meta["bytes"]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop), of the dtype on disk; 0 <= start <= stop <= len."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(
                f"tokens {start} to {stop} were asked for, {self.location} has {len(self)}"
            )
        return self.read_windows(np.array([start]), stop - start)[0]

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return [n, length] tokens from each start; the first token follows the last."""
        return self._read_windows(self._array, starts, length, self.meta["dtype"])

    def read_answers(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return [n, length] of the tokens of `read_windows`: 1 where a conversation is trained
        on."""
        return self._read_windows(self._answers, starts, length, "uint8")

    def _read_windows(self, stored: Any, starts: np.ndarray, length: int, dtype: str) -> np.ndarray:
        windows = np.empty((len(starts), length), dtype)
        pending = []  # start all reads before waiting for the first
        for row, start in zip(windows, map(int, starts), strict=True):
            head = min(length, len(self) - start)
            pending.append((row[:head], stored[start : start + head].read()))
            if head < length:
                pending.append((row[head:], stored[: length - head].read()))
        try:
            for target, future in pending:
                target[:] = future.result()
        except ValueError as error:
            raise _unreadable(self.location, error) from None
        return windows


def open_stored(location: str | os.PathLike) -> Tokens:
    """Open the tokens in a folder (path or URL) such as ``OUT/train``.

    Raises FileNotFoundError if nothing was prepared, ValueError if something is damaged or missing.
    """
    location = str(location).rstrip("/")
    content = storage.read_file(location, "meta.json")
    if content is None:
        if storage.exists(storage.join(location, "train"), "meta.json"):
            raise FileNotFoundError(
                f"{location} is a whole data set: give {location}/train, or its heldout folder"
            )
        if not storage.is_remote(location) and not os.path.exists(location):
            raise FileNotFoundError(storage.missing(location))
        raise FileNotFoundError(
            f"{location} holds no tokens (no meta.json): give the train or heldout "
            "folder of what launch/prepare_data.py wrote, or the prefix of Megatron's .bin and "
            ".idx"
        )
    try:
        meta = json.loads(content)
        tokens = meta["tokens"]
        documents = meta["documents"]
        dtype = meta["dtype"]
        stored = open_array(storage.join(location, "tokens"))
        offsets = open_array(storage.join(location, "document_offsets"))
        prompts = None
        answers = None
        if meta.get("conversations"):
            answers = open_array(storage.join(location, "answers"))
        elif "answer_tokens" in meta:
            prompts = open_array(storage.join(location, "prompt_lengths")).read().result()
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(location, error) from None
    if stored.shape != (tokens,) or stored.dtype.name != dtype:
        raise damaged(
            location,
            f"it holds {stored.shape[0]} tokens of {stored.dtype.name}, meta.json says "
            f"{tokens} of {dtype}",
        )
    if answers is not None and answers.shape != stored.shape:
        raise damaged(location, f"answers do not fit {tokens} tokens")
    if offsets.shape != (documents + 1,):
        raise damaged(
            location, f"document_offsets do not divide {tokens} tokens into {documents} documents"
        )

    def read(first: int, stop: int) -> np.ndarray:
        try:
            return offsets[first:stop].read().result()
        except ValueError as error:
            raise _unreadable(location, error) from None

    opened = Tokens(
        location,
        meta,
        stored,
        Offsets(read, documents, tokens, functools.partial(damaged, location)),
        prompts,
        answers,
    )
    opened._offsets.check_ends()
    if prompts is not None and (
        prompts.shape != (documents,)
        or not ((0 < prompts) & (prompts < np.diff(opened.document_offsets))).all()
    ):
        raise damaged(location, f"prompt_lengths do not fit {documents} documents")
    return opened


def _unreadable(location: str | os.PathLike, error: Exception) -> Exception:
    """Return the error of a failed read: damage, unless a retry may succeed."""
    if errors.is_passing(error):
        return errors.PassingError(f"{location} could not be read: {storage.first_line(error)}")
    return damaged(location, storage.first_line(error))


def damaged(location: str | os.PathLike, reason: str) -> ValueError:
    """Return the error of a damaged data set."""
    return ValueError(f"{location} is damaged: {reason}; {_AGAIN}")
