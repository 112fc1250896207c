"""Check each curve of the learning rate against tables that were worked out by hand."""

import jax
import numpy as np
import pytest

from mtnlg_jax.config import Config, OptimizerConfig, TrainConfig, validate
from mtnlg_jax.train.schedule import learning_rate, samples_before

# 100 sequences: in 25 steps of 4, or in 11 that grow from 4 to 12. The warm-up takes 20 of them.
PLAIN = TrainConfig(steps=25, global_batch_size=4)
RAMP = TrainConfig(steps=11, global_batch_size=12, micro_batch_size=1, rampup_batch_size=(4, 4, 24))
# Sequences after each step of RAMP: sizes 4, 4, 4, 8, 8, then 12.
AFTER = [4, 8, 12, 20, 28, 40, 52, 64, 76, 88, 100]

# Roots and cosines as decimals: sqrt(1/2) = cos 45 = 0.70710678, sqrt(0.2) = 0.4472136,
# 2^(-1/4) = 0.84089642. The floor is 0.1, so a height h becomes 0.1 + 0.9 h.
WSD = {"lr_decay_style": "wsd", "wsd_decay_fraction": 0.4}  # decays from 60 to 100
CYCLES = {"lr_cycles": 2}  # from 0 to 50, then from 50 to 100
TABLES = {
    "cosine": ({}, {20: 1.0, 40: 0.8681981, 60: 0.55, 80: 0.2318019, 100: 0.1}),
    "linear": ({"lr_decay_style": "linear"}, {20: 1.0, 40: 0.775, 60: 0.55, 80: 0.325, 100: 0.1}),
    "inverse square root": (
        {"lr_decay_style": "inverse_square_root"},
        {20: 1.0, 45: 2 / 3, 60: 0.5773503, 80: 0.5, 100: 0.4472136, 104: 0.1},
    ),
    "inverse square root above a floor": (
        {"lr_decay_style": "inverse_square_root", "min_learning_rate_ratio": 0.5},
        {20: 1.0, 45: 2 / 3, 80: 0.5, 100: 0.5},
    ),
    "constant": ({"lr_decay_style": "constant"}, {20: 1.0, 60: 1.0, 100: 1.0, 104: 1.0}),
    "wsd": (WSD, {20: 1.0, 60: 1.0, 70: 0.7136136, 80: 0.4727922, 100: 0.1, 104: 0.1}),
    "wsd linear": (
        WSD | {"wsd_decay_style": "linear"},
        {20: 1.0, 60: 1.0, 70: 0.775, 80: 0.55, 100: 0.1},
    ),
    "wsd cosine": (
        WSD | {"wsd_decay_style": "cosine"},
        {20: 1.0, 60: 1.0, 70: 0.8681981, 80: 0.55, 100: 0.1},
    ),
    "wsd minus square root": (
        WSD | {"wsd_decay_style": "minus_sqrt"},
        {20: 1.0, 60: 1.0, 70: 0.55, 80: 0.3636039, 100: 0.1},
    ),
    # The second cycle has no warm-up: its first step is 4 / 50 of the way down.
    "two cycles of linear": (
        CYCLES | {"lr_decay_style": "linear"},
        {20: 1.0, 35: 0.55, 50: 0.1, 54: 0.928, 75: 0.55, 100: 0.1, 104: 0.1},
    ),
    "two cycles of cosine": (CYCLES, {20: 1.0, 35: 0.55, 50: 0.1, 75: 0.55, 100: 0.1}),
    # Each decays over its last 20.
    "two cycles of wsd": (
        CYCLES | WSD | {"wsd_decay_style": "linear"},
        {20: 1.0, 30: 1.0, 40: 0.55, 50: 0.1, 54: 1.0, 80: 1.0, 90: 0.55, 100: 0.1},
    ),
    # 60 is 10 after the restart, as 30 is 10 after the warm-up: sqrt(20 / 30).
    "two cycles of inverse square root": (
        CYCLES | {"lr_decay_style": "inverse_square_root"},
        {20: 1.0, 45: 2 / 3, 50: 0.6324555, 60: 0.8164966, 100: 0.5345225},
    ),
    # The curve ends at 60 whatever the run does.
    "a decay of its own length": (
        {"lr_decay_style": "linear", "decay_samples": 60},
        {20: 1.0, 40: 0.55, 60: 0.1, 100: 0.1},
    ),
}


