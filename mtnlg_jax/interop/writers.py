"""config.json of each family from a ModelConfig: the keys that the family's class in transformers
has. Settings that it cannot express are lost here; `export` compares and refuses."""

import math
from collections.abc import Callable
from typing import Any

from mtnlg_jax.config import ModelConfig, RopeScaling
from mtnlg_jax.interop.settings import ACTIVATIONS, GATES


def _name_of(names: dict[str, str], activation: str) -> str:
    return next((theirs for theirs, ours in names.items() if ours == activation), activation)


def _common(model: ModelConfig, act: str = "hidden_act") -> dict[str, Any]:
    names = GATES if model.gated else ACTIVATIONS
    preferred = {"gelu": "gelu_new", "geglu": "gelu_pytorch_tanh"}
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings,
        act: preferred.get(model.activation) or _name_of(names, model.activation),
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    """Return the keys of rope_parameters that a type uses."""
    used = {
        "linear": ("factor",),
        "llama3": (
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
        ),
        "yarn": (
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
        ),
        "longrope": (
            "factor",
            "original_max_position_embeddings",
            "short_factor",
            "long_factor",
            "attention_factor",
        ),
    }
    names = used.get(scaling.rope_type, ())
    found = {name: getattr(scaling, name) for name in names}
    lists = {key: list(value) for key, value in found.items() if isinstance(value, tuple)}
    found = {key: value for key, value in found.items() if value is not None} | lists
    return {"rope_type": scaling.rope_type} | found


def _rope(model: ModelConfig, percent: bool = False) -> dict[str, Any]:
    found = {"rope_theta": model.rotary_base} | _scaling(model.rope_scaling)
    if percent:
        found["partial_rotary_factor"] = model.rotary_percent
    return {"rope_parameters": found}


def _grouped(model: ModelConfig) -> dict[str, Any]:
    return {"num_key_value_heads": model.kv_heads, "head_dim": model.head_width}


def _window(model: ModelConfig) -> int | None:
    windows = {model.layer(number).window for number in range(model.num_layers)} - {None}
    return min(windows, key=lambda each: each or 0) if windows else None


def _types(model: ModelConfig) -> list[str]:
    return [
        "full_attention" if model.layer(number).window is None else "sliding_attention"
        for number in range(model.num_layers)
    ]


def _llama(model: ModelConfig) -> dict[str, Any]:
    return (
        _common(model)
        | _grouped(model)
        | _rope(model)
        | {
            "rms_norm_eps": model.norm_epsilon,
            "attention_bias": model.has_bias("qkv"),
            "mlp_bias": model.has_bias("mlp"),
        }
    )


def _without_biases(model: ModelConfig) -> dict[str, Any]:
    written = _llama(model)
    del written["attention_bias"], written["mlp_bias"]
    return written


def _mistral(model: ModelConfig) -> dict[str, Any]:
    return _without_biases(model) | {"sliding_window": _window(model)}


def _qwen2(model: ModelConfig) -> dict[str, Any]:
    window = _window(model)
    return _without_biases(model) | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": _types(model),
    }


def _qwen3(model: ModelConfig) -> dict[str, Any]:
    return _qwen2(model) | {"attention_bias": model.has_bias("qkv")}


def _gemma(model: ModelConfig) -> dict[str, Any]:
    written = _llama(model)
    del written["mlp_bias"]
    return written | {"hidden_activation": written.pop("hidden_act")}


def _scalar(model: ModelConfig) -> float:
    """Return query_pre_attn_scalar."""
    scale = model.multipliers.attention or model.head_width**-0.5
    value = scale**-2
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def _gemma2(model: ModelConfig) -> dict[str, Any]:
    return _gemma(model) | {
        "query_pre_attn_scalar": _scalar(model),
        "sliding_window": _window(model),
        "layer_types": _types(model),
        "attn_logit_softcapping": model.attn_logit_softcapping,
        "final_logit_softcapping": model.final_logit_softcapping,
    }


