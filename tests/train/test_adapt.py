"""Train whole runs that start from other runs: fine-tuned, with low-rank adapters, or distilled."""

import contextlib
import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)
from mtnlg_jax.data.batches import Packed
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.interop import registry
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import loop
from mtnlg_jax.train.batch import put_batch
from mtnlg_jax.train.checkpoint import load_run
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.metrics import read_metrics, training_loss
from mtnlg_jax.train.objectives import causal_batch

MODEL = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=4, max_position_embeddings=32)
LOW_RANK = OptimizerConfig(learning_rate=3e-3, lora_rank=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled_once):
    """Prepare plain and pairs with one tokenizer, other with another, and base, a run on plain."""
    folder = tmp_path_factory.mktemp("adapt")
    words = "the old whale swam north past a red ship and nobody woke".split()
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 9)) for _ in range(300)]
    (folder / "book.txt").write_text(".\n".join(lines))
    (folder / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"prompt": line[: len(line) // 2], "answer": line.split()[0]}) + "\n"
            for line in lines
        )
    )
    prepare(folder / "book.txt", folder / "plain", vocab_size=300, heldout=0.1, progress=False)
    for name, tokenizer in (("pairs", folder / "plain" / "tokenizer"), ("other", "bpe")):
        prepare(
            folder / "pairs.jsonl",
            folder / name,
            vocab_size=290,
            heldout=0.1,
            progress=False,
            answer=" {answer}",
            tokenizer=str(tokenizer),
        )
    train(config_of(folder, "plain", steps=2), folder / "base")
    return folder


def config_of(folder, data="pairs", steps=4, model=MODEL, optimizer=None, **train):
    train = {"global_batch_size": 4, "eval_every": 2, "save_every": 2, "eval_batches": 2} | train
    return Config(
        model=model,
        mesh=MeshConfig(data=2),
        data=DataConfig(path=str(folder / data)),
        optimizer=optimizer or OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(steps=steps, compute_dtype="float32", **train),
    )


def train(config, workdir, stop_before=None):
    class Stop(Exception):
        pass

    real = loop.batch_at
    make = loop.make_mesh
    loop.make_mesh = lambda config: make(config, jax.devices()[:2])  # less to compile than for all

    def failing(config, mesh, data, step, samples):
        if step == stop_before:
            raise Stop
        return real(config, mesh, data, step, samples)

    loop.batch_at = failing
    try:
        return loop.train(config, str(workdir), show_progress=False)
    except Stop:
        return None
    finally:
        loop.batch_at = real
        loop.make_mesh = make


def numbers(workdir):
    return [
        {
            key: value
            for key, value in record.items()
            if key not in ("tokens_per_second", "mfu", "time")
        }
        for record in read_metrics(os.path.join(workdir, "metrics.jsonl"))
        if record["kind"] != "goodput"  # seconds
    ]


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# Slow: adapters are saved and restored by the same code; test_a_run_starts_as_its_base runs them.
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(None, id="all parameters"),
        pytest.param(LOW_RANK, id="low rank", marks=pytest.mark.slow),
    ],
)
def test_a_run_from_another_resumes_bit_for_bit(folder, tmp_path, optimizer):
    config = config_of(folder, init=str(folder / "base"), optimizer=optimizer, eval_every=0)
    train(config, tmp_path / "whole")
    assert train(config, tmp_path / "parts", stop_before=3) is None
    parts = tmp_path / "parts"
    train(config, parts)
    assert numbers(parts) == numbers(tmp_path / "whole")
    ours = load_run(parts, "last")
    wanted = load_run(tmp_path / "whole", "last")
    assert_equal_trees(ours.params, wanted.params)
    assert ours.config.optimizer.lora_rank == 0  # merged, it is a plain model
    base = load_run(folder / "base")
    assert jax.tree.structure(ours.params) == jax.tree.structure(base.params)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(ours.params),
            jax.tree.leaves(base.params),
            strict=True,
        )
        if not np.array_equal(new, old)
    }
    if optimizer:
        assert changed == {"blocks.attention.w_q_DNH", "blocks.attention.w_v_DKH"}
        with pytest.raises(ValueError, match="lora.alpha: 16.0 -> 8.0"):
            train(
                dataclasses.replace(
                    config, optimizer=dataclasses.replace(optimizer, lora_alpha=8.0)
                ),
                parts,
            )
    else:
        assert len(changed) > 10
        # It does not need its start again, but another one would not be read, and does not get onto
        # its record.
        for init, words in (
            ("", None),
            (str(tmp_path / "gone"), f"started from .{folder / 'base'}.*leave --init out"),
        ):
            given = dataclasses.replace(config, train=dataclasses.replace(config.train, init=init))
            with (
                contextlib.nullcontext()
                if words is None
                else pytest.raises(ValueError, match=words)
            ):
                train(given, parts)
            assert json.loads((parts / "config.json").read_text())["train"]["init"] == str(
                folder / "base"
            )


