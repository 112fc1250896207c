"""Translate GPT-2's config and tensors between Hugging Face's format and ours.

Hugging Face stores matrices as [in, out] (Conv1D), queries, keys and values side by side in one
matrix, and each layer separately. Here queries, keys and values are separate, heads have their own
axis, and layers are stacked. Tensor names are without ``transformer.``.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtnlg_jax.config import ModelConfig, validate_model
from mtnlg_jax.model.transformer import abstract_model

PREFIX = "transformer."
# The causal mask, which older versions also saved.
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

_OUTER: dict[str, tuple[str, ...]] = {
    "wte.weight": ("tokens_VD",),
    "wpe.weight": ("positions_PD",),
    "ln_f.weight": ("final_norm.scale_D",),
    "ln_f.bias": ("final_norm.bias_D",),
    "lm_head.weight": ("head_VD",),
}
_BLOCK = {
    "ln_1.weight": ("norm_1.scale_D",),
    "ln_1.bias": ("norm_1.bias_D",),
    "attn.c_attn.weight": ("attention.w_q_DNH", "attention.w_k_DKH", "attention.w_v_DKH"),
    "attn.c_attn.bias": ("attention.b_q_NH", "attention.b_k_KH", "attention.b_v_KH"),
    "attn.c_proj.weight": ("attention.w_o_NHD",),
    "attn.c_proj.bias": ("attention.b_o_D",),
    "ln_2.weight": ("norm_2.scale_D",),
    "ln_2.bias": ("norm_2.bias_D",),
    "mlp.c_fc.weight": ("mlp.w_in_DF",),
    "mlp.c_fc.bias": ("mlp.b_in_F",),
    "mlp.c_proj.weight": ("mlp.w_out_FD",),
    "mlp.c_proj.bias": ("mlp.b_out_D",),
}

# GPT2Config's defaults for keys that a config.json leaves out, and other names of keys.
_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
_ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
# Hugging Face's names of our activations; the first one is written.
_ACTIVATIONS: dict[Literal["gelu", "gelu_exact", "relu", "silu", "swiglu"], tuple[str, ...]] = {
    "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "gelu_exact": ("gelu",),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}
# Any other value changes what the model computes. reorder_and_upcast_attn is not checked: it makes
# attention sum in float32, which it always does here.
_SWITCHES = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "activation_function": sum(_ACTIVATIONS.values(), ()),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
}


def model_of(config: dict) -> ModelConfig:
    """Return the ModelConfig of a config.json; raise ValueError for an unsupported setting."""
    if config.get("model_type") != "gpt2":
        raise ValueError(f"model_type is {config.get('model_type')!r}; only 'gpt2' is supported")
    for key, allowed in _SWITCHES.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{key}={config[key]!r} is not supported; it must be "
                f"{' or '.join(map(json.dumps, allowed))}"
            )

    def read(key):
        value = config.get(key, config.get(_ALIASES.get(key), _DEFAULTS[key]))
        kind = type(_DEFAULTS[key] or 0)
        if isinstance(value, bool) != (kind is bool) or not isinstance(
            value, (kind, int, type(_DEFAULTS[key]))
        ):
            raise ValueError(
                f"{key}={value!r} is {type(value).__name__}; it must be {kind.__name__}"
            )
        return value

    width = read("n_embd")
    inner = read("n_inner")
    activation = next(
        ours for ours, names in _ACTIVATIONS.items() if read("activation_function") in names
    )
    model = ModelConfig(
        num_layers=read("n_layer"),
        hidden_size=width,
        num_attention_heads=read("n_head"),
        ffn_hidden_size=None if inner in (None, 4 * width) else inner,
        vocab_size=read("vocab_size"),
        vocab_size_divisible_by=1,
        max_position_embeddings=read("n_positions"),
        activation=activation,
        norm_epsilon=float(read("layer_norm_epsilon")),
        init_method_std=float(read("initializer_range")),
        dropout_rate=float(read("resid_pdrop")),
        tie_embeddings=read("tie_word_embeddings"),
    )
    validate_model(model)
    return model


def config_of(model: ModelConfig, original: dict | None = None) -> dict:
    """Return the config.json of ``model``.

    Keys that do not describe the model are taken from ``original``, the config.json that it was
    converted from. Raises ValueError for settings that GPT-2 does not have.
    """
    refuse_other_architecture(model)
    width = model.hidden_size
    ours = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.max_position_embeddings,
        "n_embd": width,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": None if model.mlp_width == 4 * width else model.mlp_width,
        "activation_function": _ACTIVATIONS[model.activation][0],
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "resid_pdrop": model.dropout_rate,
        "embd_pdrop": model.dropout_rate,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if original is None:
        return ours
    # Equivalent in both, or not part of our config.
    kept = {"activation_function", "attn_pdrop", "model_type", "architectures"}
    before = model_of(original)
    if before.dropout_rate == model.dropout_rate:
        kept.add("embd_pdrop")
    if before.mlp_width == model.mlp_width:
        kept.add("n_inner")  # 4 x n_embd may be written out
    names = {
        key: _ALIASES[key] if _ALIASES.get(key) in original else key for key in ours.keys() - kept
    }
    return original | {
        names[key]: ours[key]
        for key in ours
        if key in names and original.get(names[key], _DEFAULTS[key]) != ours[key]
    }


def refuse_other_architecture(model: ModelConfig) -> None:
    """Raise ValueError if ``model`` does not have GPT-2's architecture; name every such field."""
    wanted = {
        "position_embedding_type": ("learned",),
        "normalization": ("layernorm",),
        "activation": tuple(_ACTIVATIONS),
        "add_bias": (True,),
    }
    other = [
        f"model.{key}={getattr(model, key)} (GPT-2: {' or '.join(map(str, values))})"
        for key, values in wanted.items()
        if getattr(model, key) not in values
    ]
    if model.kv_heads != model.num_attention_heads:
        other.append(
            f"model.num_query_groups={model.kv_heads} (GPT-2: num_attention_heads, "
            f"{model.num_attention_heads})"
        )
    if model.head_width * model.num_attention_heads != model.hidden_size:
        other.append(
            f"model.kv_channels={model.head_width} (GPT-2: hidden_size / num_attention_heads, "
            f"{model.hidden_size / model.num_attention_heads:g})"
        )
    if other:
        raise ValueError(
            f"GPT-2's format cannot express {', '.join(other)}; keep such a run in its own folder"
        )


