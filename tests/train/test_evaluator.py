"""Check held-out metrics: the same rows for every batch size, spread over all sources, with their
own bytes."""

import dataclasses
import math

import numpy as np
import pytest

from mtnlg_jax.config import Config, DataConfig, MeshConfig, ModelConfig, StageConfig, TrainConfig
from mtnlg_jax.data.batches import HeldOut
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import loop

LENGTH = 32
STAGES = (StageConfig("causal"), StageConfig("masked", masked=1.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Prepare two folders with one tokenizer; tokens of the second have fewer bytes than those of
    the first."""
    folder = tmp_path_factory.mktemp("evaluator")
    rng = np.random.default_rng(0)
    for name, words in (("long", "harbour lighthouse forecastle whale"), ("short", "a i o ab cd")):
        texts = [" ".join(rng.choice(words.split(), 300)) + "." for _ in range(120)]
        (folder / f"{name}.txt").write_text("\n".join(texts))
    prepare(folder / "long.txt", folder / "long", vocab_size=300, heldout=0.1, progress=False)
    prepare(
        folder / "short.txt",
        folder / "short",
        tokenizer=str(folder / "long" / "tokenizer"),
        heldout=0.1,
        progress=False,
    )
    return str(folder / "long"), str(folder / "short")


def config_of(blend, batch=8, eval_batches=2, mesh=None, **train):
    return Config(
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=LENGTH
        ),
        mesh=mesh or MeshConfig(data=8),
        data=DataConfig(blend=blend),
        train=TrainConfig(
            global_batch_size=batch, eval_batches=eval_batches, stages=STAGES, **train
        ),
    )


def evaluated(config):
    """Return (result, labels of all causal tokens scored) where token t costs t / 10 nats."""
    data = loop.load_data(config)
    mesh = make_mesh(config.mesh)
    evaluate = loop.Evaluator(loop.resolve(config, data.tokenizer), mesh, data)
    scored = []

    def step(name):
        def run(params, batch):
            labels = np.asarray(batch["labels"])
            weights = np.asarray(batch["weights"], np.float64)
            if name == "causal":
                scored.extend(labels[weights > 0].tolist())
            return (labels * weights).sum() / 10, weights.sum()

        return run

    evaluate._steps = {name: step(name) for name in evaluate.objectives}
    return evaluate({"blocks": None}), np.array(scored), data


@pytest.mark.parametrize("eval_batches", [1, 2, 100])
def test_bits_per_byte_divides_by_the_scored_bytes(folders, eval_batches):
    result, scored, data = evaluated(config_of(((folders[0], 1.0),), eval_batches=eval_batches))
    size = sum(len(data.tokenizer.token_bytes(token)) for token in scored)
    assert result["scored_bytes"] == size and result["scored_tokens"] == len(scored)
    assert result["causal_loss"] == pytest.approx(scored.mean() / 10)
    assert result["bits_per_byte"] == pytest.approx(scored.sum() / 10 / math.log(2) / size)
    ((tokens, _),) = data.held_out
    if eval_batches == 100:  # all of it
        assert (len(scored), size) == tokens.predicted
    else:
        assert (
            len(scored) < tokens.predicted[0]
            and result["scored_tokens"] > eval_batches * 15 * LENGTH * 0.9
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 16},
        {"batch": 48},
        {"batch": 16, "micro_batch_size": 1},
        {"batch": 4, "mesh": MeshConfig(tensor=2)},
        {"batch": 12, "micro_batch_size": 1, "mesh": MeshConfig(pipe=2)},
        {"batch": 2, "mesh": MeshConfig(tensor=2, context=2)},
    ],
    ids=["16", "48", "micro", "tensor", "pipe", "context"],
)
def test_metrics_do_not_depend_on_batch_and_mesh(folders, settings):
    blend = ((folders[0], 3.0), (folders[1], 1.0))
    usual, scored, _ = evaluated(config_of(blend))
    other, rows, _ = evaluated(config_of(blend, **settings))
    assert sorted(rows) == sorted(scored)
    assert (
        other == pytest.approx(usual, rel=1e-6) and {"causal_loss", "masked_loss"} <= usual.keys()
    )


def test_sources_are_weighted_by_their_share_of_training(folders):
    alone = [evaluated(config_of(((folder, 1.0),), eval_batches=100))[0] for folder in folders]
    blend = ((folders[0], 3.0), (folders[1], 1.0))
    both, _, data = evaluated(config_of(blend, eval_batches=100))
    for name in ("causal_loss", "masked_loss"):
        assert both[name] == pytest.approx(0.75 * alone[0][name] + 0.25 * alone[1][name], rel=1e-5)
    sizes = [one["scored_bytes"] / one["scored_tokens"] for one in alone]
    size = 0.75 * sizes[0] + 0.25 * sizes[1]
    assert both["bits_per_byte"] == pytest.approx(
        both["causal_loss"] / math.log(2) / size, rel=1e-5
    )
    assert [share for _, share in data.held_out] == pytest.approx([1.5, 0.5])  # of two stages
    # Stages with their own data are weighted by their share of the steps.
    config = config_of(())
    stages = (
        StageConfig("one", fraction=3, blend=((folders[0], 1.0),)),
        StageConfig("two", blend=((folders[1], 9.0),)),
    )
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, stages=stages),
        data=DataConfig(path=folders[0]),
    )
    assert [share for _, share in loop.load_data(config).held_out] == [3.0, 1.0]


def test_rows_are_spread_over_each_held_out_text(folders):
    data = loop.load_data(config_of(((folders[0], 1.0), (folders[1], 1.0))))
    held_out = HeldOut(data.held_out, LENGTH, 20)
    assert len(held_out) == 20 and np.bincount(held_out.source).tolist() == [10, 10]
    for index, (tokens, _) in enumerate(data.held_out):
        count = -(-(len(tokens) - 1) // LENGTH)
        windows = held_out.window[held_out.source == index]
        assert (
            (np.diff(windows) >= count // 10).all()
            and windows[0] <= count / 10
            and windows[-1] >= count * 0.9 - 1
        )
    every = HeldOut(data.held_out[:1], LENGTH, 10**6)
    assert every.window.tolist() == list(range(len(every)))


def test_without_held_out_text_there_are_no_metrics(tmp_path):
    (tmp_path / "text.txt").write_text("a text of some words\n" * 300)
    prepare(tmp_path / "text.txt", tmp_path / "data", vocab_size=280, heldout=0.0, progress=False)
    assert evaluated(config_of(((str(tmp_path / "data"), 1.0),)))[0] == {}
    summary = loop.Summary("RUN", 1, 1, 1, 1.0, 1.0, None, {"kind": "eval", "step": 20}, None, 0)
    assert summary.held_out == "nothing is held out, so there is no held-out loss"
    assert summary.kept == "the last ones" and "MFU unknown" in summary.speed
    text = dataclasses.replace(
        summary, final={"step": 20, "masked_loss": 2.0}, best_step=10, mfu=0.5
    )
    assert (
        text.held_out == "held out at step 20: masked loss 2.000" and "best (step 10)" in text.kept
    )
