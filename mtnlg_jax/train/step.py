"""One training step: loss and gradients in one manual region over the whole mesh, then the update.

The number of micro-batches in use is traced, so a ramp of the batch (`batch`) never compiles again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtnlg_jax.config import Config
from mtnlg_jax.train import lora
from mtnlg_jax.train.distill import Distillation
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.optimizer import make_optimizer
from mtnlg_jax.train.processes import fingerprint
from mtnlg_jax.train.schedule import learning_rate
from mtnlg_jax.train.state import TrainState, state_shardings
from mtnlg_jax.train.watchdog import Watchdog


def make_train_step(
    config: Config,
    mesh: Mesh,
    causal: bool,
    distillation: Distillation | None = None,
    total_samples: int | None = None,
) -> Callable:
    """jitted (state, batch, micro_batches, sequences, rate_scale) -> (state, metrics); the state is
    donated. With a ``distillation`` the teacher's parameters are the last argument.
    ``total_samples`` is for `learning_rate`.

    A step whose loss or gradient norm is not finite changes nothing but the counters."""
    optimizer = make_optimizer(config.optimizer)
    loss_and_gradients = make_loss_and_gradients(config, mesh, causal, distillation)
    shardings = state_shardings(config, mesh)

    def step(state, batch, micro_batches, sequences, rate_scale, *teacher):
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        plain, learnt, to_learnt, to_params = lora.opened(state.params, config)
        loss, grads = loss_and_gradients(
            plain, batch, micro_batches, jax.random.key_data(key), *teacher
        )
        grads = to_learnt(grads)
        grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        samples = state.samples + sequences
        rate = learning_rate(config, samples, total_samples) * rate_scale
        updates, opt_state = optimizer.update(grads, state.opt_state, learnt)
        params = jax.tree.map(lambda p, u: p - rate * u, learnt, updates)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        new_state = TrainState(
            params=to_params(keep(params, learnt)),
            opt_state=keep(opt_state, state.opt_state),
            step=state.step + 1,
            samples=samples,
            nonfinite_streak=jnp.where(good, 0, state.nonfinite_streak + 1),
            nonfinite_total=state.nonfinite_total + ~good,
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "nonfinite_streak": new_state.nonfinite_streak,
            "nonfinite_total": new_state.nonfinite_total,
        }
        return new_state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


class CompiledStep:
    """The jitted ``function``, compiled at its first call under the long limit of ``watchdog``.

    All calls have the same shapes, types and shardings. ``fingerprint`` is of the lowered text that
    the compiler was given, "" before the first call.
    """

    def __init__(self, function, watchdog: Watchdog):
        self._function = function
        self._watchdog = watchdog
        self._compiled = None
        self.fingerprint = ""

    def __call__(self, *args):
        if self._compiled is None:
            self._watchdog.enter("compilation")
            lowered = self._function.lower(*args)
            self.fingerprint = fingerprint(lowered.as_text())
            self._compiled = lowered.compile()
        return self._compiled(*args)
