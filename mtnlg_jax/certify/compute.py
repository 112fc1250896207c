"""Loss and gradients of the small copy on one mesh, by the code of the train step."""

# Shapes: L layers, E experts

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtnlg_jax.certify.figures import Types
from mtnlg_jax.certify.meshes import with_sizes
from mtnlg_jax.config import Config, ModelConfig, StageConfig
from mtnlg_jax.model.params import names_of
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.parallel.mesh import AXES, make_mesh, shardings_of
from mtnlg_jax.train import lora, quantized_base
from mtnlg_jax.train.distill import Distillation
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.inputs import Data, batch_at
from mtnlg_jax.train.private_gradients import make_clipped_gradients
from mtnlg_jax.train.schedule import loss_name
from mtnlg_jax.train.state import state_shardings

_DRAWN = 20  # steps of which one has units
ONE_DEVICE = dict.fromkeys(AXES, 1)


class Objective(NamedTuple):
    """What a stage of the run trains."""

    name: str
    stage: int
    masked: bool


class Result(NamedTuple):
    """Loss, and gradients by the names of parameters, float32 arrays of their whole shapes."""

    loss: float
    gradients: dict[str, np.ndarray]
    loads: np.ndarray | None  # tokens of each expert, (L, E); None without experts


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A small model to distill from."""

    model: ModelConfig
    params: Any  # NumPy arrays

    def settings(self, stage: StageConfig) -> Distillation:
        return Distillation(self.model, stage.distill_temperature, stage.distill_weight)

    def on(self, mesh: Mesh, zero: int) -> Any:
        shardings = shardings_of(abstract_model(self.model)[1], mesh, zero)
        return jax.device_put(self.params, shardings)


def make_teacher(model: ModelConfig, seed: int) -> Teacher:
    """Return a teacher with random parameters."""
    return Teacher(model, jax.tree.map(np.asarray, init_parameters(model, seed + 1)))


def objectives_of(config: Config) -> list[Objective]:
    """Return the objectives of the stages of ``config``, each once: causal, masked, distilled."""
    found: dict[Any, Objective] = {}
    for number, stage in enumerate(config.train.stages):
        # A stage of both has steps of one and of the other.
        for masked in [False] * (stage.masked < 1) + [True] * (stage.masked > 0):
            name = "masked" if masked else "causal"
            teaching = (stage.distill_temperature, stage.distill_weight)
            taught = loss_name(config.train, stage) == "distillation_loss"
            if taught:
                name += f", distilled at temperature {teaching[0]:g}, weight {teaching[1]:g}"
            found.setdefault(
                (masked, teaching if taught else None), Objective(name, number, masked)
            )
    return list(found.values())


def with_types(config: Config, types: Types) -> Config:
    """Return ``config`` computing in ``types``."""
    train = dataclasses.replace(
        config.train, compute_dtype=types.compute, reduce_dtype=types.reduce
    )
    return dataclasses.replace(config, train=train)


def plain(config: Config) -> Config:
    """Return ``config`` as the simplest program has it: the whole batch at once on one device,
    without pipeline, ZeRO or recomputation."""
    mesh = dataclasses.replace(
        with_sizes(config.mesh, ONE_DEVICE),
        zero=0,
        schedule="circular",
        virtual_pipe=1,
        flush=None,
        tp_comm_overlap=False,
        context_mode="auto",
    )
    train = dataclasses.replace(
        config.train, micro_batch_size=config.train.global_batch_size, recompute="none"
    )
    return dataclasses.replace(config, mesh=mesh, train=train)


def devices_of(config: Config) -> list[jax.Device]:
    """Return the devices of the mesh of ``config``."""
    count = math.prod(getattr(config.mesh, axis) for axis in AXES)
    return jax.devices()[:count]


class Computation:
    """Loss and gradients of one objective on the mesh of ``config``; compiled at the first call."""

    def __init__(self, config: Config, objective: Objective, data: Data, teacher: Teacher | None):
        stage = config.train.stages[objective.stage]
        # A run of this objective alone: its batches are those of the production schedule.
        stage = dataclasses.replace(stage, masked=float(objective.masked))
        self.config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, stages=(stage,))
        )
        number = objective.stage
        self._data = dataclasses.replace(
            data,
            stages=data.stages[number : number + 1],
            samplers=data.samplers[number : number + 1],
        )
        self.mesh = make_mesh(config.mesh, devices_of(config))
        self._shardings = state_shardings(self.config, self.mesh).params
        distilled = loss_name(config.train, stage) == "distillation_loss"
        self._last: tuple = ()
        settings = None
        if distilled:
            assert teacher is not None, "a config with a teacher has a small one"
            settings = teacher.settings(stage)
            self._last = (teacher.on(self.mesh, config.mesh.zero),)
        self._run = self._jitted(not objective.masked, settings)

    def _jitted(self, causal: bool, distillation: Distillation | None) -> Any:
        config = self.config
        if config.optimizer.private:
            clipped = make_clipped_gradients(config, self.mesh, causal)

            def private(params, batch, count, key):
                figures, gradients = clipped(lora.computed(params, config), batch, count, key)
                # Units that are not finite count as 0, on a mesh and on one device alike.
                sound = (figures["nonfinite"] == 0) & (figures["units"] > 0)
                return jnp.where(sound, figures["loss"] / figures["units"], jnp.nan), gradients

            return jax.jit(private)
        # As `make_train_step` counts the loads of experts.
        moe = config.model.moe.num_moe_experts > 0
        counting = moe and not quantized_base.used(config)
        function = make_loss_and_gradients(config, self.mesh, causal, distillation, counting)

        def run(params, batch, count, key, *last):
            return function(lora.computed(params, config), batch, count, key, *last)

        return jax.jit(run)

    @functools.cached_property
    def _batches(self) -> dict[int, tuple]:
        """Return {samples before the step: arguments}: of the first step, and in a ramp of one
        behind it."""
        ramp = self.config.train.rampup_batch_size
        firsts = (0, ramp[2]) if ramp else (0,)
        return {first: self._batch(first) for first in firsts}

    def _batch(self, first: int) -> tuple:
        # Steps with differential privacy draw their units, and may draw none.
        for step in range(_DRAWN if self.config.optimizer.private else 1):
            found = batch_at(self.config, self.mesh, self._data, step, first)[:2]
            if np.asarray(found[0]["weights"]).any():
                break
        return found

    def __call__(self, params: Any) -> list[Result]:
        """Return the results for ``params`` (NumPy arrays): of a full batch, and in a ramp of its
        first one before."""
        placed = jax.device_put(params, self._shardings)
        key = jax.random.key_data(jax.random.key(self.config.train.seed))
        results = []
        for batch, count in self._batches.values():
            loss, gradients, *loads = self._run(placed, batch, count, key, *self._last)
            named = {name: np.asarray(leaf) for name, leaf in names_of(gradients).items()}
            counts = np.asarray(loads[0]) if loads else None
            results.append(Result(float(loss), named, counts))
        return results
