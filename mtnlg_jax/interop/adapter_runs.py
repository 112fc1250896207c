"""A base and an adapter of PEFT's as one run: merged, or as low-rank adaptation of ours.

The base is a folder of Hugging Face's, a GGUF file, or a run.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtnlg_jax.config import Config, ModelConfig, OptimizerConfig, validate
from mtnlg_jax.data.tokenizer import Tokenizer, load_tokenizer
from mtnlg_jax.foreign import ORIGINALS
from mtnlg_jax.interop import vocabulary
from mtnlg_jax.interop.adapter_config import CONFIG, AdapterConfig
from mtnlg_jax.interop.adapters import Adapter, Base, Merged
from mtnlg_jax.interop.export import config_of
from mtnlg_jax.interop.families import FAMILIES, Family, family_of
from mtnlg_jax.interop.interchange import Interchange
from mtnlg_jax.interop.recognize import is_adapter, is_model
from mtnlg_jax.interop.source import Source, meta_of, original_of_model, read_run
from mtnlg_jax.train import adapter_file, lora
from mtnlg_jax.train.adapted_arrays import WithAdapter, stored_arrays
from mtnlg_jax.train.checkpoint import Run, find_run

_TARGETS = tuple("q k v o in gate out".split())


class RunBase:
    """A run as the base of an adapter, by the interface of `source.Source`."""

    def __init__(self, workdir: str | os.PathLike, which: str = "best"):
        self.path = Path(workdir)
        run = find_run(workdir, which, stored_arrays)
        self._stored = run.params
        self.run = dataclasses.replace(run, params=None)
        self.model: ModelConfig = run.config.model
        self.original = original_of(workdir)

    # Adapters of PEFT's need the names of a family. A model may have none.

    @functools.cached_property
    def kind(self) -> str:
        return base_family(self.path, self.model)

    @functools.cached_property
    def family(self) -> Family:
        return FAMILIES[self.kind]

    @functools.cached_property
    def interchange(self) -> Interchange:
        return Interchange(self.model, self.family)

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        return self._stored.read(name, index)

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        yield from self._stored.blocks(name)

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor by its name in the family's table."""
        tensor, index, _ = self.interchange.table[name]
        layer = index[0] if index else None
        parts = [self.read(ours, layer) for ours in tensor.ours]
        if len(index) > 1:
            parts = [part[index[1]] for part in parts]
        return self.interchange.joined(name, parts)

    def origin(self) -> dict[str, Any]:
        return self.run.meta.get("huggingface", {})


def original_of(workdir: str | os.PathLike) -> dict | None:
    """Return the config.json of Hugging Face's of which a run was made; None for a run of ours."""
    return vocabulary.read_json(Path(workdir, ORIGINALS, "config.json"))


def base_family(path: str | os.PathLike, model: ModelConfig) -> str:
    """Return the family in whose names the model at ``path`` is stored, or would be exported.

    A run that was trained from another one has the names of that.
    """
    if is_adapter(path):
        path = base_of(path)
    if is_model(path):
        stored = original_of_model(path)
        return family_of(stored)[0] if stored else config_of(model, None)["model_type"]
    original = original_of(path)
    content = vocabulary.read_json(Path(path, "config.json")) or {}
    init = content.get("train", {}).get("init", "")
    if original is None and init and os.path.exists(init):
        return base_family(init, model)
    return config_of(model, original)["model_type"]


def base_of(adapter: str | os.PathLike, base: str | os.PathLike | None = None) -> str:
    """Return the base of an adapter: ``base``, or the folder that it names.

    Raises ValueError if it names none that is here, or names another model than ``base``.
    """
    named = AdapterConfig(adapter).base
    # As PEFT has it: an absolute path, one from the current folder, or one beside the adapter.
    places = [place for place in (named, os.path.join(adapter, named)) if named and _is_base(place)]
    if base is None:
        if not places:
            raise ValueError(
                f"the base of the adapter {adapter}, {named or 'which it does not name'}, is not a "
                "folder here; give the folder of the base: --workdir=BASE --adapter="
                f"{adapter} (launch/convert.py: --base=BASE)"
            )
        return os.path.normpath(places[0])
    if places and not os.path.samefile(places[0], base) and is_model(places[0]) and is_model(base):
        there = read_run(places[0]).model
        here = read_run(base).model
        if there != here:
            raise ValueError(
                f"the adapter {adapter} is for another base: {named}, and {base} is another model; "
                f"give {named}"
            )
    return os.fspath(base)


def _is_base(path: str | os.PathLike) -> bool:
    return is_model(path) or os.path.isdir(os.path.join(path, "checkpoints"))


def open_base(path: str | os.PathLike, which: str = "best") -> Base:
    """Return a model as the base of an adapter."""
    if is_adapter(path):
        raise ValueError(
            f"{path} is an adapter itself ({CONFIG}); give the folder of its base, or merge it "
            "with launch/convert.py --adapters=merge first"
        )
    return Source(path) if is_model(path) else RunBase(path, which)


def run_of_base(base: Base, tokenizer: str | os.PathLike | None = None) -> Run:
    """Return the run that ``base`` is, without parameters."""
    if isinstance(base, Source):
        settings = base.settings(tokenizer)
        meta = meta_of(settings, base)
        return Run(settings.config, None, settings.tokenizer, 0, meta)
    assert isinstance(base, RunBase)
    return base.run


