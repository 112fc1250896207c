"""Check how configs are read, which are refused, and that errors give the values and a remedy."""

import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from mtnlg_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
    from_json,
    load_config,
    map_paths,
    override,
    to_json,
    validate,
    validate_batch,
)
from mtnlg_jax.data.recipe.settings import Recipe

BASE = Config()


def _refused(call, *words):
    """Return the message of the ValueError that ``call`` raises: one line with all of ``words``."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, f"{word!r} is missing from: {message}"
    return message


# --- reading


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("train.steps=10", "train.steps", 10),
        (" train.steps = 1_000 ", "train.steps", 1000),
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("model.num_query_groups=None", "model.num_query_groups", None),
        ("model.num_query_groups=4", "model.num_query_groups", 4),
        ("model.tie_embeddings=false", "model.tie_embeddings", False),
        ("train.keep_best=True", "train.keep_best", True),
        ("data.path=/a=b c", "data.path", "/a=b c"),
        ("name=", "name", ""),
        ("model.activation=swiglu", "model.activation", "swiglu"),
        ("data.blend=(('a', 1), ['b', 0.5])", "data.blend", (("a", 1.0), ("b", 0.5))),
        ("train.rampup_batch_size=[8, 8, 100]", "train.rampup_batch_size", (8, 8, 100)),
        ("decode.stop_strings=('x', '=')", "decode.stop_strings", ("x", "=")),
        ("data.masking.word_share=0.2", "data.masking.word_share", 0.2),
        (
            "train.stages=[{'name': 'm', 'masked': 1, 'blend': [('a', 2)]}, {}]",
            "train.stages",
            (StageConfig(name="m", masked=1.0, blend=(("a", 2.0),)), StageConfig()),
        ),
    ],
)
def test_override_reads_a_value_as_its_fields_type(assignment, path, value):
    changed = override(BASE, assignment)
    read = changed
    for key in path.split("."):
        read = getattr(read, key)
    assert read == value and type(read) is type(value)
    assert (
        changed == override(changed) and BASE == Config()
    )  # nothing else changed, and neither did BASE


def test_the_last_override_wins():
    changed = override(BASE, "train.steps=1", "train.seed=5", "train.steps=2")
    assert changed.train == TrainConfig(steps=2, seed=5)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.steps", ["train.steps", "has no '='", "--set=train.steps=10"]),
        ("", ["has no '='"]),
        ("=5", ["Config has no ''", "train"]),
        ("train.stepz=5", ["train.stepz", "did you mean 'steps'"]),
        ("trian.steps=5", ["did you mean 'train'"]),
        ("train..steps=5", ["TrainConfig has no ''"]),
        (
            "model.kv_heads=5",
            ["ModelConfig has no 'kv_heads'", "num_query_groups"],
        ),  # a property, not a key
        ("model=5", ["model is a section", "num_layers"]),
        ("name.x=5", ["name is a value, not a section"]),
        ("train.stages.0.name=a", ["stages is a value, not a section"]),
        ("train.steps=ten", ["train.steps='ten'", "int"]),
        ("train.steps=", ["train.steps=''", "int"]),
        ("train.steps=1.5", ["train.steps=1.5 is float", "int"]),
        ("train.steps=1e3", ["1000.0 is float", "int"]),
        ("train.steps=True", ["True is bool", "int"]),
        ("train.steps=None", ["None", "int"]),
        ("train.steps='10'", ["'10' is str", "int"]),
        ("train.steps=\0", ["train.steps", "int"]),
        ("train.steps=__import__('os')", ["train.steps", "int"]),
        ("train.steps={[1]: 2}", ["train.steps", "int"]),
        ("train.steps=" + "(" * 2000, ["train.steps", "int"]),
        ("train.steps=" + "9" * 5000, ["train.steps", "int"]),
        ("train.keep_best=1", ["train.keep_best=1 is int", "bool"]),
        ("optimizer.learning_rate=nan", ["'nan'", "float"]),
        ("optimizer.learning_rate=True", ["True is bool", "float"]),
        ("optimizer.learning_rate=1+2j", ["complex", "float"]),
        ("train.rampup_batch_size=8", ["8 is int", "tuple[int, int, int]"]),
        ("train.rampup_batch_size=(8, 8)", ["(8, 8)", "tuple[int, int, int]"]),
        ("train.rampup_batch_size=(8, 8, 1.5)", ["1.5 is float", "int"]),
        ("data.blend={'a': 1}", ["dict", "tuple"]),
        ("data.blend=('a', 1)", ["'a' is str", "tuple[str, float]"]),
        ("data.blend=(('a', True),)", ["True is bool", "float"]),
        ("data.blend=(('a', 1, 2),)", ["tuple[str, float]"]),
        ("decode.stop_strings=abc", ["'abc'", "tuple[str, ...]; give ('abc',)"]),
        ("decode.stop_strings=('abc')", ["'abc' is str", "tuple[str, ...]"]),
        ("train.stages=causal", ["'causal'", "StageConfig"]),
        ("train.stages=('causal',)", ["'causal' is str", "StageConfig"]),
        ("train.stages=[{'nme': 'a'}]", ["unknown nme", "name, fraction"]),
        ("train.stages=[{1: 2, 'x': 3}]", ["unknown 1, x", "name, fraction"]),
        ("train.stages=[{'masked': 'all'}]", ["train.stages.masked='all' is str", "float"]),
    ],
)
def test_an_invalid_override_raises_an_error(assignment, words):
    _refused(lambda: override(BASE, assignment), *words)


# --- files


IMPORT = "from mtnlg_jax.config import *\n\n"


@pytest.fixture
def written(tmp_path):
    def write(text, name="run.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_load_config_runs_the_file_overrides_and_validates(written):
    path = written(f"{IMPORT}def get_config():\n    return Config(name='mine')\n")
    config = load_config(path, ["train.steps=7", "mesh.tensor=2"])
    assert config == Config(name="mine", train=TrainConfig(steps=7), mesh=MeshConfig(tensor=2))
    _refused(lambda: load_config(path, ["mesh.tensor=5"]), 12, 5)


def test_load_config_reads_lists_as_tuples(written):
    body = "Config(data=DataConfig(blend=[['a', 1]]), train=TrainConfig(stages=[StageConfig()]))"
    path = written(f"{IMPORT}def get_config():\n    return {body}\n")
    config = load_config(path)
    assert config.data.blend == (("a", 1.0),) and config.train.stages == (StageConfig(),)
    hash(config)


def test_text_after_a_colon_is_the_argument_of_get_config(written):
    path = written(f"{IMPORT}def get_config(row):\n    return Config(name=row)\n")
    assert load_config(f"{path}:7.5b").name == "7.5b"
    with pytest.raises(
        ValueError, match=f"get_config.. needs 'row'; give it after a colon, as {path}:row"
    ):
        load_config(path)
    plain = written(f"{IMPORT}def get_config():\n    return Config()\n")
    with pytest.raises(ValueError, match="takes no argument, but 'x' follows the colon"):
        load_config(f"{plain}:x")
    with pytest.raises(FileNotFoundError, match="nowhere.py' is not a file"):
        load_config("nowhere.py:7.5b")
    with pytest.raises(ValueError, match="no row '7b'; choose one of 1.7b, 3.6b"):
        load_config(str(Path(__file__).resolve().parents[1] / "configs" / "ladder.py:7b"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:", ["SyntaxError", "does not load"]),
        ("import no_such_module_at_all", ["no_such_module_at_all", "does not load"]),
        ("config = 3", ["defines no get_config()", "configs/tiny.py"]),
        ("def get_config():\n    pass", ["returns a NoneType", "Config"]),
        ("def get_config():\n    return {'train': 3}", ["returns a dict", "Config"]),
        (
            f"{IMPORT}def get_config():\n    return Config(train=TrainConfig(steps='9'))",
            ["train.steps='9' is str", "int"],
        ),
        (
            f"{IMPORT}def get_config():\n    return Config(model=ModelConfig(\n        layers=2))",
            ["line 4: TypeError", "'layers'", "did you mean 'num_layers'?"],
        ),
        (
            f"{IMPORT}def get_config():\n    return Config(optimizer=OptimizerConfig(zzzzz=2))",
            ["line 4: TypeError", "'zzzzz'", "it has name, learning_rate"],
        ),
        (
            f"{IMPORT}\ndef get_config(size):\n    return Config()",
            ["line 4", "get_config() needs 'size'", ":size"],
        ),
        (
            f"{IMPORT}\ndef lower():\n    return {{}}['x']\ndef get_config():\n    return lower()",
            ["line 5: KeyError"],
        ),
        ("import sys\ndef get_config():\n    sys.exit(4)", ["line 3: SystemExit"]),
        ("x = (1 / 0)", ["line 1: ZeroDivisionError"]),
        (
            f"{IMPORT}def get_config():\n    return Config(train=TrainConfig(steps={{9}}))",
            ["train.steps={9} is a set"],
        ),
        (
            f"{IMPORT}import numpy as np\n"
            "def get_config():\n    return Config(train=TrainConfig(steps=np.float32(2)))",
            ["config.train.steps=2.0 is float; it must be int"],
        ),
        (
            "def get_config():\n    raise ValueError('two\\nlines')",
            ["line 2: ValueError: two lines"],
        ),
    ],
)
def test_an_invalid_config_file_raises_an_error(written, text, words):
    path = written(text)
    _refused(lambda: load_config(path, ["train.seed=1"]), *words)


def test_load_config_accepts_numpy_numbers_and_path_objects(written):
    config = load_config(
        written(f"""{IMPORT}
