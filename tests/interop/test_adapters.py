"""PEFT's adapters against PEFT: logits of a merged and of a kept adapter, and the way back.

make_adapters.py writes the fixtures.
"""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mtnlg_jax.config import from_json
from mtnlg_jax.interop import registry
from mtnlg_jax.interop.adapter_export import convert_file, pairs_of, write_adapter
from mtnlg_jax.interop.adapter_runs import Beside, base_of, open_base, read_adapters, run_of_base
from mtnlg_jax.interop.adapters import Adapter, Merged
from mtnlg_jax.interop.huggingface import convert
from mtnlg_jax.interop.source import read_run
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.train import adapter_file, lora
from mtnlg_jax.train.checkpoint import load_run

HERE = Path(__file__).parent / "adapters"
NAMES = sorted(path.name for path in HERE.iterdir())
KEPT = ("gpt2", "llama", "neox")  # those that low-rank adaptation here holds
LOGITS = 1e-4


def logits(model, params, tokens):
    graph = abstract_model(model)[0]
    run = jax.jit(lambda params: nnx.merge(graph, params)(jnp.asarray(tokens, jnp.int32)))
    return np.asarray(run(params))


@functools.cache
def expected(name):
    return dict(np.load(HERE / name / "expected.npz"))


@functools.cache
def base(name):
    return open_base(base_of(HERE / name))


@functools.cache
def merged_parameters(name):
    merged = Merged(base(name), Adapter(HERE / name, base(name)))
    return merged.interchange.parameters(merged.tensor)


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_adapter_gives_the_logits_of_peft(name):
    tokens = expected(name)["tokens"]
    wanted = expected(name)["logits"]
    got = logits(base(name).model, merged_parameters(name), tokens)
    assert np.abs(got - wanted).max() < LOGITS
    assert np.abs(wanted).max() > 1


def largest_difference(got, wanted):
    """Return the largest difference of parameters; logits would take a compilation more."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def kept(name):
    """Return (params with adapters, config) of a fixture beside its base."""
    found = base(name)
    beside = Beside(Adapter(HERE / name, found))
    config = beside.config(read_run(found.path), "BASE")
    factors = {full.split(".")[-1]: jnp.asarray(array) for full, _, array in beside.parameters()}
    abstract = lora.abstract_parameters(config)
    assert {n: leaf.shape for n, leaf in lora.split(abstract)[1]["blocks"].items()} == {
        n: array.shape for n, array in factors.items()
    }
    params = found.interchange.parameters(found.tensor)
    return lora.joined(params, {"blocks": factors}), config


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_adapter_equals_the_merged_one(name):
    params, config = kept(name)
    assert largest_difference(lora.merge(params, config), merged_parameters(name)) < 1e-6
    plain = lora.split(params)[0]
    assert largest_difference(plain, merged_parameters(name)) > 0.1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The adapter of GPT-2, whose base has a tokenizer, as a run that trains it further."""
    folder = tmp_path_factory.mktemp("adapters") / "run"
    convert(str(HERE / "gpt2"), str(folder))
    return folder


