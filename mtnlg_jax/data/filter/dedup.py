"""Near-duplicates by MinHash LSH, and exactly repeated paragraphs, with NumPy only.

Documents are rows of arrays here. A stage computes `signatures` and `band_keys` shard by shard.
Then, over the whole corpus or one range of keys at a time, it computes `candidates` and verifies
their pairs with the exact `jaccard`. `components` and `keep` decide. The result does not depend on
the order of the rows if `ranks` defines which document comes first.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mtnlg_jax.data.filter.shingles import MAX_WIDTH, Memory, shingle_hashes

_GROUP = 1 << 20  # characters processed at a time
_BLOCK = 1 << 14  # shingles mapped at a time, few enough to stay in the cache
_PRIME = np.uint64((1 << 61) - 1)


@dataclass(frozen=True)
class MinHashConfig:
    """``width`` characters a shingle (1 to 13), ``hashes`` a signature in ``bands`` equal bands.

    Two documents are duplicates if their Jaccard similarity is at least ``threshold``.

    Width and counts are those of Megatron-Turing NLG, whose threshold was between 0.7 and 0.9. Here
    it is 0.8: ten bands of ten find a pair of similarity s with probability 1 - (1 - s^10)^10. That
    is 25 % at 0.7, 68 % at 0.8, 99 % at 0.9 and one half at 0.79, so below 0.8 most pairs would not
    be found anyway.

    ``scheme`` is datasketch's: "affine32" since 2.0, or "legacy" for ((a x + b) mod (2^61 - 1)) mod
    2^32 before that, where a x + b wraps around at 2^64. Signatures of different schemes cannot be
    compared.
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
                f"hashes={self.hashes} is not divisible by bands={self.bands}; make it a multiple"
            )
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} is not a similarity; give one above 0 and up to 1"
            )
        if self.scheme not in ("affine32", "legacy"):
            raise ValueError(f"unknown value scheme={self.scheme!r}; use 'affine32' or 'legacy'")


def signatures(texts: Sequence[str], config: MinHashConfig = MinHashConfig()) -> np.ndarray:  # noqa: B008
    """Return uint32 [texts, hashes], the MinHash signatures.

    They equal ``datasketch.MinHash(num_perm, seed, scheme=scheme)`` after an update with the UTF-8
    of each shingle: every ``width`` consecutive characters, or the whole text if it is shorter.

    The signature of an empty text is 2^32 - 1 throughout. Raises ValueError for lone surrogates,
    which have no UTF-8.
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
            # The pieces in this block, including one that began before it.
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
    """Remove repeated hashes from long pieces; sorting takes less time than mapping them all."""
    parts = np.split(hashes, starts[1:])
    for number, part in enumerate(parts):
        if len(part) > _BLOCK // 2:
            part = np.sort(part)
            parts[number] = part[np.append(True, part[1:] != part[:-1])]
    sizes = np.array(list(map(len, parts)))
    return np.concatenate(parts), np.cumsum(sizes) - sizes


def _permutations(config: MinHashConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return (multipliers, addends) [hashes] in the order in which datasketch draws them."""
    generator = np.random.RandomState(config.seed)
    if config.scheme == "legacy":
        draws = [
            (
                generator.randint(1, _PRIME, dtype=np.uint64),
                generator.randint(0, _PRIME, dtype=np.uint64),
            )
            for _ in range(config.hashes)
        ]
        multipliers, addends = np.array(draws, np.uint64).T
        return multipliers, addends
    halves = generator.randint(0, 1 << 31, config.hashes, dtype=np.uint32)
    odd = halves * np.uint32(2) + np.uint32(1)
    return odd, generator.randint(0, 1 << 32, config.hashes, dtype=np.uint32)


def _modulo_prime(values: np.ndarray) -> np.ndarray:
    folded = (values & _PRIME) + (values >> np.uint64(61))
    # A value below the prime wraps around to a larger one.
    return np.minimum(folded, folded - _PRIME)


