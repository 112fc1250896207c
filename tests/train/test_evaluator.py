"""Check held-out metrics: the same rows for every batch size, spread over all sources, with their
own bytes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import Config, DataConfig, MeshConfig, ModelConfig, StageConfig, TrainConfig
from mtnlg_jax.data.batches import HeldOut
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import loop
from mtnlg_jax.train.evaluate import make_eval
from mtnlg_jax.train.state import state_shardings

LENGTH = 32
NAMES = 2  # sources of the runs here, where there are several
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


def evaluated(config, change=lambda data: None):
    """Return (result, labels of all causal tokens that the mean counts, data) where token t costs
    t / 10 nats. ``change`` may change the data."""
    data = loop.load_data(config)
    change(data)
    mesh = make_mesh(config.mesh)
    evaluate = loop.Evaluator(loop.resolve(config, data.tokenizer), mesh, data)
    evaluate._steps = dict.fromkeys(evaluate.objectives, costing)
    rows = evaluate._rows("causal", np.arange(len(evaluate.held_out)))
    return evaluate({"blocks": None}), rows["labels"][rows["weights"] > 0], data


def costing(params, batch):
    """Stand in for a step of `make_eval`: token t costs t / 10 nats."""
    labels = np.asarray(batch["labels"])
    weights = np.asarray(batch["weights"], np.float64)
    means = (labels * weights).sum() / 10, weights.sum()
    if "source" not in batch:
        return means
    source = np.asarray(batch["source"])[weights > 0]
    return *means, np.bincount(source, labels[weights > 0] / 10, minlength=NAMES)


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


def test_the_loss_of_each_source_is_that_of_a_run_on_it_alone(folders):
    alone = [evaluated(config_of(((folder, 1.0),)))[0] for folder in folders]
    assert not any("/" in name for one in alone for name in one)
    # As many rows of each as alone.
    both = evaluated(config_of(tuple((folder, 1.0) for folder in folders), eval_batches=4))[0]
    for name in ("causal_loss", "masked_loss"):
        for one, source in zip(alone, ("long", "short"), strict=True):
            assert both[f"{name}/{source}"] == pytest.approx(one[name], rel=1e-12)


def test_a_source_that_the_mean_leaves_out_has_a_row_of_its_own(folders):
    def record(data):
        ((tokens, _),) = data.held_out
        # Its last tokens, of which the 16 rows of the mean hold none.
        tokens.meta["sources"] = [["most", len(tokens) - LENGTH], ["rare", LENGTH]]

    config = config_of(((folders[0], 1.0),), eval_batches=1)
    plain, _, _ = evaluated(config)
    found, _, data = evaluated(config, record)
    names = {"causal_loss/most", "causal_loss/rare", "masked_loss/most", "masked_loss/rare"}
    assert set(found) - set(plain) == names
    assert {name: found[name] for name in plain} == plain
    ((tokens, _),) = data.held_out
    size = len(tokens)
    # The row that holds the middle of the rare source; what it has of the other one counts there.
    start = (size - LENGTH // 2 - 1) // LENGTH * LENGTH
    row = tokens.read(start, min(start + LENGTH + 1, size)).astype(int)
    offsets = tokens.document_offsets
    predicted = [i for i in range(1, len(row)) if start + i not in offsets]
    rare = [row[i] / 10 for i in predicted if start + i >= size - LENGTH]
    assert rare and found["causal_loss/rare"] == pytest.approx(np.mean(rare))


def test_losses_of_sources_come_from_the_rows_of_a_batch(folders):
    blend = ((folders[0], 3.0), (folders[1], 1.0))
    config = config_of(blend, mesh=MeshConfig(), compute_dtype="float32")
    data = loop.load_data(config)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    config = loop.resolve(config, data.tokenizer)
    params = init_parameters(config.model, 0)
    evaluate = loop.Evaluator(config, mesh, data)
    found = evaluate(params)
    # By hand: every token's loss, from the plain model's logits.
    rows = evaluate._rows("causal", np.arange(len(evaluate.held_out)))
    model = nnx.merge(abstract_model(config.model)[0], params)
    arrays = {"positions_BS": rows["positions"], "segment_ids_BS": rows["segment_ids"]}
    scores = jax.nn.log_softmax(model(jnp.asarray(rows["tokens"]), **arrays))
    losses = -np.take_along_axis(np.asarray(scores), rows["labels"][..., None], 2)[..., 0]
    for number, name in enumerate(("long", "short")):
        mine = (evaluate.held_out.source == number)[:, None] & (rows["weights"] > 0)
        assert found[f"causal_loss/{name}"] == pytest.approx(losses[mine].mean(), rel=1e-5)
    # The mean is what it would be without them, to the last bit.
    plain = make_eval(config, mesh, causal=True)
    total = weight = 0.0
    for batch, _ in evaluate._batches("causal"):
        batch.pop("source")
        nats, tokens = map(float, plain(params, batch))
        total += nats
        weight += tokens
    assert found["causal_loss"] == total / weight
    for settings in (MeshConfig(data=2, tensor=2, pipe=2), MeshConfig(context=4)):
        train = dataclasses.replace(config.train, micro_batch_size=1)
        other = dataclasses.replace(config, mesh=settings, train=train)
        there = make_mesh(settings)
        placed = init_parameters(config.model, 0, state_shardings(other, there).params)
        assert loop.Evaluator(other, there, data)(placed) == pytest.approx(found, rel=2e-6)


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
    parts = {"causal_loss": 2.0, "causal_loss/web": 2.5, "causal_loss/books": None}
    parts = dataclasses.replace(summary, final={"step": 20, **parts})
    assert parts.held_out.splitlines() == [
        "held out at step 20: causal loss 2.000",
        "  causal loss by source: web 2.500, books not finite",
    ]
    assert (
        text.held_out == "held out at step 20: masked loss 2.000" and "best (step 10)" in text.kept
    )
