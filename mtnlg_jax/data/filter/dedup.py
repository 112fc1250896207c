"""Near-duplicates by MinHash LSH and exactly repeated paragraphs, in NumPy alone.

Documents are rows of arrays here. A stage computes `signatures` and `band_keys` shard by shard,
then, over all of the corpus or over one range of keys at a time, `candidates`, whose pairs it holds
to the exact `jaccard`; `components` and `keep` decide. Nothing depends on the order of the rows
where `ranks` says which document comes first.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mtnlg_jax.data.filter.shingles import MAX_WIDTH, Memory, shingle_hashes

_GROUP = 1 << 20  # characters that are worked on at a time
_BLOCK = 1 << 14  # shingles that are mapped at a time, so that they stay in the cache
_PRIME = np.uint64((1 << 61) - 1)


@dataclass(frozen=True)
class MinHashConfig:
    """``width`` characters a shingle (1 to 13), ``hashes`` a signature in ``bands`` equal bands.
    Two documents are duplicates from a Jaccard similarity of ``threshold`` on.

    The widths and counts are those of Megatron-Turing NLG, whose threshold lay between 0.7 and 0.9.
    Here it is 0.8: ten bands of ten find a pair of similarity s with 1 - (1 - s^10)^10, which is 25
    % at 0.7, 68 % at 0.8, 99 % at 0.9 and one half at 0.79, so that below 0.8 most pairs would go
    unseen anyway.

    ``scheme`` is datasketch's: "affine32" as of 2.0, or "legacy" for ((a x + b) mod (2^61 - 1)) mod
    2^32 as before, where a x + b wraps around at 2^64. Signatures of different schemes do not
    compare.
    """

    width: int = 5
    hashes: int = 100
    bands: int = 10
    threshold: float = 0.8
    seed: int = 1
    scheme: str = "affine32"

    def __post_init__(self):
        if not 1 <= self.width <= MAX_WIDTH:
            raise ValueError(f"width={self.width}: a shingle has 1 to {MAX_WIDTH} characters")
        if self.hashes < 1 or self.bands < 1 or self.hashes % self.bands:
            raise ValueError(
                f"hashes={self.hashes} do not fill bands={self.bands}; make one a multiple of the other"
            )
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} is no similarity; give one above 0 and up to 1"
            )
        if self.scheme not in ("affine32", "legacy"):
            raise ValueError(f"scheme={self.scheme!r} is not known; use 'affine32' or 'legacy'")


def signatures(texts: Sequence[str], config: MinHashConfig = MinHashConfig()) -> np.ndarray:  # noqa: B008
    """uint32 [texts, hashes], equal to ``datasketch.MinHash(num_perm, seed, scheme=scheme)`` after
    an update with the UTF-8 of each shingle: of every ``width`` characters in a row, or of the text
    itself where it is shorter.

    The signature of an empty text is 2^32 - 1 throughout. Raises ValueError for lone surrogates,
    which no UTF-8 has.
    """
    multipliers, addends = _permutations(config)
    result = np.full((len(texts), config.hashes), 2**32 - 1, np.uint32)
    memory = Memory(config.width)
    for numbers, pieces in _groups(texts, config.width):
        hashes, starts = _without_repeats(*shingle_hashes(pieces, config.width, memory))
        if config.scheme == "affine32":
            hashes = _murmur_finalizer(hashes)
        for first in range(0, len(hashes), _BLOCK):
            block = hashes[first : first + _BLOCK].astype(multipliers.dtype)
            # The pieces that lie in this block, the one that began before it included.
            low, high = np.searchsorted(starts, [first, first + len(block)], side="left")
            low -= low == len(starts) or starts[low] > first
            bounds = np.maximum(starts[low:high] - first, 0)
            least = np.empty((config.hashes, len(bounds)), np.uint32)
            mapped = np.empty_like(block)
            for number in range(config.hashes):
                np.multiply(block, multipliers[number], out=mapped)
                mapped += addends[number]
                if config.scheme == "legacy":
                    mapped = _modulo_prime(mapped) & np.uint64(2**32 - 1)
                least[number] = np.minimum.reduceat(mapped, bounds)
            rows = numbers[low:high]
            result[rows] = np.minimum(result[rows], least.T)
    return result


def _without_repeats(hashes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Long pieces repeat many of their shingles, and to sort them takes less time than to map them
    all."""
    parts = np.split(hashes, starts[1:])
    for number, part in enumerate(parts):
        if len(part) > _BLOCK // 2:
            part = np.sort(part)
            parts[number] = part[np.append(True, part[1:] != part[:-1])]
    sizes = np.array(list(map(len, parts)))
    return np.concatenate(parts), np.cumsum(sizes) - sizes


