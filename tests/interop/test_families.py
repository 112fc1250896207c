"""Each family against transformers: logits, loss, gradients, the way back, and greedy text.

make_families.py writes the fixtures. The mistakes that users of other converters met are planted
here, and each must move the logits.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mtnlg_jax.config import LayerSpec, RopeScaling
from mtnlg_jax.decode.cache import prefill, read, step, unstack
from mtnlg_jax.decode.load import names_of
from mtnlg_jax.decode.rolling import Rolling
from mtnlg_jax.decode.scoring import score, score_rows
from mtnlg_jax.interop.families import FAMILIES, family_of, model_of
from mtnlg_jax.interop.interchange import Interchange, problems, stored_names
from mtnlg_jax.model.transformer import abstract_model

HERE = Path(__file__).parent / "families"
NAMES = sorted(path.name for path in HERE.iterdir())
LOGITS = 1e-4
GRADIENTS = 1e-4
# A softmax does not see a bias of the keys: its gradient is rounding.
UNSEEN = ("k_proj.bias", "key.bias")


class Fixture:
    """A folder of transformers' and what it computed."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.stored = load_file(folder / "model.safetensors")
        self.expected = dict(np.load(folder / "expected.npz"))
        self.family = FAMILIES[family_of(self.config)[0]]
        self.model = model_of(self.config)
        self.names = stored_names(self.family, self.stored)
        self.interchange = Interchange(self.model, self.family)
        self.params = self.interchange.parameters(self.read)
        self.tokens = jnp.asarray(self.expected["tokens"], jnp.int32)

    def read(self, name: str) -> np.ndarray:
        return self.stored[self.names[name]]

    def logits(self, model=None, params=None) -> np.ndarray:
        graph = abstract_model(model or self.model)[0]
        return _logits(graph, params or self.params, self.tokens, causal=not self.family.masked)


@functools.cache
def fixture(name: str) -> Fixture:
    return Fixture(HERE / name)


@functools.partial(jax.jit, static_argnames=("graph", "causal"))
def _logits(graph, params, tokens, causal):
    return nnx.merge(graph, params)(tokens, causal=causal)


@functools.partial(jax.jit, static_argnames=("graph", "masked"))
def _loss_and_gradients(graph, params, tokens, masked):
    def loss(params):
        logits = nnx.merge(graph, params)(tokens, causal=not masked)
        shown, labels = (logits, tokens) if masked else (logits[:, :-1], tokens[:, 1:])
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(shown), labels[..., None], -1)
        return -log_probs.mean(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@functools.cache
def maker():
    """make_families.py, without running what needs torch."""
    source = (HERE.parent / "make_families.py").read_text()
    start = source.index("def projection")
    scope = {}
    exec("import zlib\nimport numpy as np\n" + source[start : source.index("def randomize")], scope)
    return scope["projection"]


def check(case: Fixture) -> None:
    """Compare everything but greedy text."""
    check_logits(case)
    graph = abstract_model(case.model)[0]
    (loss, logits), gradients = _loss_and_gradients(
        graph, case.params, case.tokens, masked=case.family.masked
    )
    np.testing.assert_allclose(logits, case.expected["logits"], atol=LOGITS)
    assert float(loss) == pytest.approx(float(case.expected["loss"]), abs=1e-5)
    check_gradients(case, names_of(gradients))


def check_logits(case: Fixture) -> None:
    """Compare the logits, their loss and the way back."""
    interchange = case.interchange
    found = {name: case.stored[full].shape for name, full in case.names.items()}
    assert problems(interchange, found) == []
    count = sum(leaf.size for leaf in jax.tree.leaves(case.params))
    assert count == case.model.parameter_count()
    logits = case.logits()
    np.testing.assert_allclose(logits, case.expected["logits"], atol=LOGITS)
    labels = np.asarray(case.tokens)
    if not case.family.masked:
        logits = logits[:, :-1]
        labels = labels[:, 1:]
    log_probs = np.take_along_axis(_log_softmax(logits), labels[..., None], -1)
    assert -log_probs.mean() == pytest.approx(float(case.expected["loss"]), abs=1e-5)
    arrays = {name: np.asarray(leaf) for name, leaf in names_of(case.params).items()}
    for name, entry in interchange.table.items():
        stored = case.read(name)
        back = interchange.tensor(name, arrays).astype(stored.dtype)
        if entry.tensor.add is None:
            assert np.array_equal(back, stored[entry.tensor.skip :]), name


def check_gradients(case: Fixture, gradients: dict) -> None:
    arrays = {name: np.asarray(leaf) for name, leaf in gradients.items()}
    seen = 0
    for key, wanted in case.expected.items():
        name = key.removeprefix("gradient:")
        if name == key or name.endswith(UNSEEN) or name not in case.interchange.table:
            continue
        entry = case.interchange.table[name]
        if entry.tensor.skip:
            continue  # rows that no token uses
        gradient = case.interchange.tensor(name, arrays, gradient=True)
        along = (gradient * maker()(name, gradient.shape)).sum()
        norm = np.linalg.norm(gradient)
        assert abs(norm - wanted[0]) <= GRADIENTS * wanted[0], name
        # A projection onto a unit normal vector is about as large as the norm.
        assert abs(along - wanted[1]) <= 10 * GRADIENTS * wanted[0], name
        seen += 1
    assert seen > len(case.interchange.table) // 3


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_the_way_back_equal_transformers(name):
    check_logits(fixture(name))


# Gradients take most of the time to compile. Quick: softcaps, windows and sandwich norms; experts
# with biases and sinks; ALiBi; both ways. Each other switch is differentiated by JAX.
QUICK = ("bert", "bloom", "gemma2", "gpt_oss")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES]
)
def test_logits_loss_and_gradients_equal_transformers(name):
    check(fixture(name))


