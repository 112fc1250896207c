"""Checkpoints of MaxText: Orbax arrays under its names, and its config.yml.

The arrays give the sizes; config.yml, which MaxText writes beside the checkpoints or the user puts
there, says the rest. Layers are scanned (one array, layers along dim 1) or apart (layers_N).
"""

# Letters: D width, F MLP width, N query heads, K key/value heads, H head width, L layers, E experts

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mtnlg_jax.config import ModelConfig, MoEConfig, Multipliers, RopeScaling, validate_model
from mtnlg_jax.interop.layouts import KEY, OUT, QUERY, VALUE, Family, Table, tensor
from mtnlg_jax.interop.recognize import maxtext_items

CONFIG = "config.yml"
LAYERS = "decoder.layers_{}."
EMBEDDING = "token_embedder.embedding"
HEAD = "decoder.logits_dense.kernel"
# Blocks whose queries are stored divided by the root of the head width, as they are initialized.
_DIVIDED = {"llama2", "mistral", "mixtral"}
BLOCKS = (*sorted(_DIVIDED), "qwen3")
_GATES = {"silu": "swiglu", "gelu": "geglu"}
_RENAMES = (
    (r"\.MoeBlock_0\.", ".moe_block."),
    (r"(\.moe_block\.w[io](_\d)?)\.kernel$", r"\1"),
)
# Settings that change the function, with the values that are known.
_NEUTRAL: dict[str, tuple] = {
    "attention_type": ("global",),
    "attn_logits_soft_cap": (0, 0.0),
    "capacity_factor": (-1, -1.0),
    "final_logits_soft_cap": (0, 0.0),
    "mlp_activations_limit": (-1, -1.0),
    "moe_expert_input_dim": (-1,),
    "n_routing_groups": (-1,),
    "num_vocab_tiling": (1,),
    "partial_rotary_factor": (1, 1.0),
    "rope_linear_scaling_factor": (1, 1.0),
    "rope_min_timescale": (1,),
    "routed_bias": (False,),
    "routed_scaling_factor": (1, 1.0),
    "routed_score_func": ("",),
    "shared_experts": (0, 1),
    "trainable_position_size": (-1, 0),
    "use_post_attn_norm": (False,),
    "use_post_ffw_norm": (False,),
    "use_untrainable_positional_embedding": (False,),
}


