"""Low-rank adapters in files of their own: one safetensors file for each, beside its base model.

A run holds them as RUN/adapters/NAME.safetensors, and deleting that file deletes the adapter. The
tensors are the factors of `lora`, by their names there, stacked over layers. The metadata says
their scale, and which model they change: its settings, its tokenizer and a hash of its weights.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mtnlg_jax import foreign, storage
from mtnlg_jax.config import Config, ModelConfig, OptimizerConfig
from mtnlg_jax.model.params import names_of
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.train import lora
from mtnlg_jax.train.adapted_arrays import stored_arrays
from mtnlg_jax.train.arrays import check_finite
from mtnlg_jax.train.checkpoint import Run, find_run
from mtnlg_jax.train.checkpoint_folder import reader_of
from mtnlg_jax.train.init_from import recorded_meaning
from mtnlg_jax.train.manifest import RECORD

FOLDER = "adapters"
SUFFIX = ".safetensors"
_FORMAT = "mtnlg_jax adapter 1"
_NAME = re.compile(r"\w[\w.-]*")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The low-rank factors of a model, and what they belong to."""

    config: Config  # the model, and the keys of the optimizer that give the factors their meaning
    factors: Mapping[str, np.ndarray]  # by `lora.factor_names`, stacked over layers, float32
    base: Mapping[str, Any]  # `identity_of` the model that they change
    trained: Mapping[str, Any]  # how they were trained; nothing depends on it
    path: str = ""

    @property
    def rank(self) -> int:
        return self.config.optimizer.lora_rank

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.config.optimizer.lora_alpha / self.rank


def adapter_config(model: ModelConfig, rank: int, alpha: float, targets: tuple[str, ...]) -> Config:
    """Return the part of a run's config that adapters of ``model`` need."""
    optimizer = OptimizerConfig(lora_rank=rank, lora_alpha=alpha, lora_targets=targets)
    return Config(model=model, optimizer=optimizer)


# --- names


def is_adapter_file(path: str | os.PathLike) -> bool:
    """Return whether ``path`` is a file that `write` may have written."""
    return os.fspath(path).endswith(SUFFIX) and os.path.isfile(path)


