"""Check muP: factors by the dims of names, equal coordinates of all widths, and its rules."""

import dataclasses
import math
import runpy
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from mtnlg_jax.config import Config, ModelConfig, MoEConfig, OptimizerConfig, override, validate
from mtnlg_jax.model import mup
from mtnlg_jax.model.params import names_of
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.parallel.mesh import parameter_name
from mtnlg_jax.train.optimizer import make_optimizer

SCRIPT = Path(__file__).parents[2] / "benchmarks/mup.py"

# name: factors at 4 times the base's width, of the initial values, of AdamW and of Muon
# (Yang 2022, table 8, and its equal forms without multipliers).
FACTORS = {
    "tokens_VD": (1, 1, 1),
    "positions_PD": (1, 1, 1),
    "scale_D": (1, 1, 1),
    "b_in_F": (1, 1, 1),
    "w_q_DNH": (1 / 2, 1 / 4, 1 / 2),
    "w_k_DKH": (1 / 2, 1 / 4, 1 / 2),
    "w_v_DKH": (1 / 2, 1 / 4, 1 / 2),
    "w_o_NHD": (1 / 2, 1 / 4, 1 / 2),
    "w_in_DF": (1 / 2, 1 / 4, 1 / 2),
    "w_out_FD": (1 / 2, 1 / 4, 1 / 2),
    "w_in_EDF": (1 / 2, 1 / 4, 1 / 2),
    "w_out_EFD": (1 / 2, 1 / 4, 1 / 2),
    "w_mlm_DC": (1 / 2, 1 / 4, 1 / 2),
    "head_VD": (1 / 4, 1 / 4, 1 / 4),
    "w_router_DE": (1 / 4, 1 / 4, 1 / 4),
    "w_shared_DC": (1 / 4, 1 / 4, 1 / 4),
    "w_project_CD": (1, 1, 1),
    "w_patch_IC": (1, 1, 1),
}


@pytest.mark.parametrize("name", FACTORS)
def test_the_dims_of_a_name_tell_its_factors(name):
    initial, adam, muon = FACTORS[name]
    assert mup.initial_factor(name, 4) == initial
    assert mup.rate_factor(name, 4) == adam
    assert mup.rate_factor(name, 4, "muon") == mup.rate_factor(name, 4, "soap") == muon
    # Before its bases turn, SOAP is Adam.
    assert mup.factor_before_turns(name, 4) * muon == adam


BASE = ModelConfig(
    num_layers=1,
    hidden_size=32,
    num_attention_heads=4,
    vocab_size=64,
    max_position_embeddings=16,
    tie_embeddings=False,
)
WIDE = dataclasses.replace(BASE, mup_base_hidden_size=8)


def test_every_parameter_starts_with_its_factor():
    model = dataclasses.replace(BASE, moe=MoEConfig(num_moe_experts=2))
    plain = names_of(init_parameters(model, seed=0))
    scaled = names_of(init_parameters(dataclasses.replace(model, mup_base_hidden_size=8), seed=0))
    for name, array in plain.items():
        initial = FACTORS.get(name.rpartition(".")[2], (1,))[0]
        np.testing.assert_allclose(scaled[name], initial * array, rtol=1e-6, err_msg=name)


def test_only_updates_have_factors_and_weight_decay_has_none():
    params = init_parameters(BASE, seed=0)
    grads = jax.tree.map(
        lambda p: np.float32(np.random.default_rng(0).normal(size=p.shape)), params
    )

    def updates(model, decay):
        optimizer = make_optimizer(OptimizerConfig(weight_decay=decay), model=model)
        return names_of(optimizer.update(grads, optimizer.init(params), params)[0])

    plain = updates(BASE, 0.0)
    scaled = updates(WIDE, 0.0)
    decayed = updates(WIDE, 0.5)
    weights = names_of(params)
    for name, update in plain.items():
        factor = FACTORS.get(name.rpartition(".")[2], (1, 1, 1))[1]
        np.testing.assert_allclose(scaled[name], factor * update, rtol=1e-5, err_msg=name)
        if name.rpartition(".")[2].startswith(("w_", "head_", "tokens_")):
            np.testing.assert_allclose(
                decayed[name] - scaled[name], 0.5 * weights[name], atol=1e-6, err_msg=name
            )


@pytest.mark.parametrize("longest", [64, 16])
def test_soap_has_the_factors_of_adam_until_it_has_turned(longest):
    params = init_parameters(BASE, seed=0)
    config = OptimizerConfig(
        name="soap",
        weight_decay=0.0,
        clip_grad_norm=0.0,
        precondition_frequency=2,
        max_precond_dim=longest,
    )

    def updates(model):
        optimizer = make_optimizer(config, model=model)
        state = optimizer.init(params)
        for seed in range(3):
            normal = np.random.default_rng(seed).normal
            grads = jax.tree.map(lambda p, draw=normal: np.float32(draw(size=p.shape)), params)
            found, state = optimizer.update(grads, state, params)
            yield names_of(found)

    for step, (plain, scaled) in enumerate(zip(updates(BASE), updates(WIDE), strict=True)):
        for name, update in plain.items():
            _, adam, white = FACTORS.get(name.rpartition(".")[2], (1, 1, 1))
            # The second step ends with a turn; no side of these matrices is as short as 16.
            factor = white if step == 2 and longest == 64 else adam
            np.testing.assert_allclose(scaled[name], factor * update, rtol=1e-5, err_msg=name)


