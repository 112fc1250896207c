"""A running batch: rows join, write and leave, each as if it were alone.

    batch = Batch(decoder, tokenizer, slots=8)
    row = batch.admit(tokens, settings, seed)
    while row.reason == "":
        batch.fill()                       # at most one chunk of one prompt
        for row, tokens in batch.turn(8):  # at most 8 steps of all rows whose prompts are read
            ...

Shapes are static. Rows that write stand in the first slots, so that a turn runs the program of the
next power of two of rows; a row that leaves changes places with the last one. The cache is as long
as its longest row needs, in powers of two. Prompts are read in chunks without a head, all but the
last token, and the first step reads that one. A free slot keeps its keys, and a prompt that begins
with the same tokens reads only the rest.
"""

# Shapes: B rows of a turn, S positions, V vocabulary, W words of 32 ids, C tokens of a chunk

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode import slots as programs
from mtnlg_jax.decode.batched_settings import Rows as SettingsRows
from mtnlg_jax.decode.batched_settings import check_tokens
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.constraint import Constraint
from mtnlg_jax.decode.quantized import on_cpu
from mtnlg_jax.decode.results import common_prefix, writable
from mtnlg_jax.decode.row import NewToken, Row
from mtnlg_jax.decode.slots import STEPS, Extras, Rows, Slots
from mtnlg_jax.decode.tiers import TIERS, row_settings, tier_settings

CHUNKS = (32, 64, 128)
# The shortest cache: below it a step costs the same.
LEAST = 256
# Turns for which half the cache must be unused before it is cut: a change copies all of it.
PATIENCE = 16


