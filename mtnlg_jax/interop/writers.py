"""config.json of each family from a ModelConfig: the keys that the family's class in transformers
has. Settings that it cannot express are lost here; `export` compares and refuses."""

import math
from collections.abc import Callable
from typing import Any

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.interop.config_parts import common, grouped, rope, types_of, window_of


def _llama(model: ModelConfig) -> dict[str, Any]:
    return (
        common(model)
        | grouped(model)
        | rope(model)
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
    return _without_biases(model) | {"sliding_window": window_of(model)}


def _qwen2(model: ModelConfig) -> dict[str, Any]:
    window = window_of(model)
    return _without_biases(model) | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": types_of(model),
    }


def _qwen3(model: ModelConfig) -> dict[str, Any]:
    return _qwen2(model) | {"attention_bias": model.has_bias("qkv")}


def _gemma(model: ModelConfig) -> dict[str, Any]:
    written = _llama(model)
    del written["mlp_bias"]
    return written | {"hidden_activation": written.pop("hidden_act")}


def _scalar(model: ModelConfig) -> float:
    """Return query_pre_attn_scalar."""
    scale = model.attention_multiplier or model.head_width**-0.5
    value = scale**-2
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def _gemma2(model: ModelConfig) -> dict[str, Any]:
    return _gemma(model) | {
        "query_pre_attn_scalar": _scalar(model),
        "sliding_window": window_of(model),
        "layer_types": types_of(model),
        "attn_logit_softcapping": model.attn_logit_softcapping,
        "final_logit_softcapping": model.final_logit_softcapping,
    }


def _gemma3(model: ModelConfig) -> dict[str, Any]:
    local = [spec for spec in model.layer_pattern if spec.window is not None]
    base = (local[0].rotary_base if local else None) or model.rotary_base
    both = {
        "full_attention": rope(model)["rope_parameters"],
        "sliding_attention": {"rope_theta": base, "rope_type": "default"},
    }
    return _gemma2(model) | {"rope_parameters": both}


def _olmo2(model: ModelConfig) -> dict[str, Any]:
    written = _llama(model)
    del written["mlp_bias"], written["head_dim"]
    return written


def _gpt_neox(model: ModelConfig) -> dict[str, Any]:
    return (
        common(model)
        | rope(model, percent=True)
        | {
            "layer_norm_eps": model.norm_epsilon,
            "attention_bias": model.has_bias("qkv"),
            "use_parallel_residual": model.parallel_residual != "none",
        }
    )


def _starcoder2(model: ModelConfig) -> dict[str, Any]:
    return (
        common(model)
        | grouped(model)
        | rope(model)
        | {
            "norm_epsilon": model.norm_epsilon,
            "use_bias": model.has_bias("qkv"),
            "sliding_window": window_of(model),
        }
    )


