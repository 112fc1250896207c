"""PEFT's low-rank adapters, in: the factors of an adapter, and a model with them merged.

A tensor W of theirs (outputs, inputs) becomes W + scale B A, or with DoRA (Liu 2024, arXiv
2402.09353) each row of that sum is scaled to a stored length. The table of the family says which of
our parameters W holds, so fused and permuted matrices need no rule of their own here.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.interop.adapter_config import CONFIG, TENSORS, AdapterConfig
from mtnlg_jax.interop.families import Family
from mtnlg_jax.interop.interchange import Interchange, stored_names
from mtnlg_jax.interop.shards import DTYPES, finite, open_safetensors

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B)\.weight")
_EMBEDDED = re.compile(r"(.+)\.lora_embedding_(A|B)")
_LENGTHS = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")
_WHOLE = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save)?\.(weight|bias)")


class Base(Protocol):
    """A model that an adapter changes: `source.Source`, or `adapter_runs.RunBase`."""

    path: Path
    model: ModelConfig

    @property
    def family(self) -> Family: ...

    @property
    def interchange(self) -> Interchange: ...

    def tensor(self, name: str) -> np.ndarray: ...

    def read(self, name: str, index: int | None = None) -> np.ndarray: ...

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]: ...

    def origin(self) -> dict[str, Any]: ...


class Change(NamedTuple):
    """Where the file has the factors of a tensor. An embedding (V, D) has A (R, V), B (D, R)."""

    first: str  # A
    second: str  # B
    scale: float
    rank: int
    lengths: str | None = None  # of DoRA's rows
    embedding: bool = False


class Adapter:
    """The adapter in ``folder`` for the model of ``interchange``.

    ``changes`` are the low-rank ones by the name of the table, and ``whole`` {name of the table:
    name in the file} the tensors that the adapter holds as a whole. From headers alone, raises
    ValueError or FileNotFoundError if something is missing, of another shape, not part of the
    model, or not supported.
    """

    def __init__(self, folder: str | os.PathLike, base: Base):
        self.folder = Path(folder)
        self.config = AdapterConfig(folder)
        self.interchange = base.interchange
        self.family = base.family
        self._base = base
        self._file, self._shapes = _open(self.folder)
        self.changes: dict[str, Change] = {}
        self.whole: dict[str, str] = {}
        self._read_names()
        self._refuse_other_modules()
        self._refuse_tied()

    # --- what the file holds

    def _read_names(self) -> None:
        found: dict[str, dict[str, str]] = {}
        for full in self._shapes:
            # What modules_to_save has replaced, saved along with bias=all.
            if ".original_module." in full:
                continue
            name = full.removeprefix(_PREFIX)
            for pattern in (_FACTOR, _EMBEDDED, _LENGTHS, _WHOLE):
                match = pattern.fullmatch(name) if name != full else None
                if match:
                    break
            else:
                raise self._wrong(
                    f"{full} is not understood, and may change the model; save the adapter again "
                    "with a current PEFT"
                )
            # Factors and lengths belong to the weight of their module.
            tensor = f"{match[1]}.{match[2]}" if pattern is _WHOLE else f"{match[1]}.weight"
            if pattern is _LENGTHS:
                found.setdefault(tensor, {})["lengths"] = full
            else:
                kind = "whole" if pattern is _WHOLE else match[2].removeprefix("lora_")
                found.setdefault(tensor, {})[kind] = full
                if pattern is _EMBEDDED:
                    found[tensor]["embedding"] = full
        if not any("A" in parts or "B" in parts for parts in found.values()):
            raise self._wrong("it holds no lora_A and lora_B; give an adapter that PEFT has saved")
        names = stored_names(self.family, found)
        # PEFT names modules as the class does, the bare one without the family's prefix.
        prefix = self.family.prefix
        self._bare = not any(name.startswith(prefix) for name in found)
        modules = {name: full.rpartition(".")[0] for name, full in names.items()}
        for name, full in names.items():
            parts = found[full]
            if name not in self.interchange.table and not self.interchange.copied(name):
                raise self._wrong(
                    f"it changes {full}, which is not part of the model at {self._base.path}; "
                    "give the base that the adapter was trained on"
                )
            if "whole" in parts:
                self._add_whole(name, full, parts["whole"], "A" in parts)
            if parts.keys() & {"A", "B", "lengths"}:
                self._add_change(name, modules[name], parts)

    def _add_whole(self, name: str, full: str, stored: str, adapted: bool) -> None:
        entry = self.interchange.table.get(self.interchange.copied(name) or name)
        assert entry is not None
        if self._shapes[stored] != entry.shape:
            raise self._other_base(stored, self._shapes[stored], entry.shape)
        # PEFT saves tables beside the factors of their own.
        self.whole[name] = stored

    def _add_change(self, name: str, module: str, parts: dict[str, str]) -> None:
        for kind in "AB":
            if kind not in parts:
                other = parts.get("B" if kind == "A" else "A", parts.get("lengths", ""))
                raise self._wrong(
                    f"lora_{kind} of {module} is missing, and {other} is there; copy the adapter "
                    "again"
                )
        if self.config.dora != ("lengths" in parts):
            raise self._wrong(
                f"use_dora={self.config.dora} of {CONFIG} and the "
                f"{'missing' if self.config.dora else 'stored'} lora_magnitude_vector of {module} "
                "disagree; copy both files again"
            )
        entry = self.interchange.table.get(name)
        if entry is None or len(entry.shape) != 2:
            raise self._wrong(
                f"it changes {module}, which is a copy of another tensor or not a matrix in this "
                "model; merge it with PEFT's merge_and_unload"
            )
        rank = self.config.rank(module)
        shape = entry.shape[::-1] if entry.tensor.columns else entry.shape
        embedding = "embedding" in parts
        if embedding:
            shape = shape[::-1]
        for kind, wanted in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
            if self._shapes[parts[kind]] != wanted:
                raise self._other_base(parts[kind], self._shapes[parts[kind]], wanted)
        if "lengths" in parts and (embedding or self._shapes[parts["lengths"]] != shape[:1]):
            raise self._other_base(parts["lengths"], self._shapes[parts["lengths"]], shape[:1])
        scale = self.config.scale(module)
        self.changes[name] = Change(
            parts["A"], parts["B"], scale, rank, parts.get("lengths"), embedding
        )

    def _refuse_other_modules(self) -> None:
        """Check that the file holds what target_modules names, and nothing else."""
        for name, entry in self.interchange.table.items():
            if not name.endswith(".weight") or len(entry.shape) != 2:
                continue
            module = name.removesuffix(".weight")
            embedding = entry.tensor.ours[0].endswith(("VD", "PD"))
            head = name == self.family.head
            if self._bare:
                module = module.removeprefix(self.family.prefix)
            wanted = self.config.changes(module, linear=not embedding or head, head=head)
            if wanted is None or wanted == (name in self.changes):
                continue
            raise self._wrong(
                f"lora_A and lora_B of {module} are missing, and target_modules names it; copy the "
                "adapter again, and give the base that it was trained on"
                if wanted
                else f"it has factors of {module}, which target_modules, exclude_modules or "
                f"layers_to_transform of {CONFIG} leave out; copy both files again"
            )

    def _refuse_tied(self) -> None:
        if not self.interchange.model.tie_embeddings:
            return
        for name in (self.family.embedding, self.family.head):
            stored = self.whole.get(name) or name in self.changes
            if not stored:
                continue
            # A table that the adapter only stores along is the base's.
            if name not in self.changes and np.array_equal(
                self._tensor(self.whole[name]),
                np.asarray(self._base.tensor(self.family.embedding), np.float32),
            ):
                del self.whole[name]
                continue
            raise self._wrong(
                f"it changes {name}, and the model ties its output embedding to the input "
                "embedding, which the adapter changes apart; merge it with PEFT's "
                "merge_and_unload, and save that model with tie_word_embeddings=false"
            )

    def _other_base(self, name: str, found: tuple, wanted: tuple) -> ValueError:
        trained = f" ({self.config.base})" if self.config.base else ""
        return self._wrong(
            f"{name} is {list(found)}, and for {self._base.path} with {CONFIG} it must be "
            f"{list(wanted)}; give the base that the adapter was trained on{trained}"
        )

    def _wrong(self, problem: str) -> ValueError:
        return ValueError(f"the adapter {self.folder} does not fit: {problem}")

    # --- numbers

    def _tensor(self, stored: str) -> np.ndarray:
        what = f"{stored} of {self.folder}"
        return finite(what, self._file.get_tensor(stored)).astype(np.float32)

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (A (R, inputs), B (outputs, R)) of tensor ``name``, float32."""
        change = self.changes[name]
        return self._tensor(change.first), self._tensor(change.second)

    def merged(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return tensor ``name`` of the base with this adapter, float32."""
        if name in self.whole:
            values = self._tensor(self.whole[name])
        change = self.changes.get(name)
        values = np.asarray(values).astype(np.float32)
        if change is None:
            return values
        first, second = self.factors(name)
        delta = np.float32(change.scale) * (second @ first)
        columns = self.interchange.table[name].tensor.columns
        turned = columns != change.embedding
        values = values + (delta.T if turned else delta)
        if change.lengths is None:
            return values
        rows = values.T if columns else values
        rows = rows * (self._tensor(change.lengths) / np.linalg.norm(rows, axis=1))[:, None]
        return rows.T if columns else rows


class Merged:
    """``base`` with ``adapter`` merged, by the interface of `source.Source`: a tensor is changed
    when it is read."""

    def __init__(self, base: Base, adapter: Adapter):
        self.adapter = adapter
        self.base = base
        self.path = base.path
        self.model = base.model
        self.family = base.family
        self.interchange = base.interchange
        self._last: tuple[str, np.ndarray] | None = None
        changed = adapter.changes.keys() | adapter.whole.keys()
        # (parameter, layer) of ours that differ from the base's.
        self._changed = {
            (ours, entry.at[0] if entry.at else None)
            for name, entry in self.interchange.table.items()
            if name in changed
            for ours in entry.tensor.ours
        }

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor by its name in the family's table. The last one is kept."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self.adapter.merged(name, self.base.tensor(name))
        return self._last[1]

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """Return parameter ``name`` or layer ``index`` of it, as `Interchange.parameter` does."""
        if (name, index) in self._changed:
            return self.interchange.parameter(name, index, self.tensor)
        return self.base.read(name, index)

    def in_file_order(self, wanted: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
        """Return (name, layer) of parameters in the order in which the base's files hold them."""
        if hasattr(self.base, "in_file_order"):
            return self.base.in_file_order(wanted)
        return wanted

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) of a table."""
        if (name, None) in self._changed:
            yield 0, self.read(name)
        else:
            yield from self.base.blocks(name)

    def origin(self) -> dict[str, Any]:
        """Return what conversion back needs: types of the base, whose bits are changed."""
        return self.base.origin()


def _open(folder: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    path = folder / TENSORS
    if not path.is_file():
        other = folder / "adapter_model.bin"
        found = f" but {other.name}: save it again with a current PEFT" if other.is_file() else ""
        raise FileNotFoundError(f"{folder} holds no {TENSORS}{found or '; copy the whole folder'}")
    file = open_safetensors(path)
    shapes = {}
    for name in file.keys():
        header = file.get_slice(name)
        if header.get_dtype() not in DTYPES:
            raise ValueError(
                f"{name} in {path} is {header.get_dtype()}; factors here are float32, which holds "
                f"only {', '.join(DTYPES)} exactly; save it as one of them"
            )
        shapes[name] = tuple(header.get_shape())
    return file, shapes
