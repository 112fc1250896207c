"""Checkpoints of Megatron-LM's format `torch`: a file for each rank, of any layout.

The folders are mp_rank_TT, mp_rank_TT_PPP, mp_rank_TT_PPP_EEE or mp_rank_TT_EEE: tensor, pipeline
and expert part. Layers are counted from 0 in each chunk of a stage.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from mtnlg_jax.interop import torch_file
from mtnlg_jax.interop.megatron_settings import HEAD, UNUSED, renamed
from mtnlg_jax.interop.megatron_tensors import Joined, args_of, state_of

# Split over tensor parts along the outputs, and along the inputs; all others are whole everywhere.
_ROWS = re.compile(
    r"linear_(qkv|fc1)\.(weight|bias)$|word_embeddings\.weight$|output_layer\.(weight|bias)$"
    r"|softmax_offset$"
)
_COLUMNS = re.compile(r"linear_(proj|fc2)\.weight$")
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)\.(.+)$")
_EXPERT = re.compile(r"^(.+\.local_experts\.)(\d+)\.(.+)$")
_SIZES = {
    "tensor": "tensor_model_parallel_size",
    "pipe": "pipeline_model_parallel_size",
    "virtual": "virtual_pipeline_model_parallel_size",
    "expert": "expert_model_parallel_size",
}


class Ranks(Joined):
    """The files of one folder: mp_rank_TT, mp_rank_TT_PPP, mp_rank_TT_PPP_EEE or mp_rank_TT_EEE."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._folder = folder
        first = _rank_file(folder, "mp_rank_")
        state = state_of(first)
        self.args = args_of(state, first)
        # Before 3, this is the order of queries, keys and values.
        self.version = float(state.get("checkpoint_version", 0))
        self.iteration = state.get("iteration")
        self._sizes = {name: int(self.args.get(key) or 1) for name, key in _SIZES.items()}
        self._check_experts()
        states = self._open(state, first)
        self._join(states)

    def _check_experts(self) -> None:
        inner = self.args.get("expert_tensor_parallel_size")
        tensor = self._sizes["tensor"]
        if self.args.get("num_experts") and inner not in (None, tensor):
            raise ValueError(
                f"{self.where} was written with expert_tensor_parallel_size={inner} and "
                f"tensor_model_parallel_size={tensor}, which is not read; write it as torch_dist"
            )

    def _name(self, tensor: int, pipe: int, expert: int) -> str:
        name = f"mp_rank_{tensor:02d}"
        if self._sizes["pipe"] > 1:
            name += f"_{pipe:03d}"
        if self._sizes["expert"] > 1:
            name += f"_{expert:03d}"
        return name

    def _open(self, state: dict, first: Path) -> dict[tuple[int, int, int], dict]:
        """Return what each rank's file holds; numbers stay on disk."""
        sizes = self._sizes
        places = {
            (tensor, pipe, expert): self._name(tensor, pipe, expert)
            for tensor in range(sizes["tensor"])
            for pipe in range(sizes["pipe"])
            for expert in range(sizes["expert"])
        }
        layout = ", ".join(f"{_SIZES[name]}={size}" for name, size in sizes.items())
        found = {path.name for path in self._folder.glob("mp_rank_*") if path.is_dir()}
        missing = [name for name in places.values() if name not in found]
        if missing:
            raise FileNotFoundError(
                f"{self._folder / missing[0]} is missing ({len(missing)} of {len(places)} ranks "
                f"are), and {first} was written with {layout}; copy all ranks"
            )
        extra = sorted(found - set(places.values()))
        if extra:
            raise ValueError(
                f"{self._folder / extra[0]} belongs to another layout than {first}, which was "
                f"written with {layout}; keep the ranks of one"
            )
        states = {}
        for place, name in places.items():
            path = _rank_file(self._folder, name)
            one = state if path == first else state_of(path)
            args = args_of(one, path)
            for key in (*_SIZES.values(), "num_layers", "hidden_size"):
                if (args.get(key) or 1) != (self.args.get(key) or 1):
                    raise ValueError(
                        f"{path} was written with {key}={args.get(key)} and {first} with "
                        f"{self.args.get(key)}; keep the ranks of one checkpoint"
                    )
            if one.get("iteration") != self.iteration:
                raise ValueError(
                    f"{path} is of iteration {one.get('iteration')} and {first} of "
                    f"{self.iteration}; copy all ranks of one iteration"
                )
            states[place] = one
        return states

    def _join(self, states: dict[tuple[int, int, int], dict]) -> None:
        sizes = self._sizes
        before = 0
        # Chunk c of all stages comes before chunk c + 1 of any (Narayanan 2021, section 2.2).
        for chunk in range(sizes["virtual"]):
            for pipe in range(sizes["pipe"]):
                ranks = {
                    (tensor, expert): _tensors(
                        states[tensor, pipe, expert], chunk, sizes["virtual"]
                    )
                    for tensor in range(sizes["tensor"])
                    for expert in range(sizes["expert"])
                }
                before += self._add_stage(ranks, before)
        layers = self.args.get("num_layers", self.args.get("encoder_num_layers"))
        if before != layers:
            raise ValueError(f"{self.where} holds {before} layers, and its args say {layers}")

    def _add_stage(self, ranks: dict[tuple[int, int], dict], before: int) -> int:
        """Add a stage whose first layer has the number ``before``; return how many it has."""
        parts = self._sizes["tensor"]
        experts = self._sizes["expert"]
        tables = {place: self._split_groups(tensors) for place, tensors in ranks.items()}
        names = tables[0, 0].keys()
        layers = set()
        for table in tables.values():
            odd = sorted(table.keys() ^ names)
            if odd:
                raise ValueError(
                    f"{odd[0]} is in some tensor or expert parts of {self.where} alone; copy all "
                    "ranks of one checkpoint"
                )
        for expert in range(experts):
            for name in names:
                inside = _EXPERT.match(name)
                if expert and not inside:
                    continue  # the same in all expert parts
                here = [tables[tensor, expert][name] for tensor in range(parts)]
                full = name
                if match := _LAYER.match(name):
                    layers.add(int(match[2]))
                    full = f"{match[1]}{before + int(match[2])}.{match[3]}"
                if inside and (match := _EXPERT.match(full)):
                    mine = int(self.args["num_experts"]) // experts
                    full = f"{match[1]}{expert * mine + int(match[2])}.{match[3]}"
                if full == HEAD and full in self.shapes:
                    continue
                self._add_parts(full, here)
        return len(layers)

    def _split_groups(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return the tensors by name, with the experts of grouped products one by one."""
        found: dict[str, Any] = {}
        for name, tensor in tensors.items():
            match = re.search(r"^(.*\.mlp\.experts\.)weight([12])$", name)
            if not match:
                found[name] = tensor
                continue
            mine = int(self.args["num_experts"]) // self._sizes["expert"]
            for expert in range(mine):
                to = f"{match[1]}local_experts.{expert}.linear_fc{match[2]}.weight"
                found[to] = _OfGroup(tensor, mine, expert, int(self.args["hidden_size"]), match[2])
        return found

    def _add_parts(self, name: str, parts: list[Any]) -> None:
        shapes = {part.shape for part in parts}
        if len(shapes) > 1:
            raise ValueError(
                f"{name} has the shapes {', '.join(map(str, sorted(shapes)))} in the tensor parts "
                f"of {self.where}; copy all ranks of one checkpoint"
            )
        shape = list(parts[0].shape)
        if _ROWS.search(name):
            shape[0] *= len(parts)
        elif _COLUMNS.search(name):
            shape[1] *= len(parts)
        gated = bool(self.args.get("swiglu") or self.args.get("quick_geglu"))

        def make() -> np.ndarray:
            arrays = [part.numpy() for part in parts]
            if "linear_qkv" in name:
                arrays = [self._in_groups(array) for array in arrays]
            return join(name, arrays, gated)

        self._add(name, tuple(shape), str(parts[0].dtype), make)

    def _in_groups(self, array: np.ndarray) -> np.ndarray:
        """Return a tensor part's queries, keys and values head by head, as they are from version 2
        on. Earlier, the three were the outermost (0) or the innermost dim (1)."""
        if self.version >= 2:
            return array
        heads = int(self.args["num_attention_heads"]) // self._sizes["tensor"]
        width = array.shape[0] // (3 * heads)
        order = (3, heads, width) if self.version < 1 else (heads, width, 3)
        grouped = array.reshape(*order, *array.shape[1:])
        moved = grouped.swapaxes(0, 1) if self.version < 1 else np.moveaxis(grouped, 2, 1)
        return moved.reshape(array.shape)


def join(name: str, parts: list[np.ndarray], gated: bool) -> np.ndarray:
    """Return a tensor from those of its tensor parts.

    Args:
      gated: linear_fc1 holds the outputs of the gate and then the others, in each part.
    """
    if _COLUMNS.search(name):
        return np.concatenate(parts, 1) if len(parts) > 1 else parts[0]
    if not _ROWS.search(name) or len(parts) == 1:
        return parts[0]
    if gated and "linear_fc1" in name:
        halves = [part.reshape(2, part.shape[0] // 2, *part.shape[1:]) for part in parts]
        return np.concatenate(halves, 1).reshape(-1, *parts[0].shape[1:])
    return np.concatenate(parts)


class _OfGroup:
    """An expert's matrix (outputs, inputs) in the weight1 or weight2 of a grouped product, which is
    stored (inputs, outputs) for all experts."""

    def __init__(self, tensor: Any, experts: int, expert: int, width: int, which: str):
        self._tensor = tensor
        self._expert = expert
        total = math.prod(tensor.shape) // (experts * width)
        self._stored = (experts, width, total) if which == "1" else (experts, total, width)
        self.shape = self._stored[:0:-1]
        self.dtype = tensor.dtype

    def numpy(self) -> np.ndarray:
        return self._tensor.numpy().reshape(self._stored)[self._expert].T


def _rank_file(folder: Path, name: str) -> Path:
    found = sorted(path for path in folder.glob(f"{name}*") if path.is_dir())
    exact = folder / name if (folder / name).is_dir() else next(iter(found), folder / name)
    for file in ("model_optim_rng.pt", "model_rng.pt"):
        if (exact / file).is_file():
            return exact / file
    raise FileNotFoundError(f"{exact / 'model_optim_rng.pt'} is missing; copy the whole folder")


def _tensors(state: dict, chunk: int, chunks: int) -> dict[str, Any]:
    """Return the tensors of a chunk of a stage by megatron-core's names."""
    name = f"model{chunk}" if chunks > 1 or "model" not in state else "model"
    if name not in state:
        raise ValueError(f"a rank file holds {', '.join(map(str, state))}, and not {name}")
    found: dict[str, Any] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, torch_file.Tensor):
            found[renamed(prefix)] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}.{key}" if prefix else str(key), inner)

    collect("", state[name])
    return {key: value for key, value in found.items() if not re.search(UNUSED, key)}
