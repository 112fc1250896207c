"""The rule of spikes against numpy, and where histories begin."""

# Shapes: W the last steps of one kind

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import Config, StageConfig, TrainConfig
from mtnlg_jax.config.rules import validate
from mtnlg_jax.train import spike_rule

SKIP = TrainConfig(steps=100, spike_policy="skip", spike_window=16)


def config_of(**train):
    return Config(train=dataclasses.replace(SKIP, **train))


class Run:
    """A history that grows by one step at a time."""

    def __init__(self, config, step=0, causal=True):
        self.causal = causal
        self.resumed(config)
        self.state = SimpleNamespace(
            step=jnp.int32(step), extras={spike_rule.KEY: spike_rule.new(config, None)}
        )

    def resumed(self, config):
        """Go on with other settings."""

        @jax.jit
        def judge(step, extras, loss, norm):
            state = SimpleNamespace(step=step, extras=extras)
            finite = jnp.isfinite(loss)
            return spike_rule.judge(config, self.causal, state, loss, norm, finite)

        self.judge = judge
        return self

    def __call__(self, loss, norm=1.0):
        figures = (jnp.float32(loss), jnp.float32(norm))
        taken, self.state.extras, metrics = self.judge(self.state.step, self.state.extras, *figures)
        self.state.step += 1
        return bool(taken), {name: x.item() for name, x in metrics.items()}


def longhand(history, value):
    """Return the deviation of ``value`` from the last 16 of ``history``."""
    last = np.array(history[-16:], np.float32)
    median = np.median(last)
    spread = 1.4826 * np.median(np.abs(last - median))
    return (np.float32(value) - median) / max(spread, 0.01 * abs(median))


def test_decisions_are_those_of_numpy():
    rng = np.random.default_rng(0)
    run = Run(config_of())
    losses = (3 + 0.1 * rng.standard_normal(60)).tolist()
    norms = (0.5 + 0.05 * rng.standard_normal(60)).tolist()
    # High and low ones: only the high ones are spikes.
    losses[20] = 9.0
    norms[30] = 4.0
    losses[31] = 0.1
    losses[40] = 3.5
    accepted = ([], [])
    found = []
    for step, figures in enumerate(zip(losses, norms, strict=True)):
        taken, metrics = run(*figures)
        deviations = (metrics["deviation_loss"], metrics["deviation_grad_norm"])
        if len(accepted[0]) < 16:
            assert taken and np.isnan(deviations).all()
        else:
            expected = [longhand(*each) for each in zip(accepted, figures, strict=True)]
            np.testing.assert_allclose(deviations, expected, rtol=1e-4, atol=1e-4)
            assert taken == (max(expected) <= 6)
        assert metrics["is_spike"] is (not taken)
        if taken:
            accepted[0].append(figures[0])
            accepted[1].append(figures[1])
        else:
            found.append(step)
    assert {20, 30} <= set(found) and 31 not in found and len(found) < 6
    assert metrics["spikes_total"] == len(found)


def test_a_spike_does_not_hide_the_next_and_a_bad_step_changes_nothing():
    run = Run(config_of())
    for _ in range(16):
        run(2.0)
    for number in range(1, 5):  # they do not enter the history
        taken, metrics = run(50.0)
        assert not taken and metrics["spikes_in_a_row"] == number
    before = run.state.extras
    taken, metrics = run(np.nan)
    assert not taken and not metrics["is_spike"] and metrics["spikes_in_a_row"] == 4
    same = jax.tree.map(lambda one, other: bool((one == other).all()), before, run.state.extras)
    assert all(jax.tree.leaves(same))
    taken, metrics = run(2.0)
    assert taken and metrics["spikes_in_a_row"] == 0 and metrics["spikes_total"] == 4


def test_five_spikes_in_a_row_are_a_new_level():
    run = Run(config_of())
    for _ in range(20):
        run(2.0)
    for number in range(1, 6):
        taken, metrics = run(9.0)
        assert not taken and metrics["spikes_in_a_row"] == number
    for _ in range(16):
        assert run(9.0)[0]
    assert not run(90.0)[0]


def test_a_flat_history_has_a_floor():
    run = Run(config_of())
    for _ in range(20):
        assert run(2.0)[0]
    assert run(2.11)[0]  # six deviations of 1 % each are 0.12
    assert not run(2.13)[0]
    assert not run(2.0, 1.07)[0]


