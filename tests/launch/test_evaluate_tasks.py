"""launch/evaluate.py --tasks from end to end: table, results, rows, differences, plots, errors."""

import json

import pytest

from mtnlg_jax.data.tokenizer import train_tokenizer

PIQA = [
    {"goal": f"the whale swam {where}", "sol1": "north", "sol2": "again", "label": n % 2}
    for n, where in enumerate(("north", "again", "the", "whale"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data").mkdir()
    hans = [
        {
            "premise": f"the whale {n}",
            "hypothesis": "swam",
            "gold_label": ("entailment", "non-entailment")[n % 2],
            "heuristic": "constituent",
            "subcase": ("ce_adverb", "cn_adverb")[n % 2],
        }
        for n in range(6)
    ]
    for name, rows in (("piqa", PIQA), ("hans", hans)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"data/{name}.jsonl").write_text(text)
    (folder / "bad").mkdir()
    (folder / "bad/piqa.jsonl").write_text(json.dumps(PIQA[0]) + '\n{"goal": "x"}\n')
    (folder / "other.json").write_text('{"kind": "audit"}')
    (folder / "file").write_text("x")
    return folder


@pytest.fixture(scope="module")
def ask(answering, folder):
    train_tokenizer(["the whale swam north again\n"] * 9, 300).save(folder / "tokenizer")
    answer = answering("evaluate.py", folder / "tokenizer", positions=64, new_tokens=8)
    return lambda *arguments: answer(
        "--workdir=RUN", *(each.replace("{folder}", str(folder)) for each in arguments)
    )


def test_results_rows_and_differences(ask, folder):
    arguments = ("--tasks=piqa", "--task_data={folder}/data")
    code, out, err = ask(*arguments, "--output={folder}/one.json", "--log_rows={folder}/rows.jsonl")
    assert code == 0 and err == f"results: {folder}/one.json\n"
    assert "checkpoint of step 7" in out and "piqa      0     4  acc" in out
    results = json.loads((folder / "one.json").read_bytes())
    assert (results["kind"], results["step"], results["tasks"]["piqa"]["rows"]) == ("tasks", 7, 4)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == [0, 1, 2, 3]
    assert all(len(row["loglikelihoods"]) == 2 for row in rows)
    hits = [row["metrics"]["acc"] for row in rows]
    assert results["tasks"]["piqa"]["metrics"]["acc"]["value"] == sum(hits) / 4

    compared = ask(
        *arguments, "--output={folder}/two.json", "--compare={folder}/one.json", "--limit=3"
    )
    assert compared[0] == 0 and f"against {folder}/one.json:" in compared[1]
    assert "the rows differ: 3 are in both, 0 only here, 1 only there" in compared[1]
    differences = json.loads((folder / "two.json").read_bytes())["differences"]
    assert [each["p_value"] for each in differences["metrics"]] == [1.0, 1.0]


def test_examples_plots_and_json(ask, folder):
    code, out, err = ask(
        *("--tasks=hans", "--task_data={folder}/data", "--num_fewshot=0,1", "--json", "--seed=3"),
        *("--output={folder}/h.json", "--plots={folder}/plots"),
    )
    assert code == 0
    found = json.loads(out)
    assert list(found["tasks"]) == ["hans@0", "hans@1"]
    assert found["tasks"]["hans@1"]["seed"] == 3 and "per_row" not in found["tasks"]["hans@0"]
    names = "hans_by_heuristic_gold.png, hans_by_subcase.png"
    assert names in err and (folder / "plots/hans_by_subcase.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate: give --input=FILE (a text to score) or --tasks"),
        (["--tasks=piqa", "--input={folder}/file"], "is of texts, which --tasks does not read"),
        (["--tasks=piqa", "--adapt=1e-3"], "is of texts, which --tasks does not read"),
        (["--tasks=piqa", "--longtext"], "is of texts, which --tasks does not read"),
        (["--input={folder}/file", "--limit=3"], "--limit=3 has no effect without --tasks"),
        (["--tasks=piqa"], "name their folder with --task_data=FOLDER"),
        (["--tasks=", "--task_data={folder}/data"], "names no task"),
        (["--tasks=piqa", "--task_data={folder}/data", "--num_fewshot=x"], "is not a number or"),
        (["--tasks=piqa", "--task_data={folder}/data", "--num_fewshot=1,1"], "a number twice"),
        (["--tasks=piqa", "--task_data={folder}/data", "--num_fewshot=-1"], "a number below 0"),
        (["--tasks=piqa", "--task_data={folder}/data", "--num_fewshot=4"], "ask for 3 or fewer"),
        (["--tasks=piqa", "--task_data={folder}/bad"], "row 2: the task piqa needs the field 'so"),
        (["--tasks=boolq", "--task_data={folder}/data"], "has no file for the task boolq"),
        (
            ["--tasks=piqa", "--task_data={folder}/data", "--compare={folder}/other.json"],
            "is not a results file of --tasks",
        ),
        (["--tasks=piqa", "--task_data={folder}/data", "--output={folder}/gone/a"], "create it"),
        (["--tasks=piqa", "--task_data={folder}/data", "--plots={folder}/file"], "is a file"),
    ],
)
def test_bad_input_ends_in_one_line(ask, folder, arguments, message):
    output = [] if any("--output" in each for each in arguments) else ["--output={folder}/no.json"]
    if not any("--tasks" in each for each in arguments):
        output = []
    code, out, err = ask(*arguments, *output)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err
    assert not (folder / "no.json").exists()


def test_a_model_of_another_project_needs_a_place(ask, folder):
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text('{"model_type": "gpt2"}')
    code, out, err = ask("--workdir={folder}/model", "--tasks=piqa", "--task_data={folder}/data")
    assert code == 2 and "not a run of ours; name the file of the results with --output" in err
    code, out, err = ask("--tasks=piqa", "--task_data={folder}/data", "--adapter=tuned")
    assert code == 2 and "--adapter=tuned makes another model of the run" in err
