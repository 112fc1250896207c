"""The file of answers: each row once, whatever a kill leaves, and never two kinds in one file."""

import json
import resource
import subprocess
import sys

import pytest

from mtnlg_jax.tasks.answers import Answer, read_answers
from mtnlg_jax.tasks.many.inputs import Item
from mtnlg_jax.tasks.many.record import SUFFIX, Record, check_writable, read_records
from mtnlg_jax.tasks.rendering import Row
from mtnlg_jax.tasks.templates import TASKS

IDENTITY = {"the inputs": "sha256:00", "--scorer": "pmi"}
ITEMS = [Item(n, f"id{n}", {"day": n}, Row(f"text {n}", ("好",))) for n in range(1, 6)]


def answer(text):
    return Answer(text, text, "en", "stop", (), (), 0, False, False, "the prompt")


def filled(path, items=ITEMS, **options):
    with Record(path, IDENTITY, 5, **options) as record:
        for item in items:
            if not record.done[item.number]:
                record.add(item, answer(f"答 {item.number}"))
    return record


def rows(path):
    return [line["row"] for line in read_records(path)]


def test_a_line_has_the_row_the_answer_and_the_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    filled(path)
    line = next(read_records(path))
    assert list(line)[:5] == ["row", "id", "input", "references", "text"]
    assert (line["id"], line["text"], line["columns"]) == ("id1", "答 1", {"day": 1})
    assert "prompt" not in line
    asked, answers = read_answers(path, TASKS["answer"])
    assert asked == [item.row for item in ITEMS] and answers[4].text == "答 5"
    filled(tmp_path / "b.jsonl", keep_prompt=True)
    assert next(read_records(tmp_path / "b.jsonl"))["prompt"] == "the prompt"


def test_every_cut_of_the_last_line_is_mended(tmp_path):
    """A process that is killed leaves any part of its last line, also a part of a character."""
    path = tmp_path / "a.jsonl"
    filled(path)
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for size in range(start, len(whole) + 1):
        path.write_bytes(whole[:size])
        record = filled(path)
        assert record.begun.answered == (5 if size == len(whole) else 4)
        assert path.read_bytes() == whole


def test_a_kill_between_the_two_files_is_mended(tmp_path):
    path = tmp_path / "a.jsonl"
    path.touch()
    filled(path)
    assert rows(path) == [1, 2, 3, 4, 5]
    path.unlink()
    filled(path)
    assert rows(path) == [1, 2, 3, 4, 5]


def test_a_second_process_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    program = (
        "import sys; from mtnlg_jax.tasks.many.record import Record\n"
        f"with Record(sys.argv[1], {IDENTITY!r}, 5): pass"
    )
    with Record(path, IDENTITY, 5) as record:
        record.add(ITEMS[0], answer("a"))
        with pytest.raises(FileExistsError, match="another process is writing .*a.jsonl; wait"):
            Record(path, IDENTITY, 5)
        other = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True
        )
        assert "another process is writing" in other.stderr
        record.add(ITEMS[1], answer("b"))
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == 0
    assert rows(path) == [1, 2]


def test_a_process_does_not_write_into_a_file_that_was_removed_meanwhile(tmp_path, monkeypatch):
    """It opened the file while another one, which then removed it, held the lock."""
    import fcntl

    path = tmp_path / "a.jsonl"
    original = fcntl.flock
    removed = []

    def flock(handle, how):
        original(handle, how)
        if not removed:
            removed.append(path.unlink())

    monkeypatch.setattr(fcntl, "flock", flock)
    filled(path)
    assert removed and rows(path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (IDENTITY | {"--scorer": "logprob"}, "begun with --scorer=pmi, now --scorer=logprob; give"),
        (IDENTITY | {"the inputs": "sha256:11"}, "the inputs sha256:00, now the inputs sha256:11"),
        ({"the inputs": "sha256:00"}, "begun with --scorer=pmi, now no --scorer"),
        (IDENTITY | {"--best": 4}, "begun with no --best, now --best=4"),
    ],
)
def test_other_settings_are_refused_and_the_file_is_left_as_it_was(tmp_path, identity, message):
    path = tmp_path / "a.jsonl"
    filled(path, ITEMS[:3])
    path.write_bytes(path.read_bytes() + b'{"row": 4, "te')
    before = path.read_bytes(), path.stat().st_mtime_ns
    with pytest.raises(ValueError, match=message):
        Record(path, identity, 5)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    filled(path)
    assert rows(path) == [1, 2, 3, 4, 5]