def test_a_kept_adapter_is_written_again_bit_for_bit(run, tmp_path):
    report = convert(str(run), str(tmp_path / "out"), adapters="keep")
    assert "for 4 matrices, rank 3, lora_alpha 5" in report
    before = load_file(HERE / "gpt2" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert np.array_equal(array.astype(np.float32), after[name]), name
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["target_modules"] == [
        f"transformer.h.1.{name}"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert written["fan_in_fan_out"] and Path(written["base_model_name_or_path"]).is_dir()


def test_a_kept_adapter_is_a_run_with_low_rank_adaptation(run):
    assert largest_difference(load_run(run).params, merged_parameters("gpt2")) < 1e-6
    config = from_json((run / "config.json").read_text())
    assert config.optimizer.lora_rank == 3 and config.optimizer.lora_targets == (
        *("q", "k", "v", "o", "in", "out"),
    )


def test_a_fused_matrix_gets_the_factors_of_its_parts_side_by_side():
    """As after training here, where queries, keys and values have an A each."""
    interchange = base("neox").interchange
    rng = np.random.default_rng(0)
    factors = random_factors(interchange, ("q", "v"), 2, rng)
    made = pairs_of(interchange, factors)["gpt_neox.layers.2.attention.query_key_value.weight"]
    assert made.first.shape == (4, 32)
    delta = made.second @ made.first
    arrays = {
        f"blocks.attention.w_{name}": np.einsum("ldr,lrnh->ldnh", factors[a], factors[b])
        for name, a, b in (
            ("q_DNH", "lora_a_q_DR", "lora_b_q_RNH"),
            ("v_DKH", "lora_a_v_DR", "lora_b_v_RKH"),
        )
    }
    arrays["blocks.attention.w_k_DKH"] = np.zeros_like(arrays["blocks.attention.w_v_DKH"])
    name = "gpt_neox.layers.2.attention.query_key_value.weight"
    assert np.allclose(delta, interchange.tensor(name, arrays), atol=1e-5)


def random_factors(interchange, targets, rank, rng):
    """Return factors of ours for ``targets`` of a model, all random."""
    factors = {}
    for full, shape in interchange.shapes.items():
        name = full.rpartition(".")[2]
        if lora.target_of(name) not in targets or "_E" in name:
            continue
        first, second = lora.factor_names(name)
        outputs = lora.outputs_of(name, shape[1:])
        inputs = shape[1 : len(shape) - len(outputs)]
        factors[first] = 0.3 * rng.normal(size=(shape[0], *inputs, rank)).astype(np.float32)
        factors[second] = 0.3 * rng.normal(size=(shape[0], rank, *outputs)).astype(np.float32)
    return factors


# --- bad input


def changed(tmp_path, name="llama", settings=None, edit=None):
    """Copy an adapter with other settings, and with tensors that ``edit`` changed."""
    folder = tmp_path / "adapter"
    shutil.copytree(HERE / name, folder)
    content = json.loads((folder / "adapter_config.json").read_text()) | (settings or {})
    (folder / "adapter_config.json").write_text(json.dumps(content))
    if edit is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


_Q = "base_model.model.model.layers.2.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("settings", "edit", "message"),
    [
        (
            {},
            lambda t: t.pop(_Q + "A.weight"),
            r"lora_A of model.layers.2.self_attn.q_proj is miss",
        ),
        (
            {},
            lambda t: t.pop(_Q + "B.weight"),
            r"lora_B of model.layers.2.self_attn.q_proj is miss",
        ),
        (
            {},
            lambda t: [t.pop(_Q + "A.weight"), t.pop(_Q + "B.weight")],
            "lora_A and lora_B of model.layers.2.self_attn.q_proj are missing, and target_modules",
        ),
        ({"r": 5}, None, r"lora_A.weight is \[4, 32\], and .* it must be \[5, 32\]; give the base"),
        ({"target_modules": ["q_proj"]}, None, r"has factors of .*k_proj, which target_modules"),
        ({"layers_to_transform": [0, 1]}, None, r"layers.2.*layers_to_transform .* leave out"),
        (
            {"peft_type": "IA3"},
            None,
            "peft_type='IA3' is not low-rank adaptation.*merge_and_unload",
        ),
        ({"lora_bias": True}, None, "lora_bias=True; merge it with PEFT"),
        ({"layer_replication": [[0, 4]]}, None, r"layer_replication=\[\[0, 4\]\]"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "'pissa_niter_4' changes the base as well"),
        ({"r": 0}, None, "r=0 must be a number above 0"),
        ({"use_dora": True}, None, "use_dora=True .* missing lora_magnitude_vector"),
        ({}, lambda t: t.update({"x.y": np.zeros(2, np.float32)}), "x.y is not understood"),
        (
            {},
            lambda t: t.update({"base_model.model.score.weight": np.zeros((2, 32), np.float32)}),
            "score.weight, which is not part of the model at",
        ),
        (
            {},
            lambda t: t.update({"base_model.model.lm_head.weight": np.zeros((61, 32), np.float32)}),
            "changes lm_head.weight, and the model ties",
        ),
        (
            {},
            lambda t: t.update({_Q + "A.weight": np.full((4, 32), np.nan, np.float32)}),
            r"q_proj.lora_A.weight of .* has 128 values that are not finite",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_adapters_raise_an_error(tmp_path, settings, edit, message):
    with pytest.raises(ValueError, match=message):
        merged = Merged(
            base("llama"), Adapter(changed(tmp_path, "llama", settings, edit), base("llama"))
        )
        merged.tensor("model.layers.2.self_attn.q_proj.weight")


def test_an_adapter_for_another_base_raises_an_error():
    with pytest.raises(ValueError, match="not part of the model at .*gpt_neox; give the base that"):
        Adapter(HERE / "llama", base("neox"))
    with pytest.raises(ValueError, match=r"is for another base: .*llama3, and .*gemma2 is another"):
        base_of(HERE / "llama", HERE.parent / "families" / "gemma2")


def test_damaged_and_missing_files_raise_an_error(tmp_path):
    folder = changed(tmp_path)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged .*copy it again"):
        Adapter(folder, base("llama"))
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="but adapter_model.bin: save it again"):
        Adapter(folder, base("llama"))
    with pytest.raises(
        ValueError, match="the base of the adapter .*, ../../families/llama3, is not"
    ):
        base_of(folder)


def test_what_only_a_merged_model_holds_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="holds .* as a whole .*give --adapters=merge"):
        Beside(Adapter(HERE / "gptj", base("gptj")))
    target = tmp_path / "run"
    with pytest.raises(ValueError, match="is a whole model; leave it out"):
        convert(str(HERE.parent / "fixtures" / "untied"), str(target), adapters="merge")
    assert not target.exists() and not list(tmp_path.iterdir())


def load_run_plain(folder):
    found = open_base(folder)
    return found.interchange.parameters(found.tensor)


def test_the_flag_adapter_merges_when_the_base_is_read(run, monkeypatch):
    """For a folder, and for the run that it was converted to."""
    monkeypatch.setattr(registry._READER, "adapted", {})
    registry.register()
    folder = HERE.parent / "fixtures" / "untied"
    assert largest_difference(load_run(folder).params, merged_parameters("gpt2")) > 0.1
    for workdir in (folder, run):
        # The run has the adapter already, so that it acts twice.
        registry.adapt(str(workdir), str(HERE / "gpt2"))
    assert largest_difference(load_run(folder).params, merged_parameters("gpt2")) < 1e-6
    twice = load_run(run).params
    change = jax.tree.map(np.subtract, merged_parameters("gpt2"), load_run_plain(folder))
    wanted = jax.tree.map(np.add, merged_parameters("gpt2"), change)
    assert largest_difference(twice, wanted) < 1e-5
    with pytest.raises(ValueError, match="needs its base; give --workdir=BASE"):
        registry.adapt(None, "adapter")


# --- with PEFT

_LOAD = """
import sys
import numpy as np, torch, transformers
from peft import PeftModel
for base, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    given = np.load(folder + "/ours.npz")
    with torch.no_grad():
        logits = model(torch.tensor(given["tokens"])).logits.numpy()
    print(np.abs(logits - given["logits"]).max())
"""
_EXPORTED = ("llama3", "gpt_neox", "gptj", "phi3_longrope", "bloom", "cohere2", "gemma3")


def python_with_peft():
    python = os.environ.get("PEFT_PYTHON")
    if python is None:
        pytest.skip("set PEFT_PYTHON to a Python that has torch, transformers and peft")
    return python


@pytest.mark.slow
def test_peft_reads_what_is_written(tmp_path):
    """PEFT_PYTHON names a Python with torch, transformers and peft."""
    python = python_with_peft()
    arguments = []
    rng = np.random.default_rng(0)
    bases = [HERE.parent / "families" / name for name in _EXPORTED]
    for folder in [*bases, HERE.parent / "fixtures" / "tied"]:
        found = open_base(folder)
        targets = tuple("q k v o in out".split()) + (("gate",) if found.model.gated else ())
        factors = random_factors(found.interchange, targets, 3, rng)
        out = tmp_path / folder.name
        out.mkdir()
        write_adapter(out, found.interchange, factors, 2.0, str(folder))
        config = read_run(found.path)
        optimizer = dataclasses.replace(
            config.optimizer, lora_rank=3, lora_alpha=6.0, lora_targets=targets
        )
        config = dataclasses.replace(config, optimizer=optimizer)
        params = found.interchange.parameters(found.tensor)
        ours = {name: jnp.asarray(array) for name, array in factors.items()}
        merged = lora.merge(lora.joined(params, {"blocks": ours}), config)
        tokens = rng.integers(3, found.model.vocabulary, (2, 20))
        np.savez(out / "ours.npz", tokens=tokens, logits=logits(found.model, merged, tokens))
        arguments += [folder, out]
    done = subprocess.run(
        [python, "-c", _LOAD, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    differences = [float(line) for line in done.stdout.split()]
    assert len(differences) == len(arguments) / 2 and max(differences) < LOGITS, differences


@pytest.mark.slow
def test_the_fixtures_are_what_peft_computes(tmp_path):
    maker = HERE.parent / "make_adapters.py"
    subprocess.run([python_with_peft(), maker, tmp_path], check=True, capture_output=True)
    for name in NAMES:
        again = np.load(tmp_path / name / "expected.npz")["logits"]
        assert np.abs(again - expected(name)["logits"]).max() < 1e-5


def test_an_adapters_file_of_ours_goes_to_peft_and_back(tmp_path):
    name = "gpt2"  # whose base has a tokenizer
    folder = str(base(name).path)
    given = read_adapters(folder, [str(HERE / name)])[str(HERE / name)]
    identity = adapter_file.identity_of(run_of_base(base(name)), base(name))
    path = str(tmp_path / "mine.safetensors")
    adapter_file.write(path, dataclasses.replace(given, base=identity))
    report = convert_file(path, str(tmp_path / "peft"), folder)
    assert "rank" in report and folder in report
    names = [path, str(tmp_path / "peft")]
    ours, back = (read_adapters(folder, names)[each] for each in names)
    for adapter in (ours, back):
        wanted = [np.einsum("lir,lro->lio", *pair) * given.scale for pair in matrices(given)]
        found = [np.einsum("lir,lro->lio", *pair) * adapter.scale for pair in matrices(adapter)]
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(ValueError, match="exists; name another folder"):
        convert_file(path, str(tmp_path / "peft"), folder)
    with pytest.raises(ValueError, match="does not hold its base.*--base"):
        convert_file(path, str(tmp_path / "other"), None)
    adapter_file.write(path, dataclasses.replace(given, base=identity | {"weights": "0"}))
    with pytest.raises(ValueError, match=r"is of another model than .*: the weights differ"):
        convert_file(path, str(tmp_path / "other"), folder)
    assert not list(tmp_path.glob("other*"))


def matrices(adapter):
    """Yield (A (L, I, R), B (L, R, O)) of each matrix."""
    for name in sorted(adapter.factors):
        if name.startswith("lora_a"):
            target = name.split("_")[2]
            second = next(n for n in adapter.factors if n.startswith(f"lora_b_{target}_"))
            layers, rank = adapter.factors[second].shape[:2]
            yield (
                adapter.factors[name].reshape(layers, -1, rank),
                adapter.factors[second].reshape(layers, rank, -1),
            )


def test_replaced_weights_are_told_from_those_before(tmp_path):
    folder = shutil.copytree(base_of(HERE / "gpt2"), tmp_path / "base")
    registry.register()
    before = adapter_file.weights_of(folder, "best", 0)
    again = shutil.copytree(folder, tmp_path / "copy")
    assert adapter_file.weights_of(again, "best", 0) == before
    registry.adapt(str(again), str(HERE / "gpt2"))
    try:
        adapted = adapter_file.weights_of(again, "best", 0)
    finally:
        registry._READER.adapted.clear()
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if "mlp" in name and tensors[name].ndim == 2)
    tensors[name][-1, -1] += 0.5
    save_file(tensors, path)
    assert len({before, adapted, adapter_file.weights_of(folder, "best", 0)}) == 3
