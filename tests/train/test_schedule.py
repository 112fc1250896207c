import dataclasses
import math

import pytest

from mtnlg_jax.config import Config, OptimizerConfig, StageConfig, TrainConfig
from mtnlg_jax.train.schedule import (
    batch_size_at,
    is_masked,
    learning_rate,
    samples_before,
    stage_at,
)

RAMP = TrainConfig(
    steps=20_000, global_batch_size=1920, micro_batch_size=1, rampup_batch_size=(32, 32, 5_859_375)
)


def test_the_ramp_of_the_paper():
    sizes = [batch_size_at(RAMP, samples_before(RAMP, step)) for step in range(16_000)]
    assert sizes[0] == 32 and sizes[-1] == 1920
    assert {b - a for a, b in zip(sizes, sizes[1:], strict=False)} == {0, 32}
    assert (
        samples_before(RAMP, sizes.index(1920))
        >= 5_859_375
        > samples_before(RAMP, sizes.index(1920) - 1)
    )


def test_samples_before_is_the_sum_of_the_batches():
    total = 0
    for step in range(16_000):
        assert samples_before(RAMP, step) == total
        total += batch_size_at(RAMP, total)


def test_without_a_ramp_every_batch_has_the_global_size():
    train = TrainConfig(global_batch_size=12)
    assert samples_before(train, 7) == 84 and batch_size_at(train, 84) == 12


STAGES = (
    StageConfig("m", 0.25, masked=1.0),
    StageConfig("c", 0.5),
    StageConfig("mix", 0.25, masked=0.3),
)


def test_stages_have_their_shares_of_the_steps():
    train = TrainConfig(steps=400, stages=STAGES)
    names = [stage_at(train, step)[2].name for step in range(400)]
    assert [names.count(name) for name in ("m", "c", "mix")] == [100, 200, 100]
    assert names == sorted(names, key=["m", "c", "mix"].index)
    assert [is_masked(train, step) for step in (0, 99, 100, 299)] == [True, True, False, False]
    assert sum(is_masked(train, step) for step in range(300, 400)) == 30


def test_a_step_after_the_last_belongs_to_the_last_stage():
    assert stage_at(TrainConfig(steps=400, stages=STAGES), 500)[2].name == "mix"


def test_learning_rates_by_hand():
    config = Config(
        optimizer=OptimizerConfig(
            learning_rate=1.0, warmup_fraction=0.1, min_learning_rate_ratio=0.1
        ),
        train=TrainConfig(steps=100, global_batch_size=4),
    )
    for samples in (4, 20, 40, 100, 220, 400, 800):
        if samples < 40:
            expected = samples / 40
        else:
            progress = min((samples - 40) / 360, 1)
            expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        assert float(learning_rate(config, samples)) == pytest.approx(expected, rel=1e-5)


def test_a_decay_longer_than_the_run_ends_above_the_floor():
    config = Config(
        optimizer=OptimizerConfig(learning_rate=1.0, decay_fraction=340 / 270, warmup_fraction=0.0)
    )
    config = dataclasses.replace(config, train=TrainConfig(steps=100, global_batch_size=4))
    assert 0.1 < float(learning_rate(config, 400)) < 0.3


def test_a_ramp_longer_than_the_run_ends_with_it():
    train = TrainConfig(
        steps=5, global_batch_size=64, micro_batch_size=1, rampup_batch_size=(1, 1, 2**40)
    )
    assert samples_before(train, 5) == 5