# transformers changes longrope's factors in the middle of a text, when it passes the original
# context; here the config's context decides. So that family's greedy text is another.
GREEDY = [n for n in NAMES if not fixture(n).family.masked and n != "phi3_longrope"]


# Slow: rotary models whose switches the others have, too.
PLAIN = ("gemma2", "gptj", "llama3", "qwen2_window")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in PLAIN else []) for n in GREEDY]
)
def test_greedy_text_through_the_cache_equals_generate(name):
    case = fixture(name)
    tokens = case.expected["greedy"]
    decoder = unstack(case.model, case.params)
    # The texts are four windows long, and the prompts longer than one.
    start = prefill(decoder, [row[:12].tolist() for row in tokens], 64, rolling=True)
    logits = start.logits_BV
    cache = start.cache
    windows = [case.model.layer(number).window for number in range(case.model.num_layers)]
    assert [isinstance(layer, Rolling) for layer in cache] == [bool(each) for each in windows]
    for window, layer in zip(windows, cache, strict=True):
        assert {x.shape[2] for x in jax.tree.leaves(layer)} == {window or 64}
    advance = jax.jit(functools.partial(step, case.model))
    for position in range(12, tokens.shape[1]):
        shown = np.array(logits)
        shown[:, case.config["eos_token_id"]] = -np.inf  # the fixture's texts go past it
        assert np.array_equal(shown.argmax(-1), tokens[:, position]), position
        read_BS = jnp.asarray(tokens[:, position], jnp.int32)
        logits, cache = advance(decoder.params, cache, read_BS, jnp.full(2, position, jnp.int32))


# A window with a sink, and ALiBi, on the paths of speculation and of ranking.
@pytest.mark.parametrize(
    "name", [pytest.param("gemma3", marks=pytest.mark.slow), "gpt_oss", "bloom"]
)
def test_several_tokens_at_once_and_scores_equal_full_passes(name):
    case = fixture(name)
    decoder = unstack(case.model, case.params)
    tokens = np.asarray(case.tokens)
    start = prefill(decoder, [row[:12].tolist() for row in tokens], 64)
    logits, _ = jax.jit(functools.partial(read, case.model))(
        decoder.params, start.cache, case.tokens[:, 12:21], jnp.full(2, 12, jnp.int32)
    )
    np.testing.assert_allclose(logits, case.expected["logits"][:, 12:21], atol=LOGITS)
    log_probs = np.asarray(jax.nn.log_softmax(case.expected["logits"][0]))
    wanted = [log_probs[i - 1, tokens[0, i]] for i in range(20, 36)]
    prefix = prefill(decoder, [tokens[0, :20].tolist()], 64)
    long, short = score(decoder, prefix, [tokens[0, 20:36].tolist(), tokens[0, 20:30].tolist()])
    np.testing.assert_allclose(long, wanted, atol=LOGITS)
    np.testing.assert_allclose(short, wanted[:10], atol=LOGITS)
    (alone,) = score_rows(decoder, [tokens[0, :36].tolist()], [20])
    np.testing.assert_allclose(alone, wanted, atol=LOGITS)


