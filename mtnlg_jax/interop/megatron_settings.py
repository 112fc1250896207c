"""The arguments that Megatron-LM stores in a checkpoint -> fields of ModelConfig, and the table of
its tensors.

Tensors have the names of megatron-core; `RENAMES` turns those of Transformer Engine and of the
older models into them.
"""

import re
from typing import Any

from mtnlg_jax.config import LayerSpec, ModelConfig, MoEConfig, RopeScaling, validate_model
from mtnlg_jax.interop.layouts import (
    QKV,
    QKV_BIAS,
    Family,
    Table,
    both,
    norms,
    outer,
    plus_one,
    tensor,
)
from mtnlg_jax.interop.settings import Fields, shortest

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
LAYERS = "decoder.layers.{}."
EXPERT = "mlp.experts.local_experts.{}."

RENAMES = (
    # Models before megatron-core.
    (r"^language_model\.embedding\.", "embedding."),
    (r"^language_model\.output_layer\.", "output_layer."),
    (r"^word_embeddings_for_head\.", "output_layer."),
    (r"^(language_model\.)?(encoder|transformer)\.", "decoder."),
    (r"^language_model\.", ""),
    (r"\.attention\.(query_key_value|dense)\.", r".self_attention.\1."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    # Transformer Engine keeps a norm in the product after it.
    (r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r".input_layernorm.\1"),
    (r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$", r".pre_mlp_layernorm.\1"),
    (
        r"\.mlp\.experts\.linear_fc(\d)\.(weight|bias)(\d+)$",
        r".mlp.experts.local_experts.\3.linear_fc\1.\2",
    ),
)
# What no logit depends on: states of FP8, heads that predict tokens further on, and frequencies.
UNUSED = r"_extra_state|^mtp\.|rotary_pos_emb|inv_freq$|local_tokens_per_expert$"

# Arguments that change the function, with the values that change nothing.
_NEUTRAL: dict[str, tuple] = {
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (),
    "embedding_multiplier": (1, 1.0),
    "hybrid_override_pattern": (),
    "hybrid_layer_pattern": (),
    "is_hybrid_model": (False,),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_path": (),
    "heterogeneous_layers_config_encoded_json": (),
    "linear_attention_freq": (),
    "linear_attention_type": (),
    "logit_softcapping": (),
    "moe_apply_probs_on_input": (False,),
    "moe_expert_capacity_factor": (),
    "moe_latent_size": (),
    "moe_mlp_glu_interleave_size": (),
    "moe_router_group_topk": (),
    "moe_router_num_groups": (),
    "moe_router_force_load_balancing": (False,),
    "moe_router_topk_limited_devices": (),
    "multi_latent_attention": (False,),
    "mrope_section": (),
    "num_residual_streams": (1,),
    "qk_l2_norm": (False,),
    "retro_add_retriever": (False,),
    "rope_type": ("rope",),
    "softmax_scale": (),
    "enable_hyper_connections": (False,),
    "use_kitchen": (False,),
}
# An argument that is not known is refused if its name looks like one of the model.
_OF_MODELS = re.compile(
    r"rope|rotary|position|atten|attn|norm(?!al)|moe|expert|router|mlp|mla(_|$)|activation|gelu"
    r"|glu|relu|bias|embed|window|head|logit|softmax|(^|_)qk|scal|residual|multiplier|interleav|mup|hyper_conn"
)
# Names with these words that change nothing: training, memory, kernels, other models' settings.
_NO_EFFECT = re.compile(
    r"^(retro|dino|bert|biencoder|retriever|ict|mamba|linear|inference|recompute|fp8|fp4|log|rl|grpo"
    r"|save|load|data|ckpt|dist|optimizer|adam|muon|lr|cuda_graph|cpu_offloading|tp_comm|dsa|kitchen"
    r"|indexer|vision|img|image|mask|train|eval|rerun|tensorboard|wandb|quant)(_|$)"
    r"|(model|data|sequence|context|tensor|pipeline|expert)_parallel|overlap|fusion|fused|backend|dropout|checkpoint|loss|dispatcher|offload|deepep"
    r"|hybridep|granularity|grad|recompute|dtype|fp32|bf16|fp16|precision|persist|memory|logging"
    r"|load_balancing|upcycling|_num_sms|permute|padding|drop_policy|pad_expert|prefill|init"
    r"|pipeline_split|divisible|latents|jitter|balance|update_rate|per_layer|qk_clip|cp_comm"
    r"|^(relative_attention_num_buckets|relative_attention_max_distance|kv_lora_rank|q_lora_rank)$"
    r"|^(qk_head_dim|qk_pos_emb_head_dim|v_head_dim|rotary_scaling_factor|mscale|mscale_all_dim)$"
    r"|^(head_lr_mult|embedding_path|attention_softmax_in_fp32|clone_scatter_output_in_embedding)$"
    r"|^(moe_grouped_gemm|moe_use_legacy_grouped_gemm|moe_extended_tp|moe_token_dropping)$"
    r"|^(apply_query_key_layer_scaling|scatter_embedding_sequence_parallel|window_size_.*)$"
    r"|^(reset_.*|create_attention_mask_in_dataloader)$"
    r"|^(use_flash_attn.*|moe_shared_expert_overlap|mtp_.*|yarn_.*|moe_router_fusion|router_.*)$"
)


class Arguments:
    """The args of a checkpoint, with a record of what was read."""

    def __init__(self, values: dict[str, Any], where: str):
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first of ``names`` that is there and not None; all count as read."""
        self._read.update(names)
        found = (self._values[name] for name in names if self._values.get(name) is not None)
        return next(found, default)

    def number(self, *names: str, default: float | None = None) -> Any:
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{names[0]}={value!r} in the args of {self._where} must be a number")
        return value

    def choose(self, name: str, known: dict[Any, Any], default: Any) -> Any:
        """Return what ``known`` has for the value of ``name``."""
        value = self.get(name, default=default)
        if value not in known:
            raise self.refuse(name, f"known are {', '.join(map(str, known))}")
        return known[value]

    def refuse(self, name: str, why: str) -> ValueError:
        return ValueError(
            f"{name}={self._values.get(name)!r} in the args of {self._where} is not supported; "
            f"{why}"
        )

    def refuse_unread(self) -> None:
        """Raise ValueError naming the arguments that change the model and were not understood."""
        for name, neutral in _NEUTRAL.items():
            value = self._values.get(name)
            if value is not None and value not in neutral and name not in self._read:
                expected = f"it must be {neutral[0]!r}" if neutral else "the model must not have it"
                raise self.refuse(name, expected)
        left = [
            name
            for name, value in self._values.items()
            if name not in self._read
            and name not in _NEUTRAL
            and _OF_MODELS.search(name)
            and not _NO_EFFECT.search(name)
            and not (value is None or value is False or value == "" or value == [])
        ]
        if left:
            shown = ", ".join(f"{name}={self._values[name]!r}" for name in left[:4])
            raise ValueError(
                f"the args of {self._where} have names that are not understood and may change the "
                f"model: {shown}{' ...' if len(left) > 4 else ''}; write the checkpoint without "
                "them if they do not"
            )


def model_of(values: dict[str, Any], where: str, vocabulary: int) -> ModelConfig:
    """Return the ModelConfig of a checkpoint's args. Raises ValueError that names an argument
    which is missing, or not supported."""
    a = Arguments(values, where)
    bias = bool(a.get("add_bias_linear", default=True))
    norm = a.choose("normalization", {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}, "LayerNorm")
    biases = ["qkv"] if bias or a.get("add_qkv_bias", default=False) else []
    biases += ["out", "mlp"] if bias else []
    biases += ["norm"] if norm == "layernorm" else []
    qk_norm = bool(a.get("qk_layernorm", default=False))
    if qk_norm and norm == "layernorm":
        raise a.refuse("qk_layernorm", "norms of queries and keys must be RMSNorm")
    a.get("apply_layernorm_1p", "layernorm_zero_centered_gamma")
    groups = a.get("num_query_groups") if a.get("group_query_attention", default=False) else None
    fields: Fields = {
        "num_layers": a.number("num_layers", "encoder_num_layers"),
        "hidden_size": a.number("hidden_size"),
        "num_attention_heads": a.number("num_attention_heads"),
        "num_query_groups": groups,
        "kv_channels": a.get("kv_channels"),
        "ffn_hidden_size": a.get("ffn_hidden_size"),
        "vocab_size": vocabulary,
        "max_position_embeddings": a.number("max_position_embeddings", "seq_length"),
        "normalization": norm,
        "norm_epsilon": float(a.number("norm_epsilon", "layernorm_epsilon", default=1e-5)),
        "qk_layernorm": "head" if qk_norm else "none",
        "activation": _activation(a, bias),
        "bias": tuple(biases),
        "tie_embeddings": not a.get("untie_embeddings_and_output_weights", default=False),
        "attention_sink": a.choose(
            "softmax_type", {"vanilla": False, "learnable": True}, "vanilla"
        ),
        "dropout_rate": float(a.number("hidden_dropout", default=0.0)),
        "init_method_std": float(a.number("init_method_std", default=0.02)),
    }
    fields |= _positions(a)
    fields["layer_pattern"] = _pattern(a, fields["num_layers"])
    fields |= _experts(a)
    a.refuse_unread()
    model = ModelConfig(**fields)
    validate_model(model)
    return model


def _activation(a: Arguments, bias: bool) -> str:
    # The fused bias and GELU is the tanh form; F.gelu is exact.
    tanh = a.get("bias_gelu_fusion", default=True) and bias
    tanh = bool(tanh or a.get("openai_gelu", default=False)) and not a.get("onnx_safe")
    offset = a.number("glu_linear_offset", default=0.0)
    clamp = a.get("activation_func_clamp_value")
    if a.get("quick_geglu", default=False):
        if (offset, clamp) != (1.0, 7.0):
            raise a.refuse("quick_geglu", "with it, glu_linear_offset=1 and a clamp at 7 are known")
        return "swiglu_oai"
    if offset or clamp is not None:
        name = "glu_linear_offset" if offset else "activation_func_clamp_value"
        raise a.refuse(name, "it is known with quick_geglu alone")
    if a.get("swiglu", default=False):
        return "swiglu"
    if a.get("squared_relu", default=False):
        return "squared_relu"
    return "gelu" if tanh else "gelu_exact"


def _positions(a: Arguments) -> Fields:
    kinds = {"learned_absolute": "learned", "rope": "rotary", "yarn": "rotary", "none": "none"}
    given = a.get("position_embedding_type", default="learned_absolute")
    kind = a.choose("position_embedding_type", kinds, "learned_absolute")
    if a.get("use_rotary_position_embeddings", default=False):
        kind = "rotary"
    if not a.get("add_position_embedding", default=True) and kind == "learned":
        kind = "none"
    base = float(a.number("rotary_base", default=10000))
    percent = float(a.number("rotary_percent", default=1.0))
    factor = a.get("rotary_seq_len_interpolation_factor")
    scaled = a.get("use_rope_scaling", default=False)
    llama = float(a.number("rope_scaling_factor", default=8.0))
    a.get("rotary_interleaved")
    if kind != "rotary":
        return {"position_embedding_type": kind}
    scaling = RopeScaling()
    if (factor not in (None, 1)) + bool(scaled) + (given == "yarn") > 1:
        raise a.refuse("position_embedding_type", "more than one change of the frequencies is set")
    if factor not in (None, 1):
        scaling = RopeScaling(rope_type="linear", factor=float(factor))
    elif scaled:
        scaling = RopeScaling(
            rope_type="llama3", factor=llama, original_max_position_embeddings=8192
        )
    elif given == "yarn":
        scaling = _yarn(a, percent)
    return {
        "position_embedding_type": "rotary",
        "rotary_base": base,
        "rotary_percent": percent,
        "rope_scaling": scaling,
    }


def _yarn(a: Arguments, percent: float) -> RopeScaling:
    for name in ("yarn_mscale", "yarn_mscale_all_dim"):
        if a.get(name) is not None:
            raise a.refuse(name, "YaRN with its own attention factor is known")
    if percent != 1:
        raise a.refuse("rotary_percent", "with YaRN it must be 1")
    return RopeScaling(
        rope_type="yarn",
        factor=float(a.number("yarn_rotary_scaling_factor")),
        original_max_position_embeddings=int(a.number("yarn_original_max_position_embeddings")),
        beta_fast=float(a.number("yarn_beta_fast", default=32.0)),
        beta_slow=float(a.number("yarn_beta_slow", default=1.0)),
        truncate=bool(a.get("yarn_correction_range_round_to_int", default=True)),
    )


def _pattern(a: Arguments, layers: int) -> tuple[LayerSpec, ...]:
    """Return which layers have a window, and which no rotary positions."""
    window = a.get("window_size")
    skipped = a.get("window_attn_skip_freq")
    bare = a.get("no_rope_freq")
    width = None
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2 or window[0] < 0 or window[1]:
            raise a.refuse("window_size", "it must be (keys before the query, 0)")
        width = int(window[0]) + 1

    def listed(name: str, value: Any) -> list[bool]:
        """Return for each layer whether ``value``, a period or a list, selects it."""
        if isinstance(value, int) and value > 0:
            return [number % value == value - 1 for number in range(layers)]
        if isinstance(value, list | tuple) and len(value) == layers:
            return [bool(each) for each in value]
        raise a.refuse(name, f"it must be a period or a list of {layers} layers")

    windowed = [width is not None] * layers
    if width is not None and skipped is not None:
        chosen = listed("window_attn_skip_freq", skipped)
        # A period names the layers without a window, a list those with one.
        windowed = [not each for each in chosen] if isinstance(skipped, int) else chosen
    plain = listed("no_rope_freq", bare) if bare else [False] * layers
    return shortest(
        tuple(
            LayerSpec(window=width if inside else None, rotary=not bare)
            for inside, bare in zip(windowed, plain, strict=True)
        )
    )


def _experts(a: Arguments) -> Fields:
    names = ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
    width, shared = (a.get(name) for name in names)
    gate = bool(a.get("moe_shared_expert_gate", default=False))
    score = a.choose(
        "moe_router_score_function", {"softmax": "softmax", "sigmoid": "sigmoid"}, "softmax"
    )
    before = bool(a.get("moe_router_pre_softmax", default=False))
    top = a.number("moe_router_topk", default=2)
    factor = a.get("moe_router_topk_scaling_factor")
    losses = [a.get(name, default=0.0) for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff")]
    losses = [each[0] if isinstance(each, list) else each for each in losses]
    balance = a.get("moe_router_load_balancing_type", default="aux_loss")
    chosen_by_bias = bool(a.get("moe_router_enable_expert_bias", default=False))
    rate = a.number("moe_router_bias_update_rate", default=MoEConfig.moe_router_bias_update_rate)
    number = a.get("num_experts", "num_moe_experts")
    every = a.get("moe_layer_freq", default=1)
    if not number:
        a.get(*(name for name in _NEUTRAL if name.startswith("moe_")))
        return {}
    if every != 1 and not (isinstance(every, list | tuple) and all(each == 1 for each in every)):
        raise a.refuse("moe_layer_freq", "every layer must have experts")
    if "sinkhorn" in balance:
        raise a.refuse("moe_router_load_balancing_type", "it changes which expert a token visits")
    if chosen_by_bias and score != "sigmoid":
        # megatron-core refuses it too: added to a softmax, the bias would choose other experts.
        raise a.refuse(
            "moe_router_enable_expert_bias",
            "it is known with moe_router_score_function=sigmoid alone",
        )
    moe = MoEConfig(
        num_moe_experts=number,
        moe_router_topk=top,
        moe_router_score_function=score,
        # A softmax over the best alone is that over all, divided by the sum of the best.
        moe_router_pre_softmax=True,
        moe_router_norm=top > 1 if score == "sigmoid" else not before,
        moe_router_topk_scaling_factor=float(factor or 1.0),
        moe_router_enable_expert_bias=chosen_by_bias,
        moe_router_bias_update_rate=float(rate),
        moe_shared_expert_intermediate_size=shared or 0,
        moe_shared_expert_gate=gate and bool(shared),
        moe_aux_loss_coeff=float(losses[0]),
        moe_z_loss_coeff=float(losses[1]),
    )
    return {"moe": moe} | ({"ffn_hidden_size": width} if width else {})


def family_of(values: dict[str, Any], model: ModelConfig) -> Family:
    """Return the table of the tensors of a model with these args."""
    less_one = bool(values.get("apply_layernorm_1p") or values.get("layernorm_zero_centered_gamma"))
    pairs = bool(values.get("rotary_interleaved")) and model.rotary_width > 0
    heads = {
        "self_attention.q_layernorm.weight": tensor("attention.q_norm.scale_H"),
        "self_attention.k_layernorm.weight": tensor("attention.k_norm.scale_H"),
    }
    block: Table = {
        **both("self_attention.linear_qkv", QKV, QKV_BIAS, by_group=True, pairs=pairs),
        **both("self_attention.linear_proj", "attention.w_o_NHD", "attention.b_o_D"),
        "self_attention.core_attention.softmax_offset": tensor("attention.b_sink_N"),
        **norms({"norm_1": "input_layernorm", "norm_2": "pre_mlp_layernorm"}, less_one),
        **(plus_one(heads) if less_one else heads),
    }
    if model.moe.num_moe_experts:
        up = ("mlp.w_in_EDF", "mlp.b_in_EF")
        if model.gated:
            up = ("mlp.w_gate_EDF mlp.w_in_EDF", "mlp.b_gate_EF mlp.b_in_EF")
        block |= both("mlp.router", "mlp.w_router_DE", "mlp.b_router_E")
        block["mlp.router.expert_bias"] = tensor("mlp.b_balance_E")
        block |= both(f"{EXPERT}linear_fc1", *up)
        block |= both(f"{EXPERT}linear_fc2", "mlp.w_out_EFD", "mlp.b_out_ED")
        block |= _mlp("mlp.shared_experts", "mlp.shared", gated=model.gated)
        block["mlp.shared_experts.gate_weight"] = tensor("mlp.w_shared_DC")
    else:
        block |= _mlp("mlp", "mlp", gated=model.gated)
    return Family(
        LAYERS,
        outer("embedding.word_embeddings", "decoder.final_layernorm", "output_layer", less_one)
        | {"embedding.position_embeddings.weight": tensor("positions_PD")},
        block,
        lambda keys: {},
        prefix="",
        head=HEAD,
        renames=RENAMES,
        buffers=UNUSED,
    )


def _mlp(theirs: str, ours: str, gated: bool) -> Table:
    if gated:
        weight = f"{ours}.w_gate_DF {ours}.w_in_DF"
        up = both(f"{theirs}.linear_fc1", weight, f"{ours}.b_gate_F {ours}.b_in_F")
    else:
        up = both(f"{theirs}.linear_fc1", f"{ours}.w_in_DF", f"{ours}.b_in_F")
    return {**up, **both(f"{theirs}.linear_fc2", f"{ours}.w_out_FD", f"{ours}.b_out_D")}


def renamed(name: str) -> str:
    """Return the name of a tensor in megatron-core's local layers."""
    name = re.sub(r"^((module|_orig_mod)\.)+", "", name)
    for old, new in RENAMES:
        name = re.sub(old, new, name)
    return name