def test_the_window_is_of_accepted_steps_and_wraps_around():
    # A history longer than its buffer, of which the window is the end.
    run = Run(config_of(steps=5000))
    spikes = run.state.extras[spike_rule.KEY]
    full_W = jnp.arange(1024, dtype=jnp.float32)
    kind = jnp.int32(spike_rule._kinds(config_of(steps=5000))[0])
    history = {"loss_W": full_W, "grad_norm_W": full_W, "count": jnp.int32(1028), "kind": kind}
    spikes["causal"] = spikes["causal"] | history
    _, metrics = run(600.0, 600.0)
    last = [*range(1012, 1024), 0, 1, 2, 3]
    assert metrics["deviation_loss"] == pytest.approx(longhand(last, 600), rel=1e-4)
    assert run.state.extras[spike_rule.KEY]["causal"]["loss_W"][4] == 600


def test_objectives_stages_and_targets_have_their_own_histories():
    two = (StageConfig("easy", 0.5), StageConfig("hard", 0.5, blend=(("other", 1.0),)))
    config = config_of(stages=two)
    run = Run(config, step=20)
    for _ in range(30):
        assert run(2.0)[0]
    assert run.state.step == 50
    assert run(5.0)[0]  # the first step of the other stage
    for _ in range(15):
        run(5.0)
    assert not run(9.0)[0]
    # A stage that differs in its learning rate alone goes on with the same history.
    same = (StageConfig("a", 0.5), StageConfig("b", 0.5, learning_rate_scale=0.1))
    run = Run(config_of(stages=same), step=30)
    for _ in range(20):
        run(2.0)
    assert not run(5.0)[0]
    # A resume that changes the targets begins a new one; one that changes only the window does not.
    assert not run.resumed(config_of(stages=same, spike_window=32))(5.0)[0]
    assert run.resumed(config_of(stages=same, label_smoothing=0.1))(5.0)[0]


def test_each_teacher_has_its_own_history():
    teachers = ("/runs/a", "/runs/b", "", "/runs/a/", "/runs/b")
    stages = tuple(
        StageConfig(f"{number}", 0.2, distill=distill) for number, distill in enumerate(teachers)
    )
    first, second, plain, *again = spike_rule._kinds(config_of(stages=stages))
    assert len({first, second, plain}) == 3 and again == [first, second]


def test_a_masked_step_is_not_compared_with_causal_ones():
    config = config_of()
    causal = Run(config)
    masked = Run(config, causal=False)
    for _ in range(20):
        causal(2.0)
        masked.state = causal.state  # one state, two programs
        assert masked(6.0)[0]
    assert not causal(6.0)[0]
    assert masked(6.0)[0]


def test_without_a_policy_a_state_has_no_history():
    config = Config()
    state = SimpleNamespace(step=jnp.int32(0), extras={})
    finite = jnp.bool_(True)
    assert spike_rule.judge(config, True, state, finite, finite, finite) == (finite, {}, {})
    assert not spike_rule.wanted(config)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"spike_window": 8}, ["train.spike_window=8", "[16, 1024]"]),
        ({"spike_deviations": 0.0}, ["train.spike_deviations=0.0", "(0, inf)"]),
        ({"spike_deviations": -1.0}, ["train.spike_deviations=-1.0"]),
        ({"steps": 16}, ["compares a step with 16", "train.steps=16"]),
        ({"spike_window": 400}, ["compares a step with 200", "train.steps=100"]),
        ({"spike_policy": "none"}, ["train.spike_window=16 is for spikes", "skip or rewind"]),
        ({"spike_leave_out": 3}, ["train.spike_leave_out=3 is for train.spike_policy=rewind"]),
        ({"spike_policy": "rewind", "save_every": 0}, ["train.save_every=0", "skip"]),
        (
            {"spike_policy": "rewind", "save_every": 10, "spike_leave_out": 11},
            ["train.spike_leave_out=11 is more than train.save_every=10"],
        ),
        ({"spike_policy": "stop"}, ["train.spike_policy='stop'", "none, skip, rewind"]),
    ],
)
def test_a_policy_that_cannot_act_is_refused(train, words):
    with pytest.raises(ValueError) as error:
        validate(config_of(**train))
    for word in words:
        assert word in str(error.value)


def test_differential_privacy_refuses_a_policy():
    config = config_of()
    private = dataclasses.replace(config.optimizer, dp_noise_multiplier=1.0)
    with pytest.raises(ValueError, match="train.spike_policy=skip with differential privacy"):
        validate(dataclasses.replace(config, optimizer=private))
