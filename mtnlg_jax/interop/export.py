"""ModelConfig -> the config.json of a family.

The proof of each is the reader: a config.json counts only if `families.model_of` makes the same
model of it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from mtnlg_jax.config import LayerSpec, ModelConfig, RopeScaling
from mtnlg_jax.config.model import BIASES
from mtnlg_jax.interop.families import NESTED, family_of, model_of
from mtnlg_jax.interop.settings import ACTIVATIONS, GATES

# Keys of config.json for fields that further training may change; a file may spell them in any of
# these ways.
_SPELLINGS = {
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "seq_length"),
    "norm_epsilon": (
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_epsilon",
        "norm_eps",
    ),
    "vocab_size": ("vocab_size",),
    "init_method_std": ("initializer_range", "init_std"),
    "tie_embeddings": ("tie_word_embeddings",),
    "dropout_rate": ("resid_pdrop", "embd_pdrop"),
    "num_layers": ("num_hidden_layers", "n_layer"),
}


def meaning(model: ModelConfig, family: str | None = None) -> dict[str, Any]:
    """Return what ``model`` computes, in one spelling: fields whose default depends on others are
    resolved, and what only training uses is left out, except the values that ``family`` keeps."""
    rotary = model.position_embedding_type == "rotary"
    scaling = model.rope_scaling if rotary else RopeScaling()

    def layer(spec: LayerSpec) -> tuple:
        turns = rotary and spec.rotary
        scaled = turns and spec.rope_scaling and scaling != RopeScaling()
        base = float(spec.rotary_base or model.rotary_base) if turns else None
        return spec.window, turns, base, scaled, spec.first_norm

    multipliers = model.multipliers
    moe = {}
    if model.moe.num_moe_experts:
        moe = dataclasses.asdict(model.moe)
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate"):
            del moe[name]
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_width,
        "ffn_hidden_size": model.mlp_width,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": model.position_embedding_type,
        "rotary_percent": model.rotary_width / model.head_width if rotary else 1.0,
        "rope_scaling": scaling,
        "normalization": model.normalization,
        "norm_placement": model.norm_placement,
        "norm_epsilon": model.norm_epsilon,
        "qk_layernorm": model.qk_layernorm,
        "parallel_residual": model.parallel_residual,
        "embedding_norm": model.embedding_norm,
        "activation": model.activation,
        "bias": tuple(name for name in BIASES if model.has_bias(name)),
        "tie_embeddings": model.tie_embeddings,
        "mlm_head": model.mlm_head,
        "layer_pattern": tuple(layer(model.layer(i)) for i in range(model.num_layers)),
        "attn_logit_softcapping": model.attn_logit_softcapping,
        "final_logit_softcapping": model.final_logit_softcapping,
        "multipliers": (
            multipliers.embedding,
            multipliers.attention or model.head_width**-0.5,
            multipliers.residual,
            multipliers.logits,
        ),
        "attention_sink": model.attention_sink,
        "moe": moe,
        "init_method_std": model.init_method_std,
        "dropout_rate": model.dropout_rate if family == "gpt2" else 0.0,
    }


def differences(one: ModelConfig, other: ModelConfig, family: str) -> list[str]:
    """Return the fields in which two models differ, as far as ``family`` knows them."""
    left = meaning(one, family)
    right = meaning(other, family)
    close = {"multipliers"}  # products of square roots
    return [
        key
        for key in left
        if left[key] != right[key]
        and not (key in close and all(map(math.isclose, left[key], right[key])))
    ]


def config_of(model: ModelConfig, original: dict | None = None) -> dict:
    """Return the config.json of ``model``.

    That of a converted model is ``original`` with only what changed. Otherwise it is that of the
    first family in `_WRITERS` that computes the same. Raises ValueError naming what no family can
    express.
    """
    if original is not None:
        changed = _changed(model, original)
        if changed is not None:
            return changed
    nearest: tuple[int, str, list[str], ModelConfig] | None = None
    for family, write in _WRITERS.items():
        config = {"architectures": [_ARCHITECTURES[family]], "model_type": family} | write(model)
        try:
            found = model_of(config)
        except ValueError:
            continue
        other = differences(model, found, family)
        if not other:
            return config
        if nearest is None or len(other) < nearest[0]:
            nearest = len(other), family, other, found
    if nearest is None:
        raise ValueError("no family of Hugging Face's has this model; keep it in its own folder")
    _, family, other, found = nearest
    there = meaning(found, family)
    here = meaning(model, family)
    named = ", ".join(f"model.{key}={here[key]} ({family}: {there[key]})" for key in other)
    raise ValueError(
        f"no family of Hugging Face's can express this model; the nearest is {family}, except for "
        f"{named}; keep such a run in its own folder"
    )


def _changed(model: ModelConfig, original: dict) -> dict | None:
    """Return ``original`` with what changed, or None if its family cannot express ``model``."""
    family, inner = family_of(original)
    config = original
    if original.get("model_type") in NESTED:
        config = inner | {"architectures": [_ARCHITECTURES[family]]}
    before = model_of(config)
    for key in differences(model, before, family):
        names = _SPELLINGS.get(key, ())
        present = [name for name in names if name in config] or list(names[:1])
        value = getattr(model, key)
        config = config | dict.fromkeys(present[: 2 if key == "dropout_rate" else 1], value)
        if key == "dropout_rate":
            config = config | {"resid_pdrop": value}
    try:
        return config if not differences(model, model_of(config), family) else None
    except ValueError:
        return None


# --- writers: the keys that the family's class in transformers has


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


_WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
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
_ARCHITECTURES = {
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
