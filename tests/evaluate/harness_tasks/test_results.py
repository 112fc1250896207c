"""Metrics, shares of classes, subcases, examples and records of rows, counted by hand."""

import json
import math
import random

import pytest

from mtnlg_jax.evaluate.harness_tasks import loading, plots, report, results, run

HANS = [
    {
        "premise": f"p{n}",
        "hypothesis": f"h{n}",
        "gold_label": ("entailment", "non-entailment")[n % 2],
        "heuristic": "lexical_overlap" if n < 4 else "subsequence",
        "subcase": ("le_passive", "ln_passive")[n % 2] if n < 4 else ("se_adj", "sn_adj")[n % 2],
    }
    for n in range(6)
]


def _yes(context, continuation):
    """Say True of all but the fourth question."""
    right = " False" if "p3" in context.rpartition("\n\n")[2] else " True"
    return -1.0 if continuation == right else -2.0


def test_hans_by_subcase(known, rows_of):
    folder = rows_of("hans.jsonl", HANS)
    task = run.run_tasks(known(_yes), ["hans"], task_data=folder)["tasks"]["hans"]
    assert task["metrics"]["acc"]["value"] == pytest.approx(4 / 6)
    by_heuristic = task["breakdown"]["heuristic/gold"]
    assert {name: (part["value"], part["rows"]) for name, part in by_heuristic.items()} == {
        "lexical_overlap/entailment": (1.0, 2),
        "lexical_overlap/non-entailment": (0.5, 2),
        "subsequence/entailment": (1.0, 1),
        "subsequence/non-entailment": (0.0, 1),
    }
    assert by_heuristic["lexical_overlap/non-entailment"]["stderr"] == pytest.approx(0.5)
    assert by_heuristic["subsequence/entailment"]["stderr"] is None, "one row has no deviation"
    assert set(task["breakdown"]["subcase"]) == {"le_passive", "ln_passive", "se_adj", "sn_adj"}
    assert task["predicted_classes"] == {
        "True": pytest.approx(5 / 6),
        "False": pytest.approx(1 / 6),
    }
    assert task["target_classes"] == {"True": 0.5, "False": 0.5}
    assert task["balanced_accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    assert "warning" not in task, "five of six is below the limit"


def test_a_model_of_one_class_is_warned_of(known, rows_of):
    folder = rows_of("hans.jsonl", HANS)
    always = known(lambda _, continuation: -float(continuation == " False"))
    results = run.run_tasks(always, ["hans"], task_data=folder)
    task = results["tasks"]["hans"]
    assert task["warning"].startswith("100.0% of the predictions are 'True', which 50.0% of")
    assert task["balanced_accuracy"] == 0.5
    told = report.describe(results)
    assert "hans: predicted True 100.0%, False 0.0%; right True 50.0%, False 50.0%" in told
    assert (
        "hans: warning: 100.0%" in told and "hans, accuracy by subcase: le_passive 1.0000" in told
    )


def test_several_numbers_of_examples_and_their_plots(known, rows_of, tmp_path):
    folder = rows_of("hans.jsonl", HANS)
    model = known(_yes)
    found = run.run_tasks(model, ["hans"], task_data=folder, num_fewshot=[0, 2])["tasks"]
    assert list(found) == ["hans@0", "hans@2"]
    assert [task["num_fewshot"] for task in found.values()] == [0, 2]
    assert found["hans@2"]["fewshot_source"] == "validation"
    contexts = [context for context, _ in model.seen[12:]]
    for context in contexts:
        *examples, asked = context.split("\n\n")
        assert len(examples) == 2 and all(asked.split()[0] not in each for each in examples)
        assert all(each.endswith(("Answer: True", "Answer: False")) for each in examples)
    assert found["hans@0"]["prompt_hash"] != found["hans@2"]["prompt_hash"]
    names = plots.write_plots(str(tmp_path), found)
    expected = ["hans_by_heuristic_gold.png", "hans_by_subcase.png", "predicted_classes.png"]
    assert sorted(names) == expected
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    lines = plots.figures(found)["hans_by_heuristic_gold.png"].axes[0].get_lines()
    drawn = {tuple(line.get_ydata()) for line in lines if len(line.get_ydata()) == 2}
    assert (0.5, 0.5) in drawn and (1.0, 1.0) in drawn


def test_examples_that_equal_the_question_are_told_and_never_shown(known, rows_of):
    rows = [{"text": f"a{n} b{n} c{n}"} for n in range(4)]
    rows.append(rows[0])
    folder = rows_of("lambada.jsonl", rows)
    model = known(lambda *_: (-1.0, True))
    for seed in range(5):
        model.seen.clear()
        results = run.run_tasks(
            model, ["lambada_openai_cloze"], task_data=folder, num_fewshot=2, seed=seed
        )
        task = results["tasks"]["lambada_openai_cloze"]
        assert task["equal_examples"] == 2, "the first row and the last one"
        for context, _ in model.seen:
            *examples, asked = context.split("\n\n")
            assert len(examples) == 2 and asked not in {each[: len(asked)] for each in examples}
    assert "2 row(s) have an equal row among those that examples come from" in report.describe(
        results
    )


def test_twins_that_begin_alike_are_not_equal(known, rows_of):
    twins = [
        {"sentence": f"Ann was better than Eve so _ got the {kind} cases."}
        for kind in ("easy", "hard")
    ]
    others = [{"sentence": f"Ann met Eve so _ {n}."} for n in range(2)]
    rows = [row | {"option1": "Ann", "option2": "Eve", "answer": "1"} for row in twins + others]
    folder = rows_of("winogrande.jsonl", rows)
    model = known(lambda *_: -1.0)
    results = run.run_tasks(model, ["winogrande"], task_data=folder, num_fewshot=1)
    assert results["tasks"]["winogrande"]["equal_examples"] == 0
    folder = rows_of("winogrande.jsonl", [*rows, rows[0]])
    results = run.run_tasks(model, ["winogrande"], task_data=folder, num_fewshot=1)
    assert results["tasks"]["winogrande"]["equal_examples"] == 2


def test_a_training_row_that_equals_a_question(known, rows_of):
    rows = [{"query": f"q{n}", "choices": ["a", "b"], "gold": 0} for n in range(3)]
    rows_of("arc_easy/train.jsonl", rows)
    folder = rows_of("arc_easy/test.jsonl", rows[:1] + [rows[1] | {"query": "new"}])
    model = known(lambda _, continuation: -float(continuation == " b"))
    results = run.run_tasks(model, ["arc_easy"], task_data=folder, num_fewshot=2)
    task = results["tasks"]["arc_easy"]
    assert (task["fewshot_source"], task["equal_examples"]) == ("train", 1)
    assert model.seen[0][0].count("q0") == 1
    boolq = [{"passage": f"p{n}", "question": "q", "label": 0} for n in range(3)]
    rows_of("boolq/train.jsonl", boolq)
    rows_of("boolq/dev.jsonl", [{"passage": "new", "question": "q", "label": 0}])
    assert run.run_tasks(model, ["boolq"], task_data=folder, num_fewshot=2)["tasks"]["boolq"]
    with pytest.raises(ValueError, match=r"num_fewshot=3 needs 4 rows .* has 3; ask for 2"):
        run.run_tasks(model, ["boolq"], task_data=folder, num_fewshot=3)
    with pytest.raises(ValueError, match="only 2 rows of the task arc_easy differ"):
        run.run_tasks(model, ["arc_easy"], task_data=folder, num_fewshot=3)
    with pytest.raises(ValueError, match=r"num_fewshot=4 needs 4 rows .* has 3; ask for 3"):
        run.run_tasks(model, ["arc_easy"], task_data=folder, num_fewshot=4)
    with pytest.raises(ValueError, match="is below 0"):
        run.run_tasks(model, ["arc_easy"], task_data=folder, num_fewshot=-1)


def test_examples_are_those_of_the_harness(rows_of):
    """Where no row is equal, the draws of the harness's own sampler, with its seed."""
    from lm_eval.api.samplers import ContextSampler

    rows_of(
        "arc_easy/train.jsonl", [{"query": f"q{n}", "choices": ["a"], "gold": 0} for n in range(9)]
    )
    folder = rows_of("arc_easy/test.jsonl", [{"query": "new", "choices": ["a"], "gold": 0}] * 3)
    task = loading.load_tasks(["arc_easy"], folder)["arc_easy"]
    task.set_fewshot_seed(1234)
    theirs = ContextSampler(list(task.training_docs()), rnd=1234)
    shown = [task.fewshot_context(doc, 3) for doc in task.eval_docs]
    expected = [[each["question"] for each in theirs.sample(3)] for _ in shown]
    assert [
        [part.split()[1] for part in context.split("\n\n")[:-1]] for context in shown
    ] == expected


def test_limits_rows_and_records(known, rows_of):
    rows = [{"goal": f"g{n}", "sol1": "a", "sol2": "bb", "label": n % 2} for n in range(5)]
    folder = rows_of("piqa.jsonl", rows)
    model = known(lambda _, continuation: -float(len(continuation)))
    found = run.run_tasks(model, ["piqa"], task_data=folder, limit=3, log_rows=True)
    task = found["tasks"]["piqa"]
    assert (task["rows"], task["limit"], task["per_row"]["acc"]) == (3, 3, [1, 0, 1])
    assert task["target_classes"] == {"1": pytest.approx(2 / 3), "2": pytest.approx(1 / 3)}
    lines = report.log_lines(found["tasks"]).decode().splitlines()
    assert len(lines) == 3 and "log" not in task
    record = json.loads(lines[1])
    assert record["loglikelihoods"] == [-2.0, -3.0]
    assert (record["prediction"], record["target"], record["doc_id"]) == ("a", "bb", 1)
    assert record["place"].endswith("piqa.jsonl row 2") and record["metrics"]["acc"] == 0
    again = run.run_tasks(model, ["piqa"], task_data=folder, limit=3)["tasks"]["piqa"]
    assert again["prompt_hash"] == task["prompt_hash"] and len(task["prompt_hash"]) == 64
    other = run.run_tasks(model, ["piqa"], task_data=folder, limit=2)["tasks"]["piqa"]
    assert other["prompt_hash"] != task["prompt_hash"]


def test_a_prompt_hash_is_of_every_character():
    known = results.prompt_hash([("a question", " yes"), ("another", " no")])
    assert known == results.prompt_hash(iter([("a question", " yes"), ("another", " no")]))
    for changed in (
        [("a question", " yes"), ("another", " No")],
        [("a question ", "yes"), ("another", " no")],
        [("another", " no"), ("a question", " yes")],
    ):
        assert results.prompt_hash(changed) != known


def test_the_results_are_json_with_the_keys_of_a_file(known, rows_of):
    folder = rows_of("boolq.jsonl", [{"passage": "p", "question": "q", "label": 1}])
    found = run.run_tasks(known(lambda *_: -1.0), ["boolq"], task_data=folder, step=7)
    text = report.as_json(found)
    assert json.loads(text) == found
    assert (found["kind"], found["step"]) == ("tasks", 7)
    assert {"mtnlg_jax", "jax", "lm_eval", "python"} <= set(found["versions"])
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40
    task = found["tasks"]["boolq"]
    keys = {"version", "num_fewshot", "rows", "prompt_hash", "metrics", "predicted_classes"}
    assert keys <= set(task) and task["metrics"]["acc"]["stderr"] is None
    assert '"acc": [ 0 ]' in text.decode(), "values of rows stand on one line"


def test_the_bootstrap_is_that_of_the_harness(monkeypatch):
    from lm_eval.api import metrics

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    draws = random.Random(0)
    values = [-20 * draws.random() for _ in range(37)]
    theirs = metrics.bootstrap_stderr(metrics.perplexity, values, 2000)
    assert results.bootstrap_perplexity(values, 2000) == pytest.approx(theirs, rel=1e-10)
    assert results.stderr(metrics.perplexity, values, 2000) == pytest.approx(theirs, rel=1e-10)
    pairs = [(int(value < -9), int(value < -11)) for value in values]
    theirs = metrics.bootstrap_stderr(metrics.f1_score, pairs, 60)
    assert results.stderr(metrics.f1_score, pairs, 60) == pytest.approx(theirs, rel=1e-12)
    hits = [1, 0, 1, 1]
    assert results.stderr(metrics.mean, hits, 1000) == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


GENERATION = """\
task: writes
dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata: {version: 2.5}
"""


def test_a_task_of_the_user_beside_its_files(known, tmp_path):
    (tmp_path / "writes.yaml").write_text(GENERATION)
    rows = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.jsonl").write_text('{"q": "nine", "a": "9"}\n')
    contexts = []

    def write(context, how):
        contexts.append(context)
        return "1"

    found = run.run_tasks(
        known(write), ["writes"], include_path=str(tmp_path), num_fewshot=1, log_rows=True
    )
    task = found["tasks"]["writes"]
    assert contexts[1] == "Q: nine\nA: 9\n\nQ: two\nA:"
    assert task["version"] == 2.5 and task["metrics"]["exact_match"]["value"] == 0.5
    assert [record["prediction"] for record in task["log"]] == ["1", "1"]


def test_parquet_and_tables(known, rows_of, tmp_path):
    rows = [{"premise": "p", "hypothesis": "h", "label": 2}]
    folder = rows_of("anli/plain_text/test_r3-00000-of-00002.parquet", rows)
    rows_of("anli/plain_text/test_r3-00001-of-00002.parquet", rows)
    model = known(lambda _, continuation: -float(continuation != " False"))
    task = run.run_tasks(model, ["anli_r3"], task_data=folder)["tasks"]["anli_r3"]
    assert (task["rows"], task["metrics"]["acc"]["value"]) == (2, 1.0)
    head = "gold_label\tsentence1\tsentence2\theuristic\tsubcase\n"
    table = tmp_path / "heuristics_evaluation_set.txt"
    table.write_text(head + 'entailment\tHe said "yes .\tHe said .\tconstituent\tce_adverb\n')
    task = run.run_tasks(model, ["hans"], task_data=str(tmp_path))["tasks"]["hans"]
    assert task["breakdown"]["subcase"] == {"ce_adverb": {"value": 0.0, "stderr": None, "rows": 1}}


def test_labels_of_piqa_in_a_file_of_their_own(known, rows_of, tmp_path):
    folder = rows_of("piqa/valid.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b"}] * 2)
    (tmp_path / "data/piqa/valid-labels.lst").write_text("0\n1\n")
    model = known(lambda _, continuation: -float(continuation != " a"))
    task = run.run_tasks(model, ["piqa"], task_data=folder)["tasks"]["piqa"]
    assert task["per_row"]["acc"] == [1, 0]
    (tmp_path / "data/piqa/valid-labels.lst").write_text("0\n")
    with pytest.raises(ValueError, match="has 1 labels, and .* 2 rows"):
        run.run_tasks(model, ["piqa"], task_data=folder)


