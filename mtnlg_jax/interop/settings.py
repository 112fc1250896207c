"""config.json of each family -> fields of ModelConfig. Both spellings are read: that of
transformers 5 (rope_parameters, layer_types) and the older one that most folders on the hub
have."""

from typing import Any

from mtnlg_jax.config import LayerSpec, RopeScaling
from mtnlg_jax.config.coerce import coerce
from mtnlg_jax.interop.keys import Keys

Fields = dict[str, Any]
# Keys of rope_scaling without which its type says nothing.
_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}

GATES = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "gelu": "geglu_exact",
}
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
}


# --- what families share


def activation_of(c: Keys, gated: bool) -> str:
    names = GATES if gated else ACTIVATIONS
    default = "silu" if gated else "gelu"
    keys = ("hidden_activation", "hidden_act", "activation_function", "activation")
    value = c.get(*keys, default=default)
    if value not in names:
        raise ValueError(
            f"the activation {value!r} of config.json is not supported; it must be one of "
            f"{', '.join(names)}"
        )
    return names[value]


def common(c: Keys, gated: bool = True) -> Fields:
    """Return sizes, norm and activation."""
    for key in ("pruned_heads", "add_cross_attention", "cross_attention"):
        c.must_be(key, False, {})
    quantized = c.get("quantization_config")
    # Tensors in MXFP4 are read as bfloat16 (`mxfp4`).
    if not (isinstance(quantized, dict) and quantized.get("quant_method") == "mxfp4"):
        c.must_be("quantization_config", False, {})
    return {
        "num_layers": c.number("num_hidden_layers", "n_layer"),
        "hidden_size": c.number("hidden_size", "n_embd", "n_embed"),
        "num_attention_heads": c.number("num_attention_heads", "n_head"),
        "num_query_groups": c.get("num_key_value_heads"),
        "kv_channels": c.get("head_dim"),
        "ffn_hidden_size": c.get("intermediate_size", "ffn_dim", "n_inner"),
        "vocab_size": c.number("vocab_size"),
        "max_position_embeddings": c.number(
            "max_position_embeddings", "n_positions", "seq_length", default=2048
        ),
        "norm_epsilon": float(
            c.number(
                "rms_norm_eps",
                "layer_norm_eps",
                "layer_norm_epsilon",
                "norm_epsilon",
                "norm_eps",
                default=1e-5,
            )
        ),
        "activation": activation_of(c, gated),
        "tie_embeddings": bool(c.get("tie_word_embeddings", default=True)),
        "init_method_std": float(c.number("initializer_range", "init_std", default=0.02)),
    }


def rope(c: Keys) -> Fields:
    """Return rotary positions, of both spellings."""
    given = dict(c.get("rope_parameters", "rope_scaling") or {})
    inner = given.get("full_attention", given)
    if not isinstance(inner, dict):
        raise ValueError(
            f"full_attention={inner!r} of rope_parameters in config.json must be an object; copy "
            "the file again"
        )
    given = dict(inner)
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    kind = {"su": "longrope"}.get(kind, kind)
    theta = given.pop("rope_theta", None)
    percent = given.pop("partial_rotary_factor", None)
    if kind == "dynamic":
        kind = "default"  # changes frequencies only beyond max_position_embeddings
        given = {}
    original = c.get("original_max_position_embeddings")
    if kind in ("yarn", "llama3", "longrope"):
        given.setdefault(
            "original_max_position_embeddings", original or c.number("max_position_embeddings")
        )
    fields = RopeScaling.__dataclass_fields__
    known = {key: value for key, value in given.items() if key in fields and value is not None}
    # mscale of YaRN is for attention scales that differ from the paper's.
    unknown = sorted(key for key in given.keys() - set(fields) if given[key] is not None)
    kinds = ("default", "linear", "llama3", "yarn", "longrope")
    if kind not in kinds or unknown:
        what = f"rope_type {kind!r}" if kind not in kinds else f"{', '.join(unknown)}"
        raise ValueError(
            f"{what} of rope_scaling in config.json is not supported; known are the types "
            f"{', '.join(kinds)} and dynamic with the keys {', '.join(fields)}"
        )
    missing = [key for key in _NEEDED.get(kind, ()) if key not in known]
    if missing:
        raise ValueError(
            f"rope_scaling of config.json has the type {kind} and no {', '.join(missing)}; copy "
            "the file again"
        )
    if kind == "default":
        known = {}
    if percent is None:
        percent = c.get("partial_rotary_factor", "rotary_pct", default=1.0)
    if theta is None:
        theta = c.number("rope_theta", "rotary_emb_base", default=10000.0)
    else:
        c.get("rope_theta", "rotary_emb_base")
    return {
        "position_embedding_type": "rotary",
        "rope_scaling": coerce(known | {"rope_type": kind}, RopeScaling, "rope_scaling"),
        "rotary_percent": float(percent),
        "rotary_base": float(theta),
    }


def rms(c: Keys, *bias: str) -> Fields:
    return common(c) | rope(c) | {"normalization": "rmsnorm", "bias": bias}


def layer_types(c: Keys) -> list[str] | None:
    return by_layer(c, "layer_types")


def by_layer(c: Keys, key: str) -> list | None:
    """Return a list with a value for each layer, or None. Raises ValueError if its length is
    another."""
    values = c.get(key)
    number = c.number("num_hidden_layers", "n_layer")
    if values and len(values) != number:
        raise ValueError(
            f"{key} of config.json has {len(values)} entries for num_hidden_layers={number}; give "
            "one for each layer"
        )
    return values


def pattern(
    c: Keys,
    types: list[str] | None = None,
    local: Fields | None = None,
    full: Fields | None = None,
) -> tuple[LayerSpec, ...]:
    """Return the layers of ``types`` (default: layer_types), as short as they repeat."""
    types = types or layer_types(c) or c["layer_types"]
    known = {"sliding_attention", "full_attention"}
    if not set(types) <= known:
        raise ValueError(
            f"layer_types {sorted(set(types) - known)} of config.json are not supported; known are "
            f"{' and '.join(sorted(known))}"
        )
    window = c["sliding_window"] if "sliding_attention" in types else None
    specs = tuple(
        LayerSpec(window=window, **(local or {}))
        if kind == "sliding_attention"
        else LayerSpec(**(full or {}))
        for kind in types
    )
    return shortest(specs)


def shortest(specs: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """Return the shortest pattern that repeats into ``specs``."""
    for period in range(1, len(specs)):
        if all(spec == specs[i % period] for i, spec in enumerate(specs)):
            return specs[:period]
    return specs


def one_window(c: Keys) -> Fields:
    """Return a window that all layers share, or none."""
    return {"layer_pattern": (LayerSpec(window=c.get("sliding_window")),)}
