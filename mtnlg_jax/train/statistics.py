"""Statistics by layer, every train.stats_every steps, by programs of their own beside the step.

Before the step takes the state, they compute its gradient in two halves of the batch, the update
that follows from it, and the activations of a few rows. The step and its program stay as they are,
so losses and parameters are the same bit for bit. docs/statistics.md explains each number.
"""

# Shapes: L layers, M micro-batches, B rows, S query positions

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config
from mtnlg_jax.model.params import name_of
from mtnlg_jax.parallel.mesh import dims_of
from mtnlg_jax.train import lora, noise_scale
from mtnlg_jax.train.activations import make_activations
from mtnlg_jax.train.batch import micro_batch_shape, put_batch
from mtnlg_jax.train.distill import Distillation
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.init_from import Teachers, kinds_of_steps
from mtnlg_jax.train.inputs import Data, rows_at
from mtnlg_jax.train.metrics import MetricsLog
from mtnlg_jax.train.noise_scale import Noise
from mtnlg_jax.train.schedule import is_masked, stage_at
from mtnlg_jax.train.state import TrainState
from mtnlg_jax.train.step import CompiledStep, dropout_key, make_update
from mtnlg_jax.train.watchdog import Watchdog

KIND = "stats"  # of the records in metrics.jsonl
SAMPLE_ROWS = 8  # whose activations are read: the first of the batch, or all of a smaller one


