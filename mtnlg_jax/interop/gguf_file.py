"""GGUF files of llama.cpp: their tensors under the names of Hugging Face's, and a config.json from
their metadata.

Formats that gguf itself dequantizes are read: F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K, Q6_K and
others. llama.cpp stores the queries and keys of Llama with rotary pairs side by side, and Gemma's
scales plus 1; both are undone here.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtnlg_jax.data.tokenizer.gguf_header import StoredTensor, read_header
from mtnlg_jax.interop.families import FAMILIES, Family
from mtnlg_jax.interop.tensors import Tensor

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OTHER_FORMAT = "write it as F16 or Q8_0 with llama-quantize"
_TOKENS = ("bos", "eos", "padding", "unknown", "mask")
# Factors of Llama 3's frequencies, which llama.cpp stores as a tensor.
_FACTORS = "rope_freqs.weight"
_LLAMA_3 = ({"factor": 8.0}, {"factor": 32.0})


class _Tensor(NamedTuple):
    """A tensor as bytes: ``rows`` [..., bytes of a row]."""

    kind: Any  # a GGMLQuantizationType
    shape: tuple[int, ...]
    rows: np.ndarray


class GGUF:
    """The tensors of the file at ``path``, and its metadata as a config.json in ``config``.

    Raises ValueError if the file is damaged, of an unsupported architecture or format; ImportError
    if the package gguf is missing.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            import gguf
        except ImportError:
            raise ImportError(
                f"reading {path} needs the package gguf; run pip install 'mtnlg_jax[gguf]'"
            ) from None
        self.path = Path(path)
        self._gguf = gguf
        header = read_header(path)
        self._meta = {
            name: value
            for name, value in header.metadata.items()
            if not name.startswith("tokenizer.ggml.") or name.endswith(("_token_id", ".model"))
        }
        self._file = np.memmap(path, np.uint8, "r")
        stored = {each.name: self._open(each) for each in header.tensors}
        if self._meta.get("split.count", 0) > 1:
            raise ValueError(
                f"{path} is one of {self._meta['split.count']} parts; join them with llama.cpp's "
                "llama-gguf-split --merge"
            )
        architecture = self._meta.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"the architecture of {path} is {architecture!r}; supported are "
                f"{', '.join(ARCHITECTURES)}"
            )
        self._architecture = architecture
        self.kind = ARCHITECTURES[architecture]
        self._tensors: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._factors: np.ndarray | None = None
        for name, tensor in stored.items():
            if name == _FACTORS:
                self._factors = self._dequantized(name, tensor).reshape(-1)
                continue
            name = self._their_name(name)
            self._tensors[name] = tensor
            self.shapes[name] = tensor.shape
            self.dtypes[name] = tensor.kind.name
        self._refuse_formats()
        self.config = self._config()

    def _refuse_formats(self) -> None:
        """Raise ValueError that names a tensor whose format cannot be read."""
        by_format = {tensor.kind: name for name, tensor in self._tensors.items()}
        for name in by_format.values():
            self.rows(name, 0, 1)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rows(name, 0, self.shapes[name][0])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self._tensors[name]
        if len(tensor.shape) == 1:
            return self._dequantized(name, tensor)[start:stop]
        return self._dequantized(name, tensor._replace(rows=tensor.rows[start:stop]))

    def _open(self, tensor: StoredTensor) -> "_Tensor":
        """Return the bytes of a tensor, by rows. Raises ValueError if the file ends before it."""
        try:
            kind = self._gguf.GGMLQuantizationType(tensor.kind)
        except ValueError as error:
            raise ValueError(
                f"{tensor.name} of {self.path} has a format that the installed package gguf does "
                f"not know ({error}); {_OTHER_FORMAT}, or upgrade gguf"
            ) from None
        block, size = self._gguf.GGML_QUANT_SIZES[kind]
        shape = tuple(reversed(tensor.dims))
        width = shape[-1] // block * size
        end = tensor.start + math.prod(shape[:-1]) * width
        if end > len(self._file) or shape[-1] % block:
            raise ValueError(
                f"{self.path} ends after {len(self._file):,} of {end:,} bytes, in {tensor.name}; "
                "copy it again"
            )
        rows = self._file[tensor.start : end].reshape(*shape[:-1], width)
        return _Tensor(kind, shape, rows)

    def _dequantized(self, name: str, tensor: "_Tensor") -> np.ndarray:
        try:
            return self._gguf.quants.dequantize(tensor.rows, tensor.kind)
        except NotImplementedError:
            raise ValueError(
                f"{name} of {self.path} is {tensor.kind.name}, which the package gguf does not "
                f"dequantize; {_OTHER_FORMAT}"
            ) from None

    def _their_name(self, name: str) -> str:
        """Return Hugging Face's name of a tensor; one without any stays, to be refused by name."""
        stem, _, end = name.rpartition(".")
        if stem in _OUTER:
            return f"{_OUTER[stem]}.{end}"
        block, _, rest = stem.partition(".")
        number, _, part = rest.partition(".")
        names = _BLOCK | (_SANDWICH if self.kind.startswith("gemma") else {})
        if block != "blk" or part not in names:
            return name
        return f"model.layers.{number}.{names[part]}.{end}"

    def family(self) -> Family:
        """Return the family with the differences of llama.cpp."""
        family = FAMILIES[self.kind]

        def change(name: str, tensor: Tensor) -> Tensor:
            tensor = dataclasses.replace(tensor, plus_one=False)
            if self.kind == "llama" and name.startswith(("self_attn.q_proj", "self_attn.k_proj")):
                tensor = dataclasses.replace(tensor, pairs=True)
            return tensor

        return dataclasses.replace(
            family,
            outer={name: change(name, tensor) for name, tensor in family.outer.items()},
            block={name: change(name, tensor) for name, tensor in family.block.items()},
        )

    def _of(self, key: str, default: Any = None) -> Any:
        return self._meta.get(f"{self._architecture}.{key}", default)

    def _needed(self, key: str) -> Any:
        value = self._of(key)
        if value is None:
            raise ValueError(
                f"{self.path} has no {self._architecture}.{key} in its metadata; convert the model "
                "again with llama.cpp's convert_hf_to_gguf.py"
            )
        return value

    def _config(self) -> dict[str, Any]:
        heads = self._needed("attention.head_count")
        width = self._needed("embedding_length")
        if "model.embed_tokens.weight" not in self.shapes:
            raise ValueError(f"{self.path} has no token_embd.weight; copy it again")
        config = {
            "model_type": self.kind,
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": width,
            "intermediate_size": self._needed("feed_forward_length"),
            "num_hidden_layers": self._needed("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._of("attention.head_count_kv", heads),
            "head_dim": self._of("attention.key_length", width // heads),
            "max_position_embeddings": self._needed("context_length"),
            "rms_norm_eps": self._rounded(self._needed("attention.layer_norm_rms_epsilon")),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
        }
        if "model.layers.0.self_attn.q_proj.bias" in self.shapes and self.kind == "llama":
            config["attention_bias"] = True
        self.has_tokenizer = "tokenizer.ggml.model" in self._meta
        for role in _TOKENS:
            index = self._meta.get(f"tokenizer.ggml.{role}_token_id")
            if index is not None:
                name = {"padding": "pad", "unknown": "unk"}.get(role, role)
                config[f"{name}_token_id"] = index
        # Models for chat have several ends.
        ends = [self._meta.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
        different = [index for index in dict.fromkeys(ends) if index is not None]
        if len(different) > 1:
            config["eos_token_id"] = different
        base = self._rounded(self._of("rope.freq_base", 10000.0))
        rope = {"rope_theta": base} | self._scaling(config["head_dim"], base)
        if self.kind.startswith("gemma"):
            config |= self._gemma(config)
        if self.kind == "gemma3_text":
            local = self._rounded(self._of("rope.freq_base_swa", 10000.0))
            rope = {
                "full_attention": rope,
                "sliding_attention": {"rope_theta": local, "rope_type": "default"},
            }
        return config | {"rope_parameters": rope}

    @staticmethod
    def _rounded(value: float) -> float:
        """Return a float32 of the file as the decimal number that was meant."""
        return float(f"{value:.7g}")

    def _gemma(self, config: dict[str, Any]) -> dict[str, Any]:
        # As llama.cpp has it: the models of 27B divide by the width over the heads.
        largest = config["num_hidden_layers"] == (46 if self.kind == "gemma2" else 62)
        scalar = config["hidden_size"] // config["num_attention_heads"]
        found = {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": scalar if largest else config["head_dim"],
        }
        window = self._of("attention.sliding_window")
        if window is not None:
            found["sliding_window"] = window
        if self.kind == "gemma2":
            found["attn_logit_softcapping"] = self._of("attn_logit_softcapping", 50.0)
            found["final_logit_softcapping"] = self._of("final_logit_softcapping", 30.0)
        else:
            found["final_logit_softcapping"] = self._of("final_logit_softcapping")
        return found

    def _scaling(self, width: int, base: float) -> dict[str, Any]:
        if self._factors is not None:
            return self._llama_3(width, base)
        kind = self._of("rope.scaling.type", "none")
        factor = self._of("rope.scaling.factor", self._of("rope.scale_linear", 1.0))
        if kind in ("none", "linear") and factor in (0.0, 1.0):
            return {"rope_type": "default"}
        if kind in ("none", "linear"):
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            return {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": self._needed(
                    "rope.scaling.original_context_length"
                ),
            }
        raise ValueError(f"rope.scaling.type {kind!r} of {self.path} is not supported")

    def _llama_3(self, width: int, base: float) -> dict[str, Any]:
        """Return the settings of Llama 3's scaling that give the factors in the file."""
        assert self._factors is not None
        for known in _LLAMA_3:
            for original in (8192, self._of("rope.scaling.original_context_length", 8192)):
                made = llama_3_factors(width, base, known["factor"], original)
                if made.shape == self._factors.shape and np.allclose(
                    made, self._factors, rtol=1e-4
                ):
                    return known | {
                        "rope_type": "llama3",
                        "original_max_position_embeddings": original,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                    }
        raise ValueError(
            f"{_FACTORS} of {self.path} are not those of Llama 3.1 or 3.2 (factor 8 or 32); use "
            "the folder of Hugging Face's"
        )


def llama_3_factors(
    width: int, base: float, factor: float, original: int, low: float = 1.0, high: float = 4.0
) -> np.ndarray:
    """Return how many times longer each wavelength becomes, as llama.cpp stores it."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
