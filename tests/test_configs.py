"""Check that every run file in configs/ loads, is consistent, and has its published size."""

import ast
import dataclasses
import math
import re
import typing
from pathlib import Path

import jax
import pytest

from mtnlg_jax.config import MeshConfig, ModelConfig, TrainConfig, load_config
from mtnlg_jax.model.attention import SUPPORT
from mtnlg_jax.model.context_attention import MODES
from mtnlg_jax.model.transformer import ACTIVATIONS, RECOMPUTE, abstract_model
from mtnlg_jax.parallel.mesh import shardings_of
from mtnlg_jax.planning.layout import POLICIES
from mtnlg_jax.train.schedule import batch_size_at, samples_before

FOLDER = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.py"))
VOCABULARY = 1024  # used where the tokenizer decides

# Narayanan 2021, Table 1: billions, heads, width, layers, tensor, pipe, GPUs, batch.
LADDER = """
    1.7     24   2304   24  1   1    32   512
    3.6     32   3072   30  2   1    64   512
    7.5     32   4096   36  4   1   128   512
    18.4    48   6144   40  8   1   256  1024
    39.1    64   8192   48  8   2   512  1536
    76.1    80  10240   60  8   4  1024  1792
    145.6   96  12288   80  8   8  1536  2304
    310.1  128  16384   96  8  16  1920  2160
    529.6  128  20480  105  8  35  2520  2520
    1008.0 160  25600  128  8  64  3072  3072
"""
ROWS = [line.split() for line in LADDER.strip().splitlines()]


def _row_name(row: list[str]) -> str:
    return row[0].removesuffix(".0") + "b"


NAMES = [path.name for path in FILES if path.stem != "ladder"] + [
    f"ladder.py:{_row_name(row)}" for row in ROWS
]


def _config(name: str):
    return load_config(f"{FOLDER}/{name}")


def _size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_folder_has_all_published_configs():
    assert {"tiny", "mtnlg_530b", "ladder"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_and_counts_its_parameters(name):
    config = _config(name)
    assert config.name == name.replace(".py:", "_").removesuffix(".py")
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or VOCABULARY)
    assert _size(abstract_model(model)[1]) == model.parameter_count()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_shows_its_command_and_imports_only_the_package(path):
    tree = ast.parse(path.read_text())
    text = ast.get_docstring(tree)
    assert re.search(r"^ *(python|bash) launch/\w+\.(py|sh)", text, re.MULTILINE), "no command"
    named = {found.partition(":")[0] for found in re.findall(r"--config=(\S+)", text)}
    assert named <= {f"configs/{path.name}"}, "another config named"
    assert re.search(r"\b(CPU|GPU|A100|H100|TPU)s?\b", text), "no hardware"
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", "").split(".")[0] for node in imports} == {"mtnlg_jax"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_ladder_equals_the_published_table(row):
    config = _config(f"ladder.py:{_row_name(row)}")
    model = config.model
    mesh = config.mesh
    train = config.train
    assert f"{model.parameter_count() / 1e9:.1f}" == row[0]
    heads, width, layers, tensor, pipe, gpus, batch = map(int, row[1:])
    assert (model.num_attention_heads, model.hidden_size, model.num_layers) == (
        heads,
        width,
        layers,
    )
    assert (mesh.tensor, mesh.pipe, mesh.context) == (tensor, pipe, 1)
    assert mesh.pipe * mesh.data * mesh.tensor == gpus
    assert (train.global_batch_size, config.sequence_length, model.vocab_size) == (
        batch,
        2048,
        51200,
    )
    # The formula of section 5.1 omits the 2h of the final LayerNorm.
    h = width
    l = layers  # noqa: E741
    V = 51200
    s = 2048
    formula = 12 * l * h**2 * (1 + 13 / (12 * h) + (V + s) / (12 * l * h))
    assert model.parameter_count() - 2 * h == round(formula)