def _gemma3(model: ModelConfig) -> dict[str, Any]:
    local = [spec for spec in model.layer_pattern if spec.window is not None]
    base = (local[0].rotary_base if local else None) or model.rotary_base
    rope = {
        "full_attention": _rope(model)["rope_parameters"],
        "sliding_attention": {"rope_theta": base, "rope_type": "default"},
    }
    return _gemma2(model) | {"rope_parameters": rope}


def _olmo2(model: ModelConfig) -> dict[str, Any]:
    written = _llama(model)
    del written["mlp_bias"], written["head_dim"]
    return written


def _gpt_neox(model: ModelConfig) -> dict[str, Any]:
    return (
        _common(model)
        | _rope(model, percent=True)
        | {
            "layer_norm_eps": model.norm_epsilon,
            "attention_bias": model.has_bias("qkv"),
            "use_parallel_residual": model.parallel_residual != "none",
        }
    )


def _starcoder2(model: ModelConfig) -> dict[str, Any]:
    return (
        _common(model)
        | _grouped(model)
        | _rope(model)
        | {
            "norm_epsilon": model.norm_epsilon,
            "use_bias": model.has_bias("qkv"),
            "sliding_window": _window(model),
        }
    )


def _stablelm(model: ModelConfig) -> dict[str, Any]:
    return (
        _common(model)
        | _rope(model, percent=True)
        | {
            "num_key_value_heads": model.kv_heads,
            "layer_norm_eps": model.norm_epsilon,
            "use_qkv_bias": model.has_bias("qkv"),
            "use_parallel_residual": model.parallel_residual != "none",
        }
    )


def _mixtral(model: ModelConfig) -> dict[str, Any]:
    return _mistral(model) | {
        "num_local_experts": model.moe.num_moe_experts,
        "num_experts_per_tok": model.moe.moe_router_topk,
        "router_aux_loss_coef": model.moe.moe_aux_loss_coeff,
    }


def _olmoe(model: ModelConfig) -> dict[str, Any]:
    return _olmo2(model) | {
        "num_experts": model.moe.num_moe_experts,
        "num_experts_per_tok": model.moe.moe_router_topk,
        "router_aux_loss_coef": model.moe.moe_aux_loss_coeff,
        "norm_topk_prob": model.moe.moe_router_norm,
    }


def _qwen3_moe(model: ModelConfig) -> dict[str, Any]:
    written = _qwen3(model)
    del written["layer_types"]
    return written | {
        "moe_intermediate_size": model.mlp_width,
        "num_experts": model.moe.num_moe_experts,
        "num_experts_per_tok": model.moe.moe_router_topk,
        "router_aux_loss_coef": model.moe.moe_aux_loss_coeff,
        "norm_topk_prob": model.moe.moe_router_norm,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gpt_oss(model: ModelConfig) -> dict[str, Any]:
    written = _without_biases(model)
    return written | {
        "hidden_act": "silu",
        "attention_bias": True,
        "sliding_window": _window(model),
        "layer_types": _types(model),
        "num_local_experts": model.moe.num_moe_experts,
        "num_experts_per_tok": model.moe.moe_router_topk,
        "router_aux_loss_coef": model.moe.moe_aux_loss_coeff,
    }


def _gpt2(model: ModelConfig) -> dict[str, Any]:
    width = model.hidden_size
    return {
        "vocab_size": model.vocabulary,
        "n_positions": model.max_position_embeddings,
        "n_embd": width,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": None if model.mlp_width == 4 * width else model.mlp_width,
        "activation_function": _common(model)["hidden_act"],
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "resid_pdrop": model.dropout_rate,
        "embd_pdrop": model.dropout_rate,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _bloom(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "seq_length": model.max_position_embeddings,
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _bert(model: ModelConfig) -> dict[str, Any]:
    return _common(model) | {
        "layer_norm_eps": model.norm_epsilon,
        "type_vocab_size": 2,
        "hidden_dropout_prob": model.dropout_rate,
        "attention_probs_dropout_prob": 0.0,
    }


WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "olmo2": _olmo2,
    "gpt_neox": _gpt_neox,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
    "bloom": _bloom,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "bert": _bert,
}
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "bloom": "BloomForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "bert": "BertForMaskedLM",
}
