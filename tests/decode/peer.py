"""Build the random GPT-2 models of fixtures/transformers.npz, and read Hugging Face's results."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import make_fixtures as made
import numpy as np

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.cache import Decoder, unstack
from mtnlg_jax.model.transformer import abstract_model

FILE = Path(__file__).parent / "fixtures" / "transformers.npz"
CONFIG = ModelConfig(
    num_layers=made.LAYERS,
    hidden_size=made.WIDTH,
    num_attention_heads=made.HEADS,
    vocab_size=made.VOCABULARY,
    max_position_embeddings=made.CONTEXT,
)


class Letters:
    """A tokenizer whose tokens are letters; every one may be written, and one is the end."""

    vocab_size = made.VOCABULARY
    bos_id = made.END
    eos_id = made.END
    eos_ids = (made.END,)
    prompt_bos = False
    is_special = np.zeros(made.VOCABULARY, bool)

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == self.eos_id else b"abcdefghijklm"[token : token + 1]

    def encode(self, text: str) -> list[int]:
        return ["abcdefghijklm".index(letter) for letter in text]


@functools.cache
def fixtures() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        fixtures = dict(file)
    asked = json.loads(json.dumps([made.GREEDY_SETTINGS, made.BEAM_SETTINGS, made.PROCESSORS]))
    assert json.loads(str(fixtures["settings"])) == asked, (
        "make_fixtures.py has changed; run it again"
    )
    return fixtures


@functools.cache
def decoder(number: int) -> Decoder:
    """Return model ``number`` of the fixtures."""
    heads = made.HEADS
    width = made.WIDTH

    def tensor(name):
        return fixtures()[f"{number}/weights/{name}"]

    def layers(name):
        return np.stack([tensor(f"h.{layer}.{name}") for layer in range(made.LAYERS)])

    qkv = layers("attn.c_attn.weight").reshape(made.LAYERS, width, 3, heads, -1)
    qkv_bias = layers("attn.c_attn.bias").reshape(made.LAYERS, 3, heads, -1)
    ours = {
        "tokens_VD": tensor("wte.weight"),
        "positions_PD": tensor("wpe.weight"),
        "final_norm.scale_D": tensor("ln_f.weight"),
        "final_norm.bias_D": tensor("ln_f.bias"),
        "blocks.attention.w_o_NHD": layers("attn.c_proj.weight").reshape(
            made.LAYERS, heads, -1, width
        ),
        "blocks.attention.b_o_D": layers("attn.c_proj.bias"),
        "blocks.mlp.w_in_DF": layers("mlp.c_fc.weight"),
        "blocks.mlp.b_in_F": layers("mlp.c_fc.bias"),
        "blocks.mlp.w_out_FD": layers("mlp.c_proj.weight"),
        "blocks.mlp.b_out_D": layers("mlp.c_proj.bias"),
    }
    for place, (weight, bias) in enumerate(
        (("w_q_DNH", "b_q_NH"), ("w_k_DKH", "b_k_KH"), ("w_v_DKH", "b_v_KH"))
    ):
        ours[f"blocks.attention.{weight}"] = qkv[:, :, place]
        ours[f"blocks.attention.{bias}"] = qkv_bias[:, place]
    for place in "12":
        ours[f"blocks.norm_{place}.scale_D"] = layers(f"ln_{place}.weight")
        ours[f"blocks.norm_{place}.bias_D"] = layers(f"ln_{place}.bias")

    def find(path, leaf):
        name = ".".join(
            str(getattr(key, "key", getattr(key, "name", key))) for key in path
        ).removesuffix(".value")
        assert ours[name].shape == leaf.shape, (name, ours[name].shape, leaf.shape)
        return jnp.asarray(ours[name])

    return unstack(CONFIG, jax.tree_util.tree_map_with_path(find, abstract_model(CONFIG)[1]))


def cut(tokens, ends=(made.END,)) -> tuple[int, ...]:
    """Return a row of Hugging Face's up to its end token."""
    row = tokens.tolist()
    return tuple(row[: next((place for place, token in enumerate(row) if token in ends), len(row))])
