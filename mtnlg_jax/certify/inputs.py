"""The inputs of a certificate: text of random words, prepared as a user's is, and parameters away
from where they start."""

# Shapes: B rows, S query positions, E experts

import dataclasses
import json
import math
import os
from typing import Any

import jax
import numpy as np

from mtnlg_jax.certify.models import VOCABULARY
from mtnlg_jax.config import Config, PrefixConfig
from mtnlg_jax.data.batches import Batches
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.model.params import name_of
from mtnlg_jax.parallel.mesh import EXPERT_BIAS, make_mesh
from mtnlg_jax.train.inputs import Data, load_data
from mtnlg_jax.train.state import init_state

_WORDS = 60
_DOCUMENTS = 120
_LETTERS = list("etaoinshrdlu")
# Standard deviation of what is added to each trained parameter, times the root of the width. New
# biases and adapters are 0 and new scales 1, where many a wrong sum has no effect. Of the biases of
# E experts, times 1 / E.
_SHAKE = 0.5


def write_data(folder: str, seed: int, sources: int = 1) -> list[str]:
    """Prepare documents of random words in ``folder``, and return the folders of the tokens of all
    ``sources``, which share a tokenizer."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(_LETTERS, rng.integers(2, 7))) for _ in range(_WORDS)]
    found: list[str] = []
    for number in range(sources):
        # Short documents, so that a row has several.
        texts = [" ".join(rng.choice(words, rng.integers(3, 25))) + "." for _ in range(_DOCUMENTS)]
        path = os.path.join(folder, f"words-{number}.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        prepared = os.path.join(folder, f"data-{number}")
        tokenizer = os.path.join(found[0], "tokenizer") if found else "bpe"
        prepare(
            path,
            prepared,
            vocab_size=VOCABULARY,
            tokenizer=tokenizer,
            heldout=0.0,
            seed=seed,
            progress=False,
        )
        found.append(prepared)
    return found


class _Prefixed:
    """Batches with random images or features ahead of every other row."""

    def __init__(self, batches: Batches, prefix: PrefixConfig):
        self._batches = batches
        self._prefix = prefix
        self.has_answers = batches.has_answers

    def rows(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        rows = self._batches.rows(samples)
        prefix = self._prefix
        # Seeded by the sample, as the tokens are.
        draws = [np.random.default_rng((1, int(sample))) for sample in samples]
        if prefix.image_size:
            found = [rng.integers(0, 256, prefix.shape, np.uint8) for rng in draws]
        else:
            found = [rng.normal(size=prefix.shape).astype(np.float32) for rng in draws]
        prefixed = (np.asarray(samples) % 2 == 0).astype(np.int32)
        # A row with a prefix is one document, of which the prefix is not predicted.
        ahead_BS = prefixed[:, None] > 0
        place_S = np.arange(rows["tokens"].shape[1], dtype=np.int32)[None]
        answers_BS = ~ahead_BS | (place_S >= prefix.positions)
        return rows | {
            "segment_ids": np.where(ahead_BS, 1, rows["segment_ids"]).astype(np.int32),
            "positions": np.where(ahead_BS, place_S, rows["positions"]).astype(np.int32),
            "answers": answers_BS.astype(np.int32),
            "prefix": np.stack(found),
            "prefixed": prefixed,
        }


def open_data(config: Config) -> Data:
    """Open the data of the small ``config`` as a run does."""
    data = load_data(config)
    prefix = config.model.prefix
    if prefix.positions and not config.optimizer.private:
        stages: Any = tuple(_Prefixed(each, prefix) for each in data.stages)
        data = dataclasses.replace(data, stages=stages)
    return data


def parameters_of(config: Config) -> Any:
    """Return the parameters of a run's start as NumPy arrays, each moved by random numbers.

    ``config`` is on one device. Codes of a quantized base stay as they are.
    """
    deviation = np.float32(_SHAKE / math.sqrt(config.model.hidden_size))
    state = init_state(config, make_mesh(config.mesh, jax.devices()[:1]))

    def one(path: Any, leaf: jax.Array) -> np.ndarray:
        name = name_of(path)
        found = np.asarray(leaf)
        if "quantized" in name:
            return found
        # By name and seed, so that no other parameter changes the draw.
        rng = np.random.default_rng([config.train.seed, *name.encode()])
        # Scores of experts are about 1 / E: a bias above them would choose the same for all tokens.
        scale = np.float32(_SHAKE / found.shape[-1]) if name.endswith(EXPERT_BIAS) else deviation
        return found + scale * rng.standard_normal(found.shape, np.float32)

    return jax.tree_util.tree_map_with_path(one, state.params)
