"""What the tables of `families` are made of: the description of a family, and the tensors that many
of them name alike."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mtnlg_jax.interop.keys import Keys
from mtnlg_jax.interop.tensors import Tensor

Table = dict[str, Tensor]

QUERY = "attention.w_q_DNH"
KEY = "attention.w_k_DKH"
VALUE = "attention.w_v_DKH"
OUT = "attention.w_o_NHD"
QKV = f"{QUERY} {KEY} {VALUE}"
QKV_BIAS = "attention.b_q_NH attention.b_k_KH attention.b_v_KH"


@dataclass(frozen=True)
class Family:
    """How the files of one model_type are laid out."""

    layers: str  # prefix of a layer's tensors, with {} for its number
    outer: Table
    block: Table  # names without the prefix; {} stands for an expert
    read: Callable[[Keys], dict[str, Any]]  # config.json -> fields of ModelConfig
    defaults: dict[str, Any] = field(default_factory=dict)  # of the class in transformers
    prefix: str = "model."  # which files of the bare model leave out
    head: str = "lm_head.weight"  # a copy of the embedding where they are tied
    renames: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) of older spellings
    # Tensors that compute nothing here: masks and frequencies that older versions saved, and heads
    # for other tasks.
    buffers: str = r"rotary_emb\.inv_freq$|\.masked_bias$|position_ids$"
    first_norm: str = "\0"  # the norm that a layer with first_norm=False does not have
    masked: bool = False  # trained to fill masks
    # (pattern, replacement) of names in a model whose parallel halves have a norm each.
    two_norms: tuple[tuple[str, str], ...] = ()

    @property
    def embedding(self) -> str:
        """The tensor of the token embedding."""
        return next(name for name, each in self.outer.items() if each.ours == ("tokens_VD",))


def tensor(ours: str, **how: Any) -> Tensor:
    return Tensor(tuple(ours.split()), **how)


def both(theirs: str, weight: str, bias: str, **how: Any) -> Table:
    return {f"{theirs}.weight": tensor(weight, **how), f"{theirs}.bias": tensor(bias, **how)}


def norms(names: dict[str, str], plus_one: bool = False) -> Table:
    """Return the tensors of norms; ``names`` are {our name: their name}."""
    table = {}
    for ours, theirs in names.items():
        table[f"{theirs}.weight"] = tensor(f"{ours}.scale_D", plus_one=plus_one)
        table[f"{theirs}.bias"] = tensor(f"{ours}.bias_D")
    return table


def attention(
    at: str,
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    pairs: bool = False,
) -> Table:
    query, key, value, out = (f"{at}.{name}" for name in names)
    return {
        **both(query, QUERY, "attention.b_q_NH", pairs=pairs),
        **both(key, KEY, "attention.b_k_KH", pairs=pairs),
        **both(value, VALUE, "attention.b_v_KH"),
        **both(out, OUT, "attention.b_o_D"),
    }


def fused(theirs: str, out: str, **how: Any) -> Table:
    return {**both(theirs, QKV, QKV_BIAS, **how), **both(out, OUT, "attention.b_o_D")}


def plain(up: str, down: str, **how: Any) -> Table:
    """Return the tensors of an MLP without a gate."""
    return {
        **both(up, "mlp.w_in_DF", "mlp.b_in_F", **how),
        **both(down, "mlp.w_out_FD", "mlp.b_out_D", **how),
    }


def outer(tokens: str, final: str, head: str = "lm_head", plus_one: bool = False) -> Table:
    return {
        f"{tokens}.weight": tensor("tokens_VD"),
        **norms({"final_norm": final}, plus_one),
        f"{head}.weight": tensor("head_VD"),
        f"{head}.bias": tensor("b_head_V"),
    }


def plus_one(table: Table) -> Table:
    return {name: replace(each, plus_one=True) for name, each in table.items()}


def experts(router: str, gate: str, up: str, down: str) -> Table:
    return {
        **both(router, "mlp.w_router_DE", "mlp.b_router_E"),
        **both(gate, "mlp.w_gate_EDF", "mlp.b_gate_EF"),
        **both(up, "mlp.w_in_EDF", "mlp.b_in_EF"),
        **both(down, "mlp.w_out_EFD", "mlp.b_out_ED"),
    }


GATED = {
    **both("mlp.gate_proj", "mlp.w_gate_DF", "mlp.b_gate_F"),
    **both("mlp.up_proj", "mlp.w_in_DF", "mlp.b_in_F"),
    **both("mlp.down_proj", "mlp.w_out_FD", "mlp.b_out_D"),
}
GATE_UP = {
    "mlp.gate_up_proj.weight": tensor("mlp.w_gate_DF mlp.w_in_DF"),
    "mlp.down_proj.weight": tensor("mlp.w_out_FD"),
}
PRE = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
SANDWICH = {
    "norm_1": "input_layernorm",
    "norm_1_out": "post_attention_layernorm",
    "norm_2": "pre_feedforward_layernorm",
    "norm_2_out": "post_feedforward_layernorm",
}
OUTPUT = {"norm_1": "post_attention_layernorm", "norm_2": "post_feedforward_layernorm"}
HEAD_NORMS = {
    "self_attn.q_norm.weight": tensor("attention.q_norm.scale_H"),
    "self_attn.k_norm.weight": tensor("attention.k_norm.scale_H"),
}
FULL_NORMS = {
    "self_attn.q_norm.weight": tensor("attention.q_norm.scale_NH"),
    "self_attn.k_norm.weight": tensor("attention.k_norm.scale_KH"),
}
LAYERS = "model.layers.{}."
MODEL = outer("model.embed_tokens", "model.norm")
MODEL_PLUS_ONE = outer("model.embed_tokens", "model.norm", plus_one=True)
ATTENTION = attention("self_attn")
PAIRED = attention("self_attn", pairs=True)
LLAMA = {**ATTENTION, **GATED, **norms(PRE)}
GPT_LAYERS = "transformer.h.{}."
OF_HEADS = "query_key_value"

# Text models inside multimodal ones.
NESTED_NAMES = (
    (r"^language_model\.model\.", "model."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.lm_head", "lm_head"),
)
VISION = r"rotary_emb\.inv_freq$|vision_tower\.|multi_modal_projector\.|vision_model\."

BERT_BLOCK = {
    **attention("attention", ("self.query", "self.key", "self.value", "output.dense")),
    **plain("intermediate.dense", "output.dense"),
    **norms({"norm_1": "attention.output.LayerNorm", "norm_2": "output.LayerNorm"}),
}
OLD_NORMS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def masked(transform: str, norm: str, head: str, bias: str) -> Table:
    return {
        **both(transform, "mlm.w_mlm_DC", "mlm.b_mlm_D"),
        **both(norm, "mlm.norm.scale_D", "mlm.norm.bias_D"),
        f"{head}.weight": tensor("head_VD"),
        bias: tensor("b_head_V"),
    }


def llama_like(read: Callable[[Keys], dict], block: Table = LLAMA, **more: Any) -> Family:
    outer = more.pop("outer", MODEL)
    return Family(LAYERS, outer, block, read, **more)


LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
GEMMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
}
