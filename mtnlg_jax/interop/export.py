"""ModelConfig -> the config.json of a family.

The proof of each is the reader: a config.json counts only if `families.model_of` makes the same
model of it.
"""

import dataclasses
import math
from typing import Any

from mtnlg_jax.config import LayerSpec, ModelConfig, RopeScaling
from mtnlg_jax.config.model import BIASES
from mtnlg_jax.interop.config_parts import ARCHITECTURES
from mtnlg_jax.interop.families import NESTED, family_of, model_of
from mtnlg_jax.interop.writers import WRITERS

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
            model.attention_multiplier or model.head_width**-0.5,
            multipliers.residual,
            model.logits_multiplier,
        ),
        "attention_sink": model.attention_sink,
        "prefix": model.prefix.shape,
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


def config_of(model: ModelConfig, original: dict | None = None, family: str | None = None) -> dict:
    """Return the config.json of ``model``.

    That of a converted model is ``original`` with only what changed. Otherwise it is that of the
    first family in `writers.WRITERS` that computes the same, or of ``family``. Raises ValueError
    naming what no family, or not this one, can express.
    """
    if family is not None and family not in WRITERS:
        raise ValueError(f"unknown family={family!r}; choose one of {', '.join(sorted(WRITERS))}")
    if original is not None and family in (None, family_of(original)[0]):
        changed = _changed(model, original)
        if changed is not None:
            return changed
    nearest: tuple[int, str, list[str], ModelConfig] | None = None
    for name in WRITERS if family is None else [family]:
        config = {"architectures": [ARCHITECTURES[name]], "model_type": name}
        config |= WRITERS[name](model)
        try:
            found = model_of(config)
        except ValueError:
            continue
        other = differences(model, found, name)
        if not other:
            return config
        if nearest is None or len(other) < nearest[0]:
            nearest = len(other), name, other, found
    if nearest is None:
        which = "no family" if family is None else f"not {family}"
        raise ValueError(f"{which} of Hugging Face's has this model; keep it in its own folder")
    _, name, other, found = nearest
    there = meaning(found, name)
    here = meaning(model, name)
    named = ", ".join(f"model.{key}={here[key]} ({name}: {there[key]})" for key in other)
    if family is not None:
        raise ValueError(
            f"{family} cannot express this model, because of {named}; give another family, or "
            "none to have one found"
        )
    raise ValueError(
        f"no family of Hugging Face's can express this model; the nearest is {name}, except for "
        f"{named}; keep such a run in its own folder"
    )


def _changed(model: ModelConfig, original: dict) -> dict | None:
    """Return ``original`` with what changed, or None if its family cannot express ``model``."""
    family, inner = family_of(original)
    # Tensors are written as they are, and never quantized again.
    config = {key: value for key, value in original.items() if key != "quantization_config"}
    if original.get("model_type") in NESTED:
        config = inner | {"architectures": [ARCHITECTURES[family]]}
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
