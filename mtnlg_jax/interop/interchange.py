"""Parameters of ours from tensors of theirs and back, by the table of `families`.

Everything is read layer by layer: a parameter is never held in two forms as a whole.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.interop import tensors
from mtnlg_jax.interop.families import Family
from mtnlg_jax.interop.shards import as_float32
from mtnlg_jax.interop.tensors import Tensor
from mtnlg_jax.model.params import names_of
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel import host
from mtnlg_jax.train import lora

Read = Callable[[str], np.ndarray]
HEAD_BIAS = "b_head_V"


def _nothing(name: str) -> np.ndarray:
    raise AssertionError(f"no tensor is added to a factor, and {name} was asked for")


class Entry(NamedTuple):
    """A tensor of theirs in a model."""

    tensor: Tensor
    at: tuple[int, ...]  # index into our parameters: (), (layer,) or (layer, expert)
    shape: tuple[int, ...]


class Interchange:
    """The tensors of a model in a family's names: ``table`` is {their name: Entry}."""

    def __init__(self, model: ModelConfig, family: Family):
        self.model = model
        self.family = family
        self.abstract = abstract_model(model)[1]
        self.shapes = {name: leaf.shape for name, leaf in names_of(self.abstract).items()}
        self.table: dict[str, Entry] = {}
        self._sources: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}
        for theirs, tensor in family.outer.items():
            self._add(theirs, tensor, ())
        for layer in range(model.num_layers):
            for theirs, tensor in family.block.items():
                if theirs.startswith(family.first_norm) and not model.layer(layer).first_norm:
                    continue
                named = Tensor(
                    **{**vars(tensor), "ours": tuple(f"blocks.{name}" for name in tensor.ours)}
                )
                self._add(family.layers.format(layer) + theirs, named, (layer,))

    def _add(self, theirs: str, tensor: Tensor, index: tuple[int, ...]) -> None:
        if not all(name in self.shapes for name in tensor.ours):
            return  # the switches of this model leave the parameter out
        if "{}" not in theirs:
            self._enter(theirs, tensor, index)
            return
        for expert in range(self.model.moe.num_moe_experts):
            self._enter(theirs.format(expert), tensor, (*index, expert))

    def _enter(self, theirs: str, tensor: Tensor, index: tuple[int, ...]) -> None:
        shapes = [self._shape_of(name, index) for name in tensor.ours]
        rows = sum(self._rows_of(name, index) for name in tensor.ours) + tensor.skip
        if tensors.is_vector(tensor.ours[0]):
            shape = (*shapes[0][:-1], rows)
        else:
            inputs = shapes[0][-1]
            matrix = (inputs, rows) if tensor.columns else (rows, inputs)
            shape = (*shapes[0][:-2], *matrix)
        self.table[theirs] = Entry(tensor, index, shape)
        for number, name in enumerate(tensor.ours):
            self._sources[name, index] = (theirs, number)

    def _shape_of(self, name: str, index: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a part of theirs has: of one layer, with all experts if ``index``
        names none."""
        shape = self.shapes[name][len(index) :]
        if self._has_experts(name, index):
            return (shape[0], *tensors.their_shape(name, shape[1:]))
        return tensors.their_shape(name, shape)

    def _has_experts(self, name: str, index: tuple[int, ...]) -> bool:
        # Vectors of a number for each expert are tensors of their own.
        whole = name.endswith(("b_router_E", "b_balance_E"))
        return tensors.dims_of(name).startswith("E") and len(index) == 1 and not whole

    def copied(self, theirs: str) -> str | None:
        """Return the tensor of the table of which ``theirs`` may be a copy: a tied head of the
        embedding, or the bias of a masked head under its other name."""
        family = self.family
        if theirs in self.table:
            return None
        if theirs == family.head:
            return family.embedding if self.model.tie_embeddings else None
        if theirs == family.head.replace("weight", "bias"):
            names = (
                name for name, entry in self.table.items() if entry.tensor.ours == (HEAD_BIAS,)
            )
            return next(names, None)
        return None

    # --- theirs -> ours

    def parameter(self, name: str, layer: int | None, read: Read) -> np.ndarray:
        """Return a parameter of ours, or one layer of a stacked one: in its stored dtype, which
        float32 holds exactly, or float32 where something is computed."""
        index = () if layer is None else (layer,)
        shape = self.shapes[name][len(index) :]
        if (name, index) in self._sources:
            return self._one(name, index, shape, read)
        if (name, (*index, 0)) in self._sources:
            experts = (self._one(name, (*index, e), shape[1:], read) for e in range(shape[0]))
            first = next(experts)
            array = host.empty(shape, first.dtype)
            host.write(array[0], first)
            for expert, values in enumerate(experts, 1):
                host.write(array[expert], values)
            return array
        # A norm that this layer has no use for.
        return np.ones(shape, np.float32) if "scale" in name else np.zeros(shape, np.float32)

    def _one(self, name: str, index: tuple[int, ...], shape: tuple[int, ...], read: Read):
        theirs, number = self._sources[name, index]
        tensor = self.table[theirs].tensor
        rows = np.asarray(read(theirs))
        if self._has_experts(name, index):
            experts = [
                self._from_rows(tensor, number, name, rows[expert], shape[1:], index, read)
                for expert in range(shape[0])
            ]
            return np.stack(experts)
        return self._from_rows(tensor, number, name, rows, shape, index, read)

    def _from_rows(self, tensor, number, name, rows, shape, index, read) -> np.ndarray:
        if tensor.columns and rows.ndim > 1:
            rows = rows.T
        rows = rows[tensor.skip :]
        if tensor.plus_one:
            rows = as_float32(rows) + np.float32(1)
        if tensor.add is not None:
            rows = as_float32(rows) + as_float32(np.asarray(read(tensor.add)))[:1]
        sizes = [self._rows_of(other, index) for other in tensor.ours]
        part = tensors.part_of(tensor, rows, sizes, number, self.model)
        if tensor.pairs and name.endswith(("w_q_DNH", "w_k_DKH", "b_q_NH", "b_k_KH")):
            part = tensors.turn_pairs(part, self.model, back=False)
        return tensors.to_ours(name, part, shape)

    def _rows_of(self, name: str, index: tuple[int, ...]) -> int:
        shape = self._shape_of(name, index)
        return shape[-1] if tensors.is_vector(name) else shape[-2]

    def parts(self, theirs: str, read: Read) -> list[np.ndarray]:
        """Return our parameters, or layers of them, that ``theirs`` holds."""
        tensor, index, _ = self.table[theirs]
        return [
            self._one(name, index, self.shapes[name][len(index) :], read) for name in tensor.ours
        ]

    def parameters(self, read: Read) -> nnx.State:
        """Return all of our parameters, float32, on this process's first device."""
        arrays = []
        for name, shape in self.shapes.items():
            if not name.startswith("blocks."):
                arrays.append(as_float32(self.parameter(name, None, read)))
                continue
            array = np.empty(shape, np.float32)
            for layer in range(shape[0]):
                array[layer] = self.parameter(name, layer, read)
            arrays.append(array)
        return jax.tree.unflatten(
            jax.tree.structure(self.abstract), [jax.numpy.asarray(array) for array in arrays]
        )

    # --- ours -> theirs

    def tensor(self, theirs: str, arrays: dict, *, gradient: bool = False) -> np.ndarray:
        """Return a tensor of theirs, float32, from our parameters by name, or from gradients."""
        tensor, index, _ = self.table[theirs]
        if self._has_experts(tensor.ours[0], index):
            experts = self.model.moe.num_moe_experts
            parts = [
                self._to_rows(
                    tensor, [np.asarray(arrays[n][index])[e] for n in tensor.ours], gradient
                )
                for e in range(experts)
            ]
            return np.stack(parts)
        layer = [np.asarray(arrays[name][index] if index else arrays[name]) for name in tensor.ours]
        return self._to_rows(tensor, layer, gradient)

    def joined(self, theirs: str, parts: list[np.ndarray]) -> np.ndarray:
        """Undo `parts`, without the rows that are skipped or added."""
        return self._to_rows(self.table[theirs].tensor, parts, gradient=False)

    # --- factors of low rank R, which have R where the matrix has its inputs

    def factors(self, theirs: str, rows: np.ndarray) -> list[np.ndarray]:
        """Return the parts (R, outputs ...) of a factor (outputs, R) of ``theirs``."""
        tensor, index, _ = self.table[theirs]
        tensor = replace(tensor, columns=False)
        made = []
        for number, name in enumerate(tensor.ours):
            shape = self.shapes[name][len(index) :]
            shape = (rows.shape[1], *lora.outputs_of(name, shape))
            made.append(self._from_rows(tensor, number, name, rows, shape, index, _nothing))
        return made

    def joined_factors(self, theirs: str, parts: list[np.ndarray]) -> np.ndarray:
        """Undo `factors`."""
        tensor = replace(self.table[theirs].tensor, columns=False)
        return self._to_rows(tensor, parts, gradient=True)

    def _to_rows(self, tensor: Tensor, layer: list[np.ndarray], gradient: bool) -> np.ndarray:
        parts = []
        for name, array in zip(tensor.ours, layer, strict=True):
            part = tensors.to_theirs(name, array)
            if tensor.pairs and name.endswith(("w_q_DNH", "w_k_DKH", "b_q_NH", "b_k_KH")):
                part = tensors.turn_pairs(part, self.model, back=True)
            parts.append(part)
        rows = tensors.join(tensor, parts, self.model)
        if tensor.plus_one and not gradient:
            rows = rows - np.float32(1)
        if tensor.columns and rows.ndim > 1:
            rows = rows.T
        return np.ascontiguousarray(rows)


# --- what a folder holds


def stored_names(family: Family, stored: Iterable[str]) -> dict[str, str]:
    """Return {name in the family's table: name as stored}. Wrappers for several devices and for
    compiling put prefixes of their own first, and the bare model leaves the family's out."""
    names = {}
    for full in stored:
        bare = re.sub(r"^((module|_orig_mod)\.)+", "", full)
        for old, new in family.renames:
            bare = re.sub(old, new, bare)
        names[bare] = full
    prefix = family.prefix
    if prefix and not any(name.startswith(prefix) for name in names):
        outside = tuple(name for name in family.outer if not name.startswith(prefix))
        names = {n if n.startswith(outside) else prefix + n: full for n, full in names.items()}
    return {name: full for name, full in names.items() if not re.search(family.buffers, name)}


def problems(interchange: Interchange, found: dict[str, tuple[int, ...]]) -> list[str]:
    """Return what is missing, of another shape, or not part of the model among ``found`` (shapes
    by the names of the table)."""
    wanted = {name: entry.shape for name, entry in interchange.table.items()}
    added = {entry.tensor.add for entry in interchange.table.values()} - {None}
    lines = [
        f"{name} is missing (expected {list(shape)})"
        for name, shape in wanted.items()
        if name not in found
    ]
    lines += [f"{name} is missing" for name in added if name not in found]
    for name, shape in found.items():
        copied = interchange.copied(name)
        expected = wanted.get(name) or (wanted[copied] if copied else None)
        if name in added:
            continue
        if expected is None:
            lines.append(f"{name} {list(shape)} is not part of the model")
        elif shape != expected:
            lines.append(f"{name} is {list(shape)} (expected {list(expected)})")
    return sorted(lines)
