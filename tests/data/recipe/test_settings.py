"""What flags change in a recipe."""

import dataclasses

import pytest

from mtnlg_jax.data.recipe.settings import DecontaminationConfig, Recipe, Source, with_flags

RECIPE = Recipe(
    sources=(Source("a", ("a",)), Source("b", ("b",), text_key="body"), Source("c", ("c",))),
    decontamination=DecontaminationConfig(test_sets=("old",), test_keys=("question",)),
)


def test_nothing_given_changes_nothing():
    assert with_flags(RECIPE) == RECIPE


def test_what_is_given_replaces_what_the_recipe_has():
    changed = with_flags(
        RECIPE, stages=["clean"], test_sets=["new"], skip_sources=["c"], text_key="text_2", seed=3
    )
    assert changed == dataclasses.replace(
        RECIPE,
        sources=(
            Source("a", ("a",), text_key="text_2"),
            # A key of its own stays.
            Source("b", ("b",), text_key="body"),
        ),
        stages=("clean",),
        decontamination=DecontaminationConfig(test_sets=("new",), test_keys=("question",)),
        text_key="text_2",
        seed=3,
    )


def test_a_source_to_skip_must_exist():
    with pytest.raises(ValueError, match="--skip_sources=d is not a source of the recipe: a, b, c"):
        with_flags(RECIPE, skip_sources=["d"])
    with pytest.raises(ValueError, match="it names none"):
        with_flags(Recipe(), skip_sources=["d"])
