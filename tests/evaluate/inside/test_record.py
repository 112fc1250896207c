"""The recorded pass: attention weights reproduce the model's attention in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.evaluate.inside import record
from mtnlg_jax.evaluate.inside.logit_lens import attention_maps, read_layers
from mtnlg_jax.evaluate.inside.record import ATTENTION, MLP, run_recorded

# Slopes of ALiBi; caps, windows and norms on both sides; sinks and windows; post-norm, both ways;
# parallel halves.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "gptj", "bloom")]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", *SLOW])
def test_weights_applied_to_the_values_are_the_attention(family, name, monkeypatch):
    model, tokens, causal = family(name)
    seen = []
    attend = record.attention

    def watched(q, k, v, **options):
        result = attend(q, k, v, **options)
        if options.get("impl") != "xla":  # the model's own call
            seen.append((v, result[0] if options["return_lse"] else result))
        return result

    monkeypatch.setattr(record, "attention", watched)

    @jax.jit
    def run(tokens):
        return run_recorded(model, tokens, causal, maps=True), list(seen)

    found, seen = run(tokens[None])
    weights = np.asarray(found.maps_LBNST)
    total = weights.sum(-1)
    share = np.ones_like(total)
    if found.sinks_LBNS is not None:
        share = 1 - np.asarray(found.sinks_LBNS)
    assert (found.sinks_LBNS is not None) == (name == "gpt_oss")
    np.testing.assert_allclose(total, share, atol=1e-5)
    assert len(seen) == model.config.num_layers
    for layer, (v, out) in enumerate(seen):
        values = np.repeat(np.asarray(v), weights.shape[2] // v.shape[2], 2)
        wanted = np.asarray(out) * share[layer].swapaxes(1, 2)[..., None]
        got = np.einsum("bnst,btnh->bsnh", weights[layer], values)
        np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["gemma2", *SLOW])
def test_the_last_layer_of_the_lens_is_the_model(family, name):
    model, tokens, causal = family(name)
    logits = np.asarray(jax.jit(lambda x: model(x, causal=causal))(tokens[None]))[0]
    lens = read_layers(model, tokens, causal, guesses=3)
    assert lens.guesses_LSK.shape == (model.config.num_layers + 1, len(tokens), 3)
    np.testing.assert_array_equal(lens.guesses_LSK[-1], np.argsort(-logits, -1)[:, :3])
    if not causal:  # the own token, which it reads, and not the next one is predicted
        assert (lens.ranks_LS == -1).all() and np.isnan(lens.log_probs_LS).all()
        return
    wanted = jax.nn.log_softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(lens.log_probs_LS[-1, :-1], wanted, atol=1e-4)
    np.testing.assert_allclose(
        lens.probabilities_LSK[-1],
        -np.sort(-np.asarray(jax.nn.softmax(logits)), -1)[:, :3],
        rtol=1e-3,
    )
    ranks = (logits[:-1] > logits[np.arange(len(tokens) - 1), tokens[1:]][:, None]).sum(-1)
    np.testing.assert_array_equal(lens.ranks_LS[-1, :-1], ranks)
    assert (lens.ranks_LS[:, -1] == -1).all() and np.isnan(lens.log_probs_LS[:, -1]).all()
    np.testing.assert_allclose(lens.divergence_LS[-1], 0, atol=1e-5)
    assert lens.divergence_LS[0].max() > 1e-3


def test_a_row_adds_up_to_one_with_its_sink(family):
    model, tokens, causal = family("gpt_oss")
    maps = attention_maps(model, tokens, causal)
    total = maps.attention_LNST.sum(-1) + maps.sinks_LNS
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert maps.sinks_LNS.max() > 0.01


def test_a_change_reaches_later_layers_alone(family):
    model, tokens, causal = family("gptj")
    plain = jax.jit(lambda x: run_recorded(model, x, causal))(tokens[None])

    def no_mlp(point, layer, x_BSD):
        return jnp.zeros_like(x_BSD) if (point, layer) == (MLP, 0) else x_BSD

    changed = jax.jit(lambda x: run_recorded(model, x, causal, change=no_mlp))(tokens[None])
    # Halves of this family are parallel, so the attention of the layer is unchanged.
    np.testing.assert_allclose(changed.at(ATTENTION)[0], plain.at(ATTENTION)[0], atol=1e-6)
    np.testing.assert_allclose(
        changed.residual_LBSD[1], plain.residual_LBSD[1] - plain.mlp_LBSD[0], atol=1e-5
    )
    assert np.abs(changed.residual_LBSD[2] - plain.residual_LBSD[2]).max() > 1e-3