@pytest.mark.parametrize("name", [pytest.param("gemma3", marks=pytest.mark.slow), "mixtral"])
def test_int8_weights_stay_near_and_differ(name):
    case = fixture(name)
    prompts = [row[:12].tolist() for row in np.asarray(case.tokens)]
    exact, quantized = (
        np.asarray(prefill(unstack(case.model, case.params, weights=w), prompts, 64).logits_BV)
        for w in (None, "int8")
    )
    spread = exact.std()
    assert 0 < np.abs(quantized - exact).max() < 0.2 * spread


# --- planted mistakes


def _pattern(change):
    return lambda model: dataclasses.replace(
        model, layer_pattern=tuple(map(change, model.layer_pattern))
    )


def _window(more: int):
    def change(spec: LayerSpec) -> LayerSpec:
        window = None if spec.window is None else spec.window + more
        return dataclasses.replace(spec, window=window)

    return _pattern(change)


def _set(**fields):
    return lambda model: dataclasses.replace(model, **fields)


def _multiplier(**fields):
    return lambda model: dataclasses.replace(
        model, multipliers=dataclasses.replace(model.multipliers, **fields)
    )


SWITCHES = {
    "window one longer": ("gemma3", _window(1)),
    "window one shorter": ("modernbert", _window(-1)),
    "no window": ("qwen2_window", _pattern(lambda spec: dataclasses.replace(spec, window=None))),
    "no softcap of scores": ("gemma2", _set(attn_logit_softcapping=None)),
    "no softcap of logits": ("gemma2", _set(final_logit_softcapping=None)),
    "default attention scale": ("gemma2", _multiplier(attention=None)),
    "embedding not scaled": ("gemma3", _multiplier(embedding=1.0)),
    "logits not scaled": ("cohere2", _multiplier(logits=1.0)),
    "one rotary base": (
        "gemma3",
        _pattern(lambda spec: dataclasses.replace(spec, rotary_base=None)),
    ),
    "rotary in layers without it": (
        "cohere2",
        _pattern(lambda spec: dataclasses.replace(spec, rotary=True)),
    ),
    "no rope scaling": ("llama3", _set(rope_scaling=RopeScaling())),
    "YaRN in local layers": (
        "olmo3",
        _pattern(lambda spec: dataclasses.replace(spec, rope_scaling=True)),
    ),
    "YaRN's factor left out": (
        "olmo3",
        lambda model: dataclasses.replace(
            model, rope_scaling=dataclasses.replace(model.rope_scaling, attention_factor=1.0)
        ),
    ),
    "longrope's short factors": (
        "phi3_longrope",
        lambda model: dataclasses.replace(
            model,
            rope_scaling=dataclasses.replace(
                model.rope_scaling, long_factor=model.rope_scaling.short_factor
            ),
        ),
    ),
    "all dims rotate": ("gpt_neox", _set(rotary_percent=1.0)),
    "tanh GELU for the exact one": ("gpt_neox", _set(activation="gelu")),
    "tanh GELU for the exact one in BERT": ("bert", _set(activation="gelu")),
    "experts' weights not normed": (
        "mixtral",
        lambda model: dataclasses.replace(
            model, moe=dataclasses.replace(model.moe, moe_router_norm=False)
        ),
    ),
    "softmax before the best": (
        "gpt_oss",
        lambda model: dataclasses.replace(
            model, moe=dataclasses.replace(model.moe, moe_router_pre_softmax=True)
        ),
    ),
}


def _moved(case: Fixture, logits) -> float:
    return float(np.abs(np.asarray(logits) - case.expected["logits"]).max())


# Each compiles another model. Quick: one of each kind.
FEW = (
    "window one longer",
    "no softcap of scores",
    "default attention scale",
    "embedding not scaled",
    "one rotary base",
    "no rope scaling",
    "tanh GELU for the exact one",
    "experts' weights not normed",
)


@pytest.mark.parametrize(
    "mistake", [pytest.param(m, marks=[] if m in FEW else pytest.mark.slow) for m in SWITCHES]
)
def test_a_wrong_switch_moves_the_logits(mistake):
    name, change = SWITCHES[mistake]
    case = fixture(name)
    assert _moved(case, case.logits(model=change(case.model))) > 2 * LOGITS


