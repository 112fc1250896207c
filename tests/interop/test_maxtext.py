"""Checkpoints of MaxText: random models in Hugging Face's names, written by Orbax as MaxText's own
converter lays them out (its llama_or_mistral_ckpt.py and param_mapping.py)."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from mtnlg_jax.config import load_config
from mtnlg_jax.decode.load import names_of
from mtnlg_jax.interop import registry
from mtnlg_jax.interop.families import FAMILIES, model_of
from mtnlg_jax.interop.huggingface import convert
from mtnlg_jax.interop.interchange import Interchange
from mtnlg_jax.interop.source import Source
from mtnlg_jax.train.checkpoint import load_run

registry.register()
N = 4
K = 2
H = 8
D = 16
F = 24
V = 59
L = 3
E = 4
BASE = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {"decoder_block": "llama2", "max_target_length": 32, "model_name": "llama2-7b"}
# Hugging Face's config.json, MaxText's config.yml, what the writer does.
CASES: dict[str, tuple[dict, dict, dict]] = {
    "llama2": (BASE | {"model_type": "llama"}, PLAIN, {}),
    "llama3.1": (
        BASE | {"model_type": "llama", "rope_scaling": LLAMA_3},
        PLAIN | {"model_name": "llama3.1-8b"},
        {"pairs": True, "scanned": False},
    ),
    "qwen3": (
        BASE | {"model_type": "qwen3", "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
        PLAIN
        | {"decoder_block": "qwen3", "use_qk_norm": True, "normalization_layer_epsilon": 1e-6}
        | {"logits_via_embedding": True, "normalize_embedding_logits": False},
        {"divided": False, "zarr3": False},
    ),
    "mixtral": (
        BASE | {"model_type": "mixtral", "num_local_experts": E, "num_experts_per_tok": 2},
        PLAIN | {"decoder_block": "mixtral", "num_experts": E, "num_experts_per_tok": 2},
        {"dtype": jnp.bfloat16},
    ),
}


class Written:
    """A random model, as parameters of ours and as a checkpoint of MaxText at ``step``."""

    def __init__(self, folder: Path, case: str):
        config, settings, how = CASES[case]
        self.model = model_of(config)
        interchange = Interchange(self.model, FAMILIES[config["model_type"]])
        rng = np.random.default_rng(0)
        self.theirs = {
            name: (rng.integers(-16, 17, entry.shape) / 16).astype(np.float32)
            for name, entry in interchange.table.items()
        }
        self.params = names_of(interchange.parameters(self.theirs.__getitem__))
        self.run = folder
        self.step = folder / "7"
        save(self.step / "items", self._tree(**how), how.get("zarr3", True))
        (self.step / "config.yml").write_text(yaml.safe_dump(settings))

    def _layer(self, layer: int, pairs: bool, divided: bool) -> dict[str, np.ndarray]:
        """Return {MaxText's name: array} of a layer."""
        at = f"model.layers.{layer}."
        found = {}
        for name, array in self.theirs.items():
            if not name.startswith(at):
                continue
            name = name.removeprefix(at).removesuffix(".weight")
            if match := re.fullmatch(r"self_attn\.([qkv])_proj", name):
                kernel = array.T.reshape(D, -1, H)
                if pairs and match[1] != "v":  # halves to neighbors
                    kernel = kernel.reshape(D, -1, 2, H // 2).swapaxes(2, 3).reshape(D, -1, H)
                if divided and match[1] == "q":
                    kernel = kernel / np.float32(np.sqrt(H))
                kind = {"q": "query", "k": "key", "v": "value"}[match[1]]
                found[f"self_attention.{kind}.kernel"] = kernel
            elif name == "self_attn.o_proj":
                found["self_attention.out.kernel"] = array.T.reshape(N, H, D)
            elif match := re.fullmatch(r"self_attn\.([qk])_norm", name):
                found[f"self_attention.{'query' if match[1] == 'q' else 'key'}_norm.scale"] = array
            elif name in NORMS:
                found[f"{NORMS[name]}.scale"] = array
            elif match := re.fullmatch(r"mlp\.(gate|up|down)_proj", name):
                kind = {"gate": "wi_0", "up": "wi_1", "down": "wo"}[match[1]]
                found[f"mlp.{kind}.kernel"] = array.T
            elif name == "block_sparse_moe.gate":
                found["MoeBlock_0.gate.kernel"] = array.T
            elif match := re.fullmatch(r"block_sparse_moe\.experts\.(\d)\.w([123])", name):
                kind = {"1": "wi_0", "3": "wi_1", "2": "wo"}[match[2]]
                stack = found.setdefault(f"MoeBlock_0.{kind}", np.zeros((E, *array.T.shape)))
                stack[int(match[1])] = array.T
        return found

    def _tree(self, pairs=False, divided=True, scanned=True, dtype=jnp.float32, zarr3=True):
        layers = [self._layer(layer, pairs, divided) for layer in range(L)]
        flat = {
            "token_embedder.embedding": self.theirs["model.embed_tokens.weight"],
            "decoder.decoder_norm.scale": self.theirs["model.norm.weight"],
        }
        if "lm_head.weight" in self.theirs:
            flat["decoder.logits_dense.kernel"] = self.theirs["lm_head.weight"].T
        for name in layers[0]:
            if scanned:
                flat[f"decoder.layers.{name}"] = np.stack([each[name] for each in layers], 1)
            else:
                flat |= {f"decoder.layers_{i}.{name}": each[name] for i, each in enumerate(layers)}
        tree: dict = {}
        for name, array in flat.items():
            at = tree
            *parents, last = name.split(".")
            for parent in parents:
                at = at.setdefault(parent, {})
            at[last] = jnp.asarray(array, dtype)
        return {"params": {"params": tree}, "step": jnp.int32(7), "opt_state": {"mu": jnp.ones(3)}}


NORMS = {
    "input_layernorm": "pre_self_attention_layer_norm",
    "post_attention_layernorm": "post_self_attention_layer_norm",
}


def save(folder: Path, tree: dict, zarr3: bool) -> None:
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))


