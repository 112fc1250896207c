"""Replay the batch of a step with a state of the run, and measure each document's part in it."""

# Shapes: L layers

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.config import Config, MeshConfig, validate, validate_batch
from mtnlg_jax.evaluate.why import programs, states
from mtnlg_jax.evaluate.why.settings import Settings
from mtnlg_jax.parallel.mesh import make_mesh, mesh_shape, row_shards
from mtnlg_jax.train import init_from, spikes
from mtnlg_jax.train.inputs import Data, batch_at, load_data, resolve
from mtnlg_jax.train.schedule import batch_size_at, is_masked, samples_at_end, stage_at
from mtnlg_jax.train.step import make_train_step
from mtnlg_jax.train.step_batch import Document, StepBatch
from mtnlg_jax.train.token_losses import make_token_losses


class Part(NamedTuple):
    """The effect of a document on its batch, by linearity of the mean loss."""

    document: Document
    tokens: int  # predicted
    rows: tuple[int, ...]
    loss: float  # mean cross entropy of its predicted tokens
    norm: float  # of its part of the mean gradient
    share: float  # of the squared norm of the gradient; those of all documents add up to 1
    loss_without: float  # of the batch's other documents
    norm_without: float  # of the gradient of the others


class Opened:
    """A run opened to replay its steps: settings, mesh, data and teachers."""

    def __init__(self, workdir: str, step: int, entries: Sequence[str] = ()):
        """``step``: done ones before the step. ``entries`` are those of `Settings`."""
        self.workdir = workdir
        self.settings = Settings(workdir, entries)
        self.left_out = states.left_out(workdir, step)
        config = self.settings.at(step)
        if step >= config.train.steps:
            raise ValueError(
                f"--step={step + 1} is beyond the run, which has train.steps={config.train.steps}"
            )
        given = any(entry.strip().startswith("mesh.") for entry in entries)
        self.mesh_config, devices = _fitting_mesh(config, given)
        self.mesh = make_mesh(self.mesh_config, devices)
        self.data: Data = load_data(config)
        self.config = self.at(step)
        self.teachers = init_from.load_teachers(self.config, self.mesh)

    def at(self, step: int) -> Config:
        """Return the settings of the step from ``step`` on, on this mesh."""
        config = self.settings.at(step)
        config = dataclasses.replace(config, mesh=self.mesh_config)
        config = resolve(config, self.data.tokenizer)
        validate(config)
        validate_batch(config, row_shards(self.mesh.shape))
        return config

    def load(self, step: int | None) -> states.Found:
        """Return the state of checkpoint ``step``; None: the start of the run."""
        config = self.at(step or 0)
        return states.load(self.workdir, step, config, self.mesh, self.data, self.teachers)

    def samples(self, found: states.Found, step: int) -> int:
        """Return the samples before ``step``, counted from the state."""
        samples = int(found.state.samples)
        for each in range(found.step, step):
            samples += batch_size_at(self.settings.at(each).train, samples)
        if step >= found.step:
            return samples
        # A later state: back to it from the start.
        samples = 0
        for each in range(step):
            samples += batch_size_at(self.settings.at(each).train, samples)
        return samples

    def forward(
        self, found: states.Found, step: int, on_step: Callable[[int, dict], None]
    ) -> states.Found:
        """Run the true steps from the state to ``step``, and call ``on_step`` with each one's
        number and metrics. The state is donated. Batches that the run left out are left out."""
        state = found.state
        samples = int(state.samples)
        made: dict[tuple, Any] = {}
        total = self._total(found.step, samples)
        for each in range(found.step, step):
            config = self.at(each)
            if self.settings.begins(each):
                # A start of the run fixes the length of its schedule.
                total = self._total(each, samples)
            if (each + 1, samples) in self.left_out:
                used = batch_size_at(config.train, samples)
                state = spikes.pass_over(state, used, is_spike=False)
                samples += used
                continue
            number, _, stage = stage_at(config.train, each)
            kind, teacher = init_from.teacher_of(self.teachers, number)
            masked = is_masked(config.train, each)
            key = (config, kind, masked, total)
            if key not in made:
                options = dict(init_from.kinds_of_steps(self.teachers))[kind]
                made[key] = make_train_step(
                    config,
                    self.mesh,
                    causal=not masked,
                    total_samples=total,
                    sparse=self.data.has_answers,
                    **options,
                )
            batch, micro, sequences = batch_at(config, self.mesh, self.data, each, samples)
            scale = float(stage.learning_rate_scale)
            state, metrics = made[key](state, batch, micro, sequences, scale, *teacher)
            samples += int(sequences)
            on_step(each + 1, {name: x.tolist() for name, x in jax.device_get(metrics).items()})
        return states.Found(step, state, f"{found.source} and {step - found.step} true steps")

    def _total(self, step: int, samples: int) -> int:
        train = self.settings.at(step).train
        return samples_at_end(train, min(step, train.steps), samples)