def test_multipliers_of_the_model_follow_the_widths():
    tied = dataclasses.replace(WIDE, tie_embeddings=True)
    assert WIDE.logits_multiplier == 1 and tied.logits_multiplier == 1 / 4
    assert tied.attention_multiplier is None
    heads = dataclasses.replace(tied, mup_base_kv_channels=2)
    # 1 / sqrt(2) in the base, whose heads are a fourth as wide.
    assert heads.attention_multiplier == pytest.approx(1 / math.sqrt(2) / 4)
    same = dataclasses.replace(tied, mup_base_hidden_size=32, mup_base_kv_channels=8)
    assert same.logits_multiplier == 1
    assert same.attention_multiplier == pytest.approx(1 / math.sqrt(8))


@pytest.mark.parametrize(
    "settings, message",
    [
        (["mup_base_hidden_size=64"], "mup_base_hidden_size=64 is wider than model.hidden_size=32"),
        (["mup_base_hidden_size=0"], "mup_base_hidden_size"),
        (["mup_base_kv_channels=4"], "mup_base_hidden_size=None turns it off; set that too"),
        (
            ["mup_base_hidden_size=8", "mup_base_kv_channels=99"],
            "mup_base_kv_channels=99 is wider than a head of this model, 8",
        ),
    ],
)
def test_a_base_that_does_not_fit_is_refused(settings, message):
    config = Config(model=BASE)
    with pytest.raises(ValueError, match=message):
        for setting in settings:
            config = override(config, f"model.{setting}")
        validate(config)


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(SCRIPT))


def moved(benchmark, width, mup, optimizer):
    # SOAP is Adam in the first step alone.
    options = {"precondition_frequency": 1} if optimizer == "soap" else {}
    model = benchmark["Model"](benchmark["model_of"](width, mup), optimizer, **options)
    return model.moved(rate=2**-7, steps=6)


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("muon", "lion", "soap"))],
)
def test_coordinates_are_flat_over_four_widths(benchmark, optimizer):
    widths = benchmark["WIDTHS"]
    found = [moved(benchmark, width, True, optimizer) for width in widths]
    for name in found[0]:
        slope = benchmark["slope"](widths, [each[name] for each in found])
        assert abs(slope) < 0.25, name
    # The test can fail: without muP the same widths move further the wider they are.
    ends = [moved(benchmark, width, False, optimizer) for width in (widths[0], widths[-1])]
    slope = benchmark["slope"]((widths[0], widths[-1]), [each["logits"] for each in ends])
    assert slope > 0.4


@pytest.mark.slow
def test_a_turned_soap_moves_matrices_as_adam_does(benchmark):
    widths = benchmark["WIDTHS"][:3]

    def slope(name, **options):
        changes = []
        for width in widths:
            model = benchmark["Model"](benchmark["model_of"](width, True), name, **options)
            model.optimizer = of_matrices(model.optimizer)
            params = model.start
            state = model.optimizer.init(params)
            for step in range(9):  # the first three turn the bases alone
                rate = 2.0**-8 if step >= 3 else 0.0
                params, state, _ = model.step(params, state, benchmark["batch"](step), rate)
            model.trained = lambda rate, steps, params=params: (params, [])
            changes.append(model.moved(0.0, 0)["residual stream"])
        return benchmark["slope"](widths, changes)

    # Embeddings, which have Adam's updates, would hide the matrices. Factors of 1/m: 0.5 apart.
    assert abs(slope("soap", precondition_frequency=1) - slope("adamw")) < 0.15


def of_matrices(optimizer):
    """Return ``optimizer`` with updates of 0 for all but the matrices of the blocks."""

    def update(grads, state, params):
        found, state = optimizer.update(grads, state, params)
        kept = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * parameter_name(path).startswith("w_"), found
        )
        return kept, state

    return optax.GradientTransformation(optimizer.init, update)


@pytest.mark.slow
def test_the_best_learning_rate_holds_for_a_wider_model(benchmark):
    rates = benchmark["RATES"][1:-1]

    def best(width, mup):
        model = benchmark["Model"](benchmark["model_of"](width, mup))
        losses = [np.mean(model.trained(rate, 60)[1][-6:]) for rate in rates]
        return benchmark["best_rate"](rates, losses)

    narrow = best(32, True)
    # In powers of two: within one of the base's, and without muP more than two away.
    assert abs(math.log2(best(256, True) / narrow)) < 1
    assert math.log2(narrow / best(256, False)) > 2
