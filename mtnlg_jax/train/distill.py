"""Distillation (Hinton 2015, arXiv 1503.02531): the teacher of a stage, run inside the student's
step.

The teacher is frozen parameters beside the state, split over the mesh as the student's are, without
moments. It reads each micro-batch as the student does, masked or not, without dropout; its last
hidden states meet the student's in `model.loss.distilled_cross_entropy`, a chunk of tokens at a
time.
"""

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx
from jax import lax

from mtnlg_jax.config import Config, ModelConfig
from mtnlg_jax.model.context_attention import context_attention
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.collectives import gather_weights


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What a step must know of a stage's teacher; its parameters are an argument of the step."""

    model: ModelConfig
    temperature: float
    weight: float


class Teacher:
    """The teacher in the manual region: ``params`` are this device's part."""

    def __init__(self, config: Config, given: Distillation, causal: bool, params):
        self.temperature = given.temperature
        self.weight = given.weight
        self._graph = abstract_model(given.model)[0]
        self._causal = causal
        self._mode = config.mesh.context_mode
        self._gather = functools.partial(
            gather_weights, dtype=jnp.dtype(config.train.compute_dtype), zero=config.mesh.zero
        )
        # As the student's: whole once a step, or with ZeRO-3 a layer at a time.
        self._layerwise = config.mesh.zero == 3
        self._params = params if self._layerwise else self._gather(params)

    def hidden(self, micro) -> tuple:
        """(last hidden states (B x S, C), output embedding (V, C)) of a micro-batch."""
        rest = {key: value for key, value in self._params.raw_mapping.items() if key != "blocks"}
        if self._layerwise:
            rest = self._gather(rest)
        weights = type(self._params)({**rest, "blocks": self._params.raw_mapping["blocks"]})
        model = nnx.merge(self._graph, lax.stop_gradient(weights))
        x_BSC = model.hidden(
            micro["tokens"],
            positions_BS=micro["positions"],
            segment_ids_BS=micro["segment_ids"],
            causal=self._causal,
            prepare=self._layer,
            attend=functools.partial(context_attention, mode=self._mode),
        )
        return x_BSC.reshape(-1, x_BSC.shape[-1]), model.head()

    def _layer(self, layer):
        return self._gather({"blocks": layer})["blocks"] if self._layerwise else layer