def _permutations(config: MinHashConfig) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers and addends [hashes] in the order in which datasketch draws them."""
    generator = np.random.RandomState(config.seed)
    if config.scheme == "legacy":
        draws = [
            (
                generator.randint(1, _PRIME, dtype=np.uint64),
                generator.randint(0, _PRIME, dtype=np.uint64),
            )
            for _ in range(config.hashes)
        ]
        return tuple(np.array(draws, np.uint64).T)
    odd = generator.randint(0, 1 << 31, config.hashes, dtype=np.uint32) * np.uint32(2) + np.uint32(
        1
    )
    return odd, generator.randint(0, 1 << 32, config.hashes, dtype=np.uint32)


def _modulo_prime(values: np.ndarray) -> np.ndarray:
    folded = (values & _PRIME) + (values >> np.uint64(61))
    return np.minimum(
        folded, folded - _PRIME
    )  # what lies below the prime wraps around to something larger


def _murmur_finalizer(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def _groups(texts: Sequence[str], width: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """(rows, pieces) of about a million characters. Long texts come in pieces that share width - 1
    characters, each in a group of its own, so that no row comes twice in one."""
    rows = []
    pieces = []
    size = 0
    for row, text in enumerate(texts):
        for start in range(0, max(len(text) - width + 1, min(len(text), 1)), _GROUP):
            piece = text[start : start + _GROUP + width - 1]
            if size + len(piece) > _GROUP and rows:
                yield np.array(rows), pieces
                rows = []
                pieces = []
                size = 0
            rows.append(row)
            pieces.append(piece)
            size += len(piece)
    if rows:
        yield np.array(rows), pieces


def band_keys(signatures: np.ndarray, bands: int) -> np.ndarray:
    """uint64 [n, bands]: a hash of each band of the signatures [n, hashes] and of its number, so
    that the keys of all bands may lie in one table. Documents that share a key agree, but for one
    chance in 2^64, on a whole band."""
    if signatures.shape[1] % bands:
        raise ValueError(
            f"{signatures.shape[1]} hashes do not fill {bands} bands; make one a multiple of the other"
        )
    rows = signatures.reshape(len(signatures), bands, -1)
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), rows.shape[:2]) * np.uint64(
        0x9E3779B97F4A7C15
    )
    for column in range(
        rows.shape[2]
    ):  # the finalizer of SplitMix64 (Steele 2014) after each value
        keys = keys + rows[:, :, column] + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys = keys ^ (keys >> np.uint64(31))
    return keys


def ranks(priority: Sequence[int], *place: Sequence) -> np.ndarray:
    """int64 [n]: 0 for the document that stays before all others, which is the one of the highest
    ``priority``, among those the one of the lowest ``place`` (one or more columns, the first counts
    most: file, line).

    Raises ValueError where two documents have the same place, as their order would be that of the
    input.
    """
    columns = [-np.asarray(priority, np.int64), *map(np.asarray, place)]
    order = np.lexsort(columns[::-1])
    equal = np.ones(max(len(order) - 1, 0), bool)
    for column in columns:
        equal &= column[order[1:]] == column[order[:-1]]
    if equal.any():
        row = order[np.argmax(equal)]
        raise ValueError(
            f"two documents have the place {[column[row].item() for column in columns[1:]]}; "
            "add a column that tells them apart"
        )
    result = np.empty(len(order), np.int64)
    result[order] = np.arange(len(order))
    return result


def candidates(keys: np.ndarray, rank: np.ndarray, window: int = 8) -> np.ndarray:
    """int64 [pairs, 2]: rows that share one of the ``keys`` [n, bands], the smaller row first,
    sorted, each pair once.

    Each member of a bucket is paired with the bucket's first by ``rank`` [n] and with the
    ``window`` members before
    it: with all up to buckets of window + 2, and with no more than window + 1 in larger ones, so
    that a boilerplate page of a million copies costs no square. The components of all candidates
    stay as they were; what is lost in large buckets is a pair that is similar while neither of the
    two is similar to any other member it was paired with.
    """
    found = []
    by_rank = np.argsort(rank, kind="stable")
    for column in keys.T:
        order = by_rank[np.argsort(column[by_rank], kind="stable")]
        values = column[order]
        opens = np.ones(len(order), bool)
        opens[1:] = values[1:] != values[:-1]
        heads = np.maximum.accumulate(np.where(opens, np.arange(len(order)), 0))
        members = np.flatnonzero(~opens)
        pairs = [np.stack([order[heads[members]], order[members]], 1)]
        for lag in range(1, window + 1):
            members = members[members - lag > heads[members]]
            pairs.append(np.stack([order[members - lag], order[members]], 1))
        found.append(_distinct(np.concatenate(pairs), len(rank)))
    return _distinct(np.concatenate(found), len(rank)) if found else np.zeros((0, 2), np.int64)


def _distinct(pairs: np.ndarray, n: int) -> np.ndarray:
    joined = np.unique(pairs.min(1) * n + pairs.max(1))
    return np.stack([joined // max(n, 1), joined % max(n, 1)], 1)


def shingles(text: str, width: int = 5) -> set[str]:
    """Every ``width`` characters in a row; the text itself where it is shorter, nothing of an empty
    one."""
    return {text[start : start + width] for start in range(max(len(text) - width + 1, 1))} - {""}


def jaccard(a: str, b: str, width: int = 5) -> float:
    """Shingles that both texts have over those that one has, 0 to 1; 1 for two empty texts."""
    ours = shingles(a, width)
    theirs = shingles(b, width)
    common = len(ours & theirs)
    return common / (len(ours) + len(theirs) - common) if ours or theirs else 1.0


def components(pairs: np.ndarray, n: int) -> np.ndarray:
    """int32 [n]: the number of each row's component, where ``pairs`` [m, 2] of rows belong
    together."""
    import scipy.sparse

    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    graph = scipy.sparse.coo_array(
        (np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n)
    )
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1]


def keep(components: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """bool [n]: true for the row of the lowest ``rank`` in each component."""
    return ~repeated(components, rank)


def repeated(values: np.ndarray, *order: Sequence) -> np.ndarray:
    """bool [n]: true for every occurrence of a value but its first by ``order`` (one or more
    columns [n], the first counts most). All occurrences of a value must be there, so a corpus may
    be cut by ranges of its values."""
    sort = np.lexsort([*map(np.asarray, order[::-1]), values])
    result = np.zeros(len(sort), bool)
    result[sort[1:]] = values[sort[1:]] == values[sort[:-1]]
    return result


_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_LINE_ENDS = re.compile(r"\n\s*")


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each paragraph with the space behind it."""
    start = 0
    for match in (_BLANK_LINES if _BLANK_LINES.search(text) else _LINE_ENDS).finditer(text):
        yield start, match.end()
        start = match.end()
    if start < len(text):
        yield start, len(text)


