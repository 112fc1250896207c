"""Megatron's indexed data sets, byte for byte: PREFIX.bin, the tokens, and PREFIX.idx, their
documents.

PREFIX.idx, all little-endian (megatron/core/datasets/indexed_dataset.py):

    "MMIDIDX\\0\\0", uint64 1, uint8 dtype, uint64 sequences, uint64 documents + 1
    int32 length of each sequence, in tokens
    int64 start of each sequence, in bytes
    int64 number of the first sequence of each document, and the number of sequences

Multimodal sets end with a mode of each sequence (int8) and are refused. Megatron's documents end
with eos and have no bos.
"""

import functools
import hashlib
import math
import os
import struct
from pathlib import Path

import numpy as np

from mtnlg_jax import storage
from mtnlg_jax.data.store.offsets import Offsets
from mtnlg_jax.data.store.tokens import Tokens
from mtnlg_jax.data.tokenizer import Tokenizer

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_UINT16_BELOW = 65_500  # pieces; DType.optimal_dtype
_PIECE = 1 << 22  # tokens in memory at once
_LOOK = 1 << 18  # tokens checked at either end when a tokenizer is attached


def prefix_of(location: str | os.PathLike) -> str | None:
    """Return the prefix that a path names, with or without .bin or .idx; None if it is not a
    Megatron data set."""
    path = str(location).rstrip("/")
    stem, suffix = os.path.splitext(path)
    if suffix in (".bin", ".idx") and not os.path.isdir(path):
        return stem
    found = not storage.is_remote(path) and any(
        os.path.isfile(path + suffix) for suffix in (".idx", ".bin")
    )
    return path if found and not os.path.isdir(path) else None


def kept_documents(documents: int, heldout: float) -> int:
    """Return the number of documents to train on if a share of the last ones is held out; at least
    one, if there is any."""
    return documents - min(math.ceil(heldout * documents), max(0, documents - 1))


