"""why.py: it names the planted document of a spike, replays bit for bit, and equals every mesh."""

import json
import math
import shutil

import numpy as np
import pytest

from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.evaluate.inside.files import write_results
from mtnlg_jax.evaluate.why import page, states
from mtnlg_jax.evaluate.why.neighbors import Recorded
from mtnlg_jax.evaluate.why.replay import Opened, Replayed
from mtnlg_jax.evaluate.why.run_why import Question, answer, compared

SPIKE = 24  # the step that reads the bad document


@pytest.fixture(scope="module")
def report(spiked):
    return answer(Question(spiked.run, None, replay=True, top=2))


def test_it_names_the_planted_document_of_the_spike(report, spiked):
    result, shown = report
    assert result["step"] == SPIKE
    first = result["documents"][0]
    assert first["source"] == str(spiked.folder / "data")
    assert first["text"].strip() == spiked.bad
    # Clearly: the next one explains little.
    scores = [
        each["deviations_of_loss"] + each["deviations_of_grad_norm"] for each in result["documents"]
    ]
    assert scores[0] > 3 * max(scores[1], 0.1)
    said = page.lines(result)
    assert f"1. {first['source']} document {first['document']}" in said and spiked.bad[:30] in said
    assert "<script" not in shown and "http:" not in shown and "https:" not in shown


def test_the_replay_is_the_run_bit_for_bit(report, spiked):
    result, _ = report
    recorded = spiked.records[SPIKE]
    assert result["replay"]["equal"] is True and result["parameters"]["exact"]
    for name in ("loss", "grad_norm"):
        assert result["replay"][name] == recorded[name]
        assert result["replayed"][name] == pytest.approx(recorded[name], rel=1e-6)


def test_the_parts_add_up(report):
    result, _ = report
    documents = result["documents"]
    # One document has a single token in the batch, so nothing of it is predicted.
    assert result["documents_measured"] == result["documents_in_batch"] - 1 == len(documents)
    assert sum(each["tokens"] for each in documents) == result["tokens"]
    assert sum(each["gradient_share"] for each in documents) == pytest.approx(1, abs=1e-4)
    mean = sum(each["tokens"] * each["loss"] for each in documents) / result["tokens"]
    assert mean == pytest.approx(result["replayed"]["loss"], rel=1e-5)
    norms = np.concatenate(
        [np.ravel(x) for x in result["gradient"]["parameters"].values()], dtype=float
    )
    assert math.sqrt((norms**2).sum()) == pytest.approx(result["replayed"]["grad_norm"], rel=1e-6)
    rows = result["rows"]
    assert sum(each["tokens"] * each["loss"] for each in rows) / result["tokens"] == pytest.approx(
        mean, rel=1e-5
    )
    # The production step without a document agrees with the difference of gradients.
    for each in documents[:2]:
        assert each["left_out"]["loss"] == pytest.approx(each["loss_without"], rel=1e-5)
        assert each["left_out"]["grad_norm"] == pytest.approx(each["grad_norm_without"], rel=1e-4)
    assert documents[2]["left_out"] is None


def _figures(run, entries):
    opened = Opened(run, SPIKE - 1, entries)
    step = Replayed(opened, opened.load(20), SPIKE - 1)
    losses = step.token_losses()
    document = next(iter(step.batch.documents))
    return step.loss, step.norm, losses, step.measure(document, losses), step


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "tensor": 2, "context": 2},
        pytest.param({"pipe": 2, "data": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"pipe": 2, "data": 2, "tensor": 2, "schedule": "circular"}, marks=pytest.mark.slow
        ),
        pytest.param({"data": 2, "tensor": 4, "zero": 3}, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_has_the_same_numbers(spiked, mesh):
    entries = [f"mesh.{name}={value}" for name, value in mesh.items()]
    loss, norm, losses, part, alone = _figures(spiked.run, [])
    assert alone.batch.mesh.size == 1
    got = _figures(spiked.run, entries)
    assert got[-1].batch.mesh.size == 8
    assert got[0] == pytest.approx(loss, rel=1e-5) and got[1] == pytest.approx(norm, rel=1e-4)
    np.testing.assert_allclose(got[2], losses, rtol=1e-4, atol=1e-5)
    for name, value in part._asdict().items():
        if isinstance(value, float):
            assert getattr(got[3], name) == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert got[3][:3] == part[:3]


def test_few_documents_are_chosen_with_the_bad_one(spiked):
    result, _ = answer(Question(spiked.run, SPIKE, most=3, top=0))
    assert result["documents_measured"] == 3 and result["parameters"]["steps_before"] == 3
    assert result["documents"][0]["text"].strip() == spiked.bad
    assert result["documents"][0]["left_out"] is None


def test_the_files_are_whole_json_and_html(report, tmp_path):
    names = write_results(str(tmp_path), "why", *report)
    assert names == ["why.json", "why.html"]
    found = json.loads((tmp_path / "why.json").read_text())
    assert found["kind"] == "why" and found["step"] == SPIKE
    assert {"commit", "versions", "created"} <= set(found)


def test_bad_input_is_one_error(spiked, tmp_path):
    run = spiked.run
    (tmp_path / "other.txt").write_text("the captain slept on the ship. " * 99)
    tokenizer = str(spiked.folder / "data/tokenizer")
    prepare(tmp_path / "other.txt", tmp_path / "other", tokenizer=tokenizer, progress=False)
    for question, words in (
        (Question(run, 99), "--step=99 is beyond the run"),
        (Question(run, 0), "--step=0"),
        (Question(run, 8), "no checkpoint before step 8 is kept (kept: 10, 20, 30, 32)"),
        (Question(run, 24, checkpoint=22), "--checkpoint=22 is not kept"),
        (Question(run, 24, checkpoint=30, replay=True), "--replay goes forward"),
        (Question(run, 24, entries=("optimizer.b1=0.5",)), "would make another step"),
        (Question(run, 24, entries=(f"data.path={tmp_path}/gone",)), "gone"),
        (Question(run, 24, entries=(f"data.path={tmp_path}/other",)), "data.source 0"),
        (Question(str(tmp_path), 24), "is not a run"),
        (Question(run, 24, entries=("mesh.tensor=3",)), "mesh"),
    ):
        with pytest.raises((ValueError, OSError)) as error:
            answer(question)
        assert words in str(error.value), error.value


def test_without_metrics_no_spike_is_found(spiked, tmp_path):
    shutil.copy(f"{spiked.run}/config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="give the number with --step"):
        answer(Question(str(tmp_path), None))


def test_a_later_checkpoint_says_so(spiked):
    assert states.choose(spiked.run, 23) == 20
    assert states.choose(spiked.run, 23, 30) == 30
    assert states.choose(spiked.run, 0) is None
    assert states.choose(spiked.run, 7, replay=True) is None


def test_a_step_that_was_not_finite_equals_its_record():
    exact = {"loss": math.nan, "grad_norm": math.inf}
    recorded = Recorded(3, "causal", {"loss": math.nan, "grad_norm": math.nan})  # null in the file
    assert compared(exact, recorded)["equal"]
    assert not compared(exact | {"loss": 1.0}, recorded)["equal"]
