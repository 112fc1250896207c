"""Check what a run keeps of its data: counts of every stage, and no text."""

import json
import random

import pytest

from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.provenance import provenance
from mtnlg_jax.data.recipe.run import make
from mtnlg_jax.data.recipe.settings import Recipe, Source


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = "the whale swam north past a cold lighthouse and slept until morning came".split()
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(words, k=80)) + f" secret{i}."} for i in range(40)]
    (folder / "hidden.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, rows[0], {"text": "short"}]))
    )
    return folder


def test_a_prepared_folder_keeps_its_counts_and_no_text(texts, tmp_path):
    info = prepare(texts, tmp_path / "out", vocab_size=300, progress=False)
    planted = [{"secret": "1234", "copies": 4}, {"secret": "5678", "copies": 16}]
    planted.append({"secret": "9999", "copies": 0})
    (tmp_path / "out/canaries.json").write_text(json.dumps({"seed": 1, "canaries": planted}))
    (found,) = provenance([str(tmp_path / "out")] * 2)
    for key in ("fingerprint", "tokenizer", "train", "heldout"):
        assert found["prepared"][key] == info[key]
    assert found["canaries"] == {"planted": 2, "copies": 20, "controls": 1}
    kept = json.dumps(found)
    for hidden in ("secret", "1234", "hidden.jsonl", "whale"):
        assert hidden not in kept


def test_a_recipe_keeps_what_each_stage_removed(texts, tmp_path):
    recipe = Recipe(
        sources=(Source("sea", (str(texts),), settings=("clean.min_tokens=16",)),),
        stages=("clean", "duplicates", "tokens"),
        tokenizer="unigram",
        vocab_size=300,
    )
    info = make(recipe, None, str(tmp_path / "out"), progress=False)
    for path in (tmp_path / "out", tmp_path / "out/sources/sea"):
        (found,) = provenance([str(path)])
        stages = found["report"]["stages"]
        assert [stage["name"] for stage in stages] == [stage["name"] for stage in info["stages"]]
        assert [stage["documents"] for stage in stages] == [
            stage["documents"] for stage in info["stages"]
        ]
        assert found["report"]["inputs"]["files"] == 1
        assert "examples" not in stages[0] and "swam" not in json.dumps(found)


def test_missing_and_damaged_files_leave_the_path(tmp_path):
    (tmp_path / "prepared.json").write_text("{")
    (tmp_path / "report.json").write_text("[1]")
    assert provenance([str(tmp_path), "gone"]) == [{"path": str(tmp_path)}, {"path": "gone"}]