def open_merged(
    adapter: str | os.PathLike, base: str | os.PathLike | None = None, which: str = "best"
) -> tuple[Run, Merged | WithAdapter]:
    """Return the adapted model as a run without parameters, and where those are read.

    ``adapter`` is a folder of PEFT's, or the file of an adapter of ours.
    """
    if adapter_file.is_adapter_file(adapter):
        assert base is not None, "such a file does not name its base"
        found = open_base(base, which)
        run = run_of_base(found)
        given = adapter_file.load_adapter(base, os.fspath(adapter), base=(run, found))
        return run, WithAdapter(found, given.config, given.factors)
    found = open_base(base_of(adapter, base), which)
    merged = Merged(found, Adapter(adapter, found))
    return run_of_base(found), merged


def read_adapters(
    workdir: str | os.PathLike, names: Sequence[str], which: str = "best"
) -> dict[str, adapter_file.Adapter]:
    """Return adapters of the model at ``workdir`` by name, to decode beside each other.

    Each is the name of one of the run, its file, or a folder of PEFT's. Raises ValueError on what
    does not fit the model, and on what PEFT's hold that only a merged model has.
    """
    found = open_base(workdir, which)
    identity: dict[str, Any] = {}
    adapters = {}
    for name in names:
        path = adapter_file.find(workdir, name)
        if is_adapter(path):
            base_of(path, workdir)
            beside = Beside(Adapter(path, found))
            config = adapter_file.adapter_config(
                found.model, beside.rank, beside.scale * beside.rank, beside.targets
            )
            factors = {full.rpartition(".")[2]: array for full, _, array in beside.parameters()}
            adapters[name] = adapter_file.Adapter(config, factors, {}, {}, path)
            continue
        adapters[name] = adapter_file.read(path, found.model)
        identity = identity or adapter_file.identity_of(run_of_base(found), found)
        adapter_file.check_fits(adapters[name], identity, workdir)
    return adapters


def tokenizers_of(base: Base) -> tuple[Config, tuple[Tokenizer, ...]]:
    """Return (the config of the base, the tokenizers with which data may be prepared)."""
    run = run_of_base(base)
    if isinstance(base, Source):
        return run.config, (run.tokenizer, load_tokenizer(base.folder))
    return run.config, (run.tokenizer,)


# --- beside the base


class Beside:
    """An adapter as low-rank adaptation of ours: one rank and one scale for all matrices.

    A smaller rank is filled up with zeros, and so are matrices and layers that the adapter leaves
    out: factors that are both 0 stay 0 in training. Another scale than the common one is
    multiplied into B. Raises ValueError naming what only a merged model holds.
    """

    def __init__(self, adapter: Adapter):
        self._adapter = adapter
        self._interchange = adapter.interchange
        self._refuse()
        changes = adapter.changes
        shapes = self._interchange.shapes
        self.rank = max(change.rank for change in changes.values())
        scales = [change.scale for change in changes.values()]
        # The most common one, so that most factors stay as they are.
        self.scale = max(set(scales), key=lambda scale: (scales.count(scale), scale))
        # {our matrix: {layer: their tensor}}
        self._places: dict[str, dict[int, str]] = {}
        for name in changes:
            tensor, (layer,), _ = self._interchange.table[name]
            for ours in tensor.ours:
                self._places.setdefault(ours, {})[layer] = name
        self.targets = tuple(
            target for target in _TARGETS if any(_target(name) == target for name in self._places)
        )
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in self._places:
            first, second = lora.factor_names(name.rpartition(".")[2])
            inputs = first.rpartition("_")[2].removesuffix("R")
            layers, *dims = shapes[name]
            split = len(inputs)
            self.shapes[f"lora.blocks.{first}"] = (layers, *dims[:split], self.rank)
            self.shapes[f"lora.blocks.{second}"] = (layers, self.rank, *dims[split:])

    def _refuse(self) -> None:
        adapter = self._adapter
        what = None
        if adapter.whole:
            what = f"{next(iter(adapter.whole))} as a whole (modules_to_save, or bias)"
        elif adapter.config.dora:
            what = "the lengths of DoRA's rows (use_dora)"
        for name, change in adapter.changes.items():
            ours = self._interchange.table[name].tensor.ours
            fits = all(_target(each) in _TARGETS and "_E" not in each for each in ours)
            if change.embedding or not fits:
                what = what or f"factors of {name}"
        if what:
            raise ValueError(
                f"the adapter {adapter.folder} holds {what}, which low-rank adaptation here does "
                "not have; give --adapters=merge"
            )

    def config(self, config: Config, base: str) -> Config:
        """Return the config of a run that trains the adapter further."""
        given = config.optimizer
        optimizer = OptimizerConfig(
            learning_rate=given.learning_rate,
            weight_decay=given.weight_decay,
            lora_rank=self.rank,
            lora_alpha=self.scale * self.rank,
            lora_targets=self.targets,
        )
        train = dataclasses.replace(config.train, init=os.path.abspath(base))
        config = dataclasses.replace(config, optimizer=optimizer, train=train)
        validate(config)
        return config

    def parameters(self) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """Yield (name, None, array) of the factors."""
        for ours, places in self._places.items():
            names = lora.factor_names(ours.rpartition(".")[2])
            made = [np.zeros(self.shapes[f"lora.blocks.{name}"], np.float32) for name in names]
            for layer, theirs in places.items():
                change = self._adapter.changes[theirs]
                first, second = self._adapter.factors(theirs)
                number = self._interchange.table[theirs].tensor.ours.index(ours)
                part = self._interchange.factors(theirs, second)[number]
                # A fused matrix has one A for all of its parts.
                made[0][layer][..., : change.rank] = first.T.reshape(
                    *made[0].shape[1:-1], change.rank
                )
                made[1][layer][: change.rank] = np.float32(change.scale / self.scale) * part
            for name, array in zip(names, made, strict=True):
                yield f"lora.blocks.{name}", None, array


def _target(ours: str) -> str | None:
    return lora.target_of(ours.rpartition(".")[2])
