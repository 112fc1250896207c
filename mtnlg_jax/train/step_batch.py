"""The batch of a step, and the documents in its rows."""

# Shapes: M micro-batches, B rows of one, S positions

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mtnlg_jax.config import Config
from mtnlg_jax.data.batches import Batches
from mtnlg_jax.data.origins import PADDING, origins
from mtnlg_jax.parallel.collectives import zigzag
from mtnlg_jax.parallel.mesh import row_shards
from mtnlg_jax.train.batch import micro_batch_shape, put_batch
from mtnlg_jax.train.inputs import Data, batch_at, rows_at
from mtnlg_jax.train.schedule import is_masked, stage_at


class Document(NamedTuple):
    """A document of a source that has tokens in the batch."""

    source: int  # index in the stage's sources
    number: int  # in that source, from 0


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """The batch of the step from ``step`` done ones to the next, on ``mesh`` and on the host."""

    config: Config
    mesh: Mesh
    data: Data
    step: int
    first: int  # samples before it

    @property
    def masked(self) -> bool:
        return is_masked(self.config.train, self.step)

    @property
    def stage(self) -> int:
        """The index of the stage."""
        return stage_at(self.config.train, self.step)[0]

    @property
    def batches(self) -> Batches:
        return self.data.stages[self.stage]

    @functools.cached_property
    def arrays(self) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        """The input of the step: see `batch_at`."""
        return batch_at(self.config, self.mesh, self.data, self.step, self.first)

    @property
    def sequences(self) -> int:
        return rows_at(self.config, self.data, self.step, self.first)[1]

    @functools.cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """The rows in use (sequences, S), in the order of the samples."""
        rows_of, sequences = rows_at(self.config, self.data, self.step, self.first)
        return rows_of(np.arange(sequences))

    @property
    def total(self) -> float:
        """The weight of the batch: its predicted tokens, at least 1."""
        return max(float(self.rows["weights"].sum()), 1.0)

    @functools.cached_property
    def documents(self) -> dict[Document, np.ndarray]:
        """The tokens (row, position) of each document, int64 [n, 2], in the order of the rows.

        All tokens of the rows are of one document, but padding.
        """
        samples = self.first + np.arange(self.sequences)
        source, numbers = origins(self.batches, self.config.sequence_length, samples)
        # A row's last token is only a label.
        numbers = numbers[:, :-1]
        row, position = np.nonzero(numbers != PADDING)
        found: dict[Document, list[tuple[int, int]]] = {}
        keys = zip(source[row].tolist(), numbers[row, position].tolist(), strict=True)
        for at, key in enumerate(keys):
            found.setdefault(Document(*key), []).append((row[at], position[at]))
        return {key: np.array(places, np.int64) for key, places in found.items()}

    def source_name(self, document: Document) -> str:
        """Return the prepared folder, or Megatron's prefix, of a document."""
        location = str(self.batches.sources[document.source].location)
        return location.removesuffix("/train")

    def by_excess(self, losses: np.ndarray) -> list[Document]:
        """Return the documents with a predicted token, those first that raise the mean loss most.

        ``losses`` (sequences, S) are those of each token. Documents with a loss that is not finite
        come first.
        """
        weights = self.rows["weights"]
        used = losses[(weights > 0) & np.isfinite(losses)]
        mean = float(used.mean()) if used.size else 0.0

        def excess(document: Document) -> float:
            at = tuple(self.documents[document].T)
            own = losses[at][weights[at] > 0]
            return float(own.sum()) - mean * len(own) if np.isfinite(own).all() else math.inf

        documents = [document for document in self.documents if self.weight(document) > 0]
        return sorted(documents, key=excess, reverse=True)

    def mask(self, document: Document) -> np.ndarray:
        """Return which tokens of the rows are of ``document``, bool (sequences, S)."""
        mask = np.zeros(self.rows["weights"].shape, bool)
        mask[tuple(self.documents[document].T)] = True
        return mask

    def weight(self, document: Document) -> float:
        """Return the predicted tokens of ``document``."""
        return float(self.rows["weights"][tuple(self.documents[document].T)].sum())

    def without(self, mask: np.ndarray) -> dict[str, jax.Array]:
        """Return the arrays of the whole batch, in which tokens of ``mask`` (sequences, S) are not
        predicted."""
        rows_of, sequences = rows_at(self.config, self.data, self.step, self.first)

        def left(numbers: np.ndarray) -> dict[str, np.ndarray]:
            made = rows_of(numbers)
            left_out = mask[np.minimum(numbers, sequences - 1)]
            return made | {"weights": np.where(left_out, 0, made["weights"]).astype(np.float32)}

        micro, size = micro_batch_shape(self.config, self.mesh)
        shape = (micro, size, self.config.sequence_length)
        return put_batch(left, shape, self.mesh, self.config.model)

    def alone(self, mask: np.ndarray) -> list[tuple[dict[str, jax.Array], float]]:
        """Return small batches, and the weight of each, in which tokens of ``mask`` (sequences, S)
        alone are predicted.

        All of them have one shape, and the rows' numbers of the whole batch, which dropout reads.
        """
        used = np.flatnonzero((mask & (self.rows["weights"] > 0)).any(1))
        size = row_shards(self.mesh.shape)
        # A pipeline takes as many micro-batches as it has stages.
        micro = self.mesh.shape["pipe"]
        made = []
        for start in range(0, len(used), size):
            chosen = used[start : start + size]
            made.append(self._small(np.resize(chosen, size), len(chosen), mask, micro))
        return made

    def _small(self, numbers: np.ndarray, count: int, mask: np.ndarray, micro: int) -> tuple:
        """Return the batch of the first ``count`` rows of ``numbers``, and its weight."""
        size = len(numbers)
        weights = np.where(mask, self.rows["weights"], 0)[numbers]
        weights[count:] = 0

        def rows_of(places: np.ndarray) -> dict[str, np.ndarray]:
            at = places % size
            # Only the first micro-batch has weight.
            used = (places < size)[:, None]
            rows = {name: array[numbers[at]] for name, array in self.rows.items()}
            return rows | {"weights": (weights[at] * used).astype(np.float32)}

        shape = (micro, size, self.config.sequence_length)
        batch = put_batch(rows_of, shape, self.mesh, self.config.model)
        whole = np.tile(numbers.astype(np.int32), (micro, 1))
        batch["rows"] = jax.device_put(whole, batch["rows"].sharding)
        return batch, float(weights.sum())

    def for_tokens(self) -> dict[str, jax.Array]:
        """Return the whole batch with a multiple of mesh.pipe micro-batches."""
        rows_of, _ = rows_at(self.config, self.data, self.step, self.first)
        micro, size = micro_batch_shape(self.config, self.mesh)
        micro += -micro % self.mesh.shape["pipe"]
        shape = (micro, size, self.config.sequence_length)
        return put_batch(rows_of, shape, self.mesh, self.config.model)

    def in_order(self, values_MBS: jax.Array) -> np.ndarray:
        """Return numbers by token of `for_tokens` as those of ``rows``, (sequences, S)."""
        found = np.asarray(jax.device_get(values_MBS))
        found = found.reshape(-1, found.shape[-1])[: self.sequences]
        order = np.argsort(zigzag(found.shape[-1], self.mesh.shape["context"]))
        return found[:, order]