class Replayed:
    """The step from ``step`` done ones on, computed with the parameters of ``found``."""

    def __init__(self, run: Opened, found: states.Found, step: int):
        config = run.at(step)
        self.batch = StepBatch(config, run.mesh, run.data, step, run.samples(found, step))
        self._params = found.state.params
        kind, self._teacher = init_from.teacher_of(run.teachers, self.batch.stage)
        options = dict(init_from.kinds_of_steps(run.teachers))[kind]
        causal = not self.batch.masked
        sparse = run.data.has_answers
        self._gradients = programs.make_gradients(config, run.mesh, causal, options, sparse)
        self._token_losses = make_token_losses(config, run.mesh, causal)
        # As in `train.step`: dropout depends on the seed and the step alone.
        step_key = jax.random.fold_in(jax.random.key(config.train.seed), step)
        self._key = jax.random.key_data(step_key)
        arrays, self._count, _ = self.batch.arrays
        loss, self._gradient, squares = self._run(arrays, self._count)
        self.loss = float(loss)
        # By name: (L,) of parameters of the layers, else ().
        self.squares = {name: np.asarray(x, np.float64) for name, x in squares.items()}
        self.norm = math.sqrt(sum(float(x.sum()) for x in self.squares.values()))

    def _run(self, batch: dict[str, jax.Array], count: int | jax.Array) -> tuple:
        count = jnp.asarray(count, jnp.int32)
        return self._gradients(self._params, batch, count, self._key, *self._teacher)

    def token_losses(self) -> np.ndarray:
        """Return the cross entropy of each token's label, float32 (sequences, S); nan where nothing
        is predicted."""
        found = self._token_losses(self._params, self.batch.for_tokens(), self._key)
        return np.where(self.batch.rows["weights"] > 0, self.batch.in_order(found), np.nan)

    def row_norms(self) -> np.ndarray:
        """Return the norm of each row's part of the gradient, float64 (sequences,)."""
        norms = []
        for row in range(self.batch.sequences):
            mask = np.zeros(self.batch.rows["weights"].shape, bool)
            mask[row] = True
            norms.append(self._part(mask)[2])
        return np.array(norms)

    def measure(self, document: Document, losses: np.ndarray) -> Part:
        """Return the part of ``document``; ``losses`` are `token_losses`."""
        mask = self.batch.mask(document)
        share, loss, norm, of_norm, rest = self._part(mask)
        own = losses[mask & (self.batch.rows["weights"] > 0)]
        left = 1 - share
        some = left > 1e-9  # otherwise the batch holds nothing else
        return Part(
            document,
            round(share * self.batch.total),
            tuple(np.flatnonzero(mask.any(1)).tolist()),
            float(own.mean()) if own.size else math.nan,
            norm,
            of_norm,
            (self.loss - share * loss) / left if some else math.nan,
            rest if some else math.nan,
        )

    def leave_out(self, document: Document) -> tuple[float, float]:
        """Return the loss and the gradient's norm of the step whose batch does not predict
        ``document``, as the train step computes them."""
        arrays = self.batch.without(self.batch.mask(document))
        loss, _, squares = self._run(arrays, self._count)
        return float(loss), math.sqrt(sum(float(np.sum(x)) for x in squares.values()))

    def _part(self, mask: np.ndarray) -> tuple[float, float, float, float, float]:
        """Return of the tokens of ``mask``: their share of the weight, their mean loss, the norm of
        their part of the gradient, its share of the squared norm, and the norm without them."""
        weight = 0.0
        nats = 0.0
        part = jax.tree.map(jnp.zeros_like, self._gradient)
        for arrays, own in self.batch.alone(mask):
            loss, gradient, _ = self._run(arrays, self.batch.mesh.shape["pipe"])
            weight += own
            nats += own * float(loss)
            part = programs.added(part, gradient, own / self.batch.total)
        share = weight / self.batch.total
        norm, of_norm, rest = programs.measured_part(part, self._gradient, share)
        return share, nats / max(weight, 1.0), float(norm), float(of_norm), float(rest)


def _fitting_mesh(config: Config, given: bool) -> tuple[MeshConfig, Sequence[jax.Device]]:
    """Return the run's mesh and devices for it; one device if the run's mesh does not fit.

    A mesh that was ``given`` must fit; ValueError says why it does not.
    """
    devices = jax.devices()
    try:
        mesh_shape(config.mesh, len(devices))
        validate_batch(config, row_shards(mesh_shape(config.mesh, len(devices))))
        return config.mesh, devices
    except ValueError:
        if given:
            raise
    # Every mesh gives the same numbers, up to rounding.
    alone = dataclasses.replace(
        MeshConfig(), data=1, zero=config.mesh.zero, context_mode=config.mesh.context_mode
    )
    return alone, devices[:1]
