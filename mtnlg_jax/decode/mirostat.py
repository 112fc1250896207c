"""Mirostat 2.0: sampling that is steered to a mean surprise (Basu 2021, algorithm 2).

The surprise of token x is -log2 p(x), in bits, where p is the distribution after penalties and
temperature, before anything is cut. Each row has a limit mu, at first 2 tau. A step draws among
the tokens whose surprise is at most mu (the best one always stays), and then sets

    mu <- mu - eta (surprise of the token drawn - tau).

As in the authors' code, the surprise is that before the cut; llama.cpp takes the one after it.
"""

# Shapes: B rows, V vocabulary

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.decode.batched_settings import Settings
from mtnlg_jax.decode.processors import NEG_INF, temper, where_used


def start(settings: Settings) -> jax.Array:
    """Return the limit of each row before its first token, in bits (B,)."""
    return 2 * jnp.asarray(settings.rows.mirostat_tau, jnp.float32)


def cut(processed_BV, settings: Settings, mu_B) -> jax.Array:
    """Forbid the tokens whose surprise is above the row's limit, in rows with a mirostat_tau."""

    def limit(processed_BV):
        above_BV = _surprise(processed_BV, settings) > mu_B[:, None]
        above_BV &= processed_BV < processed_BV.max(-1, keepdims=True)
        return jnp.where(
            above_BV & (settings.rows.mirostat_tau > 0)[:, None], NEG_INF, processed_BV
        )

    return where_used(settings, ("mirostat_tau",), limit, processed_BV)


def steer(mu_B, tokens_B, processed_BV, settings: Settings) -> jax.Array:
    """Return the limits after ``tokens_B`` were drawn; ``processed_BV`` is from before `cut`."""

    def step(mu_B):
        surprise_BV = _surprise(processed_BV, settings)
        surprise_B = jnp.take_along_axis(surprise_BV, tokens_B[:, None], 1)[:, 0]
        tau_B = settings.rows.mirostat_tau
        steered_B = mu_B - settings.rows.mirostat_eta * (surprise_B - tau_B)
        return jnp.where(tau_B > 0, steered_B, mu_B)

    return where_used(settings, ("mirostat_tau",), step, mu_B)


def _surprise(processed_BV, settings: Settings) -> jax.Array:
    tempered_BV = temper(processed_BV, settings.rows.temperature)
    return -jax.nn.log_softmax(tempered_BV, -1) / np.log(2).astype(np.float32)
