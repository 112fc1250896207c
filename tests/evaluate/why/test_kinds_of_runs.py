"""Steps of other kinds of runs: masked, with dropout, a ramp, a blend, LoRA, a teacher, answers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from spiked_run import LENGTH, small_config, write_texts

from mtnlg_jax.config import MeshConfig, StageConfig
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.evaluate.why.replay import Opened, Replayed
from mtnlg_jax.evaluate.why.run_why import Question, answer
from mtnlg_jax.train.loop import train

pytestmark = pytest.mark.slow  # each trains runs of its own


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    write_texts(folder)
    prepare(folder / "texts.jsonl", folder / "a", vocab_size=360, progress=False)
    tokenizer = str(folder / "a" / "tokenizer")
    rng = np.random.default_rng(5)
    words = "whale ship old captain".split()
    with open(folder / "b.jsonl", "w") as file:
        for _ in range(90):
            file.write(json.dumps({"text": " ".join(rng.choice(words, 30))}) + "\n")
    prepare(folder / "b.jsonl", folder / "b", tokenizer=tokenizer, progress=False)
    with open(folder / "pairs.jsonl", "w") as file:
        for _ in range(90):
            row = {"prompt": " ".join(rng.choice(words, 8)), "answer": str(rng.choice(words))}
            file.write(json.dumps(row) + "\n")
    return folder


def _trained(config, workdir):
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        train(dataclasses.replace(config, mesh=MeshConfig(data=1)), str(workdir), False)
    return str(workdir)


def _blended(texts, **train):
    config = small_config("", steps=8, save_every=4, **train)
    data = dataclasses.replace(
        config.data, path="", blend=((str(texts / "a"), 2.0), (str(texts / "b"), 1.0))
    )
    return dataclasses.replace(config, data=data)


def test_masked_steps_with_dropout_a_ramp_and_a_blend(texts, tmp_path):
    config = _blended(
        texts,
        stages=(StageConfig("mixed", 1.0, masked=0.5),),
        rampup_batch_size=(4, 4, 24),
        micro_batch_size=2,
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout_rate=0.2))
    run = _trained(config, tmp_path / "run")
    for number, objective in ((4, "masked"), (7, "causal")):
        result, _ = answer(Question(run, number, replay=True, top=1, most=8))
        assert result["objective"] == objective and result["replay"]["equal"]
        assert len(result["sources"]) == 2
        tokens = sum(each["tokens"] for each in result["rows"])
        mean = sum(each["tokens"] * (each["loss"] or 0) for each in result["rows"]) / tokens
        # The losses by token have the dropout of the step.
        assert mean == pytest.approx(result["replayed"]["loss"], rel=1e-5)
        first = result["documents"][0]
        assert first["left_out"]["loss"] == pytest.approx(first["loss_without"], rel=1e-5)


def test_adapters_and_a_teacher(texts, tmp_path):
    base = _trained(_blended(texts), tmp_path / "base")
    tuned = _blended(texts, init=base)
    tuned = dataclasses.replace(
        tuned, optimizer=dataclasses.replace(tuned.optimizer, lora_rank=2, lora_targets=("q", "v"))
    )
    result, _ = answer(Question(_trained(tuned, tmp_path / "tuned"), 6, replay=True, most=4))
    assert result["replay"]["equal"] and set(result["gradient"]["groups"]) == {"adapters"}
    learner = _blended(
        texts, stages=(StageConfig("distilled", 1.0, distill=base, distill_weight=0.5),)
    )
    result, _ = answer(Question(_trained(learner, tmp_path / "learner"), 6, replay=True, most=4))
    assert result["replay"]["equal"]
    assert np.isfinite(result["documents"][0]["left_out"]["loss"])


def test_answers_of_packed_pairs(texts, tmp_path):
    prepare(
        texts / "pairs.jsonl",
        tmp_path / "pairs",
        tokenizer=str(texts / "a" / "tokenizer"),
        answer=" {answer}",
        progress=False,
    )
    config = small_config(tmp_path / "pairs", steps=6, save_every=3)
    run = _trained(config, tmp_path / "run")
    result, _ = answer(Question(run, 5, replay=True, most=64))
    assert result["replay"]["equal"]
    assert max(len({row for row in each["rows"]}) for each in result["documents"]) == 1
    opened = Opened(run, 4)
    batch = Replayed(opened, opened.load(3), 4).batch
    several = [int(places[0, 0]) for places in batch.documents.values()]
    # Rows hold several pairs, which are told apart.
    assert len(several) > 2 * len(set(several)) and batch.rows["tokens"].shape == (8, LENGTH)
