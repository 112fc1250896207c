"""Check training with a prefix: every mesh equals one device, and a small captioner learns."""

import base64
import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from mtnlg_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PrefixConfig,
    StageConfig,
    TrainConfig,
    to_json,
    validate,
)
from mtnlg_jax.data.prefix.rows import PrefixInput
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.interop.export import config_of
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.parallel.mesh import make_mesh, shardings_of
from mtnlg_jax.train import loop
from mtnlg_jax.train.batch import abstract_batch, put_batch
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.inputs import resolve
from mtnlg_jax.train.objectives import with_prefix

ROWS = 16
LENGTH = 16
TOLERANCE = 1e-5
SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "vocab_size": 128,
    "max_position_embeddings": LENGTH,
    "normalization": "rmsnorm",
    "add_bias": False,
}
MODELS = {
    "images": ModelConfig(**SIZES, prefix=PrefixConfig(width=12, image_size=6, patch_size=2)),
    "features": ModelConfig(**SIZES, prefix=PrefixConfig(length=7, width=5)),
}
MESHES = {
    "data and tensor": MeshConfig(data=2, tensor=4),
    "context and ZeRO 3": MeshConfig(data=2, context=2, tensor=2, zero=3),
    "pipe": MeshConfig(data=2, pipe=2, tensor=2),
    "1f1b": MeshConfig(data=1, pipe=2, context=2, tensor=2, schedule="1f1b", zero=3),
}
# Slow are the pairs with axes that a quick one has.
QUICK = {("images", "context and ZeRO 3"), ("features", "1f1b")}


@functools.cache
def rows(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    prefix = MODELS[name].prefix
    made = {
        "tokens": rng.integers(0, 128, shape),
        "labels": rng.integers(0, 128, shape),
        "segment_ids": np.ones(shape),
        "positions": np.tile(np.arange(LENGTH), (ROWS, 1)),
    }
    made = {key: x.astype(np.int32) for key, x in made.items()}
    made["weights"] = (rng.random(shape) > 0.3).astype(np.float32)
    numbers = rng.integers(0, 256, (ROWS, *prefix.shape)).astype(prefix.dtype)
    # Every third row is text alone.
    prefixed = (np.arange(ROWS) % 3 > 0).astype(np.int32)
    return with_prefix(made, {"prefix": numbers, "prefixed": prefixed}, prefix)


@functools.cache
def parameters(name: str):
    """Every parameter is random: zeros could hide mistakes of biases."""
    rng = np.random.default_rng(1)

    def noisy(leaf):
        return np.asarray(leaf) + 0.05 * rng.standard_normal(leaf.shape).astype(np.float32)

    return jax.tree.map(noisy, init_parameters(MODELS[name], seed=0))


@functools.cache
def loss_and_gradients(name: str, mesh_config: MeshConfig, micro_batches: int = 2):
    config = Config(
        model=MODELS[name],
        mesh=mesh_config,
        train=TrainConfig(
            global_batch_size=ROWS,
            micro_batch_size=ROWS // micro_batches // mesh_config.data,
            compute_dtype="float32",
            loss_chunk=24,
            steps=10,
        ),
    )
    validate(config)
    sizes = (mesh_config.pipe, mesh_config.data, mesh_config.context, mesh_config.tensor)
    mesh = make_mesh(mesh_config, jax.devices()[: np.prod(sizes)])
    params = jax.device_put(
        parameters(name), shardings_of(parameters(name), mesh, mesh_config.zero)
    )
    shape = (micro_batches, ROWS // micro_batches, LENGTH)
    batch = put_batch(
        lambda numbers: {key: x[numbers] for key, x in rows(name).items()},
        shape,
        mesh,
        config.model,
    )
    # Every step is compiled for this input.
    for key, wanted in abstract_batch(config, mesh).items():
        assert (batch[key].shape, batch[key].dtype) == (wanted.shape, wanted.dtype)
        assert batch[key].sharding == wanted.sharding
    function = jax.jit(make_loss_and_gradients(config, mesh, causal=True))
    key = jax.random.key_data(jax.random.key(3))
    loss, gradients = function(params, batch, jnp.int32(micro_batches), key)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return float(loss), {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_equal_numbers(got, wanted):
    assert got[0] == pytest.approx(wanted[0], rel=TOLERANCE)
    largest = max(np.abs(gradient).max() for gradient in wanted[1].values())
    for key, gradient in wanted[1].items():
        assert np.abs(gradient).max() > 0, key
        assert np.abs(got[1][key] - gradient).max() <= TOLERANCE * largest, key


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow, id="-".join(pair))
        for pair in ((name, mesh) for name in MODELS for mesh in MESHES)
    ],
)
def test_a_mesh_equals_one_device(name, mesh):
    got = loss_and_gradients(name, MESHES[mesh])
    assert_equal_numbers(got, loss_and_gradients(name, MeshConfig(data=1)))