def test_a_step_and_weights_are_known_late_and_compared(tmp_path):
    path = tmp_path / "a.jsonl"
    with Record(path, IDENTITY, 5) as record:
        record.require("step", 900, "give that checkpoint")
        record.require("the weights", "0a", "give that checkpoint")
        record.add(ITEMS[0], answer("a"))
    with Record(path, IDENTITY, 5) as record:
        record.require("step", 900, "give that checkpoint")
        with pytest.raises(
            ValueError, match="step 900, and this is step 950; give that checkpoint"
        ):
            record.require("step", 950, "give that checkpoint")
        with pytest.raises(ValueError, match="begun with the weights 0a, and this is the weights"):
            record.require("the weights", "0b", "give that checkpoint")


def test_files_of_others_are_refused_untouched(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"row": 1}')
    with pytest.raises(ValueError, match=f"exists, and no a.jsonl{SUFFIX} beside it says"):
        Record(path, IDENTITY, 5)
    assert path.read_text() == '{"row": 1}'
    path.with_name(path.name + SUFFIX).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Record(path, IDENTITY, 5)
    assert path.read_text() == '{"row": 1}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no", "line 3 is not a line of these answers"),
        ('{"row": 2}', "line 3: row 2 is answered twice"),
        ('{"row": 9}', "line 3: row 9 is none of the 5 rows"),
        ('{"row": "x"}', "line 3: row x is none of the 5 rows"),
    ],
)
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    filled(path, ITEMS[:2])
    path.write_text(path.read_text() + line + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        Record(path, IDENTITY, 5)
    assert path.read_bytes() == before


def test_errors_are_kept_unless_they_are_to_be_tried_again(tmp_path):
    path = tmp_path / "a.jsonl"
    with Record(path, IDENTITY, 5) as record:
        record.add(ITEMS[0], answer("a"))
        record.add_error(ITEMS[1], "too long")
        record.add_error(Item(3, None, {}, None, "damaged"), "damaged")
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == [
        {"row": 2, "id": "id2", "error": "too long", "input": "text 2", "columns": {"day": 2}},
        {"row": 3, "error": "damaged"},
    ]
    with Record(path, IDENTITY, 5) as record:
        assert (record.begun.answered, record.begun.errors) == (1, 2)
        assert list(record.done) == [0, 1, 1, 1, 0, 0]
    with Record(path, IDENTITY, 5, retry_errors=True) as record:
        assert (record.begun.answered, record.begun.errors) == (1, 0)
        assert list(record.done) == [0, 1, 0, 0, 0, 0]
        with pytest.raises(FileExistsError):
            Record(path, IDENTITY, 5)
        record.add(ITEMS[1], answer("b"))
    assert rows(path) == [1, 2] and sorted(each.name for each in tmp_path.iterdir()) == [
        "a.jsonl",
        f"a.jsonl{SUFFIX}",
    ]


def test_a_disk_that_fills_up_costs_no_line(tmp_path):
    """It takes a part of a line without an error, and refuses the rest."""
    path = tmp_path / "a.jsonl"
    with Record(path, IDENTITY, 5) as record:
        record.add_error(ITEMS[1], "too long")
        record.add(ITEMS[0], answer("a"))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before.splitlines()[1]) - 9, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            Record(path, IDENTITY, 5, retry_errors=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_a_record_without_a_line_leaves_nothing(tmp_path):
    with Record(tmp_path / "a.jsonl", IDENTITY, 5):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_row_is_never_written_twice(tmp_path):
    with Record(tmp_path / "a.jsonl", IDENTITY, 5) as record:
        record.add(ITEMS[0], answer("a"))
        with pytest.raises(AssertionError, match="row 1 of .* would be answered twice"):
            record.add(ITEMS[0], answer("a"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gs://bucket/a.jsonl", "is a URL"),
        ("{folder}", "is a folder"),
        ("{folder}/no/a.jsonl", "the folder .*no does not exist"),
        ("{folder}/a.csv", "name it with the suffix .jsonl"),
    ],
)
def test_files_that_cannot_be_written_are_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        check_writable(name.replace("{folder}", str(tmp_path)))
