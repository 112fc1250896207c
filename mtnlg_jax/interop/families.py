"""The families of Hugging Face's models: which tensor holds which parameter of ours.

One table serves reading, writing, gradients in tests, and adapters. A family is its `model_type`.
"""

from mtnlg_jax.config import ModelConfig, validate_model
from mtnlg_jax.interop import family_settings as settings
from mtnlg_jax.interop.keys import Keys, check_types
from mtnlg_jax.interop.layouts import (
    ATTENTION,
    BERT_BLOCK,
    FULL_NORMS,
    GATE_UP,
    GATED,
    GEMMA_DEFAULTS,
    GPT_LAYERS,
    HEAD_NORMS,
    LAYERS,
    LLAMA,
    LLAMA_DEFAULTS,
    MODEL_PLUS_ONE,
    NESTED_NAMES,
    OF_HEADS,
    OLD_NORMS,
    OUT,
    OUTPUT,
    PAIRED,
    PRE,
    SANDWICH,
    VISION,
    Family,
    attention,
    both,
    experts,
    fused,
    llama_like,
    masked,
    norms,
    outer,
    plain,
    plus_one,
    tensor,
)

FAMILIES: dict[str, Family] = {
    "llama": llama_like(settings.llama, defaults=LLAMA_DEFAULTS),
    "mistral": llama_like(settings.mistral, defaults=LLAMA_DEFAULTS | {"num_key_value_heads": 8}),
    "qwen2": llama_like(settings.qwen2, defaults=LLAMA_DEFAULTS),
    "qwen3": llama_like(
        settings.qwen3, LLAMA | HEAD_NORMS, defaults=LLAMA_DEFAULTS | {"head_dim": 128}
    ),
    "smollm3": llama_like(
        settings.smollm3, defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    ),
    "granite": llama_like(settings.granite, defaults=LLAMA_DEFAULTS),
    "gemma": llama_like(
        settings.gemma,
        LLAMA | norms(PRE, plus_one=True),
        outer=MODEL_PLUS_ONE,
        defaults=GEMMA_DEFAULTS,
    ),
    "gemma2": llama_like(
        settings.gemma2,
        LLAMA | norms(SANDWICH, plus_one=True),
        outer=MODEL_PLUS_ONE,
        defaults=GEMMA_DEFAULTS
        | {
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": llama_like(
        settings.gemma3,
        LLAMA | norms(SANDWICH, plus_one=True) | plus_one(HEAD_NORMS),
        outer=MODEL_PLUS_ONE,
        defaults=GEMMA_DEFAULTS
        | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 1e6},
        renames=NESTED_NAMES,
        buffers=VISION,
    ),
    "phi3": llama_like(
        settings.phi3,
        {
            **fused("self_attn.qkv_proj", "self_attn.o_proj"),
            **GATE_UP,
            **norms(PRE),
        },
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    "phi": Family(
        LAYERS,
        outer("model.embed_tokens", "model.final_layernorm"),
        {
            **attention("self_attn", ("q_proj", "k_proj", "v_proj", "dense")),
            **plain("mlp.fc1", "mlp.fc2"),
            **norms({"norm_1": "input_layernorm"}),
        },
        settings.phi,
        defaults={
            "tie_word_embeddings": False,
            "partial_rotary_factor": 0.5,
            "hidden_act": "gelu_new",
        },
    ),
    "olmo2": llama_like(
        settings.olmo2,
        {**ATTENTION, **GATED, **norms(OUTPUT), **FULL_NORMS},
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    "olmo3": llama_like(
        settings.olmo3,
        {**ATTENTION, **GATED, **norms(OUTPUT), **FULL_NORMS},
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": 4096},
    ),
    "glm4": llama_like(
        settings.glm4,
        {
            **PAIRED,
            **GATE_UP,
            **norms(
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
    "cohere": llama_like(
        settings.cohere,
        {**PAIRED, **GATED, **norms({"norm_1": "input_layernorm"})},
        defaults={"rope_theta": 500000.0, "layer_norm_eps": 1e-5},
    ),
    "cohere2": llama_like(
        settings.cohere2,
        {**PAIRED, **GATED, **norms({"norm_1": "input_layernorm"})},
        defaults={"sliding_window": 4096, "layer_norm_eps": 1e-5},
    ),
    "stablelm": llama_like(
        settings.stablelm,
        defaults={"partial_rotary_factor": 0.25, "tie_word_embeddings": False},
    ),
    "nemotron": llama_like(
        settings.nemotron,
        {**ATTENTION, **plain("mlp.up_proj", "mlp.down_proj"), **norms(PRE, plus_one=True)},
        outer=MODEL_PLUS_ONE,
        defaults={
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
            "hidden_act": "relu2",
        },
    ),
    "starcoder2": llama_like(
        settings.starcoder2,
        {**ATTENTION, **plain("mlp.c_fc", "mlp.c_proj"), **norms(PRE)},
        defaults={"hidden_act": "gelu_pytorch_tanh"},
    ),
    "gpt_neox": Family(
        "gpt_neox.layers.{}.",
        outer("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        {
            **fused(f"attention.{OF_HEADS}", "attention.dense", by_group=True),
            **plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            **norms(PRE),
        },
        settings.gpt_neox,
        defaults={"tie_word_embeddings": False, "rotary_pct": 0.25},
        prefix="gpt_neox.",
        head="embed_out.weight",
        renames=((r"^lm_head\.", "embed_out."),),
        buffers=r"inv_freq$|attention\.bias$|\.masked_bias$",
    ),
    "gptj": Family(
        GPT_LAYERS,
        outer("transformer.wte", "transformer.ln_f"),
        {
            **attention("attn", ("q_proj", "k_proj", "v_proj", "out_proj"), pairs=True),
            **plain("mlp.fc_in", "mlp.fc_out"),
            **norms({"norm_1": "ln_1"}),
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
        GPT_LAYERS,
        outer("transformer.wte", "transformer.ln_f")
        | {"transformer.wpe.weight": tensor("positions_PD")},
        {
            **fused("attn.c_attn", "attn.c_proj", columns=True),
            "attn.c_proj.weight": tensor(OUT, columns=True),
            **plain("mlp.c_fc", "mlp.c_proj", columns=True),
            **norms({"norm_1": "ln_1", "norm_2": "ln_2"}),
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
        outer("model.decoder.embed_tokens", "model.decoder.final_layer_norm")
        | {"model.decoder.embed_positions.weight": tensor("positions_PD", skip=2)},
        {
            **attention("self_attn", ("q_proj", "k_proj", "v_proj", "out_proj")),
            **plain("fc1", "fc2"),
            **norms({"norm_1": "self_attn_layer_norm", "norm_2": "final_layer_norm"}),
        },
        settings.opt,
        defaults={"activation_function": "relu"},
        renames=((r"^decoder\.", "model.decoder."),),
    ),
    "bloom": Family(
        GPT_LAYERS,
        outer("transformer.word_embeddings", "transformer.ln_f")
        | norms({"embedding_norm": "transformer.word_embeddings_layernorm"}),
        {
            **fused(f"self_attention.{OF_HEADS}", "self_attention.dense", by_group=True),
            **plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            **norms(PRE),
        },
        settings.bloom,
        prefix="transformer.",
    ),
    "falcon": Family(
        GPT_LAYERS,
        outer("transformer.word_embeddings", "transformer.ln_f"),
        {
            **fused(f"self_attention.{OF_HEADS}", "self_attention.dense", by_group=True),
            **plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            **norms(PRE),
        },
        settings.falcon,
        renames=(
            (r"\.ln_attn\.", ".input_layernorm."),
            (r"\.ln_mlp\.", ".post_attention_layernorm."),
        ),
        two_norms=(
            (r"\.input_layernorm\.", ".ln_attn."),
            (r"\.post_attention_layernorm\.", ".ln_mlp."),
        ),
        prefix="transformer.",
    ),
    "mixtral": llama_like(
        settings.mixtral,
        {
            **ATTENTION,
            **norms(PRE),
            **experts(
                "block_sparse_moe.gate",
                *(f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2")),
            ),
        },
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 1e6},
    ),
    "qwen3_moe": llama_like(
        settings.qwen3_moe,
        {
            **ATTENTION,
            **norms(PRE),
            **HEAD_NORMS,
            **experts(
                "mlp.gate",
                *(f"mlp.experts.{{}}.{n}" for n in ("gate_proj", "up_proj", "down_proj")),
            ),
        },
        defaults=LLAMA_DEFAULTS,
    ),
    "olmoe": llama_like(
        settings.olmoe,
        {
            **ATTENTION,
            **norms(PRE),
            **FULL_NORMS,
            **experts(
                "mlp.gate",
                *(f"mlp.experts.{{}}.{n}" for n in ("gate_proj", "up_proj", "down_proj")),
            ),
        },
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    "gpt_oss": llama_like(
        settings.gpt_oss,
        {
            **ATTENTION,
            **norms(PRE),
            "self_attn.sinks": tensor("attention.b_sink_N"),
            **both("mlp.router", "mlp.w_router_DE", "mlp.b_router_E"),
            "mlp.experts.gate_up_proj": tensor(
                "mlp.w_gate_EDF mlp.w_in_EDF", interleaved=True, columns=True
            ),
            "mlp.experts.gate_up_proj_bias": tensor("mlp.b_gate_EF mlp.b_in_EF", interleaved=True),
            "mlp.experts.down_proj": tensor("mlp.w_out_EFD", columns=True),
            "mlp.experts.down_proj_bias": tensor("mlp.b_out_ED"),
        },
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    "bert": Family(
        "bert.encoder.layer.{}.",
        {
            "bert.embeddings.word_embeddings.weight": tensor("tokens_VD"),
            "bert.embeddings.position_embeddings.weight": tensor(
                "positions_PD", add="bert.embeddings.token_type_embeddings.weight"
            ),
            **norms({"embedding_norm": "bert.embeddings.LayerNorm"}),
            **masked(
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.decoder",
                "cls.predictions.bias",
            ),
        },
        BERT_BLOCK,
        settings.bert,
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12},
        prefix="bert.",
        head="cls.predictions.decoder.weight",
        renames=OLD_NORMS,
        buffers=r"position_ids$|^bert\.pooler\.|^cls\.seq_relationship\.",
        masked=True,
    ),
    "roberta": Family(
        "roberta.encoder.layer.{}.",
        {
            "roberta.embeddings.word_embeddings.weight": tensor("tokens_VD"),
            "roberta.embeddings.position_embeddings.weight": tensor(
                "positions_PD", skip=2, add="roberta.embeddings.token_type_embeddings.weight"
            ),
            **norms({"embedding_norm": "roberta.embeddings.LayerNorm"}),
            **masked("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        },
        BERT_BLOCK,
        settings.roberta,
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12},
        prefix="roberta.",
        head="lm_head.decoder.weight",
        renames=OLD_NORMS,
        buffers=r"position_ids$|^roberta\.pooler\.",
        masked=True,
    ),
    "modernbert": Family(
        LAYERS,
        {
            "model.embeddings.tok_embeddings.weight": tensor("tokens_VD"),
            **norms({"embedding_norm": "model.embeddings.norm", "final_norm": "model.final_norm"}),
            **masked("head.dense", "head.norm", "decoder", "decoder.bias"),
        },
        {
            **fused("attn.Wqkv", "attn.Wo"),
            "mlp.Wi.weight": tensor("mlp.w_gate_DF mlp.w_in_DF"),
            "mlp.Wo.weight": tensor("mlp.w_out_FD"),
            **norms({"norm_1": "attn_norm", "norm_2": "mlp_norm"}),
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
    check_types(config)
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
    check_types(config)
    try:
        fields = family.read(keys)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"config.json of a {kind} has a value that cannot be used ({type(error).__name__}: "
            f"{error}); compare it with that of the model's page"
        ) from None
    keys.refuse_unread()
    model = ModelConfig(**fields)
    validate_model(model)
    return model