class MegatronTokens(Tokens):
    """`Tokens` of PREFIX.bin, mapped into memory. The files do not record their tokenizer: `attach`
    one.

    Documents may lack a bos, so the first token of each is not predicted.
    """

    def __init__(self, location: str, meta: dict, array: np.ndarray, offsets: Offsets):
        super().__init__(location, meta, array, offsets)
        self._tokenizer: Tokenizer | None = None

    def attach(self, tokenizer: Tokenizer) -> None:
        """Set the tokenizer: reading a token outside its vocabulary raises ValueError from now on.
        Checks the beginning and the end at once."""
        self._tokenizer = tokenizer
        self.meta |= {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
        for start in (0, max(0, len(self) - _LOOK)):
            self.read(start, min(start + _LOOK, len(self)))

    def begins_with(self, token: int) -> bool:
        """Whether the first documents, up to a hundred, all begin with ``token``."""
        for _, begins in self.blocks_of_offsets():
            opening = self._array[begins[:-1][np.diff(begins) > 0][:100]]
            return bool(opening.size) and bool((opening == token).all())
        return False

    @functools.cached_property
    def predicted(self) -> tuple[int, int]:
        """As in `Tokens`; reads all tokens. Raises ValueError without a tokenizer."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{self.location}: the bytes of its tokens are not known without the tokenizer "
                "that made them; attach it first"
            )
        sizes = np.array(
            [len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)]
        )
        count = len(self)
        size = 0
        for start in range(0, count, _PIECE):
            size += int(sizes[self.read(start, min(start + _PIECE, len(self)))].sum())
        for _, begins in self.blocks_of_offsets():
            opening = self._array[begins[:-1][np.diff(begins) > 0]]
            count = count - len(opening)
            size = size - int(sizes[opening].sum())
        return count, size

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        windows = np.empty((len(starts), length), self._array.dtype)
        for row, start in zip(windows, map(int, starts), strict=True):
            head = min(length, len(self) - start)
            row[:head] = self._array[start : start + head]
            row[head:] = self._array[: length - head]
        limit = self.meta["vocab_size"]
        if limit is not None and windows.size and not 0 <= windows.min() <= windows.max() < limit:
            wrong = windows[(windows < 0) | (windows >= limit)][0]
            raise ValueError(
                f"{self.location} holds token {wrong}, and the tokenizer's vocabulary ends at "
                f"{limit - 1}; give the one that made these files as data.tokenizer"
            )
        return windows


def open_megatron(
    location: str | os.PathLike, first: int = 0, last: int | None = None
) -> MegatronTokens:
    """Open documents [first, last) of PREFIX.bin and PREFIX.idx; without ``last`` up to the end.
    Reads only the ends of the index.

    Raises FileNotFoundError if a file is missing, ValueError if the files are damaged or hold
    something other than text.
    """
    prefix = prefix_of(location) or str(location)
    if storage.is_remote(prefix):
        raise ValueError(
            f"{prefix}: Megatron's files are mapped into memory; copy them to a local disk, or "
            "make token arrays of them with launch/convert_data.py"
        )
    for suffix, other in ((".idx", ".bin"), (".bin", ".idx")):
        if not os.path.isfile(prefix + suffix):
            raise FileNotFoundError(
                f"{prefix}{suffix} does not exist; a Megatron data set is that and {prefix}{other}"
            )
    damaged = functools.partial(_damaged, prefix)
    dtype, sequences, documents = _read_header(prefix, damaged)
    start = _HEADER.size
    lengths = _map(prefix + ".idx", "<i4", sequences, start)
    pointers = _map(prefix + ".idx", "<i8", sequences, start + 4 * sequences)
    firsts = _map(prefix + ".idx", "<i8", documents + 1, start + 12 * sequences)
    size = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
    if os.path.getsize(prefix + ".bin") != size:
        raise damaged(
            f"{prefix}.bin has {os.path.getsize(prefix + '.bin')} bytes, and the index requires "
            f"{size}"
        )
    if firsts[0] != 0 or firsts[-1] != sequences or (sequences and pointers[0] != 0):
        raise damaged(f"its documents are not those of {sequences} sequences from byte 0 on")

    def begins(start: int, stop: int) -> np.ndarray:
        """Return the first token of documents [start, stop), after a check of every sequence in
        between."""
        numbers = np.asarray(firsts[start:stop])
        if numbers.size and (
            numbers[0] < 0 or numbers[-1] > sequences or (np.diff(numbers) < 0).any()
        ):
            raise damaged(
                f"the sequences of documents {start} to {stop - 1} do not follow each other"
            )
        if not numbers.size:
            return numbers
        inside = slice(int(numbers[0]), int(numbers[-1]))
        ends = np.append(
            pointers[inside], pointers[inside.stop] if inside.stop < sequences else size
        )
        sizes = dtype.itemsize * lengths[inside].astype(np.int64)
        if (sizes < 0).any() or (np.diff(ends) != sizes).any() or ends[0] % dtype.itemsize:
            raise damaged(
                f"the sequences of documents {start} to {stop - 1} do not lie one after another"
            )
        return ends[numbers - inside.start] // dtype.itemsize

    last = documents if last is None else last
    base = int(begins(first, first + 1)[0])
    end = int(begins(last, last + 1)[0])
    offsets = Offsets(
        lambda start, stop: begins(first + start, first + stop) - base,
        last - first,
        end - base,
        damaged,
        least=0,
    )
    offsets.check_ends()
    meta = {
        "dtype": dtype.name,
        "tokens": end - base,
        "documents": last - first,
        "tokenizer": None,
        "vocab_size": None,
        "sha256": _fingerprint(prefix, first, last),
    }
    return MegatronTokens(
        prefix, meta, _map(prefix + ".bin", dtype, size // dtype.itemsize, 0)[base:end], offsets
    )


def write_megatron(tokens: Tokens, prefix: str | os.PathLike, overwrite: bool = False) -> None:
    """Write PREFIX.bin and PREFIX.idx with the same tokens, as megatron-core's
    `IndexedDatasetBuilder` does: a sequence for each document; uint16 below 65,500 pieces, else
    int32.

    Memory is bounded, and both files are put in place at the end. Raises FileExistsError if one
    exists and not ``overwrite``.
    """
    prefix = str(prefix).removesuffix(".idx").removesuffix(".bin")
    vocab_size = tokens.meta["vocab_size"]
    if vocab_size is None:
        raise ValueError(
            f"{tokens.location}: the vocabulary of the tokens is unknown; give their --tokenizer"
        )
    if tokens.conversations:
        raise ValueError(
            f"{tokens.location} holds conversations, and Megatron's files cannot say which tokens "
            "to train on; convert a data set of text"
        )
    if tokens.prompt_lengths is not None:
        raise ValueError(
            f"{tokens.location} holds pairs, and Megatron's files cannot say where an answer "
            "begins; convert them to .jsonl"
        )
    code = 8 if vocab_size < _UINT16_BELOW else 4
    dtype = np.dtype(_DTYPES[code])
    documents = tokens.documents
    for suffix in (".bin", ".idx"):
        if os.path.exists(prefix + suffix) and not overwrite:
            raise FileExistsError(
                f"{prefix}{suffix} exists; choose another prefix or replace it with --overwrite"
            )
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    beside = {suffix: f"{prefix}{suffix}.partial-{os.getpid()}" for suffix in (".bin", ".idx")}
    try:
        with open(beside[".bin"], "wb") as file:
            for start in range(0, len(tokens), _PIECE):
                file.write(
                    tokens.read(start, min(start + _PIECE, len(tokens))).astype(dtype).tobytes()
                )
            _sync(file)
        with open(beside[".idx"], "wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, code, documents, documents + 1))
            for number, begins in tokens.blocks_of_offsets():
                sizes = np.diff(begins)
                if sizes.max() >= 1 << 31:
                    raise ValueError(
                        f"document {number + sizes.argmax()} of {tokens.location} has "
                        f"{sizes.max()} tokens, and Megatron's index holds lengths up to "
                        f"{(1 << 31) - 1}; cut it"
                    )
                file.write(sizes.astype("<i4").tobytes())
            for _, begins in tokens.blocks_of_offsets():
                file.write((begins[:-1] * dtype.itemsize).astype("<i8").tobytes())
            for start in range(0, documents + 1, _PIECE):
                file.write(
                    np.arange(start, min(start + _PIECE, documents + 1), dtype="<i8").tobytes()
                )
            _sync(file)
        # The index last: a data set is opened by it.
        if overwrite:
            Path(prefix + ".idx").unlink(missing_ok=True)
        os.replace(beside[".bin"], prefix + ".bin")
        os.replace(beside[".idx"], prefix + ".idx")
    finally:
        for path in beside.values():
            Path(path).unlink(missing_ok=True)


def _read_header(prefix: str, damaged) -> tuple[np.dtype, int, int]:
    """Return (dtype, sequences, documents), after a check of the index size against them."""
    path = prefix + ".idx"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    if head[: len(_MAGIC)] != _MAGIC:
        raise damaged(f"{path} does not begin with MMIDIDX, so it is not a Megatron index")
    if len(head) < _HEADER.size:
        raise damaged(f"{path} ends after {len(head)} bytes, inside its header")
    _, version, code, sequences, documents = _HEADER.unpack(head)
    if version != 1:
        raise damaged(f"{path} has version {version}; only version 1 is supported")
    if code in _FLOATS:
        raise ValueError(
            f"{prefix} holds {_FLOATS[code]}, not tokens; give what Megatron's preprocess_data.py "
            "made"
        )
    if code not in _DTYPES:
        raise damaged(f"{path} names dtype {code}; Megatron's codes are 1 to 8")
    wanted = _HEADER.size + 12 * sequences + 8 * documents
    if sequences and size == wanted + sequences:
        raise ValueError(
            f"{prefix} is multimodal (each sequence has a mode), and the model reads text alone; "
            "make it again without modes"
        )
    if not documents or size != wanted:
        raise damaged(
            f"{path} has {size} bytes, and {sequences} sequences in {documents - 1} documents "
            f"take {wanted}"
        )
    return np.dtype(_DTYPES[code]), sequences, documents - 1


def _map(path: str, dtype: str | np.dtype, count: int, offset: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)


def _fingerprint(prefix: str, first: int, last: int) -> str:
    """Return the sha256 of both sizes, the chosen documents, and the first, middle and last MiB of
    both files: reading a whole corpus would take hours."""
    digest = hashlib.sha256(f"{first} {last}".encode())
    part = 1 << 20
    for suffix in (".idx", ".bin"):
        size = os.path.getsize(prefix + suffix)
        digest.update(f" {size} ".encode())
        with open(prefix + suffix, "rb") as file:
            for start in (0, (size - part) // 2, size - part):
                file.seek(max(0, start))
                digest.update(file.read(part))
    return digest.hexdigest()


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _damaged(prefix: str, reason: str) -> ValueError:
    return ValueError(f"{prefix} is damaged: {reason}; copy or make it again")