def test_megatron_turing_has_the_recipe_of_the_paper():
    config = _config("mtnlg_530b.py")
    model = config.model
    mesh = config.mesh
    train = config.train
    optimizer = config.optimizer
    assert f"{model.parameter_count() / 1e9:.1f}" == "529.6"
    assert model.parameter_count() == _config("ladder.py:529.6b").model.parameter_count()
    assert (model.head_width, model.mlp_width, model.init_method_std) == (160, 81920, 0.004)
    assert mesh.tensor * mesh.pipe == 280 and mesh.tensor * mesh.pipe * mesh.data == 2240
    assert len(config.data.blend) == 15
    assert sum(weight for _, weight in config.data.blend) == pytest.approx(1, abs=1e-9)
    tokens = samples_before(train, train.steps) * config.sequence_length
    assert (
        0 <= tokens - 270e9 + 2048 < 1920 * 2048
    )  # the last step exceeds this by less than a batch
    assert optimizer.warmup_fraction * tokens == pytest.approx(1e9, rel=1e-4)
    assert optimizer.decay_fraction * tokens == pytest.approx(340e9, rel=1e-4)


def test_the_batch_of_megatron_turing_grows_to_1920_over_12b_tokens():
    train = _config("mtnlg_530b.py").train
    ramp = round(12e9 / 2048)
    sizes = [batch_size_at(train, i * ramp // 590) for i in range(591)]
    assert sizes[0] == 32 and sizes[-2] < 1920 and sizes[-1] == 1920
    assert sorted(set(sizes)) == list(range(32, 1921, 32)) and sizes == sorted(sizes)


@pytest.mark.parametrize("name", ["mtnlg_530b.py", "ladder.py:310.1b", "ladder.py:1008b"])
def test_tensors_of_the_largest_configs_divide_over_their_axes(name):
    # An abstract mesh, because the plan for thousands of chips does not need them.
    config = _config(name)
    mesh = config.mesh
    shape = (mesh.pipe, mesh.data, mesh.context, mesh.tensor)
    abstract = jax.sharding.AbstractMesh(shape, ("pipe", "data", "context", "tensor"))
    shardings_of(abstract_model(config.model)[1], abstract, mesh.zero)


@pytest.mark.parametrize(
    ("section", "field", "choices"),
    [
        (ModelConfig, "attention_impl", ("auto", *SUPPORT)),
        (ModelConfig, "activation", (*ACTIVATIONS, "swiglu")),
        (MeshConfig, "context_mode", MODES),
        (TrainConfig, "recompute", tuple(RECOMPUTE)),
        (TrainConfig, "recompute", tuple(POLICIES)),
    ],
)
def test_the_choices_of_a_field_are_those_implemented(section, field, choices):
    assert set(typing.get_args(typing.get_type_hints(section)[field])) == set(choices)


SMALL = {
    "num_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "max_position_embeddings": 8,
}
VARIANTS = {
    "rotary": {"position_embedding_type": "rotary"},
    "rmsnorm": {"normalization": "rmsnorm"},
    "swiglu": {"activation": "swiglu"},
    "swiglu_no_bias": {"activation": "swiglu", "add_bias": False},
    "grouped_heads": {"num_query_groups": 2, "kv_channels": 10, "ffn_hidden_size": 20},
    "untied": {"tie_embeddings": False},
    "no_bias": {"add_bias": False},
    "all": {
        "position_embedding_type": "rotary",
        "normalization": "rmsnorm",
        "activation": "swiglu",
        "num_query_groups": 1,
        "tie_embeddings": False,
        "add_bias": False,
    },
}


@pytest.mark.parametrize("switches", VARIANTS.values(), ids=VARIANTS)
def test_the_parameter_count_is_exact_for_every_option(switches):
    plain = ModelConfig(**SMALL)
    model = ModelConfig(**SMALL, **switches)
    assert model.parameter_count() == _size(abstract_model(model)[1]) != plain.parameter_count()


def test_counting_parameters_needs_a_vocabulary():
    with pytest.raises(ValueError, match="model.vocab_size is not known yet"):
        ModelConfig().parameter_count()
