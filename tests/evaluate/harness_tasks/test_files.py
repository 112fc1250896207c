"""Which file of a folder a task reads: the names that distributions have."""

import pytest

from mtnlg_jax.evaluate.harness_tasks import files, layouts, loading

# Every file of a folder, and what each task must find in it.
FOLDER = [
    "WiC/train.jsonl",
    "WiC/val.jsonl",
    "WiC/test.jsonl",
    "hellaswag_val.jsonl",
    "hellaswag_train.jsonl",
    "winogrande/winogrande_xl/validation-00000-of-00001.parquet",
    "winogrande/winogrande_l/validation-00000-of-00001.parquet",
    "anli_v1.0/R1/dev.jsonl",
    "anli_v1.0/R1/test.jsonl",
    "anli_v1.0/R1/train.jsonl",
    "anli_v1.0/R2/dev.jsonl",
    "anli/plain_text/test_r3-00000-of-00002.parquet",
    "anli/plain_text/test_r3-00001-of-00002.parquet",
    "RACE/test/high/1.txt",
    "RACE/test/high/2.txt",
    "RACE/test/middle/3.txt",
    "ARC-V1-Feb2018/ARC-Easy/ARC-Easy-Test.jsonl",
    "ARC-V1-Feb2018/ARC-Challenge/ARC-Challenge-Dev.jsonl",
    "heuristics_evaluation_set.txt",
    "heuristics_train_set.txt",
    "GLUE/RTE/dev.tsv",
    "other/openbook_qa.jsonl",
    "sorted.jsonl",
    "notes/boolq.md",
    ".cache/boolq.jsonl",
    "boolq.jsonl.gz",
]


@pytest.fixture
def folder(tmp_path):
    for name in FOLDER:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "evaluated", "expected"),
    [
        ("wic", "validation", {"validation": [1], "train": [0]}),
        ("hellaswag", "validation", {"validation": [3], "train": [4]}),
        ("winogrande", "validation", {"validation": [5]}),
        ("anli_r1", "test", {"test": [8], "train": [9], "validation": [7]}),
        ("anli_r2", "test", {"test": [10]}),
        ("anli_r3", "test", {"test": [11, 12]}),
        ("race", "test", {"test": [13, 14]}),
        ("arc_easy", "test", {"test": [16]}),
        ("arc_challenge", "test", {"test": [17]}),
        ("hans", "validation", {"validation": [18], "train": [19]}),
        ("rte", "validation", {"validation": [20]}),
        ("openbookqa", "test", {"test": [21]}),
        ("boolq", "validation", {"validation": [25]}),
    ],
)
def test_files_of_distributions(folder, name, evaluated, expected):
    found = files.find(str(folder), name, evaluated)
    names = {split: [str(path.relative_to(folder)) for path in found[split]] for split in found}
    assert names == {split: [FOLDER[n] for n in numbers] for split, numbers in expected.items()}


def test_a_folder_that_is_the_tasks_own_and_a_file(tmp_path):
    own = tmp_path / "piqa"
    own.mkdir()
    (own / "valid.jsonl").write_text("x")
    assert files.find(str(own), "piqa", "validation") == {"validation": [own / "valid.jsonl"]}
    file = own / "valid.jsonl"
    assert files.find(str(file), "boolq", "validation") == {"validation": [file]}
    with pytest.raises(ValueError, match="copy the folder first"):
        files.find("gs://bucket/data", "piqa", "validation")


def test_every_task_here_has_a_form():
    for name in loading.own_names():
        assert loading._read(loading.FOLDER / f"{name}.yaml")["metadata"]["rows"] in layouts.FORMS