def config_of(train=PLAIN, **optimizer):
    settings = {"warmup_samples": 20, "min_learning_rate_ratio": 0.1} | optimizer
    return Config(optimizer=OptimizerConfig(learning_rate=2.0, **settings), train=train)


@pytest.mark.parametrize("train", [PLAIN, RAMP], ids=["plain", "ramp"])
@pytest.mark.parametrize("case", TABLES)
def test_each_curve_equals_its_table(case, train):
    settings, table = TABLES[case]
    config = config_of(train, **settings)
    validate(config)
    table = {0: 0.0, 4: 0.2, 10: 0.5} | table
    samples = np.array(list(table), np.int32)
    expected = 2.0 * np.array(list(table.values()))
    # In the step the samples are traced.
    found = jax.jit(lambda s: learning_rate(config, s))(samples)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    one = [float(learning_rate(config, int(s))) for s in samples]
    np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-7)


def test_steps_of_a_ramp_follow_the_samples():
    assert [samples_before(RAMP, step + 1) for step in range(11)] == AFTER
    # Of linear, 20 to 100: step 1 of the warm-up, its end, 8 / 80, 44 / 80 and the last step.
    expected = {0: 0.2, 3: 1.0, 4: 0.91, 7: 0.505, 10: 0.1}
    config = config_of(RAMP, lr_decay_style="linear")
    for step, share in expected.items():
        assert float(learning_rate(config, AFTER[step])) == pytest.approx(2 * share, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lr_decay_style": "wsd", "warmup_fraction": 0.5, "wsd_decay_fraction": 0.6},
            "warmup_fraction=0.5, a warm-up of 50 sequences, and optimizer.wsd_decay_fraction=0.6, "
            "a decay of 60, exceed the 100 of the curve",
        ),
        (
            WSD | {"lr_cycles": 2, "warmup_samples": 31},
            "warmup_samples=31, a warm-up of 31 sequences, .* a decay of 20, exceed the 50 of each "
            "of optimizer.lr_cycles=2",
        ),
        ({"warmup_samples": 100}, "warmup_samples=100, .* within the 100 of the run; lower it"),
        (
            {"warmup_samples": 60, "decay_samples": 60},
            "60 sequences, leaves nothing of the 60 of the curve .optimizer.decay_samples=60",
        ),
        (
            {"lr_decay_style": "linear", "lr_cycles": 4, "warmup_fraction": 0.25},
            "a warm-up of 25 sequences, leaves nothing of the 25 of each of optimizer.lr_cycles=4",
        ),
        (
            {"lr_cycles": 13},
            "lr_cycles=13 gives each cycle 7.692.* sequences, and one takes two batches .8, by "
            "train.global_batch_size=4. or more; set it to 12 or less, or raise train.steps",
        ),
        (
            {"lr_cycles": 2_000_000_000, "decay_samples": 100},
            "set it to 12 or less, or raise optimizer.decay_samples",
        ),
        ({"warmup_fraction": 0.5, "decay_fraction": 0.4}, "decay_fraction=0.4 is outside .0.5, "),
        (WSD | {"decay_fraction": 1.5}, "decay_fraction=1.5 .* end before its decay does; set it"),
        ({"lr_decay_style": "constant", "lr_cycles": 2}, "lr_cycles=2 .* nothing to restart"),
        (
            {"lr_decay_style": "inverse_square_root", "warmup_samples": 0},
            "warm-up / samples, and optimizer.warmup_samples=0, .* has no length; raise it",
        ),
        (
            {"lr_decay_style": "inverse_square_root", "warmup_fraction": 0.004},
            "warmup_fraction=0.004, a warm-up of 0 sequences, has no length; raise it",
        ),
        ({"wsd_decay_style": "cosine"}, "wsd_decay_style=cosine is for wsd, and .*=cosine; set"),
        ({"lr_decay_style": "WSD"}, "lr_decay_style='WSD'; choose one of cosine, linear"),
    ],
)
def test_phases_that_do_not_fit_are_refused(settings, words):
    config = Config(optimizer=OptimizerConfig(**settings), train=PLAIN)
    with pytest.raises(ValueError, match=words) as error:
        validate(config)
    assert "\n" not in str(error.value)


def test_phases_that_fill_the_run_are_accepted():
    settings = {"warmup_fraction": 0.5, "wsd_decay_fraction": 0.5}
    for steps in (25, 27):  # an odd number of pairs: half of it is rounded
        train = TrainConfig(steps=steps, global_batch_size=1)
        validate(Config(optimizer=OptimizerConfig(lr_decay_style="wsd", **settings), train=train))