class MaxText:
    """The checkpoint at ``path``: a step's folder, its items/, or the folder of several steps.

    Raises ValueError or FileNotFoundError if something is missing, damaged or not supported.
    """

    def __init__(self, path: str | os.PathLike):
        items = maxtext_items(path)
        if items is None:
            raise FileNotFoundError(f"{path} holds no items/_METADATA of MaxText; copy it again")
        self.items = items
        self.settings = self._settings()
        self.stored = Arrays(items, self._number("param_scan_axis", 1))
        self.model = self._model()
        self.family = self._family()
        if self._block() in _DIVIDED:
            self.stored.multiply("self_attention.query.kernel", math.sqrt(self.model.head_width))

    def _settings(self) -> dict[str, Any]:
        places = [folder / CONFIG for folder in (self.items, *self.items.parents[:3])]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{places[1]} is missing, and the arrays do not say which model they are; copy "
                "MaxText's config.yml of the run there, or the NAME.yml of the model"
            )
        self.where = found
        try:
            settings = yaml.safe_load(found.read_text())
        except yaml.YAMLError as error:
            line = str(error).partition("\n")[0]
            raise ValueError(f"{found} is not valid YAML ({line}); correct it") from None
        if not isinstance(settings, dict):
            raise ValueError(f"{found} holds no settings; copy MaxText's config.yml of the run")
        return settings

    def _get(self, name: str, default: Any) -> Any:
        value = self.settings.get(name)
        return default if value is None or value == "None" else value

    def _number(self, name: str, default: float) -> Any:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}={value!r} of {self.where} must be a number")
        return value

    def _block(self) -> str:
        return self._get("decoder_block", "llama2")

    def _refuse(self, name: str, known: Any) -> ValueError:
        return ValueError(
            f"{name}={self.settings.get(name)!r} of {self.where} is not supported; known are "
            f"{', '.join(map(str, known))}"
        )

    def _model(self) -> ModelConfig:
        if self._block() not in BLOCKS:
            raise self._refuse("decoder_block", BLOCKS)
        for name, neutral in _NEUTRAL.items():
            if self._get(name, neutral[0]) not in neutral:
                raise self._refuse(name, neutral)
        normed = bool(self._get("use_qk_norm", False))
        if normed != (self._block() == "qwen3"):
            raise self._refuse("use_qk_norm", [self._block() == "qwen3"])
        activations = tuple(self._get("mlp_activations", ("silu", "linear")))
        gates: dict[tuple, Any] = {(name, "linear"): ours for name, ours in _GATES.items()}
        if activations not in gates:
            raise self._refuse("mlp_activations", gates)
        shapes = self.stored.raw
        first = LAYERS.format(0)
        needed = [EMBEDDING, *(f"{first}self_attention.{name}.kernel" for name in ("query", "key"))]
        for name in needed:
            if name not in shapes:
                raise ValueError(f"{self.items} holds no {name}; copy the whole folder")
        vocabulary, width = shapes[EMBEDDING]
        heads, head_width = shapes[needed[1]][1:]
        experts = int(self._number("num_experts", 1))
        inner = shapes.get(f"{first}moe_block.wi_0" if experts > 1 else f"{first}mlp.wi_0.kernel")
        if inner is None:
            raise ValueError(f"{self.items} holds no MLP for num_experts={experts}; correct one")
        tied = bool(self._get("logits_via_embedding", False))
        divided = tied and bool(self._get("normalize_embedding_logits", True))
        biases = [f"{first}self_attention.{name}.bias" in shapes for name in ("query", "out")]
        model = ModelConfig(
            num_layers=self.stored.layers,
            hidden_size=width,
            num_attention_heads=heads,
            num_query_groups=shapes[needed[2]][1],
            kv_channels=head_width,
            ffn_hidden_size=inner[-1],
            vocab_size=vocabulary,
            max_position_embeddings=int(self._number("max_target_length", 2048)),
            normalization="rmsnorm",
            norm_epsilon=float(self._number("normalization_layer_epsilon", 1e-5)),
            qk_layernorm="head" if normed else "none",
            activation=gates[activations],
            bias=tuple(name for name, has in zip(("qkv", "out"), biases, strict=True) if has),
            tie_embeddings=tied,
            position_embedding_type="rotary",
            rotary_base=float(self._number("rope_max_timescale", 10000)),
            rope_scaling=self._scaling(),
            multipliers=Multipliers(logits=width**-0.5 if divided else 1.0),
            moe=self._experts(experts),
            dropout_rate=float(self._number("dropout_rate", 0.0)),
        )
        validate_model(model)
        return model

    def _experts(self, experts: int) -> MoEConfig:
        if experts <= 1:
            return MoEConfig()
        if self._block() != "mixtral":
            raise self._refuse("num_experts", (f"1 with decoder_block={self._block()}",))
        return MoEConfig(
            num_moe_experts=experts,
            moe_router_topk=int(self._number("num_experts_per_tok", 1)),
            # A softmax over the best alone is that over all, divided by the sum of the best.
            moe_router_pre_softmax=True,
            moe_router_norm=True,
            moe_aux_loss_coeff=float(self._number("load_balance_loss_weight", 0.0)),
        )

    def _llama_3_1(self) -> bool:
        """Whether rotary pairs are neighbors, as MaxText's LLaMARotaryEmbedding has them."""
        names = (self._get("rope_type", "default"), self._get("model_name", "default"))
        return any(str(name).lower().startswith("llama3.1") for name in names)

    def _scaling(self) -> RopeScaling:
        kind = str(self._get("rope_type", "default")).lower()
        if self._llama_3_1():
            if not self._get("rope_use_scale", True):
                return RopeScaling()
            return RopeScaling(
                rope_type="llama3", factor=8.0, original_max_position_embeddings=8192
            )
        if kind != "default":
            raise self._refuse("rope_type", ("default", "llama3.1"))
        return RopeScaling()

    def _family(self) -> Family:
        pairs = self._llama_3_1()
        block: Table = {
            "pre_self_attention_layer_norm.scale": tensor("norm_1.scale_D"),
            "post_self_attention_layer_norm.scale": tensor("norm_2.scale_D"),
            "self_attention.query.kernel": tensor(QUERY, columns=True, pairs=pairs),
            "self_attention.key.kernel": tensor(KEY, columns=True, pairs=pairs),
            "self_attention.value.kernel": tensor(VALUE, columns=True),
            "self_attention.out.kernel": tensor(OUT, columns=True),
            "self_attention.query.bias": tensor("attention.b_q_NH", pairs=pairs),
            "self_attention.key.bias": tensor("attention.b_k_KH", pairs=pairs),
            "self_attention.value.bias": tensor("attention.b_v_KH"),
            "self_attention.out.bias": tensor("attention.b_o_D"),
            "self_attention.query_norm.scale": tensor("attention.q_norm.scale_H"),
            "self_attention.key_norm.scale": tensor("attention.k_norm.scale_H"),
            "mlp.wi_0.kernel": tensor("mlp.w_gate_DF", columns=True),
            "mlp.wi_1.kernel": tensor("mlp.w_in_DF", columns=True),
            "mlp.wo.kernel": tensor("mlp.w_out_FD", columns=True),
            "moe_block.gate.kernel": tensor("mlp.w_router_DE", columns=True),
            "moe_block.wi_0": tensor("mlp.w_gate_EDF", columns=True),
            "moe_block.wi_1": tensor("mlp.w_in_EDF", columns=True),
            "moe_block.wo": tensor("mlp.w_out_EFD", columns=True),
        }
        outer = {
            EMBEDDING: tensor("tokens_VD"),
            "decoder.decoder_norm.scale": tensor("final_norm.scale_D"),
            HEAD: tensor("head_VD", columns=True),
        }
        return Family(LAYERS, outer, block, lambda keys: {}, prefix="", head=HEAD, buffers="\0")