import numpy as np
from pathlib import Path
def get_config():
    return Config(model=ModelConfig(num_layers=np.int64(2), tie_embeddings=np.bool_(True)),
                  data=DataConfig(blend=[(Path("a"), np.float32(0.5))]), name=np.str_("n"),
                  train=TrainConfig(rampup_batch_size=np.array([8, 8, 64]), micro_batch_size=1,
                                    init=Path("/b")))
""")
    )
    assert config == from_json(to_json(config)) and type(config.model.num_layers) is int
    assert (
        config.data.blend == (("a", 0.5),)
        and config.train.init == "/b"
        and config.model.tie_embeddings is True
    )
    assert config.train.rampup_batch_size == (8, 8, 64)


def test_a_home_folder_is_expanded_in_every_path_of_a_config(written, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    path = written(
        f"{IMPORT}def get_config():\n"
        "    return Config(data=DataConfig(blend=[['~/a', 1]], tokenizer='~'))"
    )
    config = load_config(
        path,
        [
            "train.init=~/b",
            "data.heldout=~/c",
            "name=~/d",
            "train.stages=[{'distill': '~/e', 'blend': [('~/f', 1)]}]",
        ],
    )
    assert (
        config.data.blend == (("/h/a", 1.0),)
        and config.data.tokenizer == "/h"
        and config.train.init == "/h/b"
    )
    assert config.data.heldout == "/h/c" and config.name == "~/d"
    assert config.train.stages == (StageConfig(distill="/h/e", blend=(("/h/f", 1.0),)),)
    _refused(
        lambda: load_config(path, ["train.init=~no-one/x"]), "train.init", "~no-one/x", "no user"
    )


def test_config_fields_that_name_files_are_marked():
    """A field whose comment or name mentions a folder has the mark that `map_paths` looks for."""
    seen = []
    config = dataclasses.replace(
        Config(),
        data=DataConfig(path="1", tokenizer="2", heldout="3"),
        train=TrainConfig(
            init="4", stages=(StageConfig(distill="5", blend=(("6", 1.0),)),), near_folder="7"
        ),
    )
    mapped = map_paths(config, lambda text: seen.append(text) or f"/{text}")
    assert sorted(seen) == list("1234567") and mapped.train.stages[0].blend == (("/6", 1.0),)
    # An empty text is not a path.
    empty = dataclasses.replace(Config(), train=TrainConfig(near_folder=""))
    assert map_paths(empty, lambda text: "changed") == empty


def test_a_missing_config_suggests_one_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"did you mean /.*/configs/tiny\.py\?"):
        load_config("configs/tiny.py")


def test_load_config_requires_a_python_file(written, tmp_path):
    for path in ("", "no/such.py", str(tmp_path), "\0"):
        with pytest.raises(
            FileNotFoundError,
            match="(is not a file|is a folder without config.json); give one of configs",
        ):
            load_config(path)
    path = written("steps: 3", "run.yaml")
    _refused(lambda: load_config(path), "run.yaml", "not a Python file")


# --- JSON

ODD = Config(
    name='a "quoted"\n\0 name, 中文 \ud800',
    model=ModelConfig(
        num_query_groups=3, vocab_size=2**31 - 1, tie_embeddings=False, rotary_base=1e-300
    ),
    mesh=MeshConfig(data=-1, tensor=2, zero=3),
    data=DataConfig(blend=(("a", 0.1 + 0.2), ("b", 5e-324)), sequence_length=7),
    optimizer=OptimizerConfig(learning_rate=1),
    train=TrainConfig(
        rampup_batch_size=(1, 1, 2**61), stages=(StageConfig("m", masked=1), StageConfig())
    ),
    decode=DecodeConfig(stop_strings=("\n\n", "終")),
)


@pytest.mark.parametrize("config", [BASE, ODD], ids=["default", "odd"])
def test_a_config_survives_a_round_trip_through_json(config):
    read = from_json(to_json(config))
    assert read == config and hash(read) == hash(config)
    assert isinstance(read.optimizer.learning_rate, float)
    assert from_json(to_json(read)) == read


def test_an_older_file_gets_current_defaults():
    assert from_json('{"model": {"num_layers": 3}}') == Config(model=ModelConfig(num_layers=3))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", ["list", "Config"]),
        ("null", ["None", "Config"]),
        ("{", ["line 1"]),
        ('{"model": 3}', ["model=3 is int", "ModelConfig"]),
        ('{"model": {"num_layers": 2.0}}', ["num_layers=2.0 is float", "int"]),
        ('{"model": {"num_layers": null}}', ["num_layers=None", "int"]),
        ('{"modle": {}, "x": 1}', ["unknown modle, x", "name, model"]),
        ('{"train": {"stages": [{"blend": [["a"]]}]}}', ["train.stages.blend=['a'] is list"]),
    ],
)
def test_invalid_json_raises_an_error(text, words):
    _refused(lambda: from_json(text), *words)


# --- invalid values and combinations


def test_the_defaults_are_valid():
    validate(BASE)


RING = ["mesh.context_mode=ring", "mesh.context=2"]


def test_the_ring_takes_a_soft_cap_and_a_multiplier_of_attention():
    caps = ["model.attn_logit_softcapping=50", "model.multipliers.attention=0.1"]
    validate(override(BASE, *RING, *caps))


def test_validate_does_not_change_the_config():
    odd = override(ODD, "mesh.tensor=1", "train.micro_batch_size=1", "train.global_batch_size=4")
    before = to_json(odd)
    validate(odd)
    assert to_json(odd) == before


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        # divisibility: both numbers, and the nearest valid ones
        (["mesh.tensor=7"], ["num_attention_heads=12", "mesh.tensor=7", "4 or 6"]),
        (
            ["mesh.tensor=6", "model.num_query_groups=4"],
            ["num_query_groups=4", "mesh.tensor=6", "2 or 4"],
        ),
        (
            ["mesh.tensor=2", "model.ffn_hidden_size=31"],
            ["ffn_hidden_size=31", "mesh.tensor=2", "1 or 31"],
        ),
        (
            ["mesh.tensor=3", "model.vocab_size=1000"],
            ["vocab_size=1000", "mesh.tensor=3", "2 or 4"],
        ),
        (["mesh.pipe=5"], ["num_layers=12", "mesh.pipe=5", "4 or 6"]),
        (
            ["mesh.context=3"],
            ["sequence_length=2048", "2 x mesh.context x mesh.tensor=6", "4 or 8"],
        ),
        (["mesh.pipe=2"], ["mesh.pipe=2 needs train.micro_batch_size"]),
        (
            ["mesh.pipe=2", "train.micro_batch_size=1", "train.rampup_batch_size=(8, 8, 80)"],
            ["needs mesh.flush", "mesh.pipe=2", "mesh.schedule=1f1b"],
        ),
        (["mesh.pipe=0"], ["mesh.pipe=0", "[1, "]),
        (["mesh.virtual_pipe=5"], ["num_layers=12", "mesh.pipe x mesh.virtual_pipe=5", "4 or 6"]),
        (["mesh.schedule=zb"], ["'zb'", "circular, 1f1b"]),
        (
            ["mesh.schedule=1f1b", "mesh.virtual_pipe=2"],
            ["mesh.virtual_pipe=2 times", "mesh.schedule=circular"],
        ),
        (["mesh.context_mode=star"], ["'star'", "ulysses, gather, ring"]),
        (
            ["mesh.context_mode=ulysses", "mesh.context=8"],
            ["mesh.tensor=12", "mesh.context=8", "4 or 6"],
        ),
        (
            [*RING, "model.position_embedding_type=alibi"],
            ["mesh.context_mode=ring", "windows, distances or sinks", "gather, or ulysses"],
        ),
        (
            [*RING, "model.layer_pattern=[{'window': 64}]"],
            ["mesh.context_mode=ring", "windows, distances or sinks", "gather, or ulysses"],
        ),
        (["mesh.flush=3", "mesh.pipe=2"], ["mesh.flush=3", "mesh.pipe=2", "1 or 3"]),
        (
            ["mesh.tensor=2", "data.sequence_length=9"],
            ["sequence_length=9", "mesh.tensor=2", "1 or 3"],
        ),
        (["model.num_attention_heads=7"], ["hidden_size=768", "num_attention_heads=7", "6 or 8"]),
        (["model.num_query_groups=5"], ["num_attention_heads=12", "num_query_groups=5", "4 or 6"]),
        (["mesh.data=3"], ["global_batch_size=32", "mesh.data=3", "30 or 33"]),
        (
            ["mesh.data=4", "train.micro_batch_size=3"],
            ["=32", "micro_batch_size x mesh.data=12", "24 or 36"],
        ),
        (
            ["train.micro_batch_size=3"],
            ["global_batch_size=32", "3", "30 or 33"],
        ),  # no mesh.data makes it valid
        (
            ["train.rampup_batch_size=(8, 5, 99)", "train.micro_batch_size=1"],
            ["24", "increment=5", "4 or 6"],
        ),
        (
            ["train.rampup_batch_size=(2, 2, 99)", "train.micro_batch_size=1", "mesh.data=4"],
            ["rampup_batch_size start=2", "mesh.data=4"],
        ),
        (
            ["train.rampup_batch_size=(8, 8, 99)"],
            ["rampup_batch_size needs train.micro_batch_size"],
        ),
        (["train.rampup_batch_size=(64, 8, 99)"], ["start=64", "[1, 32]"]),
        (["train.rampup_batch_size=(8, 0, 99)"], ["increment=0", "[1, 32]"]),
        (["train.rampup_batch_size=(8, 8, -1)"], ["samples=-1", "[0, "]),
        (["data.sequence_length=4096"], ["4096", "max_position_embeddings=2048", "rotary"]),
        (
            ["model.position_embedding_type=rotary", "model.kv_channels=7"],
            ["even head width", "7", "set"],
        ),
        (["data.path=a", "data.blend=(('b', 1),)"], ["data.path and data.blend", "keep one"]),
        (["data.masking.random_share=0.5"], ["mask_share=0.8", "random_share=0.5", "lower one"]),
        (["decode.min_new_tokens=200"], ["200", "128"]),
        (["optimizer.warmup_fraction=0.5", "optimizer.decay_fraction=0.4"], ["0.4", "0.5"]),
        # out of range: the value and the limits
        (["mesh.data=0"], ["mesh.data=0", "[1, "]),
        (["mesh.data=-2"], ["mesh.data=-2", "[1, "]),
        (["mesh.tensor=0"], ["mesh.tensor=0", "[1, "]),
        (["mesh.zero=2"], ["mesh.zero=2", "0, 1, 3"]),
        (["model.num_layers=0"], ["num_layers=0", "[1, "]),
        (["model.num_query_groups=0"], ["num_query_groups=0", "[1, "]),
        (["model.kv_channels=-64"], ["kv_channels=-64", "[1, "]),
        (["model.hidden_size=10000000000"], ["hidden_size=10000000000", "2147483648]"]),
        (
            ["model.activation=tanh"],
            ["'tanh'", "gelu, gelu_exact, relu, squared_relu, silu, swiglu"],
        ),
        (["model.normalization=batchnorm"], ["'batchnorm'", "layernorm, rmsnorm"]),
        (["model.position_embedding_type=sinusoidal"], ["'sinusoidal'", "learned, rotary"]),
        (
            ["model.layer_pattern=[]"],
            ["model.layer_pattern is empty", "LayerSpec"],
        ),
        (["model.bias=('qkv', 'all')"], ["'all'", "qkv, out, mlp"]),
        (
            ["model.position_embedding_type=rotary", "model.rotary_percent=0.01"],
            ["model.rotary_percent=0.01", "no pair of dims"],
        ),
        (
            ["model.rope_scaling.rope_type=yarn"],
            ["rope_type=yarn", "original_max_position_embeddings"],
        ),
        (
            ["model.parallel_residual=one_norm", "model.norm_placement=post"],
            ["parallel_residual=one_norm", "norm_placement=post"],
        ),
        (
            ["model.moe.num_moe_experts=2", "model.moe.moe_router_topk=3"],
            ["moe_router_topk=3", "num_moe_experts=2"],
        ),
        (["model.dropout_rate=1"], ["dropout_rate=1.0", "[0, 1)"]),
        (["model.rotary_base=0"], ["rotary_base=0.0", "(0, inf)"]),
        (["model.rotary_base=-1"], ["rotary_base=-1.0", "(0, inf)"]),
        (["data.sequence_length=0"], ["sequence_length=0", "[1, "]),
        (["data.sequence_length=-4"], ["sequence_length=-4", "[1, "]),
        (["data.blend=(('a', 0),)"], ["0.0", "'a'", "leave the source out"]),
        (["data.blend=(('a', -1),)"], ["-1.0", "'a'"]),
        (["data.blend=(('a', 1e999),)"], ["inf", "'a'"]),
        (["data.masking.word_share=0"], ["word_share=0.0", "(0, 1]"]),
        (["optimizer.learning_rate=1e999"], ["learning_rate=inf", "(0, inf)"]),
        (["optimizer.learning_rate=1" + "0" * 400], ["learning_rate=inf", "(0, inf)"]),
        (["optimizer.learning_rate=-1" + "0" * 400], ["learning_rate=-inf", "(0, inf)"]),
        (["optimizer.decay_fraction=1e999"], ["decay_fraction=inf"]),
        (["optimizer.b2=1"], ["b2=1.0", "[0, 1)"]),
        (["optimizer.clip_grad_norm=-1"], ["clip_grad_norm=-1.0", "[0, inf)"]),
        (["train.steps=0"], ["train.steps=0", "[1, "]),
        (["train.micro_batch_size=0"], ["micro_batch_size=0", "[1, "]),
        (["train.seed=-1"], ["seed=-1", "[0, "]),
        (["train.label_smoothing=1"], ["label_smoothing=1", "[0, 1)"]),
        (["train.compute_dtype=float16"], ["'float16'", "bfloat16, float32"]),
        (["train.recompute=some"], ["'some'", "none, elementwise, mlp, projections, full"]),
        (["train.stages=()"], ["train.stages is empty", "StageConfig"]),
        (["train.stages=[{'masked': 1.5}]"], ["stage 'causal'", "masked=1.5", "[0, 1]"]),
        (["train.stages=[{'fraction': 0}]"], ["fraction=0.0", "(0, inf)"]),
        (
            ["train.stages=[{'learning_rate_scale': 1e999}]"],
            ["learning_rate_scale=inf", "[0, inf)"],
        ),
        (["train.stages=[{'blend': [('a', 0)]}]"], ["'a'", "leave the source out"]),
        (["decode.temperature=-0.1"], ["temperature=-0.1", "[0, inf)"]),
        (["decode.temperature=1e999"], ["temperature=inf", "[0, inf)"]),
        (["decode.top_p=0"], ["top_p=0.0", "(0, 1]"]),
        (["decode.top_p=1.1"], ["top_p=1.1", "(0, 1]"]),
        (["decode.repetition_penalty=0"], ["repetition_penalty=0.0", "(0, inf)"]),
        (["decode.stop_strings=('a', '')"], ["a stop string is empty"]),
        (["decode.max_new_tokens=0"], ["max_new_tokens=0", "[1, "]),
    ],
)
def test_validate_raises_for_invalid_configs(assignments, words):
    _refused(lambda: validate(override(BASE, *assignments)), *words)


@pytest.mark.parametrize(
    "config",
    [
        Config(train=TrainConfig(steps="10")),
        Config(train=TrainConfig(steps=10.5)),
        Config(train=TrainConfig(steps=True)),
        Config(train=TrainConfig(steps=np.int64(10))),
        Config(train=TrainConfig(stages=("causal",))),
        Config(train=TrainConfig(stages=StageConfig())),
        Config(train=TrainConfig(stages=(ModelConfig(),))),
        Config(train=TrainConfig(keep_best=1)),
        Config(model=None),
        Config(model=TrainConfig()),
        Config(model=ModelConfig(num_layers=float("nan"))),
        Config(optimizer=OptimizerConfig(learning_rate=math.nan)),
        Config(optimizer=OptimizerConfig(learning_rate="3e-4")),
        Config(data=DataConfig(blend=(("a", math.nan),))),
        Config(data=DataConfig(blend=("ab",))),
        Config(data=DataConfig(masking=None)),
        Config(decode=DecodeConfig(temperature=math.nan)),
        Config(decode=DecodeConfig(presence_penalty=-math.inf)),
        Config(decode=DecodeConfig(stop_strings="ab")),
        Config(name=3),
    ],
)
def test_validate_checks_values_of_a_config_file(config):
    _refused(lambda: validate(config))


def test_nan_raises_an_error_for_every_float():
    count = 0
    for section in (f.name for f in dataclasses.fields(Config) if f.name != "name"):
        for key, value in dataclasses.asdict(getattr(BASE, section)).items():
            if isinstance(value, float):
                text = json.dumps({section: {key: math.nan}})
                _refused(lambda text=text: validate(from_json(text)), key, "nan")
                count += 1
    assert count > 15


def test_huge_numbers_raise_at_once():
    # The remedy is searched among the divisors, which must not take time proportional to the
    # number.
    begin = time.perf_counter()
    width = ("model.ffn_hidden_size=2147483647", "mesh.tensor=2")
    ramp = ("train.global_batch_size=2147483648", "train.rampup_batch_size=(1, 2, 5)")
    for assignments in (width, ramp):
        _refused(lambda given=assignments: validate(override(BASE, *given)), 2147483647)
    assert time.perf_counter() - begin < 2


def test_validate_batch_checks_the_available_devices():
    config = override(BASE, "train.micro_batch_size=4")
    validate(config)
    validate_batch(config, 8)
    _refused(lambda: validate_batch(config, 3), "global_batch_size=32", "=12", "24 or 36")


@pytest.mark.parametrize(
    ("assignment", "path", "blend"),
    [
        ("data.path=b", "b", ()),
        ("data.blend=(('c', 1.0),)", "", (("c", 1.0),)),
        ("data.blend=()", "a", ()),
        ("data.path=", "", ()),
    ],
)
def test_path_and_blend_replace_each_other_unless_empty(assignment, path, blend):
    data = override(Config(data=DataConfig(path="a")), assignment).data
    assert (data.path, data.blend) == (path, blend)


def test_an_override_of_data_in_a_recipe_raises_an_error():
    _refused(lambda: override(Recipe(), "data.path=x"), "data", "Recipe")
