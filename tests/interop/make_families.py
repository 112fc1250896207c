"""Write what transformers computes with a small random model of each family, with a Python that has
torch and transformers:

    python tests/interop/make_families.py FOLDER [NAME ...]

Each folder is what save_pretrained writes, and expected.npz: the logits of a batch, its loss, the
norm and one projection of each gradient, and greedy tokens. Every parameter is random, norms and
biases too: an initialization of ones and zeros hides mistakes. Weights are numbers that float16
holds exactly. Windows are shorter than the prompts, and rotary scalings act inside the tested
length.
"""

import math
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers

VOCABULARY = 61
LENGTH = 40
PROMPT = 12

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _BASE | {"num_key_value_heads": 2}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}


def _rope(kind: str = "default", **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | more}


_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500000.0,
}
_LONGROPE = {
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * i for i in range(3)],
    "long_factor": [1.5 + 0.3 * i for i in range(3)],
    "original_max_position_embeddings": 16,
}
_LOCAL = ["sliding_attention"]
_FULL = ["full_attention"]

# Those of COMMITTED lie beside this file; tests of the others need a Python with transformers.
COMMITTED = (
    "llama3 qwen2_window gemma2 gemma3 olmo3 phi3_longrope gpt_neox gptj bloom cohere2 gpt_oss "
    "mixtral bert modernbert"
).split()

# name -> (class, class of the config, its arguments)
MODELS: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED | {"attention_bias": True}),
    "llama_linear": ("LlamaForCausalLM", "LlamaConfig", _GROUPED | _rope("linear", factor=4.0)),
    "llama3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        _GROUPED
        | {"tie_word_embeddings": True, "head_dim": 12, "rms_norm_eps": 1e-5}
        | _rope("llama3", **_LLAMA3),
    ),
    "llama_yarn": ("LlamaForCausalLM", "LlamaConfig", _GROUPED | _rope("yarn", **_YARN)),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED | {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        _GROUPED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED | {"head_dim": 12}),
    "gemma": (
        "GemmaForCausalLM",
        "GemmaConfig",
        _GROUPED | {"head_dim": 12, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _GROUPED
        | {
            "head_dim": 12,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _GROUPED
        | {
            "num_key_value_heads": 1,
            "head_dim": 12,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "num_hidden_layers": 5,  # a period of three and a rest
            "layer_types": (_LOCAL + _LOCAL + _FULL) + _LOCAL + _LOCAL,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED | {"sliding_window": 8}),
    "phi3_longrope": (
        "Phi3ForCausalLM",
        "Phi3Config",
        _GROUPED | {"original_max_position_embeddings": 16} | _rope("longrope", **_LONGROPE),
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _BASE | _rope(partial_rotary_factor=0.5)),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "olmo3": (
        "Olmo3ForCausalLM",
        "Olmo3Config",
        _GROUPED
        | {
            "sliding_window": 8,
            "layer_types": _LOCAL * 3 + _FULL,
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "rope_theta": 10000.0} | _YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _BASE | _rope(partial_rotary_factor=0.25),
    ),
    "gpt_neox_serial": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _BASE | {"use_parallel_residual": False} | _rope(partial_rotary_factor=0.5),
    ),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", _GPT | {"rotary_dim": 4}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 36,
            "n_layer": 3,
            "n_head": 6,  # not a power of two: slopes of both kinds
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _GROUPED),
    "starcoder2": (
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        _GROUPED | {"sliding_window": 8, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        _GROUPED
        | {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.05,
            "logits_scaling": 2.0,
        },
    ),
    "cohere": (
        "CohereForCausalLM",
        "CohereConfig",
        _GROUPED | {"logit_scale": 0.25, "use_qk_norm": False},
    ),
    "cohere2": (
        "Cohere2ForCausalLM",
        "Cohere2Config",
        _GROUPED | {"logit_scale": 0.25, "sliding_window": 8},
    ),
    "glm4": (
        "Glm4ForCausalLM",
        "Glm4Config",
        _GROUPED | {"head_dim": 8, "attention_bias": True} | _rope(partial_rotary_factor=0.5),
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "falcon_new": (
        "FalconForCausalLM",
        "FalconConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bias": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "stablelm": (
        "StableLmForCausalLM",
        "StableLmConfig",
        _GROUPED
        | {"use_qkv_bias": True, "hidden_dropout": 0.0}
        | _rope(partial_rotary_factor=0.25),
    ),
    "nemotron": (
        "NemotronForCausalLM",
        "NemotronConfig",
        _GROUPED | _rope(partial_rotary_factor=0.5),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _GROUPED
        | {
            "head_dim": 12,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        "OlmoeConfig",
        _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        _GROUPED
        | {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "num_hidden_layers": 3,  # a period of two and a rest
        }
        | _rope("yarn", beta_fast=32.0, beta_slow=1.0, truncate=False, **_YARN),
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "roberta": (
        "RobertaForMaskedLM",
        "RobertaConfig",
        _BERT | {"pad_token_id": 1, "type_vocab_size": 1},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "global_attn_every_n_layers": 3,
            "local_attention": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
}


def projection(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the fixed random direction onto which a gradient is projected."""
    seed = zlib.crc32(name.encode())
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomize(model) -> None:
    """Draw every parameter, rounded to numbers that float16 holds."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                value = parameter + 0.3 * noise
            elif any(part in name for part in ("emb", "wte", "wpe")):
                value = 0.5 * noise
            else:
                value = noise / math.sqrt(parameter.shape[-1])
            parameter.copy_(value.half().float())


def write(folder: Path, name: str) -> None:
    """Write the model ``name`` and what transformers computes with it."""
    model_class, config_class, arguments = MODELS[name]
    config = getattr(transformers, config_class)(**arguments)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).float().eval()
    model.config._attn_implementation = "eager"
    randomize(model)
    model.tie_weights()
    masked = "MaskedLM" in model_class
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    logits = model(tokens).logits
    shown, labels = (logits, tokens) if masked else (logits[:, :-1], tokens[:, 1:])
    loss = torch.nn.functional.cross_entropy(shown.reshape(-1, VOCABULARY), labels.reshape(-1))
    loss.backward()
    expected = {"tokens": tokens, "logits": logits.detach(), "loss": loss.detach()}
    expected = {key: value.numpy() for key, value in expected.items()}
    for key, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad.numpy()
        along = (gradient * projection(key, gradient.shape)).sum()
        expected["gradient:" + key] = np.array([np.linalg.norm(gradient), along], np.float32)
    if not masked:
        prompts = tokens[:, :PROMPT]
        expected["greedy"] = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=20,
            min_new_tokens=20,  # past an end token
            do_sample=False,
            pad_token_id=0,
        ).numpy()
    model.half().save_pretrained(folder)
    np.savez_compressed(folder / "expected.npz", **expected)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or COMMITTED:
        write(folder / name, name)
        print(name, sum(path.stat().st_size for path in (folder / name).iterdir()))


if __name__ == "__main__":
    main()
