"""Maximal update parametrization (muP; Yang 2022, Tensor Programs V, arXiv 2203.03466, table 8).

Settings found for a narrow base model, above all the learning rate, hold for a wide one. The dims
in a parameter's name tell what its inputs and outputs are, and with m = width / base width:

| kind | initial std | rate of AdamW, Lion | rate of Muon, SOAP |
| --- | --- | --- | --- |
| inputs and outputs of a growing width | m^-1/2 | m^-1 | m^-1/2 |
| inputs of a growing width, outputs of a fixed one: head, routers | m^-1 | m^-1 | m^-1 |
| all others: embeddings, norms, biases | 1 | 1 | 1 |

Muon's updates are orthogonal and scaled to a fixed RMS, so their spectral norm grows as m^1/2 and
not as m. So does that of SOAP, whose updates have numbers of equal size in the eigenbases of the
gradients: no direction holds most of them, as in Adam's, where the signs of a gradient of low rank
add up. Before its bases turn first, SOAP is Adam and has Adam's rate.

The factors act on the updates alone: the decoupled weight decay stays as it is. A head that is the
embedding table keeps the table's factors, and its logits are divided by m
(`ModelConfig.logits_multiplier`).
"""

import math
from typing import Any

import jax
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.parallel.mesh import parameter_name

# Letters of the dims that grow with the width of the model. C, the width of the masked head's
# transform, is hidden_size as well.
_GROWING = frozenset("DNKF")
_MASKED_HEAD = "w_mlm_DC"
# Optimizers whose updates are whitened: singular values of equal size, not entries.
_WHITENED = ("muon", "soap")


def sides(name: str) -> tuple[str, str]:
    """Return (input dims, output dims) of the matrix ``name``, without those of layers and
    experts: ("D", "NH") for w_q_DNH, ("NH", "D") for w_o_NHD. A head's rows are its outputs."""
    dims = name.rpartition("_")[2]
    if name.startswith("head_"):
        return dims[1:], dims[0]
    first = 1 if dims[0] == "E" else 0
    split = first + 1 if dims[first] == "D" else len(dims) - 1
    return dims[first:split], dims[split:]


def _grows(name: str) -> tuple[bool, bool]:
    """Return whether the inputs and the outputs of the parameter ``name`` grow."""
    if not name.startswith(("w_", "head_")):
        return False, False
    growing = _GROWING | {"C"} if name == _MASKED_HEAD else _GROWING
    inputs, outputs = sides(name)
    return not growing.isdisjoint(inputs), not growing.isdisjoint(outputs)


def initial_factor(name: str, ratio: float) -> float:
    """Return the factor of the initial values of the parameter ``name``."""
    inputs, outputs = _grows(name)
    if not inputs:
        return 1.0
    return 1 / math.sqrt(ratio) if outputs else 1 / ratio


def rate_factor(name: str, ratio: float, optimizer: str = "adamw") -> float:
    """Return the factor of the updates of the parameter ``name`` by ``optimizer``."""
    inputs, outputs = _grows(name)
    if not inputs:
        return 1.0
    return 1 / math.sqrt(ratio) if outputs and optimizer in _WHITENED else 1 / ratio


def factor_before_turns(name: str, ratio: float) -> float:
    """Return the factor of SOAP's updates of ``name`` while its bases are the identity, beside that
    of `rate_factor`: together they are Adam's."""
    return rate_factor(name, ratio) / rate_factor(name, ratio, "soap")


def scale_initial(params: nnx.State, model: ModelConfig) -> nnx.State:
    """Return the parameters ``params``, drawn as those of the base model, as muP starts them."""
    if model.mup_ratio == 1:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: initial_factor(parameter_name(path), model.mup_ratio) * leaf, params
    )


def scale_updates(updates: Any, model: ModelConfig, labels: Any) -> Any:
    """Return ``updates`` times their `rate_factor`; ``labels`` has the optimizer of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, label: rate_factor(parameter_name(path), model.mup_ratio, label) * leaf,
        updates,
        labels,
    )
