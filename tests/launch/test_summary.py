"""Check the text that a run prints at its end."""

import pytest

from mtnlg_jax.cli.training.summary import described
from mtnlg_jax.train.reporter import Summary


def summary_of(workdir, spikes=0):
    numbers = (str(workdir), 60, 38_528, 11_520, 2.0, 5760.0, None)
    return Summary(*numbers, {"step": 60, "causal_loss": 0.5}, 60, 0, spikes=spikes)


@pytest.mark.parametrize(
    ("spikes", "text"),
    [(0, "0 steps skipped\n"), (1, ", 1 spike left out\n"), (2000, ", 2,000 spikes left out\n")],
)
def test_spikes_are_counted(tmp_path, spikes, text):
    assert text in described(summary_of(tmp_path, spikes))


def test_tensorboard_is_named_where_its_files_are(tmp_path):
    assert "TensorBoard" not in described(summary_of(tmp_path))
    (tmp_path / "tensorboard").mkdir()
    assert f"tensorboard --logdir={tmp_path}/tensorboard\n" in described(summary_of(tmp_path))