def _murmur_finalizer(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def _groups(texts: Sequence[str], width: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield (rows, pieces) of about a million characters.

    Long texts are yielded in pieces that share width - 1 characters, each in its own group, so that
    no row occurs twice in a group.
    """
    rows: list[int] = []
    pieces: list[str] = []
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
    """Return uint64 [n, bands], a hash of each band of the signatures [n, hashes] and its number.

    Because of the number the keys of all bands fit in one table. Documents that share a key agree
    on a whole band, except with probability 2^-64.
    """
    if signatures.shape[1] % bands:
        raise ValueError(
            f"{signatures.shape[1]} hashes are not divisible by {bands} bands; make them a multiple"
        )
    rows = signatures.reshape(len(signatures), bands, -1)
    golden = np.uint64(0x9E3779B97F4A7C15)
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), rows.shape[:2]) * golden
    # The finalizer of SplitMix64 (Steele 2014) after each value.
    for column in range(rows.shape[2]):
        keys = keys + rows[:, :, column] + golden
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys = keys ^ (keys >> np.uint64(31))
    return keys


def ranks(priority: Sequence[int], *position: Sequence) -> np.ndarray:
    """Return int64 [n], 0 for the document to keep before all others.

    The highest ``priority`` comes first, then the lowest ``position`` (one or more columns, the
    most significant first: file, line).

    Raises ValueError if two documents have the same position, because their order would be that of
    the input.
    """
    columns = [-np.asarray(priority, np.int64), *map(np.asarray, position)]
    order = np.lexsort(columns[::-1])
    equal = np.ones(max(len(order) - 1, 0), bool)
    for column in columns:
        equal &= column[order[1:]] == column[order[:-1]]
    if equal.any():
        row = order[np.argmax(equal)]
        raise ValueError(
            f"two documents have the position {[column[row].item() for column in columns[1:]]}; "
            "add a column in which they differ"
        )
    result = np.empty(len(order), np.int64)
    result[order] = np.arange(len(order))
    return result


def candidates(keys: np.ndarray, rank: np.ndarray, window: int = 8) -> np.ndarray:
    """Return int64 [pairs, 2], rows that share one of the ``keys`` [n, bands].

    The smaller row is first; pairs are sorted and occur once.

    Each member of a bucket is paired with the bucket's first by ``rank`` [n] and with the
    ``window`` members before it. That is all members in buckets of up to window + 2, and at most
    window + 1 in larger ones, so that a page with a million copies does not cost the square. The
    components of the candidates do not change; a large bucket loses a pair only if neither of the
    two is similar to any other member that it was paired with.
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
    """Return every ``width`` consecutive characters; the text itself if it is shorter, nothing for
    an empty one."""
    return {text[start : start + width] for start in range(max(len(text) - width + 1, 1))} - {""}


def jaccard(a: str, b: str, width: int = 5) -> float:
    """Return the shingles of both texts over those of either, 0 to 1; 1 for two empty texts."""
    ours = shingles(a, width)
    theirs = shingles(b, width)
    common = len(ours & theirs)
    return common / (len(ours) + len(theirs) - common) if ours or theirs else 1.0


def components(pairs: np.ndarray, n: int) -> np.ndarray:
    """Return int32 [n], the component of each row, if ``pairs`` [m, 2] of rows belong together."""
    import scipy.sparse

    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    graph = scipy.sparse.coo_array(
        (np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n)
    )
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1]


def keep(components: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Return bool [n], true for the row of the lowest ``rank`` in each component."""
    return ~repeated(components, rank)


def repeated(values: np.ndarray, *order: Sequence | np.ndarray) -> np.ndarray:
    """Return bool [n], true for every occurrence of a value except its first by ``order``.

    ``order`` is one or more columns [n], the most significant first. All occurrences of a value
    must be present, so a corpus may be split by ranges of its values.
    """
    sort = np.lexsort([*map(np.asarray, order[::-1]), values])
    result = np.zeros(len(sort), bool)
    result[sort[1:]] = values[sort[1:]] == values[sort[:-1]]
    return result


_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_LINE_ENDS = re.compile(r"\n\s*")


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each paragraph with the space after it."""
    start = 0
    for match in (_BLANK_LINES if _BLANK_LINES.search(text) else _LINE_ENDS).finditer(text):
        yield start, match.end()
        start = match.end()
    if start < len(text):
        yield start, len(text)


def _normalized(paragraph: str) -> str:
    return " ".join(paragraph.casefold().split())


def paragraph_hashes(text: str, min_length: int = 80) -> np.ndarray:
    """Return uint64 [paragraphs], hashes of the paragraphs of at least ``min_length`` characters.

    Case and white space are ignored. Paragraphs end at blank lines; in a text without any, each
    line is one.
    """
    normal = (_normalized(text[start:end]) for start, end in _paragraphs(text))
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(paragraph.encode(), digest_size=8).digest(), "little")
            for paragraph in normal
            if len(paragraph) >= min_length
        ],
        np.uint64,
    )


def without_paragraphs(
    text: str, dropped: Sequence[bool] | np.ndarray, min_length: int = 80
) -> str:
    """Return the text without its paragraphs that are true in ``dropped``.

    There is one flag for each of `paragraph_hashes`. All other characters stay.
    """
    spans = list(_paragraphs(text))
    counted = [
        number
        for number, (start, end) in enumerate(spans)
        if len(_normalized(text[start:end])) >= min_length
    ]
    if len(counted) != len(dropped):
        raise ValueError(
            f"{len(dropped)} flags for {len(counted)} paragraphs of at least {min_length} "
            "characters; use the text and the min_length of paragraph_hashes"
        )
    gone = {number for number, flag in zip(counted, dropped, strict=True) if flag}
    return "".join(
        text[start:end] for number, (start, end) in enumerate(spans) if number not in gone
    )