def test_accumulation_changes_nothing():
    got = loss_and_gradients("images", MeshConfig(data=1), micro_batches=4)
    assert_equal_numbers(got, loss_and_gradients("images", MeshConfig(data=1)))


# --- whole runs


def data_of(folder, pairs: int) -> str:
    """Prepare ``pairs`` pictures of red and blue squares, with their colors as captions."""
    size = MODELS["images"].prefix.image_size
    rng = np.random.default_rng(0)
    with open(folder / "pairs.jsonl", "w") as lines:
        for number in range(pairs):
            color = number % 2
            picture = rng.integers(0, 60, (size, size, 3)).astype(np.uint8)
            picture[..., 2 * color] += 180
            buffer = io.BytesIO()
            PIL.Image.fromarray(picture).save(buffer, "PNG")
            image = {"bytes": base64.b64encode(buffer.getvalue()).decode()}
            row = {"image": image, "caption": ("a red square", "a blue square")[color]}
            lines.write(json.dumps(row) + "\n")
    prepare(
        folder / "pairs.jsonl",
        folder / "data",
        prefix=PrefixInput("image", size),
        prompt="",
        answer="{caption}",
        heldout=0.1,
        vocab_size=280,
        progress=False,
    )
    return str(folder / "data")


def run_of(model, path, steps, **train_options):
    return Config(
        model=dataclasses.replace(model, vocab_size=None, max_position_embeddings=32),
        data=DataConfig(path=path),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.1),
        train=TrainConfig(
            steps=steps,
            global_batch_size=16,
            compute_dtype="float32",
            eval_every=steps,
            save_every=steps,
            eval_batches=1,
            **train_options,
        ),
        mesh=MeshConfig(data=1),
    )


@pytest.fixture(scope="module")
def one_device_run():
    """Train on one of the eight virtual devices, as most users of a laptop do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


def run_of_text(folder, path: str) -> Config:
    """Save a random model of text as a run in ``folder``, with the tokenizer of ``path``."""
    tokenizer = load_tokenizer(f"{path}/tokenizer")
    config = run_of(dataclasses.replace(MODELS["images"], prefix=PrefixConfig()), path, 1)
    config = resolve(config, tokenizer)
    tokenizer.save(folder / "tokenizer")
    (folder / "config.json").write_text(to_json(config))
    checkpoints = Checkpoints(folder / "checkpoints")
    meta = {"config": json.loads(to_json(config)), "identity": {}}
    checkpoints.save(1, {"params": init_parameters(config.model, seed=5)}, meta, wait=True)
    checkpoints.close()
    return config


def test_a_captioner_learns_from_a_run_of_text(one_device_run, tmp_path):
    """A run of text gives a captioner its parameters, the projector is new, and it learns."""
    path = data_of(tmp_path, 64)
    run_of_text(tmp_path / "first", path)
    config = run_of(MODELS["images"], path, 150, init=str(tmp_path / "first"))
    adapted = dataclasses.replace(config, optimizer=OptimizerConfig(lora_rank=2))
    with pytest.raises(ValueError, match="projector of model.prefix is new"):
        loop.train(adapted, str(tmp_path / "adapted"), False)
    taught = (StageConfig("taught", distill=str(tmp_path / "first")),)
    taught = dataclasses.replace(config, train=dataclasses.replace(config.train, stages=taught))
    with pytest.raises(ValueError, match=r"the teacher's prefix has shape \(\)"):
        loop.train(taught, str(tmp_path / "taught"), False)

    loop.train(config, str(tmp_path / "run"), False)
    run, decoder = load_decoder(str(tmp_path / "run"))
    size = config.model.prefix.image_size
    for color, caption in ((0, "a red square"), (2, "a blue square")):
        picture = np.full((size, size, 3), 30, np.uint8)
        picture[..., color] = 210
        (result,) = generate(
            decoder, run.tokenizer, [""], DecodeConfig(max_new_tokens=12), prefixes=[picture]
        )
        assert (result.text, result.finish_reason) == (caption, "stop")


def test_no_other_format_can_express_a_prefix():
    with pytest.raises(ValueError, match="can express this model.*model.prefix"):
        config_of(MODELS["images"])