def _without(parts):
    """Parameters whose names hold ``parts`` become ones."""

    def change(case: Fixture):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.ones_like(leaf) if parts in jax.tree_util.keystr(path) else leaf,
            case.params,
        )

    return change


def _other_table(**how):
    """The tensors are read in another way."""

    def change(case: Fixture):
        family = case.family
        block = {
            key: dataclasses.replace(tensor, **how)
            if any(getattr(tensor, name) != value for name, value in how.items())
            else tensor
            for key, tensor in family.block.items()
        }
        return Interchange(case.model, dataclasses.replace(family, block=block)).parameters(
            case.read
        )

    return change


def _swapped(one: str, other: str):
    def change(case: Fixture):
        def read(name):
            if one in name:
                return case.read(name.replace(one, other))
            return case.read(name.replace(other, one) if other in name else name)

        return case.interchange.parameters(read)

    return change


TENSORS = {
    "rotary pairs read as halves": ("gptj", _other_table(pairs=False)),
    "rotary halves read as pairs": ("llama3", _other_table(pairs=True)),
    "fused qkv read in blocks": ("gpt_neox", _other_table(by_group=False)),
    "gate and up not interleaved": ("gpt_oss", _other_table(interleaved=False)),
    "norms of queries left out": ("gemma3", _without("q_norm")),
    "1 not added to the scales": ("gemma2", _other_table(plus_one=False)),
    "1 added to the scales": ("llama3", _other_table(plus_one=True)),
    "sandwich norms swapped": (
        "gemma2",
        _swapped("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "sinks left out": ("gpt_oss", _without("b_sink_N")),
    "gate and up swapped": ("mixtral", _swapped(".w1.", ".w3.")),
}


@pytest.mark.parametrize("mistake", TENSORS)
def test_a_tensor_read_wrongly_moves_the_logits(mistake):
    name, change = TENSORS[mistake]
    case = fixture(name)
    assert _moved(case, case.logits(params=change(case))) > 2 * LOGITS


# --- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"model_type": "llama", "mlp_gate_curve": 3}, "mlp_gate_curve=3"),
        ({"rope_parameters": {"rope_type": "cubic"}}, "rope_type 'cubic'"),
        ({"hidden_act": "tanh"}, "'tanh'"),
        ({"hidden_size": None}, "hidden_size=None"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        model_of(fixture("llama3").config | change)


def test_missing_misshapen_and_foreign_tensors_are_named():
    case = fixture("llama3")
    found = {name: case.stored[full].shape for name, full in case.names.items()}
    del found["model.norm.weight"]
    found["model.layers.0.mlp.up_proj.weight"] = (3, 4)
    found["model.layers.0.self_attn.q_norm.weight"] = (12,)
    lines = problems(case.interchange, found)
    assert [line.split(" ")[0] for line in lines] == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.norm.weight",
    ]


def test_older_spellings_mean_the_same():
    config = fixture("llama3").config
    rope = dict(config["rope_parameters"])
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    theta = rope.pop("rope_theta")
    old |= {"rope_theta": theta, "rope_scaling": rope, "torch_dtype": "float16"}
    assert model_of(old) == model_of(config)
    old["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    del old["rope_scaling"]["rope_type"]
    assert model_of(old) == model_of(config)


# --- all families


def _python_with_transformers() -> str | None:
    return os.environ.get("TRANSFORMERS_PYTHON")


@pytest.mark.slow
def test_every_family_equals_transformers(tmp_path):
    """Makes all fixtures anew; TRANSFORMERS_PYTHON names a Python with torch and transformers."""
    python = _python_with_transformers()
    if python is None and importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers: set TRANSFORMERS_PYTHON to a Python that has it")
    maker = HERE.parent / "make_families.py"
    source = maker.read_text()
    names = [
        line.split('"')[1]
        for line in source[source.index("MODELS: dict") :].splitlines()
        if line.startswith('    "') and line.endswith(("(", "),"))
    ]
    assert {family_of(fixture(name).config)[0] for name in NAMES} <= FAMILIES.keys()
    subprocess.run([python or "python", maker, tmp_path, *names], check=True, capture_output=True)
    kinds = set()
    for name in names:
        case = Fixture(tmp_path / name)
        check(case)
        kinds.add(case.config["model_type"])
    assert kinds == FAMILIES.keys()
