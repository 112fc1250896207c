"""Other processes repeat what the devices of process 0 do."""

import threading
from multiprocessing.connection import Pipe

import jax
import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.slots import Slots
from mtnlg_jax.serve import mirror
from mtnlg_jax.serve.engine import Engine
from mtnlg_jax.serve.requests import Generation, Job
from mtnlg_jax.serve.selftest import Answer
from mtnlg_jax.serve.slices import in_slices, score_slices

# The programs of tests/decode/test_batch.py.
SHAPES = {"slots": 2, "chunks": (16,), "least": 64}


class Kept(Slots):
    """Slots of the process that follows, which the test looks at."""

    made: list[Slots] = []

    def __init__(self, *arguments):
        super().__init__(*arguments)
        Kept.made.append(self)


class Counted:
    """A job that counts, in each process, how often it ran."""

    ran = 0

    def __call__(self, decoder):
        Counted.ran += 1
        return len(jax.tree.leaves(decoder.params))


@pytest.fixture
def led(learned, monkeypatch):
    """Return a leader whose follower is a thread, which has ended when the test looks at it."""
    monkeypatch.setattr(mirror, "Slots", Kept)
    Kept.made.clear()
    here, there = Pipe()
    follower = threading.Thread(target=mirror.follow, args=(there, [learned.decoder], {}))
    follower.start()
    leader = mirror.Leader([here])
    leader.follower = follower
    yield leader
    here.close()
    follower.join()


def _answered(engine, *works):
    answers = [Answer() for _ in works]
    for work, answer in zip(works, answers, strict=True):
        engine.submit(work, answer)
    while not all(answer.ended for answer in answers):
        engine._turn()
    return answers


def test_a_follower_has_the_same_cache_and_does_the_same_jobs(led, learned, tokenizer):
    engine = Engine(
        learned.decoder, tokenizer, warm=False, budget=0.0, mirror=led.mirror(0), **SHAPES
    )
    sampled = DecodeConfig(max_new_tokens=5, temperature=1.0)
    rows = [Generation((30, 31, 32 + number), sampled, number) for number in range(3)]
    scored = Job(score_slices([[30, 31, 32], [40, 41]], 2))
    answers = _answered(engine, *rows, scored, Job(in_slices(Counted())))
    assert all(answer.end.reason in ("stop", "length") for answer in answers)
    assert len(answers[3].events[0].value) == 2
    led.end()
    led.follower.join()
    (theirs,) = Kept.made
    ours = engine._batch._device.cache
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs.cache), strict=True):
        assert np.abs(mine).max() > 0
        np.testing.assert_array_equal(mine, other)
    assert Counted.ran == 2, "once in each process"
    engine.close()


def test_a_lost_follower_stops_the_engine(led, learned, tokenizer):
    engine = Engine(
        learned.decoder, tokenizer, warm=False, budget=0.0, mirror=led.mirror(0), **SHAPES
    )
    led.end()
    led.follower.join()
    led._connections[0].close()
    with pytest.raises(OSError, match="closed"):
        _answered(engine, Generation((30,), DecodeConfig(max_new_tokens=2), 0))
    engine.close()


def test_a_job_that_cannot_be_sent_ends_alone(led, learned, tokenizer):
    engine = Engine(
        learned.decoder, tokenizer, warm=False, budget=0.0, mirror=led.mirror(0), **SHAPES
    )
    (job,) = _answered(engine, Job(lambda decoder: iter([1])))
    assert job.end.reason == "error" and "local object" in job.end.error
    (row,) = _answered(engine, Generation((30,), DecodeConfig(max_new_tokens=2), 0))
    assert row.end.reason in ("stop", "length")
    led.end()
    engine.close()
