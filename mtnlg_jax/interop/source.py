"""A model of another project as it is stored: a folder of Hugging Face's, a GGUF file, or a
checkpoint of Megatron-LM or MaxText.

Parameters of ours are read one layer at a time, so a model is converted, decoded and trained
without ever being in memory twice.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mtnlg_jax.config import (
    Config,
    DecodeConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
    to_json,
    validate,
)
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.foreign import folder_of, is_gguf
from mtnlg_jax.interop import vocabulary
from mtnlg_jax.interop.families import FAMILIES, family_of, model_of
from mtnlg_jax.interop.generation import decode_of
from mtnlg_jax.interop.gguf_file import GGUF
from mtnlg_jax.interop.interchange import Interchange, problems, stored_names
from mtnlg_jax.interop.maxtext_file import MaxText
from mtnlg_jax.interop.megatron_file import Megatron
from mtnlg_jax.interop.recognize import is_megatron, maxtext_items
from mtnlg_jax.interop.shards import Shards, as_float32, finite

ROWS_AT_ONCE = 4096  # of a table


class Stored(Protocol):
    """Tensors by their stored names."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def __getitem__(self, name: str) -> np.ndarray: ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray: ...


class Settings(NamedTuple):
    """What a folder says beside its tensors."""

    config: Config
    tokenizer: Tokenizer
    left_out: list[str]  # special tokens without a row
    not_kept: list[str]  # settings of generation without a counterpart


def read_config(path: str | os.PathLike) -> dict:
    """Return the config.json of a model. Raises FileNotFoundError if it is missing."""
    path = Path(path)
    found = vocabulary.read_json(path / "config.json")
    if found is None:
        raise FileNotFoundError(f"{path / 'config.json'} is missing; copy the whole folder")
    return found


