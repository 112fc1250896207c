"""Read the parameters of a run with low-rank adapters, or of a model and an adapter, as those of
the merged model, a layer at a time: neither its matrices nor a quantized base are ever held in
float32 as a whole."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from mtnlg_jax.config import Config
from mtnlg_jax.train import lora, quantized_base
from mtnlg_jax.train.arrays import StoredArrays


def stored_arrays(path: epath.Path, config: Config) -> "StoredArrays | AdaptedArrays":
    """Return the parameters at ``path`` of a run with ``config``, adapters merged."""
    stored = StoredArrays(path)
    return AdaptedArrays(stored, config) if lora.used(config) else stored


class AdaptedArrays:
    """The merged parameters, by the interface of `StoredArrays`."""

    def __init__(self, stored: StoredArrays, config: Config) -> None:
        self._stored = stored
        self._config = config
        self._quantized = quantized_base.used(config)
        # They are small, and each is needed for every layer of its matrix.
        self._factors = {
            name: stored.read(f"lora.blocks.{name}")
            for name in lora.abstract_adapters(config)["blocks"]
        }

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """Return parameter ``name``, or layer ``index`` of it, float32."""
        if not name.startswith("blocks."):
            return self._stored.read(name, index)
        if index is None:
            layers = self._config.model.num_layers
            return np.stack([self.read(name, layer) for layer in range(layers)])
        last = name.rpartition(".")[2]
        matrix = self._matrix(name, last, index)
        if lora.target_of(last) is None or lora.factor_names(last)[0] not in self._factors:
            return np.asarray(matrix)
        factors = {
            each: jnp.asarray(self._factors[each][index]) for each in lora.factor_names(last)
        }
        return np.asarray(lora.adapt(self._config, last, jnp.asarray(matrix), factors))

    def _matrix(self, name: str, last: str, index: int) -> Any:
        if not (self._quantized and quantized_base.is_quantized(last)):
            return self._stored.read(name, index)
        base = self._config.optimizer.lora_base
        codes, scales = (
            jnp.asarray(self._stored.read(f"{quantized_base.KEY}.blocks.{part}", index))
            for part in quantized_base.names_of(last, base)
        )
        head = self._config.model.head_width
        return quantized_base.dequantize(last, codes, scales, base, False, head)

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) of a table, which no adapter changes."""
        return self._stored.blocks(name)


class WithAdapter:
    """A model with an adapter merged as it is read, by the interface of `StoredArrays`.

    ``config`` has the model and the settings of the adapter, and ``factors`` are its arrays.
    """

    def __init__(self, base: Any, config: Config, factors: Mapping[str, np.ndarray]) -> None:
        self.base = base
        self._config = config
        self._factors = factors

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """Return parameter ``name``, or layer ``index`` of it; float32 where it is adapted."""
        values = self.base.read(name, index)
        last = name.rpartition(".")[2]
        if not name.startswith("blocks.") or lora.target_of(last) is None:
            return values
        names = lora.factor_names(last)
        if names[0] not in self._factors:
            return values
        at = slice(None) if index is None else index
        factors = {each: jnp.asarray(self._factors[each][at]) for each in names}
        matrix = jnp.asarray(values, jnp.float32)
        stacked = "L" if index is None else ""
        return np.asarray(lora.adapt(self._config, last, matrix, factors, stacked))

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) of a table, which no adapter changes."""
        return self.base.blocks(name)

    def in_file_order(self, wanted: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
        """Return (name, layer) of parameters in the order in which the base's files hold them."""
        if hasattr(self.base, "in_file_order"):
            return self.base.in_file_order(wanted)
        return wanted
