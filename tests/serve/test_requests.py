"""Requests are checked before they are queued."""

import dataclasses
import math

import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.serve.requests import Generation, Job

GOOD = Generation((1, 2), DecodeConfig(), seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ()}, "no tokens"),
        ({"settings": DecodeConfig(num_beams=2)}, "num_beams=2 is not one row"),
        (
            {"settings": DecodeConfig(temperature=1.0, num_return_sequences=3)},
            "num_return_sequences=3 .* seed . i",
        ),
        ({"settings": DecodeConfig(prompt_lookup_num_tokens=5)}, "prompt_lookup_num_tokens=5"),
        ({"settings": DecodeConfig(top_k=5)}, "top_k"),
        ({"seed": 2**32}, f"seed={2**32} is outside 0 to {2**32 - 1}"),
        ({"seed": -1}, "seed=-1"),
        ({"alternatives": 21}, "21 alternatives a token are outside 0 to 20"),
        ({"deadline": math.nan}, "deadline is not a number"),
    ],
)
def test_a_bad_request_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOOD, **change)


def test_a_job_needs_a_deadline_that_is_a_number():
    with pytest.raises(ValueError, match="deadline is not a number"):
        Job(lambda decoder: iter([1]), deadline=math.nan)


def test_tokens_become_a_tuple():
    given = [1, 2]
    assert Generation(given, DecodeConfig(), seed=0) == GOOD
