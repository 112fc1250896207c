"""Layouts that are compiled rank by their prediction; the compiler is replaced here."""

import pytest

from mtnlg_jax.config import load_config
from mtnlg_jax.planning import aot, prediction, prove
from mtnlg_jax.planning.layout_report import job_of
from mtnlg_jax.planning.search import search


def fake(seconds: dict[int, float | None], asked: list):
    """Return a `measure` whose n-th call predicts ``seconds[n]``; None does not compile."""

    def measure(config, topology, predict):
        assert predict
        asked.append((config.mesh, config.train.micro_batch_size))
        found = aot.Measurement(str(topology), 64, {}, "train", 1, "libtpu 0", None)
        value = seconds[len(asked)]
        if value is None:
            found.failure = "out of memory"
            return found
        waits = [["wait all-gather data", "mtnlg_jax/train/weights.py:48", 0.5, 3, 100]]
        found.predicted = prediction.Prediction(1, value, 100.0, 0.5, 0.6, waits=waits)
        return found

    return measure


@pytest.fixture(scope="module")
def job():
    return job_of(load_config("configs/ladder.py:7.5b"), "v5p")[0]


def test_fastest_by_prediction_comes_first(job, monkeypatch):
    asked = []
    monkeypatch.setattr(prove, "measure", fake({1: 4.0, 2: None, 3: 3.0}, asked))
    topology = prove.topology_of("v5p", 64)
    lines = list(prove.proofs(job, topology, search(job, 64), 3))
    assert str(topology) == "v5p:4x4x4" and len(set(asked)) == 3
    assert lines[1] == "layout 2: out of memory"
    table = lines[4].splitlines()
    assert [row.split()[0] for row in table[1:]] == ["3", "1"]
    assert "500.0 ms wait all-gather data mtnlg_jax/train/weights.py:48" in " ".join(
        table[1].split()
    )
    assert "fastest by prediction: 3: --set=" in lines[5]


def test_nothing_that_compiles_is_said(job, monkeypatch):
    monkeypatch.setattr(prove, "measure", fake({1: None}, []))
    *_, last = prove.proofs(job, prove.topology_of("v5p", 64), search(job, 64), 1)
    assert "no layout on all devices compiled" in last


def test_topologies_of_numbers_of_chips():
    assert str(prove.topology_of("H100", 64)) == "H100:8x8"
    assert str(prove.topology_of("A100-80", 4)) == "A100:1x4"
    assert str(prove.topology_of("v6e", 256)) == "v6e:16x16"
    with pytest.raises(ValueError, match="no v5e slice has 48 chips; the nearest have 32 and 64"):
        prove.topology_of("v5e", 48)
    with pytest.raises(ValueError, match="12 H100 are no whole nodes of 8"):
        prove.topology_of("H100", 12)
    with pytest.raises(ValueError, match="--prove: there are no figures of the clock"):
        prove.topology_of("TPU7x", 4)
