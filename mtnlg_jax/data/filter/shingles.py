"""Compute SHA-1 of every shingle of a text, many at a time, in NumPy."""

from typing import Any

import numpy as np

# 13 characters of at most 4 bytes fit with SHA-1's padding into one block of 64 bytes.
MAX_WIDTH = 13

_BLOCK = 1 << 14  # shingles hashed at a time: a dozen arrays of this length stay in the cache
_LOOKUP = 1 << 17  # shingles looked up at a time, enough for the unknown ones to fill a block
_SLOTS = 1 << 19  # shingles whose hash is remembered


class Memory:
    """The hashes of recent shingles, one a slot.

    Running text repeats itself, and a lookup takes a tenth of the time of SHA-1. Whole keys are
    compared, so the memory never changes a result.
    """

    def __init__(self, width: int):
        # Three characters of 21 bits a word. No key is all ones, which marks an empty slot.
        self.words = [np.full(_SLOTS, 2**64 - 1, np.uint64) for _ in range(0, width, 3)]
        self.hashes = np.zeros(_SLOTS, np.uint32)

    def find(self, keys: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (slots, hashes, indices of the keys whose hash is unknown)."""
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
        # If several keys have one slot, NumPy stores the last, the same in all arrays.
        for words, key in zip(self.words, keys, strict=True):
            words[slots] = key
        self.hashes[slots] = hashes


def shingle_hashes(pieces: list[str], width: int, memory: Memory) -> tuple[np.ndarray, np.ndarray]:
    """Return the first 32 bits of SHA-1 [shingles], little-endian, and the start of each piece's
    shingles [pieces]."""
    text = "".join(pieces)
    try:
        data = np.frombuffer(text.encode() + bytes(4 * MAX_WIDTH + 8), np.uint8)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a lone surrogate U+{ord(text[error.start]):04X} in a text; repair Unicode first"
        ) from None
    codes = np.frombuffer(text.encode("utf-32-le") + bytes(4 * width), np.uint32)
    offsets = np.zeros(len(codes) + 1, np.int64)  # of each character in the UTF-8
    np.cumsum(
        1 + (codes > 0x7F).view(np.uint8) + (codes > 0x7FF) + (codes > 0xFFFF), out=offsets[1:]
    )
    # The big-endian word at each byte, as SHA-1 reads them.
    words = np.zeros(len(data) - 3, np.uint32)
    for byte in range(4):
        words <<= np.uint32(8)
        words |= data[byte : len(data) - 3 + byte]
    # A shingle at each character; those that reach into the next text are removed below.
    hashes = np.empty(len(text), np.uint32)
    for first in range(0, len(text), _LOOKUP):
        last = min(first + _LOOKUP, len(text))
        near = codes[first : last + width].astype(np.uint64)
        keys = []
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
    begins = np.cumsum(sizes) - sizes
    inside = np.ones(len(text), bool)
    for back in range(1, width):
        longer = sizes > back
        inside[(begins + sizes - back)[longer]] = False
    short = np.flatnonzero(sizes < width)
    if len(short):
        lengths = offsets[(begins + sizes)[short]] - offsets[begins[short]]
        hashes[begins[short]] = _sha1(words, offsets[begins[short]], lengths)
    counts = np.maximum(sizes - width + 1, 1)
    return hashes[inside], np.cumsum(counts) - counts


_FIVE, _TWENTY_SEVEN, _ONE, _THIRTY_ONE, _THIRTY, _TWO = np.array(
    [5, 27, 1, 31, 30, 2], np.uint32
).reshape(6, 1)
_ROUND_CONSTANTS = np.array([0x5A827999, 0x6ED9EBA1, 0x8F1BBCDC, 0xCA62C1D6], np.uint32).reshape(
    4, 1
)


def _sha1(words: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the first four bytes, as a little-endian number, of SHA-1 (FIPS 180-4) of messages of
    one block.

    ``words`` [bytes] is the big-endian word at each byte; a message is ``lengths`` bytes from
    ``offsets`` on.
    """
    schedule: list[Any] = [None] * 16  # None is a word of zeros
    masks = np.array([0, 0xFF000000, 0xFFFF0000, 0xFFFFFF00, 0xFFFFFFFF, 0], np.uint32)
    ends = np.array([0x80000000, 0x00800000, 0x00008000, 0x00000080, 0, 0], np.uint32)
    for number in range(int(lengths.max()) // 4 + 1):
        # -1, the last entry of both tables: the message ends before this word.
        left = np.clip(lengths - 4 * number, -1, 4)
        word = words.take(offsets + 4 * number)
        word &= masks[left]
        word |= ends[left]
        schedule[number] = word
    schedule[15] = (8 * lengths).astype(np.uint32)
    a, b, c, d, e = (
        np.full(len(lengths), value, np.uint32)
        for value in (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0)
    )
    chosen = np.empty_like(a)
    other = np.empty_like(a)
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