def check_name(name: str) -> None:
    """Raise ValueError if an adapter cannot have this name."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--adapter={name} is not a name; use letters, digits, dots, dashes and underscores"
        )


def path_of(workdir: str | os.PathLike, name: str) -> str:
    """Return where the run in ``workdir`` holds the adapter ``name``."""
    return storage.join(workdir, FOLDER, name + SUFFIX)


def find(workdir: str | os.PathLike, adapter: str) -> str:
    """Return the path of an adapter: that of a file or a folder as it is, or of a name in a run.

    Raises FileNotFoundError that lists the names in the run, and ValueError on a file of another
    kind.
    """
    named = path_of(workdir, adapter)
    if os.path.isfile(named):
        return named
    if os.path.isfile(adapter) and not adapter.endswith(SUFFIX):
        raise ValueError(
            f"{adapter} is no adapter's file, whose name ends with {SUFFIX}; give one of "
            "launch/adapt.py, or the folder that PEFT has saved"
        )
    if os.path.exists(adapter):
        return adapter
    folder = Path(workdir, FOLDER)
    names = sorted(path.stem for path in folder.glob("*" + SUFFIX)) if folder.is_dir() else []
    known = f"it has {', '.join(names)}" if names else "it has none"
    raise FileNotFoundError(
        f"{workdir} has no adapter {adapter!r}: {known}; train one with launch/adapt.py, or give "
        "the path of an adapter's file, or of a folder that PEFT has saved"
    )


# --- the base


def open_base(workdir: str | os.PathLike, which: str = "best") -> tuple[Run, Any]:
    """Return (a model as a run without parameters, where they are read one at a time)."""
    reader = reader_of(workdir, which)
    if reader is not None:
        return reader.open(workdir)
    run = find_run(workdir, which, stored_arrays)
    return dataclasses.replace(run, params=None), run.params


def identity_of(run: Run, stored: Any) -> dict[str, Any]:
    """Return what an adapter records of its base.

    The hash is that of the first and the last layer and of all arrays outside the layers other
    than tables, in float32: every kind of training changes one of them.
    """
    model = run.config.model
    digest = hashlib.sha256()
    last = model.num_layers - 1
    for name, leaf in sorted(names_of(abstract_model(model)[1]).items()):
        layers: list[int | None] = [None]
        if name.startswith("blocks."):
            layers = [*dict.fromkeys([0, last])]
        elif len(leaf.shape) > 1:
            continue
        for layer in layers:
            values = np.ascontiguousarray(np.asarray(stored.read(name, layer), np.float32))
            digest.update(f"{name} {layer} {values.shape}".encode())
            digest.update(values.tobytes())
    return {
        "model": json.loads(json.dumps(recorded_meaning(model))),
        "tokenizer": run.tokenizer.fingerprint,
        "weights": digest.hexdigest(),
        "step": run.step,
    }


def weights_of(workdir: str | os.PathLike, which: str, step: int) -> str:
    """Return digits that tell the weights of a model that was loaded, as ``step``, from others.

    They stand for the record of a run's checkpoint, which has the hash of every file, and for
    whether its averages were loaded; elsewhere for the weights of `identity_of`, with what an
    adapter changes.
    """
    if foreign.reader_of(workdir) is None:
        record = epath.Path(workdir) / "checkpoints" / str(step) / RECORD
        averages = b"ema" if which == "ema" else b""
        return hashlib.sha256(record.read_bytes() + averages).hexdigest()[:16]
    return identity_of(*open_base(workdir, which))["weights"][:16]


def check_fits(adapter: Adapter, identity: Mapping[str, Any], workdir: str | os.PathLike) -> None:
    """Raise ValueError that names what differs if ``adapter`` was not trained on this model."""
    theirs = adapter.base["model"]
    ours = identity["model"]
    what = None
    for key in dict.fromkeys([*theirs, *ours]):
        if theirs.get(key) != ours.get(key):
            what = f"model.{key} is {_shown(theirs, key)} there and {_shown(ours, key)} here"
            break
    else:
        if adapter.base["tokenizer"] != identity["tokenizer"]:
            what = (
                f"its tokenizer is {adapter.base['tokenizer'][:12]} there and "
                f"{identity['tokenizer'][:12]} here"
            )
        elif adapter.base["weights"] != identity["weights"]:
            what = (
                f"the weights differ (checkpoint of step {adapter.base['step']} there, of step "
                f"{identity['step']} here)"
            )
    if what:
        raise ValueError(
            f"the adapter {adapter.path} is of another model than {workdir}: {what}; give the "
            "model that it was trained on, or train it again with launch/adapt.py"
        )


def _shown(settings: Mapping[str, Any], key: str) -> Any:
    return settings.get(key, "the default")


def load_adapter(
    workdir: str | os.PathLike, adapter: str, which: str = "best", base: Any = None
) -> Adapter:
    """Return an adapter of the model at ``workdir`` by its name or the path of its file.

    ``base`` is `open_base` of the model if it is open already. Raises ValueError if the adapter
    is of another model or damaged.
    """
    run, stored = base or open_base(workdir, which)
    found = read(find(workdir, adapter), run.config.model)
    check_fits(found, identity_of(run, stored), workdir)
    return found


# --- the file


def write(path: str, adapter: Adapter) -> None:
    """Write the file at ``path`` as a whole or not at all."""
    optimizer = adapter.config.optimizer
    metadata = {
        "format": _FORMAT,
        "rank": json.dumps(optimizer.lora_rank),
        "alpha": json.dumps(optimizer.lora_alpha),
        "targets": json.dumps(optimizer.lora_targets),
        "base": json.dumps(adapter.base),
        "trained": json.dumps(adapter.trained, ensure_ascii=False),
    }
    factors = {name: np.ascontiguousarray(each) for name, each in adapter.factors.items()}
    storage.write_file(*os.path.split(path), save(factors, metadata))


def read(path: str | os.PathLike, model: ModelConfig) -> Adapter:
    """Read the file of an adapter, for ``model``.

    Raises ValueError if it is damaged or not such a file. Whether it belongs to the model is for
    `check_fits`; a model of other shapes is refused by it with its settings.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} is not the file of an adapter; give one that launch/adapt.py has written"
        )
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            factors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error}); copy it again"
        ) from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not an adapter of launch/adapt.py (its format is "
            f"{metadata.get('format')!r}, and {_FORMAT!r} is read here)"
        )
    given = {key: json.loads(metadata[key]) for key in ("rank", "alpha", "base", "trained")}
    targets = tuple(json.loads(metadata["targets"]))
    config = adapter_config(model, given["rank"], given["alpha"], targets)
    adapter = Adapter(config, factors, given["base"], given["trained"], path)
    # Factors of other shapes belong to another model, whose settings say more than the shapes do.
    if given["base"]["model"] == json.loads(json.dumps(recorded_meaning(model))):
        _check_factors(adapter)
    return adapter


def _check_factors(adapter: Adapter) -> None:
    wanted = {n: leaf.shape for n, leaf in lora.abstract_adapters(adapter.config)["blocks"].items()}
    found = {name: factor.shape for name, factor in adapter.factors.items()}
    if found != wanted:
        name = next(n for n in sorted({*wanted, *found}) if found.get(n) != wanted.get(n))
        raise ValueError(
            f"{adapter.path} is damaged: {name} is {found.get(name)} and must be "
            f"{wanted.get(name)}; copy it again, or train it again with launch/adapt.py"
        )
    for name, factor in adapter.factors.items():
        check_finite(factor, name, adapter.path)
