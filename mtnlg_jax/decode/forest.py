"""Token sequences as trees of shared beginnings, packed into the rows of a batch.

Sequences that begin alike share the tokens of their beginning, so nothing is read twice. Trees
stand one behind the other in a row, so little of a row is padding. The nodes of a tree are laid out
depth first:

    sequences         a b c d   a b c e   a b f
    tokens            a  b  c  d  e  f
    positions         0  1  2  3  3  2
    index             0  1  2  3  4  5
    ends              6  6  5  4  5  6

``ends`` is the index behind the last node below a node. The ancestors of query i, and itself, are
the keys j <= i < ends[j]: a causal mask in which keys expire.
"""

# Shapes: B rows, S indices in a row, P positions of a path, W places of the head, M labels of a
# place

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Labels of a place of the head. A node with more takes several places.
LABELS = 4
# The width of rows, unless all trees together need less or one of them more.
USUAL = 256
# The smallest width.
LEAST = 16
# A tree may be up to four times as long as its first sequence, up to this length, so that a long
# beginning serves many sequences.
MOST = 4096
# A sequence joins a tree if it shares so many tokens, or one of so many of its own.
SHARED = 16
SHARED_PART = 4


class Tree(NamedTuple):
    """Sequences with a common beginning. All indices are within the tree.

    ``places``: for each of ``sequences``, where its labels stand in the flattened ``labels_WM``.
    """

    sequences: tuple[int, ...]
    tokens_S: np.ndarray
    positions_S: np.ndarray
    ends_S: np.ndarray
    at_W: np.ndarray  # the node whose output gives each place
    labels_WM: np.ndarray
    places: tuple[np.ndarray, ...]

    @property
    def size(self) -> int:
        """The indices of a row that the tree takes; it has at most twice as many places."""
        return max(len(self.tokens_S), -(-len(self.at_W) // 2))

    @property
    def branches(self) -> bool:
        """Whether a node has several nodes behind it."""
        return bool((self.ends_S != len(self.ends_S)).any())


class Block(NamedTuple):
    """Rows of one width, to be read in one call of the model.

    ``trees``: (tree, index of its first place) of each.
    """

    trees: tuple[tuple[Tree, int], ...]
    tokens_BS: np.ndarray
    positions_BS: np.ndarray
    ends_BS: np.ndarray
    at_W: np.ndarray  # indices into the flattened rows
    labels_WM: np.ndarray
    places: int  # how many of W are used
    branches: bool


def width_of(length: int, least: int = LEAST) -> int:
    """Return the smallest power of two, ``least`` or more, that is at least ``length``."""
    return max(least, 1 << max(length - 1, 0).bit_length())


def trees_of(rows: Sequence[Sequence[int]], starts: Sequence[int], most: int = MOST) -> list[Tree]:
    """Return trees that hold each of ``rows`` once.

    Args:
      rows: token ids, at least two each.
      starts: the first token of each row to predict, 1 to its length - 1.
      most: nodes of a tree, unless its first sequence has more.
    """
    ordered = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    trees = []
    group: list[int] = []
    shared: list[int] = []  # tokens that each of the group shares with the one before it
    nodes = labels = limit = 0
    for i in ordered:
        length = len(rows[i]) - 1
        common = _common(rows[group[-1]], rows[i]) if group else 0
        wanted = len(rows[i]) - starts[i]
        joins = group and (common >= SHARED or common * SHARED_PART >= length)
        # Places are one for LABELS labels of a node at best.
        room = nodes + length - common <= limit and labels + wanted <= LABELS * limit
        if group and not (joins and room):
            trees.append(_tree(rows, starts, group, shared))
            group = []
        if not group:
            shared = []
            nodes = labels = common = 0
            limit = max(USUAL, width_of(length), min(width_of(2 * length), most))
        group.append(i)
        shared.append(common)
        nodes += length - common
        labels += wanted
    return [*trees, _tree(rows, starts, group, shared)] if group else trees


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens, but for the last of each, two rows share at their beginning."""
    limit = min(len(one), len(other)) - 1
    for at in range(limit):
        if one[at] != other[at]:
            return at
    return limit


def _tree(rows, starts, group: list[int], shared: list[int]) -> Tree:
    """Return the tree of the sequences ``group``, in lexical order."""
    longest = max(len(rows[i]) for i in group)
    path_P = np.zeros(longest, np.int64)  # the nodes of the newest sequence
    tokens: list[int] = []
    positions: list[np.ndarray] = []
    ends_S = np.zeros(sum(len(rows[i]) - 1 for i in group), np.int64)
    keys = []
    depth = 0
    for i, common in zip(group, shared, strict=True):
        row = rows[i]
        ends_S[path_P[common:depth]] = len(tokens)
        depth = len(row) - 1
        path_P[common:depth] = len(tokens) + np.arange(depth - common)
        tokens += row[common:depth]
        positions.append(np.arange(common, depth))
        labels = np.asarray(row[starts[i] :], np.int64)
        # A node and a label as one number.
        keys.append((path_P[starts[i] - 1 : depth] << 32) + labels)
    ends_S[path_P[:depth]] = len(tokens)
    pairs, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    nodes = pairs >> 32
    # The number of each label among those of its node.
    first = np.searchsorted(nodes, nodes)
    number = np.arange(len(pairs)) - first
    begins = number % LABELS == 0
    place = np.cumsum(begins) - 1
    labels_WM = np.zeros((int(begins.sum()), LABELS), np.int32)
    labels_WM[place, number % LABELS] = pairs & 0xFFFFFFFF
    places = (place * LABELS + number % LABELS)[inverse]
    lengths = [len(each) for each in keys]
    return Tree(
        tuple(group),
        np.asarray(tokens, np.int32),
        np.concatenate(positions).astype(np.int32),
        ends_S[: len(tokens)].astype(np.int32),
        nodes[begins].astype(np.int32),
        labels_WM,
        tuple(np.split(places, np.cumsum(lengths)[:-1])),
    )


def _fill(trees: Sequence[Tree]) -> Iterator[tuple[int, list[Tree]]]:
    """Yield (width, trees) of each row, the widest first.

    The largest tree is placed first, each in the fullest row that has room (best fit decreasing).
    """
    usual = min(USUAL, width_of(sum(tree.size for tree in trees)))
    rows: list[tuple[int, list[Tree]]] = []
    room: list[tuple[int, int]] = []  # (free indices, row), sorted
    for tree in sorted(trees, key=lambda tree: -tree.size):
        at = bisect.bisect_left(room, (tree.size, 0))
        if at < len(room):
            free, row = room.pop(at)
        else:
            row = len(rows)
            free = width_of(tree.size, usual)
            rows.append((free, []))
        rows[row][1].append(tree)
        bisect.insort(room, (free - tree.size, row))
    yield from rows


def blocks_of(
    trees: Sequence[Tree],
    tokens: int,
    padded_rows: Callable[[int], int] = int,
    padded_width: Callable[[int], int] = int,
) -> Iterator[Block]:
    """Yield blocks of at most ``tokens`` indices, or of one row.

    All blocks of a width have the same number of rows, a power of two, but for the last one.
    ``padded_rows`` and ``padded_width`` return numbers that the devices divide.
    """
    rows = list(_fill(trees))
    # One program for a width, whether rows of it branch or not.
    branches = {width: False for width, _ in rows}
    for width, held in rows:
        branches[width] |= any(tree.branches for tree in held)
    start = 0
    while start < len(rows):
        width = rows[start][0]
        most = max(1, tokens // width)
        most = 1 << (most.bit_length() - 1)
        chosen = [held for wide, held in rows[start : start + most] if wide == width]
        start += len(chosen)
        number = padded_rows(width_of(len(chosen), 1))
        yield _block(chosen, number, padded_width(width), branches[width])


def _block(rows: Sequence[Sequence[Tree]], number: int, width: int, branches: bool) -> Block:
    tokens_BS = np.zeros((number, width), np.int32)
    positions_BS = np.zeros((number, width), np.int32)
    # Padding sees itself.
    ends_BS = np.tile(np.arange(1, width + 1, dtype=np.int32), (number, 1))
    at_W = np.zeros(2 * number * width, np.int32)
    labels_WM = np.zeros((len(at_W), LABELS), np.int32)
    placed = []
    used = 0
    for row, trees in enumerate(rows):
        begin = 0
        for tree in trees:
            here = slice(begin, begin + len(tree.tokens_S))
            tokens_BS[row, here] = tree.tokens_S
            positions_BS[row, here] = tree.positions_S
            ends_BS[row, here] = begin + tree.ends_S
            taken = slice(used, used + len(tree.at_W))
            at_W[taken] = row * width + begin + tree.at_W
            labels_WM[taken] = tree.labels_WM
            placed.append((tree, used))
            begin += tree.size
            used = taken.stop
    return Block(tuple(placed), tokens_BS, positions_BS, ends_BS, at_W, labels_WM, used, branches)
