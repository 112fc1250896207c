"""config.json of each family -> fields of ModelConfig: one function a family, by `settings`."""

import math

from mtnlg_jax.config import LayerSpec, MoEConfig, Multipliers
from mtnlg_jax.interop.keys import Keys
from mtnlg_jax.interop.settings import (
    Fields,
    by_layer,
    common,
    layer_types,
    one_window,
    pattern,
    rms,
    rope,
    shortest,
)


def llama(c: Keys) -> Fields:
    biases = [*(["qkv", "out"] if c.get("attention_bias") else [])]
    biases += ["mlp"] if c.get("mlp_bias") else []
    return rms(c, *biases)


def mistral(c: Keys) -> Fields:
    return llama(c) | one_window(c)


def qwen2(c: Keys) -> Fields:
    fields = rms(c, "qkv")
    types = layer_types(c)
    first = c.get("max_window_layers", default=0)
    if not c.get("use_sliding_window"):
        c.get("sliding_window")
        return fields
    if types is None:
        number = fields["num_layers"]
        types = ["full_attention" if i < first else "sliding_attention" for i in range(number)]
    return fields | {"layer_pattern": pattern(c, types)}


def qwen3(c: Keys) -> Fields:
    biases = ("qkv", "out") if c.get("attention_bias") else ()
    return qwen2(c) | {"bias": biases, "qk_layernorm": "head"}


def gemma(c: Keys) -> Fields:
    c.must_be("use_bidirectional_attention", False)
    fields = llama(c) | {"multipliers": Multipliers(embedding=math.sqrt(c["hidden_size"]))}
    # hidden_act "gelu" of early files was never meant: transformers computes the tanh form.
    return fields | {"activation": "geglu"}


def gemma2(c: Keys) -> Fields:
    scale = c.number("query_pre_attn_scalar") ** -0.5
    number = c.number("num_hidden_layers")
    types = layer_types(c) or [
        "full_attention" if i % 2 else "sliding_attention" for i in range(number)
    ]
    return gemma(c) | {
        "norm_placement": "sandwich",
        "layer_pattern": pattern(c, types),
        "multipliers": Multipliers(embedding=math.sqrt(c["hidden_size"]), attention=scale),
        "attn_logit_softcapping": c.get("attn_logit_softcapping"),
        "final_logit_softcapping": c.get("final_logit_softcapping"),
    }


def gemma3(c: Keys) -> Fields:
    local = (c.get("rope_parameters") or {}).get("sliding_attention", {})
    base = float(local.get("rope_theta") or c.get("rope_local_base_freq", default=10000.0))
    every = c.get("sliding_window_pattern", "_sliding_window_pattern", default=6)
    types = layer_types(c) or [
        "sliding_attention" if (i + 1) % every else "full_attention"
        for i in range(c.number("num_hidden_layers"))
    ]
    specs = pattern(c, types, {"rotary_base": base, "rope_scaling": False})
    return gemma2(c) | {"qk_layernorm": "head", "layer_pattern": specs}


def phi3(c: Keys) -> Fields:
    c.must_be("attention_bias", False)
    return rms(c) | one_window(c)


def phi(c: Keys) -> Fields:
    c.must_be("qk_layernorm", False)
    return (
        common(c, gated=False)
        | rope(c)
        | {"bias": ("qkv", "out", "mlp", "norm", "head"), "parallel_residual": "one_norm"}
    )


def olmo2(c: Keys) -> Fields:
    c.must_be("clip_qkv")
    return llama(c) | {"norm_placement": "output", "qk_layernorm": "full"}


def olmo3(c: Keys) -> Fields:
    types = layer_types(c) or [
        "sliding_attention" if (i + 1) % 4 else "full_attention"
        for i in range(c.number("num_hidden_layers"))
    ]
    return olmo2(c) | {"layer_pattern": pattern(c, types, {"rope_scaling": False})}


def gpt_neox(c: Keys) -> Fields:
    attention = ("qkv", "out") if c.get("attention_bias", default=True) else ()
    parallel = c.get("use_parallel_residual", default=True)
    return (
        common(c, gated=False)
        | rope(c)
        | {
            "bias": (*attention, "mlp", "norm"),
            "parallel_residual": "two_norms" if parallel else "none",
        }
    )


