"""Distillation (Hinton 2015, arXiv 1503.02531): the teacher runs inside the student's step.

The teacher's parameters are frozen. They are split over the mesh like the student's and have no
moments. The teacher reads each micro-batch as the student does, masked or not, without dropout.
`model.loss.distilled_cross_entropy` compares the last hidden states of both, a chunk of tokens at a
time.
"""

# Shapes: B rows, S query positions, C width of the teacher, V vocabulary

import dataclasses
import functools

import jax
from flax import nnx
from jax import lax

from mtnlg_jax.config import Config, ModelConfig
from mtnlg_jax.model.context_attention import context_attention
from mtnlg_jax.model.head import Head
from mtnlg_jax.model.hooks import Hooks
from mtnlg_jax.model.params import join_params, split_params
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.train import lora
from mtnlg_jax.train.weights import make_weights


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The teacher of a stage, without its parameters: those are an argument of the step."""

    model: ModelConfig
    temperature: float
    weight: float


class Teacher:
    """The teacher in the manual region; ``params`` are this device's shards."""

    def __init__(self, config: Config, given: Distillation, causal: bool, params: nnx.State):
        self.temperature = given.temperature
        self.weight = given.weight
        # The teacher has its own width and depth; only the vocabulary is the student's.
        self._graph = abstract_model(given.model)[0]
        self._causal = causal
        # The same ZeRO stage as the student's. The reduce type of gradients does not matter here.
        self._weights = make_weights(lora.without(config))
        self._params = split_params(self._weights.at_start(params))
        self._hooks = Hooks(
            prepare=self._weights.of_layer,
            attend=functools.partial(context_attention, mode=config.mesh.context_mode),
            overlap=config.mesh.tp_comm_overlap,
        )

    def hidden(self, micro: dict[str, jax.Array]) -> tuple[jax.Array, Head]:
        """Return (what the head multiplies (B x S, C), the head) of a micro-batch."""
        rest = self._weights.of_rest(self._params.rest)
        params = join_params(self._params._replace(rest=rest))
        model = nnx.merge(self._graph, lax.stop_gradient(params))
        x_BSC = model.hidden(
            micro["tokens"],
            positions_BS=micro["positions"],
            segment_ids_BS=micro["segment_ids"],
            prefix=micro.get("prefix"),
            causal=self._causal,
            hooks=self._hooks,
        )
        return x_BSC.reshape(-1, x_BSC.shape[-1]), model.head()