class Source:
    """The model at ``path``: its config, and its tensors as parameters of ours.

    Args:
      tokenizer: path of the tokenizer of a checkpoint of Megatron-LM, which decides how many rows
        of the vocabulary are padding.

    Raises ValueError or FileNotFoundError, from headers alone, if something is missing, unknown, of
    another shape, or not supported.
    """

    def __init__(self, path: str | os.PathLike, tokenizer: str | os.PathLike | None = None):
        self.path = Path(path if is_gguf(path) else folder_of(path))
        # A tokenizer beside a GGUF file is used instead of the one inside.
        self.folder = self.path.parent if is_gguf(path) else self.path
        self.tokenizer_path = self.folder
        self.returns = False  # whether conversion back gives this format
        self.stored: Stored
        self._megatron: Megatron | None = None
        self.left_optimizer = False
        self.original: dict = {}
        inner: dict = {}
        if is_gguf(path):
            file = GGUF(path)
            self.original = inner = file.config
            self.family = file.family()
            self.kind = file.kind
            self.stored = file
            beside = any((self.folder / name).is_file() for name in vocabulary.FILES)
            if file.has_tokenizer and not beside:
                self.tokenizer_path = self.path
            self.model: ModelConfig = model_of(self.original)
        elif is_megatron(path):
            self._megatron = Megatron(path, tokenizer)
            self.family = self._megatron.family
            self.kind = "model of Megatron-LM"
            self.left_optimizer = True
            self.stored = self._megatron.stored
            self.model = self._megatron.model
        elif maxtext_items(path) is not None:
            found = MaxText(path)
            self.family = found.family
            self.kind = "model of MaxText"
            self.left_optimizer = True
            self.stored = found.stored
            self.model = found.model
        else:
            self.returns = True
            self.original = read_config(self.folder)
            self.kind, inner = family_of(self.original)
            self.family = FAMILIES[self.kind]
            self.stored = Shards(self.folder, self.family.buffers)
            self.model = model_of(self.original)
        # Names of tokens and settings of generation may be outside the text model's config.
        self.texts = self.original | {key: each for key, each in inner.items() if each is not None}
        self.interchange = Interchange(self.model, self.family)
        stored = self.stored
        self.names = stored_names(self.family, stored.shapes)
        self.dtypes = {name: stored.dtypes[full] for name, full in self.names.items()}
        kept = set(self.names.values())
        self.left_out = sorted(name for name in stored.shapes if name not in kept)
        named = any(self.family.prefix in name for name in stored.shapes)
        self.prefix = self.family.prefix if named else ""
        # A tied model may store only its output embedding, which is also the input embedding.
        embedding = self.family.embedding
        if self.model.tie_embeddings and embedding not in self.names:
            if self.family.head in self.names:
                self.names[embedding] = self.names[self.family.head]
        self._refuse_other_tensors()
        self._compare_copies()
        self._last: tuple[str, np.ndarray] | None = None

    def _refuse_other_tensors(self) -> None:
        found = {name: self.stored.shapes[full] for name, full in self.names.items()}
        lines = problems(self.interchange, found)
        if lines:
            more = f" and {len(lines) - 6} more" if len(lines) > 6 else ""
            raise ValueError(
                f"the tensors of {self.path} are not those of its config, a {self.kind}: "
                f"{'; '.join(lines[:6])}{more}; correct one of the two"
            )

    def _compare_copies(self) -> None:
        """Check that a tied head that is written out equals the embedding."""
        for name, full in self.names.items():
            original = self.interchange.copied(name)
            if original is None or self.names[original] == full:
                continue
            rows = self.stored.shapes[full][0]
            for start in range(0, rows, ROWS_AT_ONCE):
                stop = start + ROWS_AT_ONCE
                here = self.stored.rows(full, start, stop)
                there = self.stored.rows(self.names[original], start, stop)
                if not np.array_equal(here, there):
                    raise ValueError(
                        f"{name} of {self.path} differs from {original}, and "
                        f"tie_word_embeddings is true; set that to false to use both, or remove "
                        f"{name}"
                    )

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor by its name in the family's table. Raises ValueError that names it if a
        value is not finite. The last one is kept: it may hold several parameters."""
        if self._last is None or self._last[0] != name:
            self._last = None  # frees it before the next one is read
            full = self.names[name]
            self._last = name, finite(f"{full} of {self.path}", self.stored[full])
        return self._last[1]

    def origin(self) -> dict[str, Any]:
        """Return what conversion back needs."""
        if not self.returns:
            return {}
        return {"family": self.kind, "dtypes": self.dtypes, "prefix": self.prefix}

    # --- parameters of ours, by the interface of `train.arrays.StoredArrays`

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """Return parameter ``name`` or layer ``index`` of it, as `Interchange.parameter` does."""
        return self.interchange.parameter(name, index, self.tensor)

    def in_file_order(self, wanted: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
        """Return (name, layer) of parameters in the order in which the files hold them, so that
        each file is read once and from its start to its end."""
        stored = self.stored
        if not isinstance(stored, Shards):
            return wanted
        places = {
            (ours, entry.at[0] if entry.at else None): stored.position(self.names[name])
            for name, entry in reversed(self.interchange.table.items())
            for ours in entry.tensor.ours
        }
        nowhere = ("", 0)  # parameters that no tensor holds
        return sorted(wanted, key=lambda each: places.get(each, nowhere))

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) of a table."""
        theirs = {entry.tensor.ours: key for key, entry in self.interchange.table.items()}[(name,)]
        tensor = self.interchange.table[theirs].tensor
        if tensor.skip or tensor.columns or tensor.add is not None:
            yield 0, self.read(name)
            return
        full = self.names[theirs]
        for start in range(0, self.stored.shapes[full][0], ROWS_AT_ONCE):
            rows = self.stored.rows(full, start, start + ROWS_AT_ONCE)
            yield start, finite(f"{full} of {self.path}", rows)

    def parameters(self) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """Yield (name, layer, array) of all parameters, layer by layer, as shards hold them."""
        yield from parameters_of(self.interchange, self)

    def inexact(self) -> dict[str, np.ndarray]:
        """Return the tensors that our parameters do not give back bit for bit: those to which
        something is added, and those with rows that are never used. They are small."""
        found = {}
        for name, (tensor, _, _) in self.interchange.table.items():
            if tensor.add is not None:
                found[tensor.add] = self.tensor(tensor.add)
            if not (tensor.plus_one or tensor.skip or tensor.add):
                continue
            parts = self.interchange.parts(name, self.tensor)
            back = self.interchange.joined(name, parts)
            values = self.tensor(name)
            if back.astype(values.dtype).tobytes() != values.tobytes():
                found[name] = values
        return found

    # --- what lies beside the tensors

    def settings(self, tokenizer_path: str | os.PathLike | None = None) -> Settings:
        """Return the config of a run with this model, and its tokenizer."""
        generation = vocabulary.read_json(self.folder / "generation_config.json")
        rows = self.model.vocabulary
        if self._megatron is not None:
            tokenizer, left_out = self._megatron.tokenizer(self.texts, generation or {}, rows)
        else:
            tokenizer, left_out = vocabulary.read_tokenizer(
                tokenizer_path or self.tokenizer_path, self.texts, generation or {}, rows
            )
        # In older folders config.json has the settings of generation_config.json.
        decode, not_kept = decode_of(
            self.texts if generation is None else generation,
            tokenizer,
            rows,
            whole=generation is not None,
        )
        run = run_of(self.path, self.model, self.family.masked)
        config = dataclasses.replace(run, decode=decode)
        validate(config)
        return Settings(config, tokenizer, left_out, not_kept)

    def files(self) -> list[str]:
        """Return the names of the files that a run keeps for the way back."""
        names = ("config.json", "generation_config.json", *vocabulary.FILES)
        found = [name for name in names if (self.folder / name).is_file()]
        return [name for name in found if name != "config.json" or self.returns]