class Arrays:
    """The arrays below ``items`` as matrices and vectors of single layers, by name.

    Args:
      axis: the dim of layers in scanned arrays.
    """

    def __init__(self, items: Path, axis: int):
        # Imported here, because it takes a while and few commands need it.
        import tensorstore as ts

        self._items = items
        self._axis = axis
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        try:
            self._metadata = json.loads((items / "_METADATA").read_bytes())
            keys = [
                [str(each["key"]) for each in entry["key_metadata"]]
                for entry in self._metadata["tree_metadata"].values()
                if not entry["value_metadata"].get("skip_deserialize")
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{items / '_METADATA'} is damaged ({type(error).__name__}: {error}); copy it again"
            ) from None
        self._factors: dict[str, float] = {}
        self._arrays: dict[str, Any] = {}
        self._places: dict[str, tuple[str, int | None]] = {}
        self._whole: tuple[str, np.ndarray] | None = None
        self.raw: dict[str, tuple[int, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.layers = 0
        for parts in keys:
            if parts[0] == "params":
                self._enter(".".join(parts))

    def _enter(self, full: str) -> None:
        """Add the array ``full``, or each layer of it."""
        array = self._arrays[full] = self._open(full)
        name = re.sub(r"^(params\.)+", "", full)
        for old, new in _RENAMES:
            name = re.sub(old, new, name)
        shape = tuple(array.shape)
        if inside := re.match(r"decoder\.layers_(\d+)\.", name):
            self.layers = max(self.layers, int(inside[1]) + 1)
        scanned = re.match(r"decoder\.layers\.(.+)$", name)
        if not scanned:
            self._name(name, full, None, shape)
            return
        number = shape[self._axis] if len(shape) > self._axis else 0
        if self.layers not in (0, number):
            raise ValueError(
                f"{full} of {self._items} has {number} layers along dim {self._axis}, and others "
                f"have {self.layers}; set param_scan_axis in {CONFIG} as it was"
            )
        self.layers = number
        for layer in range(number):
            rest = shape[: self._axis] + shape[self._axis + 1 :]
            self._name(f"{LAYERS.format(layer)}{scanned[1]}", full, layer, rest)

    def _name(self, name: str, full: str, layer: int | None, shape: tuple[int, ...]) -> None:
        self._places[name] = full, layer
        self.raw[name] = shape
        self.shapes[name] = _matrix(name, shape)
        self.dtypes[name] = self._arrays[full].dtype.name

    def _open(self, full: str) -> Any:
        import tensorstore as ts

        base = {"driver": "file", "path": f"{os.path.abspath(self._items)}/"}
        if self._metadata.get("use_ocdbt", (self._items / "manifest.ocdbt").is_file()):
            store: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{full}/"}
        else:
            store = {"driver": "file", "path": f"{base['path']}{full}/"}
        driver = "zarr3" if self._metadata.get("use_zarr3") else "zarr"
        spec = {"driver": driver, "kvstore": store}
        try:
            return ts.open(spec, open=True, read=True, context=self._context).result()
        except ValueError as error:
            line = str(error).partition("\n")[0][:120]
            raise ValueError(
                f"{full} of {self._items} cannot be read ({line}); copy the whole folder"
            ) from None

    def multiply(self, ending: str, factor: float) -> None:
        """Let arrays whose names end so be multiplied when they are read."""
        self._factors[ending] = factor

    def __getitem__(self, name: str) -> np.ndarray:
        full, layer = self._places[name]
        array = self._arrays[full]
        if layer is None:
            found = array.read().result()
        elif array.chunk_layout.read_chunk.shape[self._axis] == 1:
            found = array[(slice(None),) * self._axis + (layer,)].read().result()
        else:
            # Pieces hold several layers: keep the array until another one is read.
            if self._whole is None or self._whole[0] != full:
                self._whole = None
                self._whole = full, array.read().result()
            found = np.take(self._whole[1], layer, self._axis)
        found = found.reshape(self.shapes[name])
        for ending, factor in self._factors.items():
            if name.endswith(ending):
                found = found.astype(np.float32) * np.float32(factor)
        return found

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        full, layer = self._places[name]
        if layer is not None:
            return self[name][start:stop]
        stop = min(stop, self.shapes[name][0])
        return self._arrays[full][start:stop].read().result()


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a layer's array with its heads and their dims as one."""
    if re.search(r"self_attention\.(query|key|value)\.(kernel|bias)$", name):
        return (*shape[:-2], shape[-2] * shape[-1]) if len(shape) > 1 else shape
    if name.endswith("self_attention.out.kernel") and len(shape) > 2:
        return (shape[0] * shape[1], *shape[2:])
    return shape
