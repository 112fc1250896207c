"""Near-duplicates by MinHash LSH and exactly repeated paragraphs, in NumPy alone.

Documents are rows of arrays here. A stage computes `signatures` and `band_keys` shard by shard, then, over all of the
corpus or over one range of keys at a time, `candidates`, whose pairs it holds to the exact `jaccard`; `components` and
`keep` decide. Nothing depends on the order of the rows where `ranks` says which document comes first.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MAX_WIDTH = 13  # characters of at most 4 bytes: with SHA-1's padding they still fit into one block of 64 bytes

_GROUP = 1 << 20  # characters that are worked on at a time
_BLOCK = 1 << 14  # shingles that are hashed at a time: some dozen arrays of this length stay in the cache
_LOOKUP = 1 << 17  # shingles that are looked up at a time: so many that those not found fill a block
_SLOTS = 1 << 19  # shingles whose hash is remembered
_PRIME = np.uint64((1 << 61) - 1)


@dataclass(frozen=True)
class MinHashConfig:
    """``width`` characters a shingle (1 to 13), ``hashes`` a signature in ``bands`` equal bands. Two documents are
    duplicates from a Jaccard similarity of ``threshold`` on.

    The widths and counts are those of Megatron-Turing NLG, whose threshold lay between 0.7 and 0.9. Here it is 0.8:
    ten bands of ten find a pair of similarity s with 1 - (1 - s^10)^10, which is 25 % at 0.7, 68 % at 0.8, 99 % at 0.9
    and one half at 0.79, so that below 0.8 most pairs would go unseen anyway.

    ``scheme`` is datasketch's: "affine32" as of 2.0, or "legacy" for ((a x + b) mod (2^61 - 1)) mod 2^32 as before,
    where a x + b wraps around at 2^64. Signatures of different schemes do not compare.
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
            raise ValueError(f"hashes={self.hashes} do not fill bands={self.bands}; make one a multiple of the other")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is no similarity; give one above 0 and up to 1")
        if self.scheme not in ("affine32", "legacy"):
            raise ValueError(f"scheme={self.scheme!r} is not known; use 'affine32' or 'legacy'")


