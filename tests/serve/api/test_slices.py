"""A job that is late does not hold up its caller."""

import threading

import pytest

from mtnlg_jax.serve import slices
from mtnlg_jax.serve.slices import in_slices


def _until(iterator, wanted):
    return next(value for value in iterator if value == wanted)


def test_a_slice_that_compiles_long_lets_others_go_on(parts, monkeypatch):
    monkeypatch.setattr(slices, "PATIENCE", 0.01)
    compiled = threading.Event()

    def work(decoder):
        decoder.params  # noqa: B018
        compiled.wait(60)
        return "result"

    iterator = in_slices(work)(parts[1])
    # next() returns while the work has not.
    assert [next(iterator) for _ in range(3)] == [None] * 3
    compiled.set()
    assert _until(iterator, "result") == "result"
    with pytest.raises(StopIteration):
        next(iterator)


def test_a_job_that_is_closed_while_it_compiles_ends_at_its_next_call(parts, monkeypatch):
    monkeypatch.setattr(slices, "PATIENCE", 0.01)
    compiled = threading.Event()
    ended = threading.Event()

    def work(decoder):
        try:
            decoder.params  # noqa: B018
            compiled.wait(60)
            decoder.params  # noqa: B018
        finally:
            ended.set()

    iterator = in_slices(work)(parts[1])
    assert next(iterator) is None
    iterator.close()
    assert not ended.is_set()
    compiled.set()
    assert ended.wait(60)


def test_a_mistake_of_late_work_is_raised(parts, monkeypatch):
    monkeypatch.setattr(slices, "PATIENCE", 0.01)

    def work(decoder):
        threading.Event().wait(0.05)
        raise ValueError("no candidate")

    with pytest.raises(ValueError, match="no candidate"):
        list(in_slices(work)(parts[1]))


def test_the_next_function_waits_for_one_that_was_closed_while_it_compiled(parts, monkeypatch):
    monkeypatch.setattr(slices, "PATIENCE", 0.01)
    compiled = threading.Event()
    running = []

    def work(decoder):
        running.append("in")
        decoder.params  # noqa: B018
        if len(running) == 1:
            compiled.wait(60)
        running.append("out")
        return "result"

    first = in_slices(work)(parts[1])
    assert next(first) is None
    first.close()
    second = in_slices(work)(parts[1])
    assert [next(second) for _ in range(3)] == [None] * 3
    assert running == ["in"]
    compiled.set()
    assert _until(second, "result") == "result"
    assert running == ["in", "out"] * 2
