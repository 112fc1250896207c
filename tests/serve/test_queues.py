"""Requests of several keys take turns."""

from mtnlg_jax.serve.queues import FairQueue


def _queue(*pairs):
    queue = FairQueue()
    for key, item in pairs:
        queue.push(key, item)
    return queue


def _popped(queue, running=()):
    return [queue.pop(dict(running)) for _ in range(len(queue) + 1)]


def test_keys_take_turns_and_within_a_key_the_first_comes_first():
    queue = _queue(("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6))
    assert _popped(queue) == [1, 4, 5, 2, 6, 3, None]


def test_the_key_with_the_fewest_running_is_next():
    queue = _queue(("a", 1), ("b", 2), ("a", 3))
    assert _popped(queue, {"a": 1}.items()) == [2, 1, 3, None]


def test_items_are_taken_out_of_the_middle():
    queue = _queue(("a", 1), ("a", 2), ("b", 3))
    assert queue.take(lambda item: item != 2) == [1, 3]
    assert len(queue) == 1 and list(queue) == [2]
    assert _popped(queue) == [2, None]
