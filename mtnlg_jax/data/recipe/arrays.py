"""Tasks of the stage "tokens": the tokenizer, the tokens of each shard, and the zarr shards of the
arrays of each source."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from mtnlg_jax import storage
from mtnlg_jax.data.batches import permute
from mtnlg_jax.data.canaries import interleaved, places
from mtnlg_jax.data.encode import encode_texts
from mtnlg_jax.data.heldout import split_text
from mtnlg_jax.data.recipe.stages import Folder, Shard, Task
from mtnlg_jax.data.recipe.texts import load, save
from mtnlg_jax.data.store.tokens import (
    SHARD,
    create_tokens,
    open_for_writing,
    token_dtype,
    token_meta,
    write_meta,
    write_offsets,
    write_shard,
)
from mtnlg_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

PARTS = ("train", "heldout")
# If there are fewer, hold out the ends of the long ones: whole ones would be too large a share.
_FEW_DOCUMENTS = 1000
# Bytes from which SentencePiece draws its 20 MB: only some shards of a large corpus are read.
_TRAINING_TEXT = 200_000_000


def tokenizer_task(
    shards: list[Shard], kind: str, vocab_size: int, heldout: float, seed: int
) -> Task:
    """Return the task that trains a tokenizer of ``kind`` ("bpe", "unigram") on the training part,
    or copies the one at the path ``kind``."""
    if kind not in ("bpe", "unigram"):
        ready = load_tokenizer(kind)
        return Task("stages/tokenizer/task", _bring, (kind,), (ready.fingerprint,))
    shards = [shards[number] for number in _order(len(shards), seed)]
    return Task(
        "stages/tokenizer/task",
        _train,
        (shards, _tails(shards), kind, vocab_size, heldout, seed),
        ([shard.key for shard in shards], kind, vocab_size, heldout, seed),
    )


def encode_tasks(
    shards: list[Shard],
    tokenizer: str,
    fingerprint: str,
    heldout: float,
    seed: int,
    planted: list[tuple[str, ...]],
) -> list[Task]:
    """Return a task for each shard, which shuffles its documents, splits off the held-out part and
    encodes both. ``tokenizer`` is its folder or URL. ``planted``: for each shard, the canaries that
    join its training part."""
    tails = _tails(shards)
    return [
        Task(
            "stages/encode/" + shard.base,
            _encode,
            (shard, tokenizer, fingerprint, heldout, tails, seed, more),
            # Without canaries the key is that of data made before there were any.
            (shard.key, fingerprint, heldout, tails, seed, *([more] if more else [])),
        )
        for shard, more in zip(shards, planted, strict=True)
    ]


def array_tasks(
    encoded: list[Task], results: list[dict], place: str, part: str, seed: int, tokenizer: Tokenizer
) -> tuple[Task, list[Task]]:
    """Return the tasks that write the results of `encode_tasks` to ``place`` (sources/NAME/train,
    heldout): one that must run first, and one for each 16.8 million tokens."""
    order = _order(len(encoded), seed)
    found = [results[number][part] for number in order]
    blobs = [
        (encoded[number].name, result["tokens"])
        for number, result in zip(order, found, strict=True)
    ]
    depends = ([result["sha256"] for result in found], part, tokenizer.fingerprint, seed)
    counts = {
        what: sum(result[what] for result in found) for what in ("tokens", "documents", "bytes")
    }
    # A hash of the hashes of all shards: nobody reads the tokens again to hash them.
    sha256 = hashlib.sha256(repr(depends).encode()).hexdigest()
    meta = token_meta(tokenizer.vocab_size, tokenizer.fingerprint, seed, counts, sha256)
    name = "stages/arrays/" + place.replace("/", "-")
    first = Task(name, _frame, (place, part, blobs, meta), depends)
    return first, [
        Task(f"{name}-{number:06d}", _shard, (place, part, blobs, number), (first.key, number))
        for number in range(-(-counts["tokens"] // SHARD))
    ]


def _order(count: int, seed: int) -> np.ndarray:
    return (
        permute(np.arange(count), count, np.uint64(seed & (1 << 64) - 1)) if count else np.arange(0)
    )


def _tails(shards: list[Shard]) -> bool:
    """Whether ends are held out, in all sources or none: otherwise copies of a text could be on
    both sides."""
    return sum(shard.documents for shard in shards) < _FEW_DOCUMENTS


def _bring(folder: Folder, name: str, kind: str) -> dict:
    return _save(folder, load_tokenizer(kind))


def _train(
    folder: Folder,
    name: str,
    shards: list[Shard],
    tails: bool,
    kind: str,
    vocab_size: int,
    heldout: float,
    seed: int,
) -> dict:
    return _save(
        folder,
        train_tokenizer(
            _training_texts(folder, shards, tails, heldout, seed), vocab_size, kind, seed
        ),
    )


def _training_texts(
    folder: Folder, shards: list[Shard], tails: bool, heldout: float, seed: int
) -> Iterator[str]:
    size = 0
    for shard in shards:
        for row in folder.rows(shard):
            if text := split_text(row.text, heldout, tails, seed)[0]:
                size += len(text.encode())
                yield text
        if size > _TRAINING_TEXT:
            return


def _save(folder: Folder, tokenizer: Tokenizer) -> dict:
    # Files of another kind of tokenizer would be taken for those of this one.
    for old in storage.list_files(folder.root, "tokenizer"):
        storage.remove_file(folder.root, old)
    for file, content in tokenizer.files().items():
        folder.write(f"tokenizer/{file}", content)
    return {
        "kind": tokenizer.kind,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
    }


@lru_cache(maxsize=1)  # kept by a process from task to task
def _tokenizer(place: str, fingerprint: str) -> Tokenizer:
    return load_tokenizer(place)


def _encode(
    folder: Folder,
    name: str,
    shard: Shard,
    place: str,
    fingerprint: str,
    heldout: float,
    tail: bool,
    seed: int,
    planted: tuple[str, ...] = (),
) -> dict:
    tokenizer = _tokenizer(place, fingerprint)
    rows = folder.rows(shard)
    split = [
        split_text(rows[number].text, heldout, tail, seed) for number in _order(len(rows), seed)
    ]
    result = {}
    for part, pieces in zip(PARTS, zip(*split, strict=True), strict=True):
        texts = [text for text in pieces if text]
        if part == "train" and planted:
            number = int.from_bytes(hashlib.sha256(shard.base.encode()).digest()[:4], "little")
            at = places(len(planted), len(texts), seed, number)
            texts = [*interleaved(texts, planted, at)]
        encoded = list(encode_texts(tokenizer, texts))
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        tokens = np.concatenate([np.empty(0, token_dtype(tokenizer.vocab_size)), *encoded])
        save(folder, f"{name}.{part}.tokens", tokens)
        save(folder, f"{name}.{part}.lengths", lengths)
        digest = hashlib.sha256(lengths.tobytes() + tokens.tobytes()).hexdigest()
        result[part] = {
            "tokens": tokens.size,
            "documents": len(texts),
            "bytes": sum(len(t.encode()) for t in texts),
            "sha256": digest,
        }
    return result


def _frame(
    folder: Folder, name: str, place: str, part: str, blobs: list[tuple], meta: dict
) -> dict:
    location = storage.join(folder.root, place)
    create_tokens(location, meta["vocab_size"], meta["tokens"])
    lengths = (load(folder, f"{encoded}.{part}.lengths") for encoded, _ in blobs)
    write_offsets(location, lengths, meta["documents"])
    write_meta(location, meta)
    folder.note(f"{place}/meta.json")
    return meta


def _shard(
    folder: Folder, name: str, place: str, part: str, blobs: list[tuple], number: int
) -> dict:
    low = number * SHARD
    high = (number + 1) * SHARD
    start = 0
    pieces = []
    for blob, count in blobs:
        if start < high and start + count > low:
            tokens = load(folder, f"{blob}.{part}.tokens")
            pieces.append(tokens[max(0, low - start) : high - start])
        start += count
    stored = open_for_writing(storage.join(folder.root, place))
    write_shard(stored, number, np.concatenate(pieces))
    folder.note(f"{place}/tokens/c/{number}")
    return {}
