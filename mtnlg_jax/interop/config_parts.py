"""What the config.json of many families have in common, from a ModelConfig."""

from typing import Any

from mtnlg_jax.config import ModelConfig, RopeScaling
from mtnlg_jax.interop.settings import ACTIVATIONS, GATES

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
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "phi": "PhiForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "gptj": "GPTJForCausalLM",
    "opt": "OPTForCausalLM",
    "falcon": "FalconForCausalLM",
    "roberta": "RobertaForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
}


def _name_of(names: dict[str, str], activation: str) -> str:
    return next((theirs for theirs, ours in names.items() if ours == activation), activation)


def common(model: ModelConfig, act: str = "hidden_act") -> dict[str, Any]:
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


def rope(model: ModelConfig, percent: bool = False) -> dict[str, Any]:
    found = {"rope_theta": model.rotary_base} | _scaling(model.rope_scaling)
    if percent:
        found["partial_rotary_factor"] = model.rotary_percent
    return {"rope_parameters": found}


def grouped(model: ModelConfig) -> dict[str, Any]:
    return {"num_key_value_heads": model.kv_heads, "head_dim": model.head_width}


def window_of(model: ModelConfig) -> int | None:
    windows = {model.layer(number).window for number in range(model.num_layers)} - {None}
    return min(windows, key=lambda each: each or 0) if windows else None


def types_of(model: ModelConfig) -> list[str]:
    return [
        "full_attention" if model.layer(number).window is None else "sliding_attention"
        for number in range(model.num_layers)
    ]
