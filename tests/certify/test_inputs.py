"""Check the inputs of certificates: text as real batches have it, and parameters that hide
nothing."""

import dataclasses

import jax
import numpy as np

from mtnlg_jax.certify.compute import objectives_of, plain
from mtnlg_jax.certify.inputs import open_data, parameters_of, write_data
from mtnlg_jax.certify.shrink import small_copy
from mtnlg_jax.config import (
    Config,
    ModelConfig,
    MoEConfig,
    PrefixConfig,
    StageConfig,
    TrainConfig,
)
from mtnlg_jax.model.params import names_of
from mtnlg_jax.train.inputs import rows_at

MODEL = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4)


def small_of(folder, model=MODEL, **train):
    config = Config(model=model, train=TrainConfig(global_batch_size=32, **train))
    return small_copy(config, 8, write_data(folder, 0)).config


def test_rows_have_several_documents_and_words_that_are_not_predicted(tmp_path):
    config = small_of(tmp_path)
    rows_of, sequences = rows_at(config, open_data(config), 0, 0)
    rows = rows_of(np.arange(sequences))
    assert rows["segment_ids"].max() > 1 and (rows["positions"][:, 1:] == 0).any()
    assert 0 < rows["weights"].mean() < 1


def test_every_other_row_has_an_image(tmp_path):
    prefix = PrefixConfig(width=16, image_size=16, patch_size=8)
    config = small_of(tmp_path, dataclasses.replace(MODEL, prefix=prefix))
    rows_of, sequences = rows_at(config, open_data(config), 0, 0)
    rows = rows_of(np.arange(sequences))
    count = config.model.prefix.positions
    assert (rows["tokens"][::2, :count] == -1 - np.arange(count)).all()
    assert (rows["tokens"][1::2] >= 0).all() and rows["prefix"][::2].std() > 10
    assert (rows["weights"][::2, : count - 1] == 0).all() and rows["weights"][::2].sum() > 0


def test_parameters_are_away_from_where_biases_and_scales_start(tmp_path):
    config = plain(small_of(tmp_path))
    named = names_of(parameters_of(config))
    assert all(np.unique(leaf).size > leaf.size // 2 for leaf in named.values())
    again = names_of(parameters_of(config))
    assert all(np.array_equal(named[name], again[name]) for name in named)


def test_biases_of_many_experts_stay_near_their_scores(tmp_path):
    moe = MoEConfig(64, 4, moe_router_enable_expert_bias=True)
    config = plain(small_of(tmp_path, dataclasses.replace(MODEL, moe=moe)))
    experts = config.model.moe.num_moe_experts
    bias = names_of(parameters_of(config))["blocks.mlp.b_balance_E"]
    # Scores are 1 / E in the mean: a bias many times that would choose the same for all tokens.
    assert 0.1 / experts < bias.std() < 1 / experts


def test_each_objective_of_the_stages_is_found_once(tmp_path):
    stages = (
        StageConfig("masked", masked=1.0),
        StageConfig("both", masked=0.5),
        StageConfig("taught", distill="RUN", distill_temperature=2.0),
        StageConfig("taught again", distill="RUN", distill_temperature=2.0),
    )
    found = objectives_of(small_of(tmp_path, stages=stages))
    assert [each.name for each in found] == [
        *("masked", "causal", "causal, distilled at temperature 2, weight 0.5")
    ]
    assert jax.tree.leaves([each.stage for each in found]) == [0, 1, 2]
