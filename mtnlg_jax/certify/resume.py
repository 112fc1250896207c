"""Move a run: train on one mesh, save, restore on another mesh and on one device, and go on."""

import dataclasses
import functools
import json
import os
from contextlib import closing
from typing import Any

import jax
import numpy as np

from mtnlg_jax.certify import figures
from mtnlg_jax.certify.compute import ONE_DEVICE, Teacher, devices_of
from mtnlg_jax.certify.figures import Figure, Types
from mtnlg_jax.certify.meshes import with_sizes
from mtnlg_jax.certify.shrink import STEPS
from mtnlg_jax.config import Config, to_json
from mtnlg_jax.data.batches import SAMPLE_ORDER
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import changes, lora, moments, privacy
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.checkpoint_arrays import flatten
from mtnlg_jax.train.inputs import Data, batch_at
from mtnlg_jax.train.loop import identity_of_data
from mtnlg_jax.train.schedule import is_masked, loss_name, samples_at_end, stage_at
from mtnlg_jax.train.state import TrainState, abstract_state, init_state, state_shardings
from mtnlg_jax.train.step import make_train_step

SAVED = STEPS // 2
CHECKS = (figures.RESTORED, figures.NEXT, figures.NORMS, figures.MOMENTS)
# What a step tells that must not depend on the mesh: name in its metrics -> check.
_TOLD = {"loss": figures.NEXT, "grad_norm": figures.NORMS}


class SmallRun:
    """The steps of the small copy on the mesh of ``config``."""

    def __init__(self, config: Config, data: Data, teacher: Teacher | None):
        self.config = config
        self.mesh = make_mesh(config.mesh, devices_of(config))
        self.data = data
        self._teacher = teacher
        self._total = samples_at_end(config.train, 0, 0)
        self._programs: dict[Any, Any] = {}

    def start(self, params: Any) -> TrainState:
        """Return the state before the first step with ``params``, NumPy arrays."""
        shardings = state_shardings(self.config, self.mesh).params
        placed = jax.device_put(params, shardings)
        base, _ = lora.split(placed)
        return init_state(self.config, self.mesh, base)._replace(params=placed)

    def abstract(self) -> TrainState:
        return abstract_state(self.config, self.mesh)

    def go_on(
        self, state: TrainState, first: int, last: int
    ) -> tuple[TrainState, dict[str, list[float]]]:
        """Return (the state after steps ``first`` to ``last`` - 1, what each of them tells by the
        check that it is for)."""
        told: dict[str, list[float]] = {check: [] for check in _TOLD.values()}
        for step in range(first, last):
            batch = batch_at(self.config, self.mesh, self.data, step, int(state.samples))
            number, _, stage = stage_at(self.config.train, step)
            program, rest = self._program(number, is_masked(self.config.train, step))
            scale = float(stage.learning_rate_scale)
            state, metrics = program(state, *batch, scale, *rest)
            for name, check in _TOLD.items():
                told[check].append(float(metrics[name]))
        return state, told

    def _program(self, number: int, masked: bool) -> tuple[Any, tuple]:
        """Return (the jitted step of stage ``number``, its last arguments)."""
        config = self.config
        stage = config.train.stages[number]
        distilled = loss_name(config.train, stage) == "distillation_loss"
        key = (masked, number if distilled else None)
        if key not in self._programs:
            options: dict[str, Any] = {}
            rest: tuple = ()
            if distilled:
                assert self._teacher is not None, "a config with a teacher has a small one"
                options = {"distillation": self._teacher.settings(stage)}
                rest = (self._teacher.on(self.mesh, config.mesh.zero),)
            if config.optimizer.private:
                rest = (privacy.noise_key(config, self.data.fingerprints),)
            step = make_train_step(
                config, self.mesh, causal=not masked, total_samples=self._total, **options
            )
            self._programs[key] = step, rest
        return self._programs[key]


def moved(
    stays: SmallRun,
    others: dict[str, SmallRun],
    params: Any,
    folder: str,
    types: Types,
    mesh: str,
    tolerances: dict[str, float],
) -> list[Figure]:
    """Return the figures of a run that is saved on the mesh of ``stays`` and restored on those of
    ``others``, by their names. The checkpoint is left in ``folder``/checkpoints. ``tolerances``:
    of CHECKS."""
    config = stays.config
    state, _ = stays.go_on(stays.start(params), 0, SAVED)
    identity = identity_of_data(config, stays.data)
    found: list[Figure] = []
    with closing(Checkpoints(os.path.join(folder, "checkpoints"))) as checkpoints:
        meta = {
            "config": json.loads(to_json(config)),
            "identity": identity,
            "samples": int(state.samples),
            "order_of_samples": SAMPLE_ORDER,
            "metrics": {},
        }
        checkpoints.save(SAVED, state, meta, wait=True)
        saved = {name: np.asarray(leaf) for name, leaf in flatten(state).items()}
        state, told = stays.go_on(state, SAVED, STEPS)
        kept = _moments(state)
        for place, run in others.items():
            where = f"{mesh} -> {place}"

            def add(check: str, name: str, difference: float, where: str = where) -> None:
                limit = tolerances[check]
                found.append(Figure(check, name, where, "", types.name, difference, limit))

            refuse = functools.partial(changes.refuse_changes, config=run.config)
            restored = checkpoints.restore(run.abstract(), identity, refuse)
            assert restored is not None, "it was saved just now"
            state = restored[1]
            for name, leaf in flatten(state).items():
                add(figures.RESTORED, name, figures.differing_bits(leaf, saved[name]))
            state, again = run.go_on(state, SAVED, STEPS)
            for check, wanted in told.items():
                for step, (one, other) in enumerate(zip(again[check], wanted, strict=True), SAVED):
                    add(check, f"step {step}", figures.loss_difference(one, other))
            for kind, arrays in _moments(state).items():
                each = figures.tensor_differences(arrays, kept[kind], types)
                for name, difference in each.items():
                    add(figures.MOMENTS, f"{kind} {name}", difference)
    return found


def _moments(state: TrainState) -> dict[str, dict[str, np.ndarray]]:
    """Return the moments of the optimizer by kind, such as mu, and by parameter.

    Moments in fewer bits are decoded: codes of neighbors say nothing of their distance.
    """
    opt_state = moments.decode(jax.tree.map(np.asarray, state.opt_state))
    found: dict[str, dict[str, np.ndarray]] = {}
    # Weights and their averages are not among them: Adam makes updates of those gradients too that
    # are 0 but for rounding, such as those of key biases.
    for name, leaf in flatten({"opt_state": opt_state}).items():
        # Names are such as opt_state.1.mu.blocks.mlp.w_in_DF.
        for kind in ("mu", "nu"):
            before, point, rest = name.partition(f".{kind}.")
            if point:
                part = f"{before.removeprefix('opt_state.')}.{kind}"
                found.setdefault(part, {})[rest] = np.asarray(leaf)
    return found


def on_one_device(config: Config) -> Config:
    """Return ``config`` on one device, with its micro-batches."""
    mesh = dataclasses.replace(with_sizes(config.mesh, ONE_DEVICE), virtual_pipe=1, flush=None)
    return dataclasses.replace(config, mesh=mesh)