class Statistics:
    """Computes the statistics of steps that train.stats_every names, and writes their records.

    ``pause`` is called after a compilation, whose time is not that of a step.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        data: Data,
        teachers: Teachers,
        total_samples: int,
        watchdog: Watchdog,
        log: MetricsLog,
        pause: Callable[[], None],
    ):
        self._config = config
        self._mesh = mesh
        self._data = data
        self._log = log
        self._pause = pause
        # {step: (results on the device, sequences)}; a step is reported after the next one began
        self._pending: dict[int, tuple[dict[str, Any], int]] = {}
        self._programs: dict[tuple, CompiledStep] = {}
        if not config.train.stats_every:
            return
        made: dict[tuple, Any] = {("norms",): make_norms(config, mesh, total_samples)}
        for masked in (False, True):
            read = make_activation_figures(config, mesh, causal=not masked)
            made["activations", masked] = read
            for kind, options in kinds_of_steps(teachers):
                sparse = data.has_answers
                half = make_half_gradients(config, mesh, not masked, sparse, **options)
                made["gradients", kind, masked] = half
        # A program is compiled at its first call, as a step is.
        self._programs = {key: CompiledStep(program, watchdog) for key, program in made.items()}

    @property
    def fingerprints(self) -> list[str]:
        """Return those of the programs, as of `CompiledStep`."""
        return [self._programs[key].fingerprint for key in sorted(self._programs, key=str)]

    def before_step(
        self,
        state: TrainState,
        step: int,
        samples: int,
        kind: int,
        scale: np.float32,
        teacher: tuple,
    ) -> None:
        """Start the statistics of ``step``, if they are due, which reads on after ``samples``.

        The other arguments are those of the step: the kind of `init_from.teacher_of`, the scale of
        the learning rate, and the teacher's parameters or nothing.
        """
        config = self._config
        every = config.train.stats_every
        if not every or (step + 1) % every:
            return
        before = self.fingerprints
        masked = is_masked(config.train, step)
        rows_of, sequences = rows_at(config, self._data, step, samples)
        # By number, so that the halves are the same on every mesh.
        most = -(-config.train.global_batch_size // 2)
        first = -(-sequences // 2)
        halves = []
        for begin, count in ((0, first), (first, sequences - first)):
            batch, micro_batches = put_rows(config, self._mesh, rows_of, begin, count, most)
            half = self._programs["gradients", kind, masked]
            halves.append(half(state.params, state.step, batch, micro_batches, *teacher))
        norms: Any = self._programs["norms",](state, *halves, jnp.int32(sequences), scale)
        del halves
        rows = min(SAMPLE_ROWS, sequences)
        most = min(SAMPLE_ROWS, config.train.global_batch_size)
        batch, _ = put_rows(config, self._mesh, rows_of, 0, rows, most, flushes=False)
        read = self._programs["activations", masked]
        activations: Any = read(state.params, state.step, batch, jnp.int32(rows))
        self._pending[step] = ({"norms": norms, "activations": activations}, sequences)
        if self.fingerprints != before:
            self._pause()

    def report(self, step: int) -> None:
        """Write the record of ``step``, if it has statistics; this waits for them."""
        if step not in self._pending:
            return
        found, sequences = self._pending.pop(step)
        train = self._config.train
        where = {
            "stage": stage_at(train, step)[2].name,
            "objective": "masked" if is_masked(train, step) else "causal",
        }
        values = jax.device_get(found)
        noise = values["norms"].pop("noise")
        record = {
            "kind": KIND,
            "step": step + 1,
            **where,
            "sequences": sequences,
            **_norm_figures(values["norms"]),
            **_activation_figures(values["activations"]),
            **self._noise_figures(noise, where, sequences),
        }
        self._log.write(_plain(record))

    def restart(self) -> None:
        """Forget what is not reported: the run goes back, and these steps are undone."""
        self._pending.clear()

    def _noise_figures(self, noise: dict, where: dict[str, str], sequences: int) -> dict[str, Any]:
        first, second = (
            noise_scale.effective(float(each["weight"]), float(each["square"]))
            for each in noise["halves"]
        )
        now = noise_scale.estimate(float(noise["dot"]), float(noise["difference"]), (first, second))
        # From the records and not from a state: a resume reads the same numbers. In another stage,
        # or of another objective, the gradient is that of another loss.
        earlier = [
            Noise(record["noise_trace"], record["noise_square"])
            for record in self._log.records
            if record["kind"] == KIND and record["noise_trace"] is not None
            if all(record[name] == value for name, value in where.items())
        ]
        own = _plain({"noise_trace": now and now.trace, "noise_square": now and now.square})
        known = [*earlier, Noise(own["noise_trace"], own["noise_square"])] if now else earlier
        length = self._config.sequence_length
        return own | noise_scale.figures(noise_scale.smoothed(known), sequences, length)


def put_rows(
    config: Config,
    mesh: Mesh,
    rows_of: Callable[[np.ndarray], dict[str, np.ndarray]],
    begin: int,
    count: int,
    most: int,
    flushes: bool = True,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return (batch (M, B, S) of ``count`` rows of a step, micro-batches in use).

    ``rows_of`` is that of `inputs.rows_at`, ``begin`` the first row. There is room for ``most``
    rows; those that are not used have weight 0, and numbers of ``begin`` + ``count`` or more.
    ``flushes``: as many micro-batches as a pipeline's schedule takes.
    """
    micro, size = micro_batch_shape(config, mesh, most)
    shape = (micro if flushes else -(-most // size), size)

    def chosen(numbers: np.ndarray) -> dict[str, np.ndarray]:
        used = numbers < count
        made = rows_of(begin + np.where(used, numbers, 0))
        made["weights"] = made["weights"] * used[:, None]
        # Dropout goes by the numbers in the whole batch.
        return made | {"rows": begin + numbers}

    batch = put_batch(chosen, (*shape, config.sequence_length), mesh, config.model)
    return batch, jnp.int32(-(-count // size))


# --- the programs


def make_half_gradients(
    config: Config,
    mesh: Mesh,
    causal: bool,
    sparse: bool = False,
    distillation: Distillation | None = None,
) -> jax.stages.Wrapped:
    """Return the jitted (params, step, batch, micro-batches in use, *teacher) -> (gradients, their
    weights) of some rows of a step. The gradients are those of the rows' mean loss; of the weights
    of rows in it, "weight" is the sum and "square" the sum of squares."""
    loss_and_gradients = make_loss_and_gradients(config, mesh, causal, distillation, sparse=sparse)

    def half_gradients(params, step, batch, micro_batches, *teacher):
        key = dropout_key(config, step)
        model = lora.computed(params, config)
        _, gradients = loss_and_gradients(model, batch, micro_batches, key, *teacher)
        rows = batch["weights"].sum(-1)
        return gradients, {"weight": rows.sum(), "square": jnp.square(rows).sum()}

    return jax.jit(half_gradients)


def make_norms(config: Config, mesh: Mesh, total_samples: int) -> jax.stages.Wrapped:
    """Return the jitted (state, half, half, sequences, rate_scale) -> figures of the step that
    would take ``state``. A half is a result of `make_half_gradients`.

    Figures are the squared norms of trained parameters ("weight"), of the step's gradient before it
    is clipped ("grad") and of what the step subtracts ("update"), by the name of the parameter, for
    the blocks (L,); and under "noise" what `noise_scale.estimate` takes.
    """
    update = make_update(config, mesh, total_samples)

    def norms(state, first, second, sequences, rate_scale):
        gradients, weights = zip(first, second, strict=True)
        # The mean over all tokens, of those over the tokens of each half (`gradients._weight_of`).
        total = jnp.maximum(weights[0]["weight"] + weights[1]["weight"], 1.0)
        shares = [jnp.maximum(each["weight"], 1.0) / total for each in weights]
        mean = jax.tree.map(lambda a, b: shares[0] * a + shares[1] * b, *gradients)
        trained, _ = lora.trainable(state.params, config)
        samples = state.samples + sequences
        rate, updates, _ = update(
            mean, state.opt_state, trained, samples, rate_scale, jnp.bool_(True)
        )
        both = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), *gradients))
        apart = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), *gradients))
        return {
            "weight": _squares(trained),
            "grad": _squares(mean),
            "update": _squares(jax.tree.map(lambda u: rate * u, updates)),
            "noise": {"dot": sum(both), "difference": sum(apart), "halves": weights},
        }

    # Whole on every device, whatever splits the layers: each process fetches them.
    return jax.jit(norms, out_shardings=NamedSharding(mesh, P()))


