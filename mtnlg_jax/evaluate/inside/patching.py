"""Activation patching: which activations carry the difference between two prompts.

Run the model on a corrupt prompt, put an activation of the clean prompt's pass in its place, and
see how much of the clean prompt's answer returns (Meng 2022, "Locating and Editing Factual
Associations in GPT", section 2; Heimersheim and Nanda 2024, "How to use and interpret activation
patching").
"""

# Shapes: B patches, S positions, D width, L layers, P points

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from mtnlg_jax.evaluate.inside.record import POINTS, predict, run_recorded
from mtnlg_jax.model.transformer import Transformer

EVERY = -1  # as a position: all of them
NOWHERE = -1  # as a layer: nothing is patched


class Patched(NamedTuple):
    """The shares of the logit difference between two answers that patches recover.

    A difference is logit(first answer) - logit(second answer) behind the last token.
    """

    clean: float  # difference of the clean prompt
    corrupt: float  # of the corrupt one
    # float32; of POINTS, layers and positions: 0 as without the patch, 1 as the clean prompt.
    recovered_PLS: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 5))
def _differences(graph, params, prompts, answers, patches, causal):
    """Return the logit difference of each of the (chunks, B, 3) patches, and of both prompts."""
    model = nnx.merge(graph, params)
    clean_S, corrupt_S = prompts
    clean = run_recorded(model, clean_S[None], causal)

    def difference(x_BSD):
        logits = predict(model, x_BSD[:, -1:])[:, 0]
        return logits[:, answers[0]] - logits[:, answers[1]]

    def patched(patches_B3):
        point_B, layer_B, position_B = patches_B3.T

        def change(point, layer, x_BSD):
            here_B = (point_B == POINTS.index(point)) & (layer_B == layer)
            at_S = jnp.arange(x_BSD.shape[1])
            at_BS = (position_B[:, None] == at_S[None]) | (position_B[:, None] == EVERY)
            replaced_BS = here_B[:, None] & at_BS
            return jnp.where(replaced_BS[..., None], clean.at(point)[layer], x_BSD)

        rows_BS = jnp.broadcast_to(corrupt_S, (patches_B3.shape[0], corrupt_S.shape[0]))
        return difference(run_recorded(model, rows_BS, causal, change=change).residual_LBSD[-1])

    nothing = jnp.array([[0, NOWHERE, 0]])
    return (
        difference(clean.residual_LBSD[-1])[0],
        patched(nothing)[0],
        lax.map(patched, patches),
    )


def measure_patches(
    model: Transformer,
    clean,
    corrupt,
    answers: tuple[int, int],
    patches: np.ndarray,
    causal: bool = True,
    batch: int = 32,
) -> tuple[float, float, np.ndarray]:
    """Return the logit differences (clean, corrupt, float32 [n] of ``patches``).

    Args:
      clean, corrupt: token ids of two prompts of one length.
      answers: ids of the tokens whose logits are compared.
      patches: int [n, 3]: index in POINTS, layer (or NOWHERE), position (or EVERY).
      batch: patches in one pass.
    """
    patches = np.asarray(patches, np.int32).reshape(-1, 3)
    count = len(patches)
    batch = max(1, min(batch, count))
    # The last chunk is filled up with patches of nothing.
    filled = np.concatenate([patches, np.full((-count % batch, 3), NOWHERE, np.int32)])
    prompts = jnp.asarray(np.stack([clean, corrupt]), jnp.int32)
    found = _differences(
        *nnx.split(model), prompts, jnp.asarray(answers), filled.reshape(-1, batch, 3), causal
    )
    return float(found[0]), float(found[1]), np.asarray(found[2]).reshape(-1)[:count]


def patch_everywhere(
    model: Transformer,
    clean,
    corrupt,
    answers: tuple[int, int],
    causal: bool = True,
    batch: int = 32,
) -> Patched:
    """Patch each point of each layer at each position, one at a time, all in one program.

    Raises ValueError where both prompts have the same difference, so that nothing can return.
    """
    layers = model.config.num_layers
    shape = (len(POINTS), layers, len(clean))
    patches = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), 1)
    before, after, found = measure_patches(model, clean, corrupt, answers, patches, causal, batch)
    gap = before - after
    if not np.isfinite(gap) or abs(gap) < 1e-4:
        raise ValueError(
            f"the logits of the answers differ by {before:.5f} behind the clean prompt and by "
            f"{after:.5f} behind the corrupt one: there is nothing to recover; give prompts that "
            "change which answer is likely"
        )
    return Patched(before, after, ((found - after) / gap).reshape(shape))
