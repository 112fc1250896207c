"""Tensors that are made from parts on disk when they are asked for, as `source.Stored` has them.

`megatron_ranks` joins the files that each rank wrote (the format `torch`), `megatron_dist` reads
distributed checkpoints (`torch_dist`). Both have the names of megatron-core's local layers.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mtnlg_jax.interop import torch_file
from mtnlg_jax.interop.megatron_settings import EMBEDDING, HEAD, UNUSED

NUMBERS = ("float32", "float16", "bfloat16")


class Joined:
    """Tensors by name, each made from parts by a function of its own."""

    def __init__(self, where: Path):
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._last: tuple[str, np.ndarray] | None = None
        self._makers: dict[str, Callable[[], np.ndarray]] = {}

    def _add(self, name: str, shape: tuple, dtype: str, make: Callable[[], np.ndarray]) -> None:
        if re.search(UNUSED, name):
            return
        if name in self.shapes:
            raise ValueError(f"{self.where} holds {name} twice; it is not one checkpoint")
        if dtype not in NUMBERS:
            raise ValueError(
                f"{name} of {self.where} is {dtype}; parameters here are float32, which holds only "
                f"{', '.join(NUMBERS)} exactly"
            )
        self.shapes[name] = tuple(int(each) for each in shape)
        self.dtypes[name] = dtype
        self._makers[name] = make

    def cut(self, rows: int) -> None:
        """Leave the padding of the vocabulary out: rows of the tables beyond ``rows``."""
        for name in (EMBEDDING, HEAD):
            if name in self.shapes:
                self.shapes[name] = (min(rows, self.shapes[name][0]), *self.shapes[name][1:])

    def __getitem__(self, name: str) -> np.ndarray:
        self._last = None
        return self._makers[name]()[: self.shapes[name][0]]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if self._last is None or self._last[0] != name:
            self._last = name, self[name]
        return self._last[1][start:stop]


def args_of(state: dict, path: Path) -> dict[str, Any]:
    """Return the args of a checkpoint by name."""
    args = state.get("args")
    if args is None:
        raise ValueError(
            f"{path} holds no args, from which the model is known; save it with Megatron-LM's own "
            "training loop"
        )
    return dict(vars(args))


def state_of(path: Path) -> dict:
    """Return what a file holds; numbers stay on disk."""
    state = torch_file.load(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__} instead of a checkpoint")
    return state