def test_all_of_the_papers_tasks():
    assert loading._of_paper() == [
        *("anli_r1", "anli_r2", "anli_r3", "boolq", "hans", "hellaswag", "lambada_openai"),
        *("piqa", "race", "wic", "winogrande"),
    ]


@pytest.mark.slow  # lists the harness's 14,000 tasks
def test_other_tasks_of_the_harness(known, rows_of):
    rows_of("sciq/test.jsonl", [
        {"support": "s", "question": f"q{n}", "correct_answer": "right", "distractor1": "x",
         "distractor2": "b", "distractor3": "c"} for n in range(3)
    ])  # fmt: skip
    rows_of("mmlu_astronomy/dev.jsonl", [{"question": "d", "choices": list("wxyz"), "answer": 1}])
    rows_of("mmlu_astronomy/test.jsonl", [{"question": "t", "choices": list("wxyz"), "answer": 2}])
    rows_of("lambada/lambada_standard_test.jsonl", [{"text": "one two"}])
    rows_of("arc_easy.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 0}])
    folder = rows_of("ARC-Challenge.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 0}])
    model = known(lambda context, continuation: -float(continuation not in (" right", " C", " a")))
    names = ["sciq", "mmlu_astronomy", "lambada_standard", "ai2_arc"]
    found = run.run_tasks(model, names, task_data=folder)["tasks"]
    scores = {name: task["metrics"]["acc"]["value"] for name, task in found.items()}
    assert scores == {
        **{"sciq": 1.0, "mmlu_astronomy": 1.0, "lambada_standard": 0.0},
        **{"arc_challenge": 1.0, "arc_easy": 1.0},
    }
    shown = run.run_tasks(model, ["mmlu_astronomy"], task_data=folder, num_fewshot=1)
    assert shown["tasks"]["mmlu_astronomy"]["num_fewshot"] == 1
    assert model.seen[-1][0].count("Answer: B") == 1
    with pytest.raises(ValueError, match=r"--tasks=piqaa is not a task .* \(did you mean piqa"):
        run.run_tasks(model, ["piqaa"], task_data=folder)
    with pytest.raises(ValueError, match="is written in Python"):
        run.run_tasks(model, ["squadv2"], task_data=folder)


def test_nothing_asks_a_network(known, rows_of, monkeypatch):
    import socket

    def refuse(*arguments, **named):
        raise AssertionError(f"asked for {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = rows_of("hellaswag.jsonl", [{"query": "A: b", "choices": ["c", "d"], "gold": 0}])
    found = run.run_tasks(known(lambda *_: -1.0), ["hellaswag"], task_data=folder)
    assert found["tasks"]["hellaswag"]["metrics"]["acc"]["value"] == 1.0
