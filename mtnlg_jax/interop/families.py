"""The families of Hugging Face's models: which tensor holds which parameter of ours.

One table serves reading, writing, gradients in tests, and adapters. A family is its `model_type`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mtnlg_jax.config import ModelConfig, validate_model
from mtnlg_jax.interop import settings
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

    @property
    def embedding(self) -> str:
        """The tensor of the token embedding."""
        return next(name for name, tensor in self.outer.items() if tensor.ours == ("tokens_VD",))


def _t(ours: str, **how: Any) -> Tensor:
    return Tensor(tuple(ours.split()), **how)


def _both(theirs: str, weight: str, bias: str, **how: Any) -> Table:
    return {f"{theirs}.weight": _t(weight, **how), f"{theirs}.bias": _t(bias, **how)}


def _norms(names: dict[str, str], plus_one: bool = False) -> Table:
    """Return the tensors of norms; ``names`` are {our name: their name}."""
    table = {}
    for ours, theirs in names.items():
        table[f"{theirs}.weight"] = _t(f"{ours}.scale_D", plus_one=plus_one)
        table[f"{theirs}.bias"] = _t(f"{ours}.bias_D")
    return table


def _attention(
    at: str,
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    pairs: bool = False,
) -> Table:
    query, key, value, out = (f"{at}.{name}" for name in names)
    return {
        **_both(query, QUERY, "attention.b_q_NH", pairs=pairs),
        **_both(key, KEY, "attention.b_k_KH", pairs=pairs),
        **_both(value, VALUE, "attention.b_v_KH"),
        **_both(out, OUT, "attention.b_o_D"),
    }


def _fused(theirs: str, out: str, **how: Any) -> Table:
    return {**_both(theirs, QKV, QKV_BIAS, **how), **_both(out, OUT, "attention.b_o_D")}


def _plain(up: str, down: str, **how: Any) -> Table:
    """Return the tensors of an MLP without a gate."""
    return {
        **_both(up, "mlp.w_in_DF", "mlp.b_in_F", **how),
        **_both(down, "mlp.w_out_FD", "mlp.b_out_D", **how),
    }


def _outer(tokens: str, final: str, head: str = "lm_head", plus_one: bool = False) -> Table:
    return {
        f"{tokens}.weight": _t("tokens_VD"),
        **_norms({"final_norm": final}, plus_one),
        f"{head}.weight": _t("head_VD"),
        f"{head}.bias": _t("b_head_V"),
    }


def _plus_one(table: Table) -> Table:
    return {name: replace(tensor, plus_one=True) for name, tensor in table.items()}


def _experts(router: str, gate: str, up: str, down: str) -> Table:
    return {
        **_both(router, "mlp.w_router_DE", "mlp.b_router_E"),
        **_both(gate, "mlp.w_gate_EDF", "mlp.b_gate_EF"),
        **_both(up, "mlp.w_in_EDF", "mlp.b_in_EF"),
        **_both(down, "mlp.w_out_EFD", "mlp.b_out_ED"),
    }


_GATED = {
    **_both("mlp.gate_proj", "mlp.w_gate_DF", "mlp.b_gate_F"),
    **_both("mlp.up_proj", "mlp.w_in_DF", "mlp.b_in_F"),
    **_both("mlp.down_proj", "mlp.w_out_FD", "mlp.b_out_D"),
}
_GATE_UP = {
    "mlp.gate_up_proj.weight": _t("mlp.w_gate_DF mlp.w_in_DF"),
    "mlp.down_proj.weight": _t("mlp.w_out_FD"),
}
_PRE = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
_SANDWICH = {
    "norm_1": "input_layernorm",
    "norm_1_out": "post_attention_layernorm",
    "norm_2": "pre_feedforward_layernorm",
    "norm_2_out": "post_feedforward_layernorm",
}
_OUTPUT = {"norm_1": "post_attention_layernorm", "norm_2": "post_feedforward_layernorm"}
_HEAD_NORMS = {
    "self_attn.q_norm.weight": _t("attention.q_norm.scale_H"),
    "self_attn.k_norm.weight": _t("attention.k_norm.scale_H"),
}
_FULL_NORMS = {
    "self_attn.q_norm.weight": _t("attention.q_norm.scale_NH"),
    "self_attn.k_norm.weight": _t("attention.k_norm.scale_KH"),
}
_LAYERS = "model.layers.{}."
_MODEL = _outer("model.embed_tokens", "model.norm")
_MODEL_PLUS_ONE = _outer("model.embed_tokens", "model.norm", plus_one=True)
_ATTENTION = _attention("self_attn")
_PAIRED = _attention("self_attn", pairs=True)
_LLAMA = {**_ATTENTION, **_GATED, **_norms(_PRE)}
_H = "transformer.h.{}."
_OF_HEADS = "query_key_value"

# Text models inside multimodal ones.
_NESTED = (
    (r"^language_model\.model\.", "model."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.lm_head", "lm_head"),
)
_VISION = r"rotary_emb\.inv_freq$|vision_tower\.|multi_modal_projector\.|vision_model\."

_BERT_BLOCK = {
    **_attention("attention", ("self.query", "self.key", "self.value", "output.dense")),
    **_plain("intermediate.dense", "output.dense"),
    **_norms({"norm_1": "attention.output.LayerNorm", "norm_2": "output.LayerNorm"}),
}
_OLD_NORMS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def _masked(transform: str, norm: str, head: str, bias: str) -> Table:
    return {
        **_both(transform, "mlm.w_mlm_DC", "mlm.b_mlm_D"),
        **_both(norm, "mlm.norm.scale_D", "mlm.norm.bias_D"),
        f"{head}.weight": _t("head_VD"),
        bias: _t("b_head_V"),
    }


def _llama_like(read: Callable[[Keys], dict], block: Table = _LLAMA, **more: Any) -> Family:
    outer = more.pop("outer", _MODEL)
    return Family(_LAYERS, outer, block, read, **more)


_LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_GEMMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
}

FAMILIES: dict[str, Family] = {
    "llama": _llama_like(settings.llama, defaults=_LLAMA_DEFAULTS),
    "mistral": _llama_like(settings.mistral, defaults=_LLAMA_DEFAULTS | {"num_key_value_heads": 8}),
    "qwen2": _llama_like(settings.qwen2, defaults=_LLAMA_DEFAULTS),
    "qwen3": _llama_like(
        settings.qwen3, _LLAMA | _HEAD_NORMS, defaults=_LLAMA_DEFAULTS | {"head_dim": 128}
    ),
    "smollm3": _llama_like(
        settings.smollm3, defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    ),
    "granite": _llama_like(settings.granite, defaults=_LLAMA_DEFAULTS),
    "gemma": _llama_like(
        settings.gemma,
        _LLAMA | _norms(_PRE, plus_one=True),
        outer=_MODEL_PLUS_ONE,
        defaults=_GEMMA_DEFAULTS,
    ),
    "gemma2": _llama_like(
        settings.gemma2,
        _LLAMA | _norms(_SANDWICH, plus_one=True),
        outer=_MODEL_PLUS_ONE,
        defaults=_GEMMA_DEFAULTS
        | {
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": _llama_like(
        settings.gemma3,
        _LLAMA | _norms(_SANDWICH, plus_one=True) | _plus_one(_HEAD_NORMS),
        outer=_MODEL_PLUS_ONE,
        defaults=_GEMMA_DEFAULTS
        | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 1e6},
        renames=_NESTED,
        buffers=_VISION,
    ),
    "phi3": _llama_like(
        settings.phi3,
        {
            **_fused("self_attn.qkv_proj", "self_attn.o_proj"),
            **_GATE_UP,
            **_norms(_PRE),
        },
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    "phi": Family(
        _LAYERS,
        _outer("model.embed_tokens", "model.final_layernorm"),
        {
            **_attention("self_attn", ("q_proj", "k_proj", "v_proj", "dense")),
            **_plain("mlp.fc1", "mlp.fc2"),
            **_norms({"norm_1": "input_layernorm"}),
        },
        settings.phi,
        defaults={
            "tie_word_embeddings": False,
            "partial_rotary_factor": 0.5,
            "hidden_act": "gelu_new",
        },
    ),
    "olmo2": _llama_like(
        settings.olmo2,
        {**_ATTENTION, **_GATED, **_norms(_OUTPUT), **_FULL_NORMS},
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    "olmo3": _llama_like(
        settings.olmo3,
        {**_ATTENTION, **_GATED, **_norms(_OUTPUT), **_FULL_NORMS},
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": 4096},
    ),
    "glm4": _llama_like(
        settings.glm4,
        {
            **_PAIRED,
            **_GATE_UP,
            **_norms(
                {
                    "norm_1": "input_layernorm",
                    "norm_1_out": "post_self_attn_layernorm",
                    "norm_2": "post_attention_layernorm",
                    "norm_2_out": "post_mlp_layernorm",
                }
            ),
        },
        defaults={"partial_rotary_factor": 0.5, "tie_word_embeddings": False, "head_dim": 128},
    ),
    "cohere": _llama_like(
        settings.cohere,
        {**_PAIRED, **_GATED, **_norms({"norm_1": "input_layernorm"})},
        defaults={"rope_theta": 500000.0, "layer_norm_eps": 1e-5},
    ),
    "cohere2": _llama_like(
        settings.cohere2,
        {**_PAIRED, **_GATED, **_norms({"norm_1": "input_layernorm"})},
        defaults={"sliding_window": 4096, "layer_norm_eps": 1e-5},
    ),
    "stablelm": _llama_like(
        settings.stablelm,
        defaults={"partial_rotary_factor": 0.25, "tie_word_embeddings": False},
    ),
    "nemotron": _llama_like(
        settings.nemotron,
        {**_ATTENTION, **_plain("mlp.up_proj", "mlp.down_proj"), **_norms(_PRE, plus_one=True)},
        outer=_MODEL_PLUS_ONE,
        defaults={
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
            "hidden_act": "relu2",
        },
    ),
    "starcoder2": _llama_like(
        settings.starcoder2,
        {**_ATTENTION, **_plain("mlp.c_fc", "mlp.c_proj"), **_norms(_PRE)},
        defaults={"hidden_act": "gelu_pytorch_tanh"},
    ),
    "gpt_neox": Family(
        "gpt_neox.layers.{}.",
        _outer("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        {
            **_fused(f"attention.{_OF_HEADS}", "attention.dense", by_group=True),
            **_plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            **_norms(_PRE),
        },
        settings.gpt_neox,
        defaults={"tie_word_embeddings": False, "rotary_pct": 0.25},
        prefix="gpt_neox.",
        head="embed_out.weight",
        renames=((r"^lm_head\.", "embed_out."),),
        buffers=r"inv_freq$|attention\.bias$|\.masked_bias$",
    ),
    "gptj": Family(
        _H,
        _outer("transformer.wte", "transformer.ln_f"),
        {
            **_attention("attn", ("q_proj", "k_proj", "v_proj", "out_proj"), pairs=True),
            **_plain("mlp.fc_in", "mlp.fc_out"),
            **_norms({"norm_1": "ln_1"}),
        },
        settings.gptj,
        defaults={
            "tie_word_embeddings": False,
            "rotary_dim": 64,
            "activation_function": "gelu_new",
        },
        buffers=r"\.attn\.bias$|\.masked_bias$|embed_positions$",
        prefix="transformer.",
    ),
    "gpt2": Family(
        _H,
        _outer("transformer.wte", "transformer.ln_f")
        | {"transformer.wpe.weight": _t("positions_PD")},
        {
            **_fused("attn.c_attn", "attn.c_proj", columns=True),
            "attn.c_proj.weight": _t(OUT, columns=True),
            **_plain("mlp.c_fc", "mlp.c_proj", columns=True),
            **_norms({"norm_1": "ln_1", "norm_2": "ln_2"}),
        },
        settings.gpt2,
        defaults={
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "activation_function": "gelu_new",
        },
        buffers=r"\.attn\.(bias|masked_bias)$",
        prefix="transformer.",
    ),
    "opt": Family(
        "model.decoder.layers.{}.",
        _outer("model.decoder.embed_tokens", "model.decoder.final_layer_norm")
        | {"model.decoder.embed_positions.weight": _t("positions_PD", skip=2)},
        {
            **_attention("self_attn", ("q_proj", "k_proj", "v_proj", "out_proj")),
            **_plain("fc1", "fc2"),
            **_norms({"norm_1": "self_attn_layer_norm", "norm_2": "final_layer_norm"}),
        },
        settings.opt,
        defaults={"activation_function": "relu"},
        renames=((r"^decoder\.", "model.decoder."),),
    ),
    "bloom": Family(
        _H,
        _outer("transformer.word_embeddings", "transformer.ln_f")
        | _norms({"embedding_norm": "transformer.word_embeddings_layernorm"}),
        {
            **_fused(f"self_attention.{_OF_HEADS}", "self_attention.dense", by_group=True),
            **_plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            **_norms(_PRE),
        },
        settings.bloom,
        prefix="transformer.",
    ),
    "falcon": Family(
        _H,
        _outer("transformer.word_embeddings", "transformer.ln_f"),
        {
            **_fused(f"self_attention.{_OF_HEADS}", "self_attention.dense", by_group=True),
            **_plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            **_norms(_PRE),
        },
        settings.falcon,
        renames=(
            (r"\.ln_attn\.", ".input_layernorm."),
            (r"\.ln_mlp\.", ".post_attention_layernorm."),
        ),
        prefix="transformer.",
    ),
    "mixtral": _llama_like(
        settings.mixtral,
        {
            **_ATTENTION,
            **_norms(_PRE),
            **_experts(
                "block_sparse_moe.gate",
                *(f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2")),
            ),
        },
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 1e6},
    ),
    "qwen3_moe": _llama_like(
        settings.qwen3_moe,
        {
            **_ATTENTION,
            **_norms(_PRE),
            **_HEAD_NORMS,
            **_experts(
                "mlp.gate",
                *(f"mlp.experts.{{}}.{n}" for n in ("gate_proj", "up_proj", "down_proj")),
            ),
        },
        defaults=_LLAMA_DEFAULTS,
    ),
    "olmoe": _llama_like(
        settings.olmoe,
        {
            **_ATTENTION,
            **_norms(_PRE),
            **_FULL_NORMS,
            **_experts(
                "mlp.gate",
                *(f"mlp.experts.{{}}.{n}" for n in ("gate_proj", "up_proj", "down_proj")),
            ),
        },
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    "gpt_oss": _llama_like(
        settings.gpt_oss,
        {
            **_ATTENTION,
            **_norms(_PRE),
            "self_attn.sinks": _t("attention.b_sink_N"),
            **_both("mlp.router", "mlp.w_router_DE", "mlp.b_router_E"),
            "mlp.experts.gate_up_proj": _t(
                "mlp.w_gate_EDF mlp.w_in_EDF", interleaved=True, columns=True
            ),
            "mlp.experts.gate_up_proj_bias": _t("mlp.b_gate_EF mlp.b_in_EF", interleaved=True),
            "mlp.experts.down_proj": _t("mlp.w_out_EFD", columns=True),
            "mlp.experts.down_proj_bias": _t("mlp.b_out_ED"),
        },
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    "bert": Family(
        "bert.encoder.layer.{}.",
        {
            "bert.embeddings.word_embeddings.weight": _t("tokens_VD"),
            "bert.embeddings.position_embeddings.weight": _t(
                "positions_PD", add="bert.embeddings.token_type_embeddings.weight"
            ),
            **_norms({"embedding_norm": "bert.embeddings.LayerNorm"}),
            **_masked(
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.decoder",
                "cls.predictions.bias",
            ),
        },
        _BERT_BLOCK,
        settings.bert,
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12},
        prefix="bert.",
        head="cls.predictions.decoder.weight",
        renames=_OLD_NORMS,
        buffers=r"position_ids$|^bert\.pooler\.|^cls\.seq_relationship\.",
        masked=True,
    ),
    "roberta": Family(
        "roberta.encoder.layer.{}.",
        {
            "roberta.embeddings.word_embeddings.weight": _t("tokens_VD"),
            "roberta.embeddings.position_embeddings.weight": _t(
                "positions_PD", skip=2, add="roberta.embeddings.token_type_embeddings.weight"
            ),
            **_norms({"embedding_norm": "roberta.embeddings.LayerNorm"}),
            **_masked("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        },
        _BERT_BLOCK,
        settings.roberta,
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12},
        prefix="roberta.",
        head="lm_head.decoder.weight",
        renames=_OLD_NORMS,
        buffers=r"position_ids$|^roberta\.pooler\.",
        masked=True,
    ),
    "modernbert": Family(
        _LAYERS,
        {
            "model.embeddings.tok_embeddings.weight": _t("tokens_VD"),
            **_norms({"embedding_norm": "model.embeddings.norm", "final_norm": "model.final_norm"}),
            **_masked("head.dense", "head.norm", "decoder", "decoder.bias"),
        },
        {
            **_fused("attn.Wqkv", "attn.Wo"),
            "mlp.Wi.weight": _t("mlp.w_gate_DF mlp.w_in_DF"),
            "mlp.Wo.weight": _t("mlp.w_out_FD"),
            **_norms({"norm_1": "attn_norm", "norm_2": "mlp_norm"}),
        },
        settings.modernbert,
        defaults={"hidden_activation": "gelu", "local_attention": 128, "norm_eps": 1e-5},
        head="decoder.weight",
        first_norm="attn_norm",
        masked=True,
    ),
}

# Models that hold a text model of the second type under text_config.
NESTED = {"gemma3": "gemma3_text"}


def family_of(config: dict) -> tuple[str, dict]:
    """Return (model_type, the config of the text model) of a config.json. Raises ValueError if the
    type is not supported."""
    kind = config.get("model_type")
    if kind in NESTED and "text_config" in config:
        inner = config["text_config"]
        return NESTED[kind], inner | {"model_type": NESTED[kind]}
    if kind not in FAMILIES:
        raise ValueError(
            f"model_type is {kind!r} in config.json; supported are {', '.join(sorted(FAMILIES))}"
        )
    return kind, config


def model_of(config: dict) -> ModelConfig:
    """Return the ModelConfig of a config.json. Raises ValueError naming what is not supported."""
    kind, config = family_of(config)
    family = FAMILIES[kind]
    keys = Keys(config, family.defaults)
    keys.get("model_type")
    fields = family.read(keys)
    keys.refuse_unread()
    model = ModelConfig(**fields)
    validate_model(model)
    return model
