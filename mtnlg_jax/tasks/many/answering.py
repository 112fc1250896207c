"""Answer rows window by window, each row once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from mtnlg_jax.tasks.answers import Answer
from mtnlg_jax.tasks.many.inputs import Item
from mtnlg_jax.tasks.rendering import Row

# Batches of a window: rows of similar lengths are found within it.
BATCHES = 32
# Characters of a window, which bound its memory.
CHARACTERS = 1 << 24

# Answers rows, and calls with (index of the row, answer) as soon as an answer is known.
Perform = Callable[[Sequence[Row], Callable[[int, Answer], None]], object]


class Writer(Protocol):
    """What receives the lines; `record.Record` in the process that writes."""

    def add(self, item: Item, answer: Answer) -> None: ...

    def add_error(self, item: Item, error: str) -> None: ...

    def sync(self) -> None: ...


def answer_items(
    items: Iterable[Item],
    writer: Writer,
    perform: Perform,
    *,
    batch: int,
    proven: bool = False,
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Answer the items, each in one line of ``writer``, in windows of BATCHES x ``batch`` rows.

    Within a window the order is that of ``perform``. If it raises ValueError, the rows at fault are
    found by halving, and each gets a line with its error.

    Args:
      proven: whether rows were answered with these settings before.
      on_done: called after each line.

    Raises:
      ValueError: not one row of the first window with rows can be answered, unless ``proven``: then
        a setting is wrong rather than each row. No line is written for them.
    """

    def fail(item: Item, error: str) -> None:
        writer.add_error(item, error)
        on_done()

    def answer(item: Item, answer: Answer) -> None:
        writer.add(item, answer)
        on_done()

    for window in _windows(items, BATCHES * batch):
        asked = [item for item in window if item.row is not None]
        failed = _perform(asked, perform, answer)
        if len(failed) == len(asked) > 0 and not proven:
            raise ValueError(failed[0][1])
        proven = proven or bool(asked)
        for item in window:
            if item.row is None:
                fail(item, item.error)
        for item, error in failed:
            fail(item, error)
        writer.sync()


def _perform(
    items: Sequence[Item], perform: Perform, give: Callable[[Item, Answer], None]
) -> list[tuple[Item, str]]:
    """Answer the items, and return those that cannot be answered, with their errors."""
    failed = []
    waiting = [list(items)]
    while waiting:
        group = waiting.pop()
        if not group:
            continue
        answered: set[int] = set()

        def done(index: int, answer: Answer, group=group, answered=answered) -> None:
            # An answer that cannot be written is the error of its row.
            give(group[index], answer)
            answered.add(index)

        try:
            perform([item.row for item in group if item.row is not None], done)
        except ValueError as error:
            left = [item for index, item in enumerate(group) if index not in answered]
            if len(left) == 1 and len(group) == 1:
                failed.append((left[0], str(error)))
            else:
                middle = (len(left) + 1) // 2
                waiting += [left[middle:], left[:middle]]
    return failed


def _windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    window: list[Item] = []
    characters = 0
    for item in items:
        window.append(item)
        characters += len(item.row.input) + len(item.row.context) if item.row else 0
        if len(window) == size or characters > CHARACTERS:
            yield window
            window = []
            characters = 0
    if window:
        yield window