def gptj(c: Keys) -> Fields:
    fields = common(c, gated=False)
    width = fields["hidden_size"] // fields["num_attention_heads"]
    return fields | {
        "position_embedding_type": "rotary",
        "rotary_percent": c.number("rotary_dim", default=width) / width,
        "bias": ("mlp", "norm", "head"),
        "parallel_residual": "one_norm",
    }


def gpt2(c: Keys) -> Fields:
    c.must_be("scale_attn_weights", True)
    c.must_be("scale_attn_by_inverse_layer_idx", False)
    c.get("reorder_and_upcast_attn")  # sums in float32, as attention here always does
    fields = common(c, gated=False)
    if fields["ffn_hidden_size"] == 4 * fields["hidden_size"]:
        fields["ffn_hidden_size"] = None
    # All dropout of GPT-2 but that of attention weights is the same number.
    return fields | {"dropout_rate": float(c.number("resid_pdrop", default=0.1))}


def opt(c: Keys) -> Fields:
    c.must_be("do_layer_norm_before", True)
    c.must_be("enable_bias", True)
    c.must_be("_remove_final_layer_norm", False)
    c.must_be("word_embed_proj_dim", c["hidden_size"])
    return common(c, gated=False)


def bloom(c: Keys) -> Fields:
    c.must_be("apply_residual_connection_post_layernorm", False)
    return common(c, gated=False) | {
        "activation": "gelu",
        "position_embedding_type": "alibi",
        "embedding_norm": True,
    }


def smollm3(c: Keys) -> Fields:
    fields = llama(c)
    number = fields["num_layers"]
    every = c.get("no_rope_layer_interval", default=4)
    rotary = by_layer(c, "no_rope_layers") or [int((i + 1) % every != 0) for i in range(number)]
    types = (c.get("use_sliding_window") and layer_types(c)) or ["full_attention"] * number
    layer_types(c)
    window = c.get("sliding_window")
    specs = tuple(
        LayerSpec(window=window if kind == "sliding_attention" else None, rotary=bool(turns))
        for kind, turns in zip(types, rotary, strict=True)
    )
    return fields | {"layer_pattern": shortest(specs)}


def starcoder2(c: Keys) -> Fields:
    biases = ("qkv", "out", "mlp") if c.get("use_bias", default=True) else ()
    return common(c, gated=False) | rope(c) | one_window(c) | {"bias": (*biases, "norm")}


def granite(c: Keys) -> Fields:
    multipliers = Multipliers(
        c.number("embedding_multiplier", default=1.0),
        c.number("attention_multiplier", default=1.0),
        c.number("residual_multiplier", default=1.0),
        1 / c.number("logits_scaling", default=1.0),
    )
    return llama(c) | {"multipliers": multipliers}


def cohere(c: Keys) -> Fields:
    c.must_be("use_qk_norm", False)
    biases = ("qkv", "out") if c.get("attention_bias") else ()
    scale = c.number("logit_scale", default=0.0625)
    return (
        common(c)
        | rope(c)
        | {
            "bias": biases,
            "parallel_residual": "one_norm",
            "multipliers": Multipliers(logits=scale),
        }
    )


def cohere2(c: Keys) -> Fields:
    every = c.get("sliding_window_pattern", "_sliding_window_pattern", default=4)
    types = layer_types(c) or [
        "sliding_attention" if (i + 1) % every else "full_attention"
        for i in range(c.number("num_hidden_layers"))
    ]
    return cohere(c) | {"layer_pattern": pattern(c, types, full={"rotary": False})}


def glm4(c: Keys) -> Fields:
    biases = ("qkv",) if c.get("attention_bias") else ()
    return rms(c, *biases) | {"norm_placement": "sandwich"}


def falcon(c: Keys) -> Fields:
    c.must_be("alibi", False)
    fields = common(c, gated=False) | rope(c)
    heads = fields["num_attention_heads"]
    new = bool(c.get("new_decoder_architecture"))
    one_head = bool(c.get("multi_query", default=True))
    stored_heads = c.get("num_kv_heads", "n_head_kv")
    biases = ("qkv", "out", "mlp") if c.get("bias") else ()
    norms = c.get("num_ln_in_parallel_attn")
    parallel = bool(c.get("parallel_attn", default=True)) or new
    two = new and norms != 1
    fields |= {
        "num_query_groups": stored_heads if new else 1 if one_head else heads,
        "ffn_hidden_size": c.get("ffn_hidden_size"),
        "bias": (*biases, "norm"),
        "parallel_residual": ("two_norms" if two else "one_norm") if parallel else "none",
    }
    return fields


