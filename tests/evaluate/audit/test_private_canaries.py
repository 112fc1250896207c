"""Check on canaries that a differentially private run does not remember a row."""

import dataclasses
import itertools
import json

import jax
import pytest

from mtnlg_jax.config import load_config
from mtnlg_jax.data.canaries import CanaryConfig
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.evaluate.audit.run import audit
from mtnlg_jax.evaluate.audit.settings import AuditSettings
from mtnlg_jax.train import loop


@pytest.mark.slow
def test_canaries_stay_at_chance_at_epsilon_8(tmp_path, monkeypatch):
    pytest.importorskip("dp_accounting")
    make = loop.make_mesh
    one = dataclasses.replace(load_config("configs/tiny.py", []).mesh, data=1)
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: make(one, jax.devices()[:1]))
    texts = [document.text for document in itertools.islice(embedded_documents(), 100)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    data = tmp_path / "data"
    canaries = CanaryConfig(4, (0, 1, 16))
    prepare(
        tmp_path / "text.jsonl",
        data,
        vocab_size=400,
        heldout=0.1,
        canaries=canaries,
        progress=False,
    )
    found = {}
    for name, more in (("plain", []), ("private", ["optimizer.dp_target_epsilon=8"])):
        changes = [
            f"data.path={data}",
            "train.steps=500",
            "train.eval_every=0",
            "train.save_every=0",
            "train.log_every=50",
            "train.global_batch_size=32",
            "optimizer.learning_rate=3e-3",
        ]
        config = load_config("configs/tiny.py", [*changes, *more])
        loop.train(config, str(tmp_path / name), show_progress=False)
        settings = AuditSettings(parts=("canaries",), candidates=1000)
        report = audit(str(tmp_path / name), "last", settings, progress=False)["canaries"]
        found[name] = {row["copies"]: row for row in report["by_copies"]}
    assert found["plain"][16]["chance_probability"] < 1e-4
    # The unit is one row. What stands in 16 is protected less.
    for copies in (0, 1):
        assert found["private"][copies]["chance_probability"] > 0.01
        assert found["private"][copies]["exposure"]["mean"] < 4
    exposures = [found[name][16]["exposure"]["mean"] for name in ("plain", "private")]
    assert exposures[1] < exposures[0] / 2
    spent = json.loads((tmp_path / "private" / "privacy.json").read_text())
    assert 7.9 < spent["epsilon"] <= 8