def names_of(stored: Iterable[str]) -> dict[str, str]:
    """Return {name without any prefix: name as stored} of the tensors of a folder.

    Wrappers for data parallelism and compilation add their own prefixes before PREFIX.
    """
    bare = {full: re.sub(r"^((module|_orig_mod)\.)+", "", full) for full in stored}
    prefixed = any(name.startswith(PREFIX) for name in bare.values())
    return {name.removeprefix(PREFIX) if prefixed else name: full for full, name in bare.items()}


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of Hugging Face's GPT-2, without PREFIX, in its order."""
    ours = _flat(abstract_model(model)[1])
    shapes = {}
    for name, (parts, layer) in _parts(model).items():
        shape = _matrix_shape(parts[0], ours[parts[0]].shape[layer is not None :])
        shapes[name] = (*shape[:-1], shape[-1] * len(parts))
    return shapes


def parameters_of(model: ModelConfig, read: Callable[[str], np.ndarray]) -> nnx.State:
    """Return our float32 parameters.

    ``read`` returns a tensor by Hugging Face's name, with its shape in `shapes_of`.
    """
    abstract = abstract_model(model)[1]
    arrays = {name: np.empty(leaf.shape, np.float32) for name, leaf in _flat(abstract).items()}
    for name, (parts, layer) in _parts(model).items():
        for part, values in zip(
            parts, np.split(read(name).astype(np.float32), len(parts), -1), strict=True
        ):
            target = arrays[part] if layer is None else arrays[part][layer]
            target[...] = values.reshape(target.shape)
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [jnp.asarray(arrays.pop(name)) for name in list(arrays)]
    )


def reader_of(model: ModelConfig, params: nnx.State) -> Callable[[str], np.ndarray]:
    """Return a function from Hugging Face's name to the float32 tensor of our parameters.

    ``params`` may also be their gradients.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in _flat(params).items()}
    parts_of = _parts(model)

    def read(name: str) -> np.ndarray:
        parts, layer = parts_of[name]
        values = [arrays[part] if layer is None else arrays[part][layer] for part in parts]
        matrices = [
            each.reshape(_matrix_shape(part, each.shape))
            for part, each in zip(parts, values, strict=True)
        ]
        return np.ascontiguousarray(np.concatenate(matrices, -1))

    return read


def refuse_other_tensors(
    folder: str, found: dict[str, tuple[int, ...]], model: ModelConfig
) -> None:
    """Raise ValueError if tensors are missing, unknown or of another shape than the model's.

    Names in ``found`` are without PREFIX.
    """
    wanted = shapes_of(model)
    problems = []
    for name in wanted.keys() - found.keys():
        problems.append(f"{name} is missing (expected {list(wanted[name])})")
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            problems.append(f"{name} is {list(found[name])} (expected {list(wanted[name])})")
    for name in found.keys() - wanted.keys():
        # A tied head may be stored as well; it is compared later.
        tied_head = name == "lm_head.weight" and found[name] == wanted["wte.weight"]
        if not tied_head and not BUFFERS.fullmatch(name):
            problems.append(f"{name} {list(found[name])} is not part of the model")
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"the tensors of {folder} are not those of its config.json: "
            f"{'; '.join(sorted(problems)[:6])}{more}; correct one of the two"
        )


def _parts(model: ModelConfig) -> dict[str, tuple[tuple[str, ...], int | None]]:
    """Return {Hugging Face's name: (our names, layer)}.

    Several names are side by side in the last dim. The layer is None outside the blocks.
    """
    parts: dict[str, tuple[tuple[str, ...], int | None]] = {
        name: (ours, None) for name, ours in _OUTER.items() if name in ("wte.weight", "wpe.weight")
    }
    for layer in range(model.num_layers):
        parts |= {
            f"h.{layer}.{name}": (tuple(f"blocks.{part}" for part in ours), layer)
            for name, ours in _BLOCK.items()
        }
    return parts | {
        name: (ours, None)
        for name, ours in _OUTER.items()
        if name not in parts and not (model.tie_embeddings and name == "lm_head.weight")
    }


def _matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of one layer's parameter with heads and head width merged into one dim."""
    dims = name.rpartition("_")[2]
    at = max(dims.find("NH"), dims.find("KH"))
    return shape if at < 0 else (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])


def _flat(tree) -> dict[str, Any]:
    """Return leaves by dotted name, such as ``blocks.mlp.w_in_DF``."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
