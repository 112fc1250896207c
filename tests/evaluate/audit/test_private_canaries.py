"""Check on canaries that a differentially private run does not remember a row."""

import dataclasses
import json

import jax
import pytest

from mtnlg_jax.config import load_config
from mtnlg_jax.data.canaries import CanaryConfig
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.evaluate.audit.run import audit
from mtnlg_jax.evaluate.audit.settings import AuditSettings
from mtnlg_jax.train import loop

CHANCE = 1.4427  # bits: the mean exposure of a secret of which a model knows nothing
COPIES = (0, 1, 4, 16, 64)


@pytest.mark.slow
def test_canaries_stay_at_chance_at_epsilon_8(tmp_path, monkeypatch):
    """The example of docs/privacy.md: minutes of one core."""
    pytest.importorskip("dp_accounting")
    make = loop.make_mesh
    one = dataclasses.replace(load_config("configs/tiny.py", []).mesh, data=1)
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: make(one, jax.devices()[:1]))
    data = tmp_path / "data"
    canaries = CanaryConfig(8, COPIES)
    prepare(None, data, vocab_size=1000, heldout=0.05, canaries=canaries, progress=False)

    def measured(name, *more):
        changes = [
            f"data.path={data}",
            "data.sequence_length=32",
            "train.steps=2500",
            "train.global_batch_size=12",
            "train.eval_every=0",
            "train.save_every=0",
            "train.log_every=50",
            "optimizer.name=muon",
            "optimizer.learning_rate=1e-2",
        ]
        config = load_config("configs/tiny.py", [*changes, *more])
        loop.train(config, str(tmp_path / name), show_progress=False)
        settings = AuditSettings(parts=("canaries",), candidates=1000)
        report = audit(str(tmp_path / name), "last", settings, progress=False)["canaries"]
        return {row["copies"]: row for row in report["by_copies"]}

    plain = measured("plain")
    assert all(plain[copies]["chance_probability"] < 1e-4 for copies in (4, 16, 64))
    for seed in (0, 1):
        name = f"private {seed}"
        private = measured(name, "optimizer.dp_target_epsilon=8", f"train.seed={seed}")
        assert set(private) == set(COPIES)
        for row in private.values():
            assert row["chance_probability"] > 1e-3 and row["exposure"]["low"] < CHANCE
        spent = json.loads((tmp_path / name / "privacy.json").read_text())
        assert 7.9 < spent["epsilon"] <= 8