def _normalised(paragraph: str) -> str:
    return " ".join(paragraph.casefold().split())


def paragraph_hashes(text: str, min_length: int = 80) -> np.ndarray:
    """uint64 [paragraphs]: a hash of each paragraph that has ``min_length`` characters or more,
    regardless of case and of white space. Paragraphs end at blank lines; in a text without any,
    each line is one."""
    normal = (_normalised(text[start:end]) for start, end in _paragraphs(text))
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(paragraph.encode(), digest_size=8).digest(), "little")
            for paragraph in normal
            if len(paragraph) >= min_length
        ],
        np.uint64,
    )


def without_paragraphs(text: str, dropped: Sequence[bool], min_length: int = 80) -> str:
    """The text without those of its paragraphs that are true in ``dropped``, one flag for each of
    `paragraph_hashes`. All other characters stay as they are."""
    spans = list(_paragraphs(text))
    counted = [
        number
        for number, (start, end) in enumerate(spans)
        if len(_normalised(text[start:end])) >= min_length
    ]
    if len(counted) != len(dropped):
        raise ValueError(
            f"{len(dropped)} flags for {len(counted)} paragraphs of {min_length} characters or more; "
            "use the text and the min_length of paragraph_hashes"
        )
    gone = {number for number, flag in zip(counted, dropped, strict=True) if flag}
    return "".join(
        text[start:end] for number, (start, end) in enumerate(spans) if number not in gone
    )