def _stablelm(model: ModelConfig) -> dict[str, Any]:
    return (
        common(model)
        | rope(model, percent=True)
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
        "sliding_window": window_of(model),
        "layer_types": types_of(model),
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
        "activation_function": common(model)["hidden_act"],
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
    return common(model) | {
        "layer_norm_eps": model.norm_epsilon,
        "type_vocab_size": 2,
        "hidden_dropout_prob": model.dropout_rate,
        "attention_probs_dropout_prob": 0.0,
    }


def _with_percent(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of families whose heads rotate in part."""
    return common(model) | grouped(model) | rope(model, percent=True)


def _without_width(written: dict[str, Any]) -> dict[str, Any]:
    """Leave head_dim out, for families that compute it of hidden_size."""
    return {key: value for key, value in written.items() if key != "head_dim"}


def _phi(model: ModelConfig) -> dict[str, Any]:
    more = {"layer_norm_eps": model.norm_epsilon, "qk_layernorm": False}
    return _without_width(_with_percent(model)) | more


def _granite(model: ModelConfig) -> dict[str, Any]:
    multipliers = model.multipliers
    return _llama(model) | {
        "embedding_multiplier": multipliers.embedding,
        "attention_multiplier": model.attention_multiplier or model.head_width**-0.5,
        "residual_multiplier": multipliers.residual,
        "logits_scaling": 1 / model.logits_multiplier,
    }


def _smollm3(model: ModelConfig) -> dict[str, Any]:
    window = window_of(model)
    turns = [int(model.layer(number).rotary) for number in range(model.num_layers)]
    return _llama(model) | {
        "no_rope_layers": turns,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": types_of(model),
    }


def _olmo3(model: ModelConfig) -> dict[str, Any]:
    local = {"rope_theta": model.rotary_base, "rope_type": "default"}
    full = rope(model)["rope_parameters"]
    return _olmo2(model) | {
        "sliding_window": window_of(model),
        "layer_types": types_of(model),
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }


def _glm4(model: ModelConfig) -> dict[str, Any]:
    return _with_percent(model) | {
        "rms_norm_eps": model.norm_epsilon,
        "attention_bias": model.has_bias("qkv"),
    }


def _cohere(model: ModelConfig) -> dict[str, Any]:
    return (
        common(model)
        | rope(model)
        | {
            "num_key_value_heads": model.kv_heads,
            "layer_norm_eps": model.norm_epsilon,
            "attention_bias": model.has_bias("qkv"),
            "logit_scale": model.logits_multiplier,
            "use_qk_norm": False,
        }
    )


def _cohere2(model: ModelConfig) -> dict[str, Any]:
    written = _cohere(model)
    del written["use_qk_norm"]
    return written | {
        "head_dim": model.head_width,
        "sliding_window": window_of(model),
        "layer_types": types_of(model),
    }


def _nemotron(model: ModelConfig) -> dict[str, Any]:
    return _with_percent(model) | {
        "norm_eps": model.norm_epsilon,
        "attention_bias": model.has_bias("qkv"),
        "mlp_bias": model.has_bias("mlp"),
    }


def _gptj(model: ModelConfig) -> dict[str, Any]:
    written = _gpt2(model)
    return written | {"n_inner": model.mlp_width, "rotary_dim": model.rotary_width}


def _opt(model: ModelConfig) -> dict[str, Any]:
    written = common(model, act="activation_function")
    width = written.pop("intermediate_size")
    del written["initializer_range"]
    return written | {
        "ffn_dim": width,
        "init_std": model.init_method_std,
        "word_embed_proj_dim": model.hidden_size,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _falcon(model: ModelConfig) -> dict[str, Any]:
    written = common(model, act="activation") | rope(model)
    width = written.pop("intermediate_size")
    parallel = model.parallel_residual
    heads = model.num_attention_heads
    new = parallel == "two_norms" or model.kv_heads not in (1, heads)
    return written | {
        "ffn_hidden_size": width,
        "layer_norm_epsilon": model.norm_epsilon,
        "bias": model.has_bias("qkv"),
        "alibi": False,
        "new_decoder_architecture": new,
        "num_kv_heads": model.kv_heads,
        "multi_query": model.kv_heads == 1,
        "parallel_attn": parallel != "none",
        "num_ln_in_parallel_attn": (2 if parallel == "two_norms" else 1) if new else None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _phi3(model: ModelConfig) -> dict[str, Any]:
    written = _without_width(_with_percent(model)) | {
        "rms_norm_eps": model.norm_epsilon,
        "sliding_window": window_of(model),
    }
    original = model.rope_scaling.original_max_position_embeddings
    if model.rope_scaling.rope_type == "longrope":
        written["original_max_position_embeddings"] = original
    return written


def _roberta(model: ModelConfig) -> dict[str, Any]:
    # Positions begin behind the id of the pad token, which is 1.
    positions = model.max_position_embeddings + 2
    return _bert(model) | {"max_position_embeddings": positions, "pad_token_id": 1}


def _modernbert(model: ModelConfig) -> dict[str, Any]:
    written = common(model, act="hidden_activation")
    window = window_of(model)
    bases = {
        kind: model.layer(number).rotary_base or model.rotary_base
        for number, kind in enumerate(types_of(model))
    }
    rotary = {
        kind: {"rope_theta": bases.get(kind, model.rotary_base), "rope_type": "default"}
        for kind in ("full_attention", "sliding_attention")
    }
    return written | {
        "norm_eps": model.norm_epsilon,
        "layer_types": types_of(model),
        "local_attention": 128 if window is None else 2 * (window - 1),
        "rope_parameters": rotary,
        "decoder_bias": model.has_bias("head"),
        "attention_dropout": 0.0,
        "mlp_dropout": 0.0,
        "embedding_dropout": 0.0,
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
    "smollm3": _smollm3,
    "granite": _granite,
    "phi3": _phi3,
    "phi": _phi,
    "olmo3": _olmo3,
    "glm4": _glm4,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "nemotron": _nemotron,
    "gptj": _gptj,
    "opt": _opt,
    "falcon": _falcon,
    "roberta": _roberta,
    "modernbert": _modernbert,
}