def signatures(texts: Sequence[str], config: MinHashConfig = MinHashConfig()) -> np.ndarray:  # noqa: B008
    """uint32 [texts, hashes], equal to ``datasketch.MinHash(num_perm, seed, scheme=scheme)`` after an update with the
    UTF-8 of each shingle: of every ``width`` characters in a row, or of the text itself where it is shorter.

    The signature of an empty text is 2^32 - 1 throughout. Raises ValueError for lone surrogates, which no UTF-8 has.
    """
    multipliers, addends = _permutations(config)
    result = np.full((len(texts), config.hashes), 2**32 - 1, np.uint32)
    memory = _Memory(config.width)
    for numbers, pieces in _groups(texts, config.width):
        hashes, starts = _without_repeats(*_shingle_hashes(pieces, config.width, memory))
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
    """Long pieces repeat many of their shingles, and to sort them takes less time than to map them all."""
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
        draws = [(generator.randint(1, _PRIME, dtype=np.uint64), generator.randint(0, _PRIME, dtype=np.uint64))
                 for _ in range(config.hashes)]
        return tuple(np.array(draws, np.uint64).T)
    odd = generator.randint(0, 1 << 31, config.hashes, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return odd, generator.randint(0, 1 << 32, config.hashes, dtype=np.uint32)


def _modulo_prime(values: np.ndarray) -> np.ndarray:
    folded = (values & _PRIME) + (values >> np.uint64(61))
    return np.minimum(folded, folded - _PRIME)  # what lies below the prime wraps around to something larger


def _murmur_finalizer(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def _groups(texts: Sequence[str], width: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """(rows, pieces) of about a million characters. Long texts come in pieces that share width - 1 characters, each
    in a group of its own, so that no row comes twice in one."""
    rows, pieces, size = [], [], 0
    for row, text in enumerate(texts):
        for start in range(0, max(len(text) - width + 1, min(len(text), 1)), _GROUP):
            piece = text[start : start + _GROUP + width - 1]
            if size + len(piece) > _GROUP and rows:
                yield np.array(rows), pieces
                rows, pieces, size = [], [], 0
            rows.append(row)
            pieces.append(piece)
            size += len(piece)
    if rows:
        yield np.array(rows), pieces


class _Memory:
    """The hashes of shingles that were seen last, one a slot: running text repeats itself, and to look a hash up takes
    a tenth of the time of SHA-1. Whole keys are compared, so that what is remembered never changes a result."""

    def __init__(self, width: int):
        # Three characters of 21 bits a word. No key is all ones, which marks an empty slot.
        self.words = [np.full(_SLOTS, 2**64 - 1, np.uint64) for _ in range(0, width, 3)]
        self.hashes = np.zeros(_SLOTS, np.uint32)

    def find(self, keys: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(slots, hashes, numbers of those keys whose hash is not known)."""
        mixed = keys[0] * np.uint64(0x9E3779B97F4A7C15)
        for key in keys[1:]:
            mixed ^= mixed >> np.uint64(29)
            mixed += key
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed >>= np.uint64(64 - _SLOTS.bit_length() + 1)
        slots = mixed.view(np.int64)
        known = self.words[0].take(slots) == keys[0]
        for words, key in zip(self.words[1:], keys[1:], strict=True):
            known &= words.take(slots) == key
        return slots, self.hashes.take(slots), np.flatnonzero(~known)

    def store(self, slots: np.ndarray, keys: list[np.ndarray], hashes: np.ndarray) -> None:
        # Of several keys for one slot NumPy leaves the last, in all arrays the same.
        for words, key in zip(self.words, keys, strict=True):
            words[slots] = key
        self.hashes[slots] = hashes


def _shingle_hashes(pieces: list[str], width: int, memory: _Memory) -> tuple[np.ndarray, np.ndarray]:
    """The first 32 bits of SHA-1 [shingles], little-endian, and where each piece's begin [pieces]."""
    text = "".join(pieces)
    try:
        data = np.frombuffer(text.encode() + bytes(4 * MAX_WIDTH + 8), np.uint8)
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate U+{ord(text[error.start]):04X} in a text; repair Unicode first") from None
    codes = np.frombuffer(text.encode("utf-32-le") + bytes(4 * width), np.uint32)
    offsets = np.zeros(len(codes) + 1, np.int64)  # of each character in the UTF-8
    np.cumsum(1 + (codes > 0x7F).view(np.uint8) + (codes > 0x7FF) + (codes > 0xFFFF), out=offsets[1:])
    # Four bytes from each byte on, as SHA-1 reads them.
    words = np.zeros(len(data) - 3, np.uint32)
    for byte in range(4):
        words <<= np.uint32(8)
        words |= data[byte : len(data) - 3 + byte]
    # A shingle from each character on; those that reach into the next text are taken out below.
    hashes = np.empty(len(text), np.uint32)
    for first in range(0, len(text), _LOOKUP):
        last = min(first + _LOOKUP, len(text))
        near, keys = codes[first : last + width].astype(np.uint64), []
        for start in range(0, width, 3):
            key = near[start : start + last - first]
            for character in range(start + 1, min(start + 3, width)):
                key = key << np.uint64(21)
                key |= near[character : character + last - first]
            keys.append(key)
        slots, hashes[first:last], unknown = memory.find(keys)
        fresh = np.empty(len(unknown), np.uint32)
        for start in range(0, len(unknown), _BLOCK):
            block = slice(start, start + _BLOCK)
            begins = offsets[first + unknown[block]]
            fresh[block] = _sha1(words, begins, offsets[first + width + unknown[block]] - begins)
        hashes[first + unknown] = fresh
        memory.store(slots[unknown], [key[unknown] for key in keys], fresh)
    sizes = np.array([len(piece) for piece in pieces])
    begins, inside = np.cumsum(sizes) - sizes, np.ones(len(text), bool)
    for back in range(1, width):
        longer = sizes > back
        inside[(begins + sizes - back)[longer]] = False
    short = np.flatnonzero(sizes < width)
    if len(short):
        lengths = offsets[(begins + sizes)[short]] - offsets[begins[short]]
        hashes[begins[short]] = _sha1(words, offsets[begins[short]], lengths)
    counts = np.maximum(sizes - width + 1, 1)
    return hashes[inside], np.cumsum(counts) - counts


_FIVE, _TWENTY_SEVEN, _ONE, _THIRTY_ONE, _THIRTY, _TWO = np.array([5, 27, 1, 31, 30, 2], np.uint32).reshape(6, 1)
_ROUND_CONSTANTS = np.array([0x5A827999, 0x6ED9EBA1, 0x8F1BBCDC, 0xCA62C1D6], np.uint32).reshape(4, 1)


def _sha1(words: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The first four bytes, as a little-endian number, of SHA-1 (FIPS 180-4) of messages of one block.

    ``words`` [bytes] holds the big-endian word at each byte; a message is ``lengths`` bytes from ``offsets`` on.
    """
    schedule = [None] * 16  # None is a word of zeros
    masks = np.array([0, 0xFF000000, 0xFFFF0000, 0xFFFFFF00, 0xFFFFFFFF, 0], np.uint32)
    ends = np.array([0x80000000, 0x00800000, 0x00008000, 0x00000080, 0, 0], np.uint32)
    for number in range(int(lengths.max()) // 4 + 1):
        left = np.clip(lengths - 4 * number, -1, 4)  # -1, the last of both tables: the end lies before this word
        schedule[number] = words.take(offsets + 4 * number)
        schedule[number] &= masks[left]
        schedule[number] |= ends[left]
    schedule[15] = (8 * lengths).astype(np.uint32)
    a, b, c, d, e = (np.full(len(lengths), value, np.uint32)
                     for value in (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0))
    chosen, other = np.empty_like(a), np.empty_like(a)
    for step in range(80):
        if step >= 16:
            taken = [schedule[(step - back) % 16] for back in (3, 8, 14, 16)]
            taken = [word for word in taken if word is not None]
            if taken:
                mixed = taken[-1] if schedule[step % 16] is not None else np.empty_like(a)
                np.bitwise_xor(taken[0], taken[1] if len(taken) > 1 else 0, out=other)
                for word in taken[2:]:
                    other ^= word
                np.left_shift(other, _ONE, out=mixed)
                other >>= _THIRTY_ONE
                mixed |= other
                schedule[step % 16] = mixed
        if step < 20:
            np.bitwise_xor(c, d, out=chosen)
            chosen &= b
            chosen ^= d
        elif 40 <= step < 60:
            np.bitwise_or(b, c, out=chosen)
            chosen &= d
            np.bitwise_and(b, c, out=other)
            chosen |= other
        else:
            np.bitwise_xor(b, c, out=chosen)
            chosen ^= d
        e += chosen
        np.left_shift(a, _FIVE, out=chosen)
        np.right_shift(a, _TWENTY_SEVEN, out=other)
        chosen |= other
        e += chosen
        e += _ROUND_CONSTANTS[step // 20]
        if schedule[step % 16] is not None:
            e += schedule[step % 16]
        np.right_shift(b, _TWO, out=other)
        b <<= _THIRTY
        b |= other
        a, b, c, d, e = e, a, b, c, d
    return (a + np.uint32(0x67452301)).byteswap()


def band_keys(signatures: np.ndarray, bands: int) -> np.ndarray:
    """uint64 [n, bands]: a hash of each band of the signatures [n, hashes] and of its number, so that the keys of all
    bands may lie in one table. Documents that share a key agree, but for one chance in 2^64, on a whole band."""
    if signatures.shape[1] % bands:
        raise ValueError(f"{signatures.shape[1]} hashes do not fill {bands} bands; make one a multiple of the other")
    rows = signatures.reshape(len(signatures), bands, -1)
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), rows.shape[:2]) * np.uint64(0x9E3779B97F4A7C15)
    for column in range(rows.shape[2]):  # the finalizer of SplitMix64 (Steele 2014) after each value
        keys = keys + rows[:, :, column] + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys = keys ^ (keys >> np.uint64(31))
    return keys


def ranks(priority: Sequence[int], *place: Sequence) -> np.ndarray:
    """int64 [n]: 0 for the document that stays before all others, which is the one of the highest ``priority``, among
    those the one of the lowest ``place`` (one or more columns, the first counts most: file, line).

    Raises ValueError where two documents have the same place, as their order would be that of the input.
    """
    columns = [-np.asarray(priority, np.int64), *map(np.asarray, place)]
    order = np.lexsort(columns[::-1])
    equal = np.ones(max(len(order) - 1, 0), bool)
    for column in columns:
        equal &= column[order[1:]] == column[order[:-1]]
    if equal.any():
        row = order[np.argmax(equal)]
        raise ValueError(f"two documents have the place {[column[row].item() for column in columns[1:]]}; "
                         "add a column that tells them apart")
    result = np.empty(len(order), np.int64)
    result[order] = np.arange(len(order))
    return result


def candidates(keys: np.ndarray, rank: np.ndarray, window: int = 8) -> np.ndarray:
    """int64 [pairs, 2]: rows that share one of the ``keys`` [n, bands], the smaller row first, sorted, each pair once.

    Each member of a bucket is paired with the bucket's first by ``rank`` [n] and with the ``window`` members before
    it: with all up to buckets of window + 2, and with no more than window + 1 in larger ones, so that a boilerplate
    page of a million copies costs no square. The components of all candidates stay as they were; what is lost in large
    buckets is a pair that is similar while neither of the two is similar to any other member it was paired with.
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
    """Every ``width`` characters in a row; the text itself where it is shorter, nothing of an empty one."""
    return {text[start : start + width] for start in range(max(len(text) - width + 1, 1))} - {""}


def jaccard(a: str, b: str, width: int = 5) -> float:
    """Shingles that both texts have over those that one has, 0 to 1; 1 for two empty texts."""
    ours, theirs = shingles(a, width), shingles(b, width)
    common = len(ours & theirs)
    return common / (len(ours) + len(theirs) - common) if ours or theirs else 1.0


def components(pairs: np.ndarray, n: int) -> np.ndarray:
    """int32 [n]: the number of each row's component, where ``pairs`` [m, 2] of rows belong together."""
    import scipy.sparse

    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    graph = scipy.sparse.coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1]


def keep(components: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """bool [n]: true for the row of the lowest ``rank`` in each component."""
    return ~repeated(components, rank)


def repeated(values: np.ndarray, *order: Sequence) -> np.ndarray:
    """bool [n]: true for every occurrence of a value but its first by ``order`` (one or more columns [n], the first
    counts most). All occurrences of a value must be there, so a corpus may be cut by ranges of its values."""
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
    """uint64 [paragraphs]: a hash of each paragraph that has ``min_length`` characters or more, regardless of case and
    of white space. Paragraphs end at blank lines; in a text without any, each line is one."""
    normal = (_normalised(text[start:end]) for start, end in _paragraphs(text))
    return np.array([int.from_bytes(hashlib.blake2b(paragraph.encode(), digest_size=8).digest(), "little")
                     for paragraph in normal if len(paragraph) >= min_length], np.uint64)


def without_paragraphs(text: str, dropped: Sequence[bool], min_length: int = 80) -> str:
    """The text without those of its paragraphs that are true in ``dropped``, one flag for each of `paragraph_hashes`.
    All other characters stay as they are."""
    spans = list(_paragraphs(text))
    counted = [number for number, (start, end) in enumerate(spans) if len(_normalised(text[start:end])) >= min_length]
    if len(counted) != len(dropped):
        raise ValueError(f"{len(dropped)} flags for {len(counted)} paragraphs of {min_length} characters or more; "
                         "use the text and the min_length of paragraph_hashes")
    gone = {number for number, flag in zip(counted, dropped, strict=True) if flag}
    return "".join(text[start:end] for number, (start, end) in enumerate(spans) if number not in gone)