def parameters_of(
    interchange: Interchange, stored: Any
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Yield (name, layer, array) of all parameters, layer by layer, as shards hold them. ``stored``
    reads them like `train.arrays.StoredArrays`."""
    shapes = interchange.shapes
    for name in shapes:
        if not name.startswith("blocks."):
            yield name, None, as_float32(stored.read(name))
    for layer in range(interchange.model.num_layers):
        for name in shapes:
            if name.startswith("blocks."):
                yield name, layer, as_float32(stored.read(name, layer))


def run_of(path: Path, model: ModelConfig, masked: bool) -> Config:
    """Return the config of a run with ``model``."""
    config = Config(
        name=path.resolve().name,
        model=model,
        # Usual values for further training.
        optimizer=OptimizerConfig(learning_rate=5e-5, weight_decay=0.01),
    )
    if masked:
        stages = (StageConfig(name="masked", masked=1.0),)
        config = dataclasses.replace(config, train=TrainConfig(stages=stages))
    return config


def read_run(path: str | os.PathLike) -> Config:
    """Return the config of a run with the model at ``path``, without reading its tensors."""
    path = Path(path if is_gguf(path) else folder_of(path))
    original = original_of_model(path)
    if original:
        return run_of(path, model_of(original), FAMILIES[family_of(original)[0]].masked)
    model = Megatron(path).model if is_megatron(path) else MaxText(path).model
    return run_of(path, model, masked=False)


def original_of_model(path: str | os.PathLike) -> dict:
    """Return the config.json of a model, which a GGUF file has in its header. Models of other
    trainers have none: {}."""
    if is_megatron(path) or maxtext_items(path) is not None:
        return {}
    return GGUF(path).config if is_gguf(path) else read_config(Path(folder_of(path)))


def changed_decoding(decode: DecodeConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults."""
    names = [each.name for each in dataclasses.fields(DecodeConfig)]
    values = {name: getattr(decode, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(DecodeConfig, name)}


def meta_of(settings: Settings, source: Source) -> dict[str, Any]:
    """Return the meta of a checkpoint that is this model."""
    from mtnlg_jax.train.init_from import recorded_meaning

    return {
        "config": json.loads(to_json(settings.config)),
        "samples": 0,
        "metrics": {},
        "huggingface": source.origin(),
        "identity": {
            "model": json.loads(json.dumps(recorded_meaning(source.model))),
            "tokenizer": {"sha256": settings.tokenizer.fingerprint},
        },
    }