def make_activation_figures(config: Config, mesh: Mesh, causal: bool) -> jax.stages.Wrapped:
    """Return the jitted (params, step, batch, rows that count) -> `make_activations`."""
    activations = make_activations(config, mesh, causal)

    def activation_figures(params, step, batch, rows):
        key = dropout_key(config, step)
        return activations(lora.computed(params, config), batch, rows, key)

    return jax.jit(activation_figures)


def _squares(tree: Any) -> dict[str, jax.Array]:
    """Return the squared norm of each parameter by its name; of blocks by layer, (L,)."""

    def one(path, leaf):
        # The plan has the layers first.
        kept = 1 if dims_of(path).startswith("L") else 0
        return jnp.square(leaf.astype(jnp.float32)).sum(tuple(range(kept, leaf.ndim)))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): one(path, leaf) for path, leaf in leaves}


# --- the record


def _norm_figures(squares: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Return norms from their squares: of all, by layer and by parameter."""
    found: dict[str, Any] = {}
    for name, by_parameter in squares.items():
        wide = {key: np.asarray(x, np.float64) for key, x in by_parameter.items()}
        found[f"{name}_norm"] = math.sqrt(sum(x.sum() for x in wide.values()))
        layers = sum(x for x in wide.values() if x.ndim)
        found[f"{name}_norm_by_layer"] = np.sqrt(layers).tolist()
        found[f"{name}_norm_by_parameter"] = {key: np.sqrt(x).tolist() for key, x in wide.items()}
    sizes = zip(found["update_norm_by_layer"], found["weight_norm_by_layer"], strict=True)
    # New adapters are 0 in half of their factors, and no layer is 0 in all.
    found["update_ratio_by_layer"] = [update / max(weight, 1e-30) for update, weight in sizes]
    return found


def _activation_figures(values: dict[str, np.ndarray]) -> dict[str, Any]:
    scalars = {name: x.tolist() for name, x in values.items() if not x.ndim}
    return scalars | {f"{name}_by_layer": x.tolist() for name, x in values.items() if x.ndim}


def _plain(value: Any) -> Any:
    """Return ``value`` for JSON: numbers with six digits, and None for those that are not
    finite."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