@pytest.fixture
def written(tmp_path):
    return lambda case: Written(tmp_path / case, case)


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_model_are_those_that_were_written(case, written):
    made = written(case)
    source = Source(made.step)
    assert source.model == made.model
    found = names_of(source.interchange.parameters(source.tensor))
    assert found.keys() == made.params.keys()
    exact = 1e-2 if case == "mixtral" else 1e-6  # bfloat16 after the division by sqrt(H)
    for name, array in made.params.items():
        np.testing.assert_allclose(found[name], array, rtol=exact, err_msg=name)


def test_a_tied_head_is_normalized_unless_told_otherwise(written):
    made = written("qwen3")
    path = made.step / "config.yml"
    settings = yaml.safe_load(path.read_text())
    del settings["normalize_embedding_logits"]
    path.write_text(yaml.safe_dump(settings))
    assert Source(made.step).model.multipliers.logits == D**-0.5


def test_convert_writes_a_run(written, tmp_path):
    made = written("llama2")
    words = tmp_path / "words"
    words.mkdir()
    letters = [chr(97 + number) for number in range(26)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (words / "vocab.txt").write_text("\n".join(pieces) + "\n")
    report = convert(str(made.run), str(tmp_path / "run"), tokenizer=str(words))
    assert "optimizer" in report
    run = load_run(tmp_path / "run")
    for name, array in names_of(run.params).items():
        np.testing.assert_allclose(array, made.params[name], rtol=1e-6)
    assert load_config(str(made.step)).model == made.model


def raised(path, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        Source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_folders_are_named(written):
    made = written("llama2")
    path = made.step / "config.yml"
    settings = yaml.safe_load(path.read_text())
    for change in (
        {"decoder_block": "gemma3"},
        {"attn_logits_soft_cap": 50.0},
        {"rope_type": "yarn"},
        {"mlp_activations": ["relu"]},
        {"use_qk_norm": True},
        {"normalization_layer_epsilon": "small"},
        {"num_experts": 8},
    ):
        path.write_text(yaml.safe_dump(settings | change))
        assert next(iter(change)) in raised(made.step)
    path.write_text(yaml.safe_dump(settings | {"logits_via_embedding": True}))
    assert "logits_dense.kernel" in raised(made.step)
    path.write_text("a: [1")
    assert "not valid YAML" in raised(made.step)
    path.unlink()
    assert "config.yml is missing" in raised(made.step, FileNotFoundError)
    path.write_text(yaml.safe_dump(settings))
    metadata = made.step / "items/_METADATA"
    content = json.loads(metadata.read_text())
    key = next(name for name in content["tree_metadata"] if "'wo'" in name)
    del content["tree_metadata"][key]
    metadata.write_text(json.dumps(content))
    assert "mlp.wo.kernel is missing" in raised(made.step)
    metadata.write_text("token_embedder")
    assert "_METADATA is damaged" in raised(made.step)