class Batch:
    """Rows that share steps.

    Not for several threads: one owns it. Arguments:
      slots: rows at most that write at once.
      size: positions of a row at most; default the context.
      chunks: tokens of a prompt that are read at a time, smallest first.
      least: positions of the shortest cache.
      make_slots: makes the `Slots`.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer,
        *,
        slots: int = 8,
        size: int | None = None,
        chunks: Sequence[int] = CHUNKS,
        least: int = LEAST,
        make_slots: Callable[..., Slots] = Slots,
    ):
        if slots < 1:
            raise ValueError(f"{slots} slots hold no row; give at least 1")
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.slots = slots
        self.size = min(size or decoder.context, decoder.context)
        self.chunks = [c for c in sorted(chunks) if c < self.size] or [self.size]
        # Kernels of accelerators stop at a row's length, so one length serves all.
        self.lengths = ladder(min(least, self.size), self.size) if on_cpu() else [self.size]
        self.counts = ladder(1, slots)
        self._length = self.lengths[0]
        self._device = make_slots(decoder, slots, self.size, self._length)
        self._whole = self._device.whole
        self._allowed_V = writable(tokenizer, decoder.config.vocabulary, end=False)
        self._rows: list[Row | None] = [None] * slots
        # Of free slots: the tokens whose keys they hold, and when they were left.
        self._kept: list[list[int]] = [[] for _ in range(slots)]
        self._left = [0] * slots
        self._clock = 0
        self._busy = 0
        self._filling: list[Row] = []
        self._tier: int | None = None  # of the settings that the devices hold
        self._neutral = self._settings_of(DecodeConfig())[1]  # of rows of padding
        self._unused = 0

    @property
    def busy(self) -> int:
        """The rows that write."""
        return self._busy

    @property
    def filling(self) -> int:
        """The rows whose prompts are being read."""
        return len(self._filling)

    @property
    def free(self) -> int:
        """The slots without a row."""
        return self.slots - self._busy - len(self._filling)

    @property
    def writing(self) -> list[Row]:
        """The rows that write, in the order of their slots."""
        return [row for row in self._rows[: self._busy] if row is not None]

    @property
    def cache_bytes(self) -> int:
        """The memory of the cache now; it doubles for a moment while the cache grows."""
        return self._device.nbytes

    @property
    def rows_of_turn(self) -> int:
        """The rows that the next turn computes: a power of two, or all slots."""
        return next(count for count in self.counts if count >= self._busy) if self._busy else 0

    def check(
        self, tokens: Sequence[int], settings: DecodeConfig, extras: bool = False
    ) -> tuple[int, SettingsRows]:
        """Return the tier and the settings of a row; ``extras`` as for `row_settings`.

        Raises ValueError if no slot could ever take this row.
        """
        vocabulary = self.decoder.config.vocabulary
        if len(tokens) >= self.size:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.size}, of which "
                f"one must be new; give at most {self.size - 1}"
            )
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"token {token} is outside the model's vocabulary, 0 to {vocabulary - 1}"
                )
        check_tokens(settings, vocabulary)
        return self._settings_of(settings, extras)

    def _settings_of(self, settings: DecodeConfig, extras: bool = False) -> tuple:
        return row_settings(settings, self.tokenizer, self.decoder.config.vocabulary, extras)

    def admit(
        self,
        tokens: Sequence[int],
        settings: DecodeConfig,
        seed: int,
        *,
        constraint: Constraint | None = None,
        alternatives: int = 0,
    ) -> Row:
        """Give a free slot to a row that continues ``tokens``.

        Raises ValueError if there is no free slot, and what `check` raises.
        """
        extras = constraint is not None or alternatives > 0
        tier, fields = self.check(tokens, settings, extras)
        if not self.free:
            raise ValueError(f"all {self.slots} slots are in use; drop a row first")
        row = Row(self.tokenizer, tokens, settings, seed)
        row.constraint = constraint
        row.alternatives = alternatives
        row.longest = min(row.prompt + settings.max_new_tokens, self.size)
        row.tier = tier
        row.fields = fields
        self._fit(row.prompt)
        row.slot, row.cached = self._choose(row.known)
        row.read = row.cached
        self._rows[row.slot] = row
        self._kept[row.slot] = []
        self._filling.append(row)
        self._start()
        return row

    def fill(self) -> bool:
        """Read one chunk of the prompt that came first. Return whether there was one."""
        if not self._filling:
            return False
        row = self._filling[0]
        todo = row.prompt - 1 - row.read
        chunk = next((c for c in self.chunks if c >= todo), self.chunks[-1])
        count = min(todo, chunk)
        tokens_C = np.zeros(chunk, np.int32)
        tokens_C[:count] = row.known[row.read : row.read + count]
        self._device.fill(tokens_C, row.slot, row.read, count)
        row.read += count
        self._start()
        return True

    def turn(self, steps: int) -> list[tuple[Row, list[NewToken]]]:
        """Write at most ``steps`` tokens of each row, fewer if a row ends.

        Rows with a constraint make it one step, since the host decides what they may write next.
        Rows that end leave the batch; their ``reason`` says why.
        """
        rows = self.writing
        if not rows:
            return []
        now = time.monotonic()
        steps = min(steps, STEPS)
        if any(row.constraint is not None for row in rows):
            steps = 1
        for row in rows:
            row.began = min(row.began, now)
        self._fit(max(len(row.known) for row in rows) + steps - 1)
        rows = self._ask(rows)
        written = self._advance(steps) if rows else None
        told = [(row, row.take(written)) for row in rows] if written is not None else []
        for row in rows:
            if row.reason:
                self._leave(row)
        return told

    def drop(self, row: Row, reason: str = "cancelled") -> None:
        """Take a row out of the batch, wherever it is, and free its slot."""
        if not row.reason:
            row.end(reason)
            self._leave(row)

    @property
    def length(self) -> int:
        """The positions of the cache now."""
        return self._length

    @property
    def programs(self) -> int:
        """The compiled programs that the batches of this process hold."""
        return programs.programs()

    def warm(self, stop: Callable[[], bool] = lambda: False) -> int:
        """Compile every program that rows may need, and return how many there are.

        The batch must be empty. ``stop`` is asked before each program; True leaves the rest out.
        """
        if self._busy or self._filling:
            raise ValueError("rows are in the batch; warm it before they are admitted")
        for length in self.lengths:
            self._resize(length)
            for chunk in self.chunks:
                self._device.fill(np.zeros(chunk, np.int32), 0, 0, 0)
            if stop():
                break
            if self.slots > 1:
                self._device.swap(0, 1)
            if self.slots > 1 and self._whole:
                self._device.copy(0, 1)
            for tier in range(len(TIERS)):
                for count in self.counts:
                    if not stop():
                        self._warm_turn(tier, count)
        # Any length may follow any other.
        for one, other in itertools.permutations(self.lengths, 2):
            if stop():
                break
            self._resize(one)
            self._resize(other)
        self._resize(self.lengths[0])
        self._kept = [[] for _ in range(self.slots)]
        return programs.programs()

    # Slots

    def _choose(self, tokens: list[int]) -> tuple[int, int]:
        """Return a free slot and the tokens of the prompt whose keys it then holds."""
        most = len(tokens) - 1
        free = [i for i, row in enumerate(self._rows) if row is None]
        shared = {i: min(common_prefix(self._kept[i], tokens), most) for i in free}
        if not self._whole:
            # A window that moved on cannot go back: all of it must be of this prompt.
            shared = {i: n if n == len(self._kept[i]) else 0 for i, n in shared.items()}
        best = max(free, key=lambda i: (shared[i], -self._left[i]))
        found = shared[best]
        if self._whole:
            # Copying a slot costs less than reading a chunk.
            others = [row for row in self._rows if row is not None]
            lengths = [min(common_prefix(row.known[: row.read], tokens), most) for row in others]
            longest = max(lengths, default=0)
            if longest >= found + self.chunks[0]:
                source = others[lengths.index(longest)]
                # The slot whose keys are the least use: the one that was left first.
                best = min(free, key=lambda i: self._left[i])
                found = longest
                self._device.copy(source.slot, best)
        return best, found

    def _start(self) -> None:
        """Let rows whose prompts are read join those that write."""
        for row in list(self._filling):
            if row.read == row.prompt - 1:
                self._filling.remove(row)
                self._swap(row.slot, self._busy)
                self._busy += 1
                row.placed = True
                self._tier = None

    def _leave(self, row: Row) -> None:
        if row in self._filling:
            self._filling.remove(row)
        else:
            self._swap(row.slot, self._busy - 1)
            self._busy -= 1
            self._tier = None
        self._rows[row.slot] = None
        self._kept[row.slot] = row.known[: row.read]
        self._clock += 1
        self._left[row.slot] = self._clock

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        self._device.swap(one, other)
        lists: list[list] = [self._rows, self._kept, self._left]
        for held in lists:
            held[one], held[other] = held[other], held[one]
        for slot in (one, other):
            row = self._rows[slot]
            if row is not None:
                row.slot = slot

    def _fit(self, positions: int) -> None:
        """Make the cache long enough for ``positions``; cut it once half was unused for long."""
        length = next((n for n in self.lengths if n >= positions), self.lengths[-1])
        if length > self._length:
            self._resize(length)
        rows = [row for row in self._rows if row is not None]
        # Twice what is in use, so that a row that grows does not make it grow again at once.
        used = 2 * max([positions, *(max(len(row.known), row.prompt) for row in rows)])
        shorter = next((n for n in self.lengths if n >= used), self.lengths[-1])
        self._unused = self._unused + 1 if shorter < self._length else 0
        if self._unused > PATIENCE:
            self._resize(shorter)

    def _resize(self, length: int) -> None:
        self._unused = 0
        if length == self._length:
            return
        self._device.resize(length)
        self._length = length
        # A window that was cut holds other positions than its tokens say.
        self._kept = [kept[:length] if self._whole else [] for kept in self._kept]

    def _ask(self, rows: list[Row]) -> list[Row]:
        """Return the rows that write, once constraints have said what may come next."""
        for row in rows:
            row.ask()
        for row in rows:
            if row.reason:
                self._leave(row)
        return self.writing

    def _advance(self, steps: int):
        rows = self.writing
        count = self.rows_of_turn
        padded = [*rows, *[None] * (count - len(rows))]
        tokens_BS = np.zeros((count, self.size), np.int32)
        for at, row in enumerate(rows):
            tokens_BS[at, : len(row.known)] = row.known

        def column(value, fill: int, dtype=np.int32) -> np.ndarray:
            return np.array([fill if row is None else value(row) for row in padded], dtype)

        arrays = Rows(
            tokens_BS,
            column(lambda row: len(row.known), 1),
            column(lambda row: True, False, bool),
            column(lambda row: row.prompt, 1),
            column(lambda row: row.longest, 1),
            column(lambda row: row.seed, 0, np.uint32),
            column(lambda row: row.mu, 0, np.float32),
        )
        if self._tier is None:
            tier = max(row.tier for row in rows)
            self._set(tier, [row.fields for row in rows], count)
        return self._device.advance(arrays, self._extras(padded), steps)

    def _set(self, tier: int, fields: list, count: int) -> None:
        """Hold the settings of ``count`` rows on the devices; rows without fields are padding."""
        fields = [*fields, *[self._neutral] * (count - len(fields))]
        eos = tuple(self.tokenizer.eos_ids)
        self._device.hold(tier_settings(tier, fields, self._allowed_V, eos))
        self._tier = tier

    def _extras(self, rows: Sequence[Row | None]) -> Extras | None:
        """Return what the widest tier takes beside its settings; None for the others."""
        if self._tier != len(TIERS) - 1:
            return None
        words = -(-self.decoder.config.vocabulary // 32)
        allowed_BW = np.full((len(rows), words), 2**32 - 1, np.uint32)
        for at, row in enumerate(rows):
            if row is not None and row.allowed is not None:
                bits = np.zeros(words * 32, bool)
                size = min(len(row.allowed), self.decoder.config.vocabulary)
                bits[:size] = row.allowed[:size]
                allowed_BW[at] = np.packbits(bits, bitorder="little").view("<u4")
        alternatives = [0 if row is None else row.alternatives for row in rows]
        return Extras(allowed_BW, np.array(alternatives, np.int32))

    def _warm_turn(self, tier: int, count: int) -> None:
        ones_B = np.ones(count, np.int32)
        rows = Rows(
            np.zeros((count, self.size), np.int32),
            ones_B,
            np.zeros(count, bool),
            ones_B,
            ones_B,
            np.zeros(count, np.uint32),
            np.zeros(count, np.float32),
        )
        self._set(tier, [], count)
        self._device.advance(rows, self._extras([None] * count), 0)
        self._tier = None


def ladder(first: int, last: int) -> list[int]:
    """Return ``first``, twice that, and so on, up to ``last``."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], last))
    return sizes
