"""The engine: every request ends as it should, and what it is told depends on itself alone."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.serve.engine import Engine
from mtnlg_jax.serve.requests import Busy, Draining, Generation, Job, Result
from mtnlg_jax.serve.selftest import Answer, random_requests, selftest

# The programs of tests/decode/test_batch.py.
SHAPES = {"slots": 2, "chunks": (16,), "least": 64}
LONG = DecodeConfig(max_new_tokens=60, min_new_tokens=60)
SHORT = DecodeConfig(max_new_tokens=3, min_new_tokens=3)
WAIT = 120  # seconds, on a machine that is busy


@pytest.fixture(scope="module")
def running(learned, tokenizer):
    engine = Engine(learned.decoder, tokenizer, waiting=4, **SHAPES)
    engine.start()
    engine.wait_ready()
    yield engine
    engine.close()


@pytest.fixture
def stopped(learned, tokenizer):
    """Return an engine whose turns the test takes itself."""
    # Without a budget a turn takes one step, or two while others wait.
    engine = Engine(learned.decoder, tokenizer, waiting=4, warm=False, budget=0.0, **SHAPES)
    yield engine
    engine.close()


def _ask(engine, tokens=(30, 31), settings=SHORT, **options):
    answer = Answer()
    answer.ticket = engine.submit(Generation(tokens, settings, seed=1, **options), answer)
    return answer


def _turns(engine, *answers):
    """Take turns until all are answered, and return how many."""
    count = 0
    while not all(answer.ended for answer in answers):
        engine._turn()
        count += 1
    return count


def test_what_is_told_depends_on_the_request_alone(running, tokenizer):
    requests = random_requests(running, 6)
    report = selftest(running, requests[:4])
    assert report.passed and report.equal == 4 and report.largest_difference < 1e-5
    alone = [
        generate(
            running.decoder,
            tokenizer,
            [request.tokens],
            dataclasses.replace(
                request.settings, seed=request.seed if request.settings.temperature else 0
            ),
        )[0]
        for request in requests[:2]
    ]
    answers = [Answer() for _ in alone]
    for request, answer in zip(requests, answers, strict=False):
        running.submit(request, answer)
    for answer, expected in zip(answers, alone, strict=True):
        answer.wait(WAIT)
        assert tuple(token.token for token in answer.tokens) == expected.tokens
        assert (answer.text, answer.end.reason) == (expected.text, expected.finish_reason)
        assert [token.index for token in answer.tokens] == list(range(len(expected.tokens)))
        logprobs = [token.logprob for token in answer.tokens]
        np.testing.assert_allclose(logprobs, expected.logprobs, atol=1e-5)
        assert answer.end.usage.completion_tokens == len(expected.tokens)
    counters = running.statistics()["counters"]
    assert counters["compiles_serving"] == 0


def test_the_selftest_finds_a_request_that_its_neighbors_change(running, monkeypatch):
    requests = random_requests(running, 3)
    admit = running._batch.admit

    def planted(tokens, settings, seed, **options):
        # The seed of whoever shares the batch.
        return admit(tokens, settings, seed + running._batch.busy, **options)

    monkeypatch.setattr(running._batch, "admit", planted)
    sampled = [dataclasses.replace(r, settings=requests[1].settings) for r in requests]
    assert not selftest(running, sampled).passed


def test_a_request_is_cancelled_while_it_waits_fills_or_writes(stopped):
    writing = _ask(stopped, settings=LONG)
    second = _ask(stopped, settings=LONG)
    for _ in range(4):
        stopped._turn()
    waiting = _ask(stopped)
    second.ticket.cancel()
    waiting.ticket.cancel()
    stopped._turn()
    assert second.end.reason == waiting.end.reason == "cancelled"
    assert second.end.usage.completion_tokens == len(second.tokens) > 0
    assert waiting.end.usage.completion_tokens == 0
    filling = _ask(stopped, tokens=tuple(range(30, 80)), settings=LONG)
    stopped._turn()
    assert stopped.statistics()["gauges"]["filling_requests"] == 1
    filling.ticket.cancel()
    writing.ticket.cancel()
    stopped._turn()
    assert filling.end.reason == writing.end.reason == "cancelled"
    assert stopped.statistics()["gauges"]["writing_requests"] == 0
    assert stopped._batch.free == 2


def test_a_deadline_ends_a_request_with_what_is_there(stopped):
    late = _ask(stopped, deadline=time.monotonic() - 1)
    stopped._turn()
    assert (late.end.reason, late.tokens) == ("deadline", [])
    soon = _ask(stopped, settings=LONG, deadline=time.monotonic() + 3600)
    for _ in range(3):
        stopped._turn()
    work = dataclasses.replace(soon.ticket.work, deadline=time.monotonic())
    soon.ticket.work = work
    stopped._turn()
    assert soon.end.reason == "deadline" and 0 < len(soon.tokens) < 60
    timed = _ask(stopped, settings=dataclasses.replace(LONG, max_time=1e-6))
    _turns(stopped, timed)
    assert timed.end.reason == "deadline" and timed.tokens


def test_a_full_queue_refuses_with_a_time(stopped):
    # Two find a free slot and four wait.
    answers = [_ask(stopped, settings=LONG) for _ in range(6)]
    with pytest.raises(Busy, match="6 requests are waiting; at most 4 may wait; try") as caught:
        _ask(stopped)
    assert 1 <= caught.value.retry_after <= 60
    assert stopped.statistics()["counters"]["refused_requests"] == 1
    for answer in answers:
        answer.ticket.cancel()
    stopped._turn()
    stopped._most_tokens = 40
    one = _ask(stopped, tokens=(30,) * 50)
    with pytest.raises(
        Busy, match="50 prompt tokens are waiting, the limit is 40, and this prompt has 20"
    ):
        _ask(stopped, tokens=(30,) * 20)
    one.ticket.cancel()
    stopped._turn()


def test_the_time_to_come_again_counts_the_slots_and_not_the_wait(stopped):
    answers = [_ask(stopped) for _ in range(3)]
    for answer in answers:
        # As if it had waited for an hour.
        answer.ticket.arrived -= 3600
    _turns(stopped, *answers)
    for _ in range(4 + stopped._batch.slots):
        _ask(stopped)
    with pytest.raises(Busy) as raised:
        _ask(stopped)
    # Each took less than a minute in its slot, also on a machine that compiles slowly.
    assert raised.value.retry_after < 60


def test_bad_requests_never_reach_the_queue(stopped):
    with pytest.raises(ValueError, match="prompt has 64 tokens and the context holds 64"):
        _ask(stopped, tokens=(30,) * 64)
    with pytest.raises(ValueError, match="token 99999 is outside"):
        _ask(stopped, tokens=(99999,))
    assert stopped.statistics()["gauges"]["waiting_requests"] == 0


def test_keys_share_the_slots(stopped):
    many = [_ask(stopped, key="many") for _ in range(3)]
    one = _ask(stopped, key="one")
    _turns(stopped, one)
    # The second place went to the key that had none.
    assert not many[1].ended and not many[2].ended
    _turns(stopped, *many)


def test_a_long_prompt_delays_others_by_a_chunk_a_turn(stopped):
    writing = _ask(stopped, settings=LONG)
    for _ in range(3):
        stopped._turn()
    written = len(writing.tokens)
    chunks = stopped.statistics()["counters"]["chunks"]
    long = _ask(stopped, tokens=tuple(range(30, 92)), settings=SHORT)
    for turn in range(1, 4):
        stopped._turn()
        assert stopped.statistics()["counters"]["chunks"] == chunks + turn
        assert len(writing.tokens) > written
        written = len(writing.tokens)
        assert long.tokens == []
    _turns(stopped, long)
    writing.ticket.cancel()
    stopped._turn()


def test_a_job_is_done_in_slices_between_turns(stopped):
    writing = _ask(stopped, settings=LONG)
    seen = []

    def run(decoder):
        assert decoder.block_tokens == 1024 < stopped.decoder.block_tokens
        for part in range(3):
            seen.append(len(writing.tokens))
            yield part * 10

    job = Answer()
    stopped.submit(Job(run), job)
    failed = Answer()
    stopped.submit(Job(lambda decoder: (1 / 0 for _ in range(2))), failed)
    _turns(stopped, job, failed)
    # Others wrote between the slices.
    assert len(set(seen)) == 3
    assert job.events[0] == Result(20) and job.end.reason == "stop"
    assert (failed.end.reason, failed.end.error) == ("error", "division by zero")
    writing.ticket.cancel()
    stopped._turn()


def test_a_listener_that_fails_frees_its_slot(stopped):
    def broken(events):
        raise ConnectionError("gone")

    stopped.submit(Generation((30,), LONG, seed=0), broken)
    for _ in range(4):
        stopped._turn()
    assert stopped._batch.free == 2


def test_a_lost_device_ends_rows_with_an_error_and_goes_on(stopped, monkeypatch):
    first = _ask(stopped)

    def lost(steps):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stopped._batch, "turn", lost)
    _turns(stopped, first)
    assert (first.end.reason, first.end.error) == ("error", "the device failed: out of memory")
    second = _ask(stopped)
    _turns(stopped, second)
    assert second.end.reason == "length" and len(second.tokens) == 3


def test_drain_finishes_what_was_accepted_and_takes_nothing_new(learned, tokenizer):
    engine = Engine(learned.decoder, tokenizer, warm=False, **SHAPES)
    engine.start()
    engine.wait_ready()
    answers = [_ask(engine) for _ in range(4)]
    done = threading.Thread(target=engine.drain)
    done.start()
    for answer in answers:
        assert answer.wait(WAIT).end.reason == "length"
    done.join(WAIT)
    assert not done.is_alive() and not engine.ready
    with pytest.raises(Draining, match="takes no new request"):
        _ask(engine)
    engine.close()
    statistics = engine.statistics()
    assert statistics["counters"]["requests_length"] == 4
    assert statistics["histograms"]["first_token_seconds"]["count"] == 4
    assert statistics["gauges"]["draining"] == 1


def test_close_answers_everything(learned, tokenizer):
    engine = Engine(learned.decoder, tokenizer, warm=False, **SHAPES)
    engine.start()
    answers = [_ask(engine, settings=LONG) for _ in range(4)]
    engine.close()
    assert {answer.wait(WAIT).end.reason for answer in answers} <= {"cancelled", "length"}
    assert "cancelled" in {answer.end.reason for answer in answers}
