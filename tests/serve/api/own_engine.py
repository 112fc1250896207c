"""An engine for the tests of the API: `generate` in a thread, one work after another."""

import collections
import dataclasses
import threading
import time

import jax
import numpy as np

from mtnlg_jax.decode.best import score_best
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.results import text_stream
from mtnlg_jax.serve.requests import Busy, Draining, Finished, Generation, Result, Token, Usage


class OwnEngine:
    """``waiting``: works that may wait. ``pause``: seconds between two tokens of a row."""

    def __init__(self, decoder, tokenizer, waiting=64, pause=0.0):
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.waiting = waiting
        self.pause = pause
        self.ready = False
        self.failure = None
        self.closed = False
        self.draining = False
        self.cancelled = 0
        self._queue = collections.deque()
        self._wake = threading.Condition()

    def start(self):
        threading.Thread(target=self._run, daemon=True).start()
        self.ready = True

    def drain(self):
        self.draining = True

    def close(self):
        with self._wake:
            self.closed = True
            self._wake.notify()

    def check_room(self):
        if len(self._queue) >= self.waiting:
            raise Busy("the queue is full", 3.0)

    def submit(self, work, on_events):
        if self.draining:
            raise Draining("the engine drains")
        with self._wake:
            self.check_room()
            ticket = _Ticket(work, on_events)
            self._queue.append(ticket)
            self._wake.notify()
        return ticket

    def statistics(self):
        # The form of `Engine.statistics`.
        buckets = [(0.1, 1), (1.0, 2), (float("inf"), 2)]
        return {
            "counters": {"turns": 3},
            "gauges": {"waiting_requests": len(self._queue)},
            "histograms": {"step_seconds": {"buckets": buckets, "sum": 0.5, "count": 2}},
        }

    def _run(self):
        while not self.closed:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self.closed)
                if self.closed:
                    return
                ticket = self._queue[0]
            try:
                ended = self._do(ticket)
            except Exception as error:
                ended = Finished("error", "", Usage(0, 0, 0), str(error))
            ticket.on_events([ended])
            with self._wake:
                self._queue.popleft()

    def _do(self, ticket):
        work = ticket.work
        nothing = Usage(0, 0, 0)
        if isinstance(work, Generation):
            return self._write(ticket)
        value = None
        for part in work.run(self.decoder):
            value = part
            if ticket.gone:
                self.cancelled += 1
                return Finished("cancelled", "", nothing)
        ticket.on_events([Result(value)])
        return Finished("stop", "", nothing)

    def _write(self, ticket):
        work = ticket.work
        seed = work.seed if work.settings.temperature else 0
        (made,) = generate(
            self.decoder,
            self.tokenizer,
            [work.tokens],
            dataclasses.replace(work.settings, seed=seed),
            constraint=work.constraint and self._hook(work.constraint),
        )
        row = [*work.tokens, *made.tokens]
        tops = None
        if work.alternatives:
            *_, (tops,) = score_best(self.decoder, [row], work.alternatives)
        stream = text_stream(self.tokenizer, work.settings)
        for index, token in enumerate(made.tokens):
            if ticket.gone:
                self.cancelled += 1
                return Finished("cancelled", "", Usage(len(work.tokens), index, 0))
            if self.pause:
                time.sleep(self.pause)
            logprob = made.logprobs[index]
            top = ()
            if tops is not None:
                at = len(work.tokens) - 1 + index
                logprob = float(tops.logprobs[at])
                top = tuple(
                    zip(tops.best[at].tolist(), tops.best_logprobs[at].tolist(), strict=True)
                )
            ticket.on_events([Token(index, token, stream.push(token), logprob, top)])
        reason = {"timeout": "deadline"}.get(made.finish_reason, made.finish_reason)
        return Finished(reason, stream.finish(), Usage(len(work.tokens), len(made.tokens), 0))

    def _hook(self, constraint):
        seen = []

        def look(tokens_BS, lengths_B, prompts_B):
            written = np.asarray(tokens_BS)[0, int(prompts_B[0]) : int(lengths_B[0])].tolist()
            for token in written[len(seen) :]:
                constraint.accept(token)
                seen.append(token)
            return constraint.allowed()[None]

        def hook(tokens_BS, lengths_B, prompts_B):
            shape = jax.ShapeDtypeStruct((1, self.decoder.config.vocabulary), bool)
            return jax.pure_callback(look, shape, tokens_BS, lengths_B, prompts_B)

        return hook


class _Ticket:
    def __init__(self, work, on_events):
        self.work = work
        self.on_events = on_events
        self.gone = False

    def cancel(self):
        self.gone = True