def stablelm(c: Keys) -> Fields:
    c.must_be("qk_layernorm", False)
    biases = ("norm", "qkv") if c.get("use_qkv_bias") else ("norm",)
    parallel = "one_norm" if c.get("use_parallel_residual") else "none"
    return common(c) | rope(c) | {"bias": biases, "parallel_residual": parallel}


def nemotron(c: Keys) -> Fields:
    biases = [*(["qkv", "out"] if c.get("attention_bias") else [])]
    biases += ["mlp"] if c.get("mlp_bias") else []
    return common(c, gated=False) | rope(c) | {"bias": (*biases, "norm")}


def bert(c: Keys, skip: int = 0) -> Fields:
    c.must_be("position_embedding_type", "absolute")
    c.must_be("is_decoder", False)
    fields = common(c, gated=False)
    return fields | {
        "bias": ("qkv", "out", "mlp", "norm", "head", "mlm"),
        "norm_placement": "post",
        "embedding_norm": True,
        "mlm_head": True,
        "max_position_embeddings": fields["max_position_embeddings"] - skip,
    }


def roberta(c: Keys) -> Fields:
    c.must_be("pad_token_id", 1)  # positions begin behind it
    return bert(c, skip=2)


def modernbert(c: Keys) -> Fields:
    for key in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"):
        c.must_be(key, False)
    c.must_be("classifier_activation", "gelu")
    fields = common(c)
    half = c.number("local_attention") // 2 + 1
    every = c.get("global_attn_every_n_layers", default=3)
    types = layer_types(c) or [
        "sliding_attention" if i % every else "full_attention" for i in range(fields["num_layers"])
    ]
    rotary = c.get("rope_parameters") or {}
    old = {
        "full_attention": c.get("global_rope_theta", default=160000.0),
        "sliding_attention": c.get("local_rope_theta", default=10000.0),
    }
    base = {
        kind: float((rotary.get(kind) or {}).get("rope_theta") or old[kind])
        for kind in ("full_attention", "sliding_attention")
    }
    specs = tuple(
        LayerSpec(
            window=half if kind == "sliding_attention" else None,
            rotary_base=base[kind],
            first_norm=i > 0,
        )
        for i, kind in enumerate(types)
    )
    return fields | {
        "position_embedding_type": "rotary",
        "bias": ("head",) if c.get("decoder_bias", default=True) else (),
        "embedding_norm": True,
        "mlm_head": True,
        "layer_pattern": specs,
    }


# --- experts


def _moe(c: Keys, norm: bool) -> Fields:
    moe = MoEConfig(
        num_moe_experts=c.number("num_local_experts", "num_experts"),
        moe_router_topk=c.number("num_experts_per_tok"),
        moe_router_norm=norm,
        moe_aux_loss_coeff=float(c.number("router_aux_loss_coef", default=0.0)),
    )
    return {"moe": moe, "ffn_hidden_size": c.get("moe_intermediate_size", "intermediate_size")}


def mixtral(c: Keys) -> Fields:
    return llama(c) | _moe(c, norm=True) | one_window(c)


def qwen3_moe(c: Keys) -> Fields:
    c.must_be("mlp_only_layers", [])
    c.must_be("decoder_sparse_step", 1)
    return qwen3(c) | _moe(c, norm=bool(c.get("norm_topk_prob")))


def olmoe(c: Keys) -> Fields:
    c.must_be("clip_qkv")
    return llama(c) | _moe(c, norm=bool(c.get("norm_topk_prob"))) | {"qk_layernorm": "full"}


def gpt_oss(c: Keys) -> Fields:
    c.must_be("swiglu_alpha", 1.702)
    c.must_be("swiglu_limit", 7.0)
    fields = rms(c, "qkv", "out", "mlp")
    moe = MoEConfig(
        num_moe_experts=c.number("num_local_experts"),
        moe_router_topk=c.number("num_experts_per_tok", "experts_per_token"),
        moe_router_pre_softmax=False,
        moe_router_norm=False,
        moe_router_bias=True,
    )
    c.get("attention_bias")
    return fields | {
        "moe": moe,
        "activation": "swiglu_oai",
        "attention_sink": True,
        "layer_pattern": pattern(c),
    }
