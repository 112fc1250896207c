"""One training step: loss and gradients in one shard_map over the whole mesh, then the update.

The number of micro-batches in use is traced, so a batch ramp (`batch`) does not compile again.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtnlg_jax import compat
from mtnlg_jax.config import Config
from mtnlg_jax.train import averages, expert_loads, lora, offload, quantized_base, spike_rule
from mtnlg_jax.train.distill import Distillation
from mtnlg_jax.train.executables import KeptStep
from mtnlg_jax.train.gradients import make_loss_and_gradients
from mtnlg_jax.train.optimizer import optimizer_of
from mtnlg_jax.train.private_gradients import make_private_gradients
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
    sparse: bool = False,
) -> jax.stages.Wrapped:
    """Return the jitted step.

    It maps (state, batch, micro_batches, sequences, rate_scale) to (state, metrics) and donates the
    state. ``batch`` holds arrays (M, B, S), of which ``micro_batches`` (of M) and ``sequences`` are
    in use; see `inputs.batch_at`. ``rate_scale`` is the factor on the learning rate in this stage.
    With a ``distillation`` the teacher's parameters are one more argument, the last; with
    differential privacy `privacy.noise_key` is. A spike (`spike_rule`) and a step
    whose loss or gradient norm is not finite change only the counters. With differential privacy
    only the noised gradients decide: to skip by anything else would tell of single examples.

    Args:
      causal: whether attention is causal, as for the causal objective, or bidirectional.
      total_samples: sequences of the whole run, as in `learning_rate`.
      sparse: as in `cross_entropy`; the loss is the same.
    """
    advance = make_advance(config, mesh, total_samples)
    moe = config.model.moe
    # The layers of a quantized base are assembled where they are applied, so none can be counted.
    private = config.optimizer.private
    counting = moe.num_moe_experts > 0 and not quantized_base.used(config) and not private
    if private:
        private_gradients = make_private_gradients(config, mesh, causal)
    else:
        loss_and_gradients = make_loss_and_gradients(
            config, mesh, causal, distillation, counting, sparse
        )
    shardings = state_shardings(config, mesh)

    def train_step(state: TrainState, batch, micro_batches, sequences, rate_scale, *last):
        key = dropout_key(config, state.step)
        # With LoRA the optimizer sees only the factors A and B. Without it both are the parameters.
        model = lora.computed(state.params, config)
        trained, to_params = lora.trainable(state.params, config)
        figures = {}
        loads: list[jax.Array] = []
        if private:
            loss, grads, figures = private_gradients(
                model, batch, micro_batches, key, state.step, sequences, *last
            )
        else:
            loss, grads, *loads = loss_and_gradients(model, batch, micro_batches, key, *last)

        # Global arrays: the sums go over all shards. This is the norm before clipping, and with
        # differential privacy that of the noised mean.
        grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
        # A gradient may overflow although the loss is finite, so both are checked.
        finite = (private or jnp.isfinite(loss)) & jnp.isfinite(grad_norm)
        taken, parts, spiked = spike_rule.judge(config, causal, state, loss, grad_norm, finite)

        moved = advance(state, grads, loads, sequences, rate_scale, taken)

        # An elementwise selection, not a branch: the update is always computed, and a NaN in it is
        # not selected.
        select = functools.partial(offload.select, taken)

        # The counters always advance: the data of a non-finite step is not read again.
        new_state = TrainState(
            params=to_params(select(moved.trained, trained)),
            opt_state=select(moved.opt_state, state.opt_state),
            step=state.step + 1,
            samples=state.samples + sequences,
            nonfinite_streak=jnp.where(finite, 0, state.nonfinite_streak + 1),
            nonfinite_total=state.nonfinite_total + ~finite,
            extras=parts | select(moved.averages, averages.held(state)),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": moved.rate,
            "nonfinite_streak": new_state.nonfinite_streak,
            "nonfinite_total": new_state.nonfinite_total,
            **(figures | spiked),
        }
        if counting:
            metrics |= expert_loads.metrics_of(loads[0], moe)
        return new_state, metrics

    # The new state takes the memory of the old one. Its shardings are fixed, so that the output of
    # a step is a valid input of the next without a new compilation.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


class Moved(NamedTuple):
    """What a step changes by its gradients, beside its counters."""

    rate: Any  # learning rate, float32
    updates: Any  # the step subtracts rate x updates
    trained: Any  # parameters, those that are trained
    opt_state: Any
    averages: dict[str, Any]  # of the weights, a part of `state.TrainState.extras`


def make_advance(config: Config, mesh: Mesh, total_samples: int | None) -> Callable:
    """Return (state, gradients, loads, sequences, rate_scale, taken) -> `Moved`, all that a step
    does with its gradients. ``loads`` is empty, or has the tokens of the experts (L, E)."""
    update = make_update(config, mesh, total_samples)

    def advance(state: TrainState, grads, loads, sequences, rate_scale, taken) -> Moved:
        trained, _ = lora.trainable(state.params, config)
        # The schedule follows the samples at the end of the step, so that the first step of a
        # warm-up does not have rate 0.
        samples = state.samples + sequences
        rate, updates, opt_state = update(
            grads, state.opt_state, trained, samples, rate_scale, taken
        )
        with jax.named_scope("optimizer"):  # planning.timeline finds it by this name
            params = jax.tree.map(lambda p, u: p - rate * u, trained, updates)
        # With adapters the base is frozen, and the routers' biases are part of it.
        if loads and config.model.moe.moe_router_enable_expert_bias and not lora.used(config):
            params = expert_loads.balanced(params, loads[0], config)
        averaged = averages.updated(config, state, params)
        return Moved(rate, updates, params, opt_state, averaged)

    return advance


def make_update(config: Config, mesh: Mesh, total_samples: int | None) -> Callable:
    """Return (gradients, optimizer state, trained parameters, samples, rate_scale, taken) ->
    (rate, updates, new optimizer state) of a step that ends after ``samples``.

    The step subtracts rate x update. Where it is not ``taken`` (bool), all of it is dropped.
    """
    optimizer = optimizer_of(config, mesh)

    def update(grads, opt_state, trained, samples, rate_scale, taken):
        rate = learning_rate(config, samples, total_samples) * rate_scale
        # Clipping acts inside the optimizer. The decoupled weight decay is part of the updates, so
        # the rate scales it as well.
        with jax.named_scope("optimizer"):
            return rate, *optimizer.update(grads, opt_state, trained, finite=taken)

    return update


def dropout_key(config: Config, step: jax.Array) -> jax.Array:
    """Return the key data of the masks of a step after ``step`` others."""
    # It depends only on the seed and the step, so a resumed run repeats it.
    return jax.random.key_data(jax.random.fold_in(jax.random.key(config.train.seed), step))


class CompiledStep:
    """A jitted step, compiled at its first call under the compilation limit of ``watchdog``.

    All calls must have the same shapes, types and shardings; ``last`` are their last arguments.
    ``kept`` may have the program already, which is then neither traced nor compiled.
    ``fingerprint`` is the hash of the lowered program (StableHLO text); it is "" before the first
    call.
    """

    def __init__(
        self,
        train_step: jax.stages.Wrapped,
        watchdog: Watchdog,
        last: tuple = (),
        kept: KeptStep | None = None,
    ):
        self._train_step = train_step
        self._watchdog = watchdog
        self._last = last
        self._kept = kept
        self._compiled: jax.stages.Compiled | None = None
        self.fingerprint = ""

    def __call__(self, *args: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        args += self._last
        if self._compiled is None:
            self._watchdog.enter("compilation")
            self._watchdog.clock.enter("compile")
            found = self._kept.load(args) if self._kept else None
            found = found or self._compile(self._train_step, args)
            self._compiled = found[0]
            self.fingerprint = found[1]
            self._watchdog.clock.enter("steps")
        return self._compiled(*args)

    def _compile(
        self, train_step: jax.stages.Wrapped, args: tuple
    ) -> tuple[jax.stages.Compiled, str]:
        """Return (the compiled step, the hash of its lowered text)."""
        start = time.perf_counter()
        # Compiled ahead of the call: the text of the program becomes known, and arguments of
        # another shape later are an error instead of a silent second compilation.
        lowered = train_step.lower(*args)
        # `processes.check_same_run` compares it: processes with different programs may wait for
        # each other forever.
        text = fingerprint(lowered.as_text())
        keeps = self._kept is not None and self._kept.keeps
        with compat.without_compilation_cache() if keeps else contextlib.nullcontext():
            compiled = lowered.compile()
        if self._kept:
            self._kept.keep(compiled, text, time.perf_counter() - start)
        return compiled, text