def test_a_run_starts_as_its_base_and_adapters_load_merged(folder, tmp_path):
    still = OptimizerConfig(learning_rate=1e-30, weight_decay=0.0)
    config = config_of(folder, init=str(folder / "base"), optimizer=still, steps=1)
    train(config, tmp_path)
    assert_equal_trees(load_run(tmp_path).params, load_run(folder / "base").params)


def test_the_gradient_equals_a_loss_on_answers_packed_or_separate(folder):
    tokens = open_tokens(folder / "pairs" / "train")
    length = 32
    model = dataclasses.replace(MODEL, vocab_size=384)
    config = Config(model=model, train=TrainConfig(global_batch_size=4, compute_dtype="float32"))
    params = init_parameters(model, 0)
    graph = abstract_model(model)[0]
    rows = causal_batch(Packed(tokens, length).rows(np.arange(4)))
    assert rows["segment_ids"].max() > 1  # several pairs a row
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    batch = put_batch(
        lambda n: {name: value[n] for name, value in rows.items()}, (1, 4, length), mesh
    )
    loss, grads = jax.jit(make_loss_and_gradients(config, mesh, True))(
        params, batch, jnp.int32(1), jax.random.key_data(jax.random.key(0))
    )
    pairs = int(sum(segments.max() for segments in rows["segment_ids"]))
    ids = np.zeros((pairs, length + 1), np.int32)
    asked = tokens.prompt_lengths[:pairs]
    for pair in range(pairs):
        begin, end = tokens.document_offsets[pair : pair + 2]
        ids[pair, : end - begin] = tokens.read(begin, end)
    sizes = np.diff(tokens.document_offsets)[:pairs]
    place = np.arange(1, length + 1)
    answers = (place >= asked[:, None]) & (place < sizes[:, None])

    def longhand(params):
        log_p = jax.nn.log_softmax(nnx.merge(graph, params)(ids[:, :-1]))
        picked = jnp.take_along_axis(log_p, ids[:, 1:, None], -1)[..., 0]
        return -(picked * answers).sum() / answers.sum()

    value, wanted = jax.jit(jax.value_and_grad(longhand))(params)
    assert float(loss) == pytest.approx(float(value), rel=1e-5)
    largest = max(np.abs(grad).max() for grad in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert np.abs(a - b).max() < 1e-5 * largest


def taught(folder, teacher, weight=0.5, **settings):
    return config_of(
        folder,
        model=dataclasses.replace(MODEL, hidden_size=8),
        steps=2,
        stages=(
            StageConfig("alone", 0.5),
            StageConfig("taught", 0.5, distill=str(teacher), distill_weight=weight, **settings),
        ),
    )


@pytest.mark.slow  # test_distill.py has the same of a step
def test_a_stage_learns_from_a_teacher_and_weight_0_is_a_plain_run(folder, tmp_path):
    losses = {}
    for name, config in {
        "plain": dataclasses.replace(
            taught(folder, ""),
            train=dataclasses.replace(
                taught(folder, "").train,
                stages=(StageConfig("alone", 0.5), StageConfig("taught", 0.5)),
            ),
        ),
        "0": taught(folder, folder / "base", 0.0),
        "half": taught(folder, folder / "base", distill_temperature=2.0),
    }.items():
        train(config, tmp_path / name)
        losses[name] = numbers(tmp_path / name)
    assert losses["0"] == losses["plain"]
    first, second = (
        [training_loss(record)[1] for record in losses[name] if record["kind"] == "train"]
        for name in ("plain", "half")
    )
    assert first[0] == second[0] and first[1] != second[1]
    saved = load_run(tmp_path / "half").meta["identity"]
    assert saved["teacher"] == {"stage 1": "checkpoint 2"}


@pytest.mark.slow
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_run_of_a_quantized_base_resumes_and_decodes(folder, tmp_path, base):
    model = dataclasses.replace(MODEL, hidden_size=128, ffn_hidden_size=128)
    if not (folder / "wide").exists():
        train(config_of(folder, "plain", steps=8, model=model), folder / "wide")

    def of(kind, targets=LOW_RANK.lora_targets):
        optimizer = dataclasses.replace(LOW_RANK, lora_base=kind, lora_targets=targets)
        init = str(folder / "wide")
        return config_of(folder, init=init, model=model, optimizer=optimizer, eval_every=0)

    config = of(base)
    train(config, tmp_path / "whole")
    assert train(config, tmp_path / "parts", stop_before=3) is None
    # The checkpoint holds the quantized base, so the run that it came from may be gone.
    (folder / "wide").rename(folder / "gone")
    train(config, tmp_path / "parts")
    (folder / "gone").rename(folder / "wide")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    ours = load_run(tmp_path / "parts", "last")
    assert_equal_trees(ours.params, load_run(tmp_path / "whole", "last").params)
    train(of("float"), tmp_path / "float")
    got, wanted = (
        [
            record["loss"]
            for record in read_metrics(tmp_path / name / "metrics.jsonl")
            if record["kind"] == "train"
        ]
        for name in ("whole", "float")
    )
    assert got != wanted and np.allclose(got, wanted, rtol=0.02)
    _, decoder = load_decoder(tmp_path / "parts", "last")
    assert_equal_trees(decoder.params, unstack(ours.config.model, ours.params).params)
    with pytest.raises(ValueError, match="lora: .*base|lora.base"):
        train(of("float"), tmp_path / "parts")


# --- invalid configs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": dataclasses.replace(MODEL, hidden_size=8)},
            r"--init=.*base: parameter blocks.attention.b_k_KH is \(1, 4, 4\) there "
            r"and \(1, 4, 2\) in this config; give --set=model.hidden_size=16$",
        ),
        (
            {"model": dataclasses.replace(MODEL, add_bias=False)},
            r"parameter blocks.attention.b_\w+ is \(1, .*\) there and absent in this config; "
            r"give --set=model.add_bias=True",
        ),
        (
            {"model": dataclasses.replace(MODEL, norm_epsilon=1e-6)},
            r"model.norm_epsilon is 1e-05 there and 1e-06 in this config, "
            r"so that its parameters would mean something else",
        ),
        (
            {"data": "other"},
            r"--init=.*base has another tokenizer \(300 tokens, \w+\) than the data \(290, .*"
            r"--tokenizer=.*base/tokenizer$",
        ),
        ({"init": "none"}, r"--init=none is not a run: none does not exist; give the --workdir"),
    ],
)
def test_invalid_initial_runs_raise_an_error(folder, tmp_path, change, message):
    config = config_of(folder, **{"init": str(folder / "base")} | change)
    with pytest.raises((ValueError, OSError), match=message):
        train(config, tmp_path)
    assert not os.path.exists(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("teacher", "change", "message"),
    [
        ("base", {"data": "other"}, "stage 'taught': distill=.*base has another tokenizer"),
        ("none", {}, "stage 'taught': distill=.*none is not a run"),
        (
            "base",
            {"vocab_size": 512},
            r"the teacher's vocabulary has 384 rows and this model's has 512; "
            r"give --set=model.vocab_size=384$",
        ),
    ],
)
def test_invalid_teachers_raise_an_error(folder, tmp_path, teacher, change, message):
    config = taught(folder, folder / teacher)
    if "data" in change:
        config = dataclasses.replace(config, data=DataConfig(path=str(folder / change["data"])))
    else:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    with pytest.raises((ValueError, OSError), match=message):
        train(config, tmp_path)


def test_a_hugging_face_folder_without_tensors_as_base_raises_an_error(folder, tmp_path):
    registry.register()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(FileNotFoundError, match="holds neither model.safetensors nor"):
        train(config_of(folder, init=str(tmp_path)), tmp_path / "run")


def test_an_answer_longer_than_the_sequence_raises_an_error(folder, tmp_path):
    config = config_of(folder)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=2))
    with pytest.raises(
        ValueError,
        match=r"the answer of pair \d+ has \d+ tokens with its end, data.sequence_length=2",
    ):
        train(config, tmp_path)
