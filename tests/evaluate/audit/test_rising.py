"""Exposure rises with the number of copies, from chance to all bits: a run of a minute."""

import pytest

from mtnlg_jax.config import load_config
from mtnlg_jax.data.canaries import CanaryConfig
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.evaluate.audit.run import audit
from mtnlg_jax.evaluate.audit.settings import AuditSettings
from mtnlg_jax.train.loop import train


@pytest.mark.slow
def test_exposure_rises_with_every_number_of_copies(tmp_path):
    prepare(None, tmp_path / "data", vocab_size=2000, canaries=CanaryConfig(10), progress=False)
    changes = [
        f"data.path={tmp_path}/data",
        "train.steps=600",
        "train.eval_every=600",
        "train.save_every=600",
        "train.global_batch_size=16",
        "optimizer.name=muon",
        "optimizer.learning_rate=1e-2",
    ]
    train(load_config("configs/tiny.py", changes), str(tmp_path / "run"))
    settings = AuditSettings(parts=("canaries",), candidates=500)
    report = audit(str(tmp_path / "run"), "last", settings, progress=False)
    rows = report["canaries"]["by_copies"]
    assert [row["copies"] for row in rows] == [0, 1, 4, 16, 64]
    none, *planted = rows
    assert none["exposure"]["low"] < report["canaries"]["chance"] < none["exposure"]["high"]
    means = [row["exposure"]["mean"] for row in rows]
    assert means == sorted(means)
    assert planted[-1]["exposure"]["low"] > none["exposure"]["high"] + 5
