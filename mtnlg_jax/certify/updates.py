"""Compare what a step does with its gradients: the same gradients and the same state on a mesh and
on one device give the same update, parameters and averages of the weights.

In two trainings that differ by a rounding, Adam turns gradients that are 0 but for rounding into
updates of full size, so their weights cannot be compared. Of the same numbers they can.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.certify import figures
from mtnlg_jax.certify.compute import Result, devices_of, plain
from mtnlg_jax.certify.resume import SmallRun
from mtnlg_jax.config import Config
from mtnlg_jax.model.params import name_of, names_of
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import averages, lora
from mtnlg_jax.train.inputs import Data
from mtnlg_jax.train.schedule import learning_rate, samples_at_end
from mtnlg_jax.train.state import TrainState, state_shardings
from mtnlg_jax.train.step import Moved, make_advance

CHECKS = (figures.UPDATE, figures.PARAMETERS, figures.AVERAGES)
# Steps before the one that is compared: then moments and averages are neither 0 nor new, and SOAP
# has turned its bases (`shrink` makes it turn every second step, at least).
_BEFORE = 2
# The learning rate of the comparison: at that of the config an update may change a weight by less
# than its rounding.
_RATE = 0.1


class Advance:
    """What the train step of ``config`` does with its gradients, on its mesh."""

    def __init__(self, config: Config):
        self._config = config
        self._mesh = make_mesh(config.mesh, devices_of(config))
        self._shardings = state_shardings(config, self._mesh)
        self._trained, _ = lora.trainable(self._shardings.params, config)
        self._total = samples_at_end(config.train, 0, 0)
        advance = make_advance(config, self._mesh, self._total)
        sequences = config.train.global_batch_size

        def run(state, gradients, loads, rate_scale):
            return advance(
                state, gradients, loads, jnp.int32(sequences), rate_scale, jnp.bool_(True)
            )

        out = Moved(
            None,
            self._trained,
            self._trained,
            self._shardings.opt_state,
            averages.held(self._shardings),
        )
        self._run = jax.jit(run, out_shardings=out)

    def __call__(
        self, state: TrainState, gradients: dict[str, np.ndarray], loads: np.ndarray | None
    ) -> Moved:
        """Return the results for a ``state`` and ``gradients`` of NumPy arrays, of their whole
        shapes."""
        named = jax.tree_util.tree_map_with_path(
            lambda path, sharding: jax.device_put(gradients[name_of(path)], sharding), self._trained
        )
        placed = jax.device_put(state, self._shardings)
        after = int(state.samples) + self._config.train.global_batch_size
        rate = float(learning_rate(self._config, after, self._total))
        scale = np.float32(_RATE / rate if rate else 1.0)
        counts = [] if loads is None else [loads]
        return jax.tree.map(np.asarray, self._run(placed, named, counts, scale))


def arrays_of(moved: Moved) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of each of CHECKS by the names of the trained parameters."""
    found = {
        figures.UPDATE: names_of(moved.updates),
        figures.PARAMETERS: names_of(moved.trained),
    }
    for part in moved.averages.values():
        # With adapters they are named as the parameters of the state are.
        found[figures.AVERAGES] = {
            name.removeprefix("lora."): array for name, array in names_of(part).items()
        }
    return found


class Reference:
    """The step on one device with the ``gradients`` of a result, and the state that it starts
    from."""

    def __init__(self, config: Config, data: Data, params: Any, gradients: Result):
        config = plain(config)
        self.given = gradients
        state = jax.tree.map(np.asarray, SmallRun(config, data, None).start(params))
        advance = Advance(config)
        for step in range(_BEFORE):
            state = _after(config, state, advance(state, _varied(gradients, step), gradients.loads))
        self.state: TrainState = state
        self.wanted = arrays_of(advance(state, gradients.gradients, gradients.loads))

    def differences(self, config: Config) -> dict[str, dict[str, float]]:
        """Return the difference of each tensor on the mesh of ``config``, for each of CHECKS."""
        moved = Advance(config)(self.state, self.given.gradients, self.given.loads)
        got = arrays_of(moved)
        return {
            check: figures.tensor_differences(got[check], wanted, figures.STRICT)
            for check, wanted in self.wanted.items()
        }


def _varied(result: Result, step: int) -> dict[str, np.ndarray]:
    """Return the gradients of ``result``, each number times a random one of 0.5 to 1.5: moments are
    then not multiples of the gradients that are compared, and have the same signs, so that nothing
    cancels, of which Lion would take the sign of a rounding."""
    return {
        name: array
        * np.random.default_rng([step, *name.encode()])
        .uniform(0.5, 1.5, array.shape)
        .astype(np.float32)
        for name, array in result.gradients.items()
    }


def _after(config: Config, state: TrainState, moved: Moved) -> TrainState:
    _, to_params = lora.trainable(state.params, config)
    return state._replace(
        params=to_params(moved.trained),
        opt_state=moved.opt_state,
        step=state.step + 1,
        samples=state.samples + config.train.global_batch_size,
        extras={**state.extras, **moved.averages},
    )
