"""Paired tests of two results files, on numbers counted by hand."""

import json
import re

import pytest

from mtnlg_jax.evaluate.harness_tasks import compare, report, stored


def _results(docs, prompt="p", **values):
    metrics = {name: {"value": sum(row) / len(row), "stderr": None} for name, row in values.items()}
    task = {"per_row": {"docs": docs} | values, "metrics": metrics, "prompt_hash": prompt}
    task["num_fewshot"] = 0
    return {"kind": "tasks", "tasks": {"t": task}}


def test_mcnemar_is_the_binomial_of_the_rows_that_differ():
    # Five rows gained, one lost: 2 (1 + 6) / 2^6.
    assert compare.mcnemar([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1]) == pytest.approx(14 / 64)
    assert compare.mcnemar([1, 0], [1, 0]) == 1.0


def test_the_paired_t():
    # Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3); p of 2 degrees of freedom.
    found = compare.paired_t([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    t = 2 * 3**0.5
    assert found == pytest.approx(1 - t / (2 + t**2) ** 0.5)
    assert (
        compare.paired_t([1.0, 1.0], [1.0, 1.0]) == 1.0 and compare.paired_t([1.0], [2.0]) is None
    )


def test_metrics_of_both_results():
    ours = _results(["a", "b", "c", "d"], acc=[1, 1, 1, 0], perplexity=[-1.0, -2.0, -3.5, -1.0])
    theirs = _results(["a", "b", "c", "d"], acc=[0, 0, 1, 0], perplexity=[-2.0, -2.5, -3.0, -2.0])
    accuracy, perplexity = compare.compare(ours, theirs)
    assert (accuracy["difference"], accuracy["p_value"], accuracy["test"]) == (0.5, 0.5, "McNemar")
    assert accuracy["rows"] == 4 and accuracy["same_prompts"]
    assert perplexity["test"] == "paired t" and 0 < perplexity["p_value"] < 1
    told = report.describe_differences([accuracy, perplexity], "old.json")
    assert told.startswith("against old.json:") and re.search(r"\+0\.5000 +0\.5  McNemar", told)


def test_rows_that_differ_are_told_and_pair_by_content():
    ours = _results(["a", "b", "b", "new", "b"], acc=[1, 1, 0, 1, 1])
    theirs = _results(["b", "a", "gone", "b"], prompt="other", acc=[0, 1, 1, 0])
    (found,) = compare.compare(ours, theirs)
    # Pairs: a 1 1, the first b 1 0, the second b 0 0.
    assert (found["rows"], found["only_here"], found["only_there"]) == (3, 2, 1)
    assert found["p_value"] == 1.0 and not found["same_prompts"]
    assert "the rows differ: 3 are in both, 2 only here, 1 only" in report.describe_differences(
        [found], "x"
    )


def test_tasks_pair_by_name_and_number_of_examples():
    ours = _results(["a"], acc=[1])
    theirs = _results(["a"], acc=[0])
    theirs["tasks"] = {
        "t@4": theirs["tasks"]["t"] | {"num_fewshot": 4},
        "t@0": theirs["tasks"]["t"],
    }
    (found,) = compare.compare(ours, theirs)
    assert found["difference"] == 1.0
    compare.check({"t": 0}, theirs)
    compare.check({"t@4": 4, "other": 0}, theirs)
    with pytest.raises(ValueError, match="none of the tasks t with 1 examples; it has t@4 with 4"):
        compare.check({"t": 1}, theirs)


def test_a_metric_of_all_rows_together_has_no_test():
    ours = _results(["a", "b"], acc=[1, 0])
    for task in (ours["tasks"]["t"],):
        task["metrics"]["f1"] = {"value": 0.5}
        task["per_row"]["f1"] = [[0, 1], [1, 1]]
    found = compare.compare(ours, ours)[1]
    assert (found["test"], found["p_value"], found["difference"]) == (None, None, 0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a results file"),
        ('{"kind": "audit", "tasks": {"a": {}}}', "is not a results file"),
        ('{"kind": "tasks", "tasks": {"a": {}}}', "has no values of rows"),
    ],
)
def test_a_file_that_is_not_one_of_results(tmp_path, content, message):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        stored.read_results(str(path))
    path.write_text(json.dumps(_results(["a"], acc=[1])))
    assert stored.read_results(str(path))["kind"] == "tasks"


def test_the_file_of_a_run_keeps_earlier_tasks(tmp_path):
    folder, name = stored.place(str(tmp_path), 5)
    assert (folder, name) == (f"{tmp_path}/evaluations", "tasks_5.json")
    assert stored.earlier(folder, name) == {}
    path = tmp_path / "evaluations/tasks_5.json"
    path.parent.mkdir()
    path.write_bytes(report.as_json(_results(["a"], acc=[1])))
    assert list(stored.earlier(folder, name)) == ["t"]
    path.write_text(json.dumps(_results(["a"], acc=[1]) | {"commit": "c1", "created": "then"}))
    kept = stored.earlier(folder, name)["t"]
    assert (kept["commit"], kept["created"], kept["versions"]) == ("c1", "then", None)
    assert stored.replaced({"t": kept}, {"t": kept, "new": kept}) == {}
    assert stored.replaced({"t": kept | {"limit": 9}}, {"t": kept}) == {"t": "limit=9"}
    assert stored.replaced({"t": kept}, {"t": kept | {"prompt_hash": "q"}}) == {
        "t": "other prompts"
    }
    for content in ("{", "[]", '{"kind": "audit", "tasks": {}}', '{"kind": "tasks", "tasks": [1]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not a results file of --tasks; remove it"):
            stored.earlier(folder, name)
