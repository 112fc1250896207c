"""Answer windows of rows, each row in one line, whatever fails."""

import random

import pytest

from mtnlg_jax.tasks.answers import Answer
from mtnlg_jax.tasks.many import answering
from mtnlg_jax.tasks.many.answering import answer_items
from mtnlg_jax.tasks.many.inputs import Item
from mtnlg_jax.tasks.rendering import Row


class Lines:
    """Lines in memory."""

    def __init__(self):
        self.lines = []
        self.synced = 0

    def add(self, item, answer):
        assert answer.text == f"to {item.row.input}", "an answer belongs to its row"
        self.lines.append((item.number, "answer"))

    def add_error(self, item, error):
        self.lines.append((item.number, error))

    def sync(self):
        self.synced += 1


def item(number, text=None, error=""):
    return Item(number, None, {}, None if error else Row(text or f"t{number}"), error)


def performer(bad=(), calls=None, partly=False):
    """Answer rows in another order; raise on the texts in ``bad``, at once or ``partly`` late."""

    def perform(rows, give):
        if calls is not None:
            calls.append(len(rows))
        order = list(range(len(rows)))
        random.Random(len(rows)).shuffle(order)
        wrong = [row.input for row in rows if row.input in bad]
        if wrong and not partly:
            raise ValueError(f"{wrong[0]} is bad")
        for index in order:
            text = rows[index].input
            if text in bad:
                raise ValueError(f"{text} is bad")
            give(index, Answer(f"to {text}", "", "en", "stop", (), (), 0, False, False, ""))

    return perform


def test_each_row_has_one_line(monkeypatch):
    lines = Lines()
    calls = []
    done = []
    answer_items(
        map(item, range(1, 71)),
        lines,
        performer(calls=calls),
        batch=1,
        on_done=lambda: done.append(1),
    )
    assert sorted(lines.lines) == [(number, "answer") for number in range(1, 71)]
    assert calls == [32, 32, 6] and len(done) == 70 and lines.synced == 3
    monkeypatch.setattr(answering, "CHARACTERS", 100)
    calls.clear()
    answer_items([item(n, "x" * 60) for n in range(4)], Lines(), performer(calls=calls), batch=1)
    assert calls == [2, 2]


@pytest.mark.parametrize("partly", [False, True])
def test_rows_at_fault_are_found_by_halving(partly):
    lines = Lines()
    calls = []
    bad = {"t3", "t17"}
    answer_items(
        [*map(item, range(1, 33)), item(33, error="damaged")],
        lines,
        performer(bad, calls, partly),
        batch=2,
    )
    assert sorted(lines.lines) == [
        *((n, f"t{n} is bad" if f"t{n}" in bad else "answer") for n in range(1, 33)),
        (33, "damaged"),
    ]
    assert len(calls) <= 2 * 2 * 6 + 1


def test_an_answer_that_cannot_be_written_is_an_error_of_its_row():
    """JSON lacks scores that are not finite."""

    class Strict(Lines):
        def add(self, item, answer):
            if item.number == 2:
                raise ValueError("not finite")
            super().add(item, answer)

    lines = Strict()
    answer_items(map(item, range(1, 4)), lines, performer(), batch=1)
    assert sorted(lines.lines) == [(1, "answer"), (2, "not finite"), (3, "answer")]


def test_a_mistake_of_the_settings_is_raised_and_writes_nothing():
    bad = {f"t{n}" for n in range(1, 40)}
    lines = Lines()
    items = [item(40, error="damaged"), *map(item, range(1, 10))]
    with pytest.raises(ValueError, match="t1 is bad"):
        answer_items(items, lines, performer(bad), batch=1)
    assert lines.lines == []
    answer_items(items, lines, performer(bad), batch=1, proven=True)
    assert len(lines.lines) == 10
    lines = Lines()
    # The first window shows that the settings are right.
    answer_items([*map(item, range(40, 72)), item(1)], lines, performer(bad), batch=1)
    assert lines.lines[-1] == (1, "t1 is bad") and len(lines.lines) == 33


def test_other_errors_end_it():
    lines = Lines()

    def perform(rows, give):
        give(0, Answer("to t1", "", "en", "stop", (), (), 0, False, False, ""))
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        answer_items(map(item, range(1, 4)), lines, perform, batch=1)
    assert lines.lines == [(1, "answer")]
