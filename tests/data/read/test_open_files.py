"""Check which files of a folder are read: links, compressed files, and reports of omitted files."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import zstandard

from mtnlg_jax.data.read import open_files
from mtnlg_jax.data.read.documents import ReadReport, note_lines, read_documents
from mtnlg_jax.data.recipe.run import make
from mtnlg_jax.data.recipe.settings import DecontaminationConfig, Recipe, Source
from mtnlg_jax.data.recipe.stages import in_processes

ROOT = Path(__file__).resolve().parents[3]
PACKS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def _write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def _read(root):
    """Return (names of files read, names omitted by reason)."""
    report = ReadReport()
    read = [document.source for document in read_documents(root, report=report)]
    assert len(read) == report.documents == report.files
    assert (
        sum(noted["count"] for noted in report.notes.values())
        == report.left_out + report.skipped_files
    )
    return read, {reason: noted["names"] for reason, noted in report.notes.items()}


def test_linked_folders_and_files_are_read(tmp_path):
    root = tmp_path / "root"
    store = tmp_path / "store"
    _write(root, "web/w.txt")
    _write(store, "books/b.txt", "books/deep/c.txt", "single.md")
    (root / "books").symlink_to("../store/books")  # relative, as in a checkout
    (root / "one.md").symlink_to(store / "single.md")
    assert _read(root) == (["books/b.txt", "books/deep/c.txt", "one.md", "web/w.txt"], {})
    (tmp_path / "all").symlink_to(root)
    assert _read(tmp_path / "all") == _read(root)


def test_each_real_file_is_read_once(tmp_path):
    root = tmp_path / "root"
    store = tmp_path / "store"
    _write(root, "a/own.txt", "b/x.txt")
    _write(store, "deep/s.txt", "t.txt")
    (root / "0").symlink_to(
        root / "a"
    )  # to a folder that is read by its own name, although this comes first
    (root / "a/again.txt").symlink_to("own.txt")
    (root / "b/1").symlink_to(store / "deep")
    (root / "b/2").symlink_to(store)  # and with it, deep/ a second time
    (root / "c.txt").symlink_to(store / "t.txt")
    read, left_out = _read(root)
    assert read == ["a/own.txt", "b/1/s.txt", "b/2/t.txt", "b/x.txt"]
    assert left_out == {
        f"left out, {open_files.READ_ALREADY}": ["0/", "a/again.txt", "b/2/deep/", "c.txt"]
    }


def test_cycles_of_links_end(tmp_path):
    root = tmp_path / "root"
    _write(root, "a/x.txt", "b/y.txt")
    (root / "a/self").symlink_to(root / "a")
    (root / "a/up").symlink_to("..")
    (root / "a/other").symlink_to(root / "b")
    (root / "b/other").symlink_to(root / "a")
    read, left_out = _read(root)
    assert read == ["a/x.txt", "b/y.txt"]
    assert left_out == {
        f"left out, {open_files.CIRCLE}": ["a/self/", "a/up/"],
        f"left out, {open_files.READ_ALREADY}": ["a/other/", "b/other/"],
    }


def test_a_dangling_link_is_damage(tmp_path):
    _write(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    with pytest.raises(
        ValueError, match=r"b\.txt: a link to .*gone\.txt, which does not exist; repair it"
    ):
        list(read_documents(tmp_path))
    report = ReadReport()
    assert [
        document.source for document in read_documents(tmp_path, on_error="skip", report=report)
    ] == ["a.txt"]
    assert report.damaged == 1


def test_omitted_files_are_reported(tmp_path):
    _write(
        tmp_path,
        "a.txt",
        "code.py",
        "README",
        "b.pdf",
        "c.PDF",
        "x.tar.gz",
        ".hidden.txt",
        ".git/config",
        "d/.e/f",
    )
    os.mkfifo(tmp_path / "pipe.txt")
    read, left_out = _read(tmp_path)
    assert read == ["a.txt"]
    assert left_out == {
        "files with the suffix .pdf, not read": ["b.pdf", "c.PDF"],
        "files with the suffix .py, not read": ["code.py"],
        "files with the suffix (none), not read": ["README"],
        "files with the suffix .tar.gz, not read": ["x.tar.gz"],
        f"left out, {open_files.HIDDEN}": [".git/", ".hidden.txt", "d/.e/"],
        f"left out, {open_files.NOT_A_FILE}": ["pipe.txt"],
    }


def test_a_report_of_many_reasons_is_short():
    report = ReadReport()
    for number in range(2000):
        report.note(f"files with the suffix .{number % 1000}, not read", f"{number}.x")
    report.note("damaged", "y")
    lines = note_lines(report.notes)
    assert len(lines) == 13 and lines[-1] == "1,977 for 989 other reasons"
    assert lines[0] == "2 files with the suffix .0, not read: 0.x, 1000.x"


@pytest.mark.parametrize("suffix", PACKS)
def test_compressed_files_of_every_kind(tmp_path, suffix):
    content = {
        "a.txt": b"text one",
        "b.jsonl": b'{"text": "text two"}\n',
        "c.json": b'[{"text": "text three"}]',
        "d.csv": b"id,text\n1,text four\n",
        "E.RST": b"text five",
        "f.tsv": b"text\nsix\n",
    }
    for name, data in content.items():
        # Two concatenated streams are one file.
        half = len(data) // 2
        (tmp_path / (name + suffix.upper())).write_bytes(
            PACKS[suffix](data[:half]) + PACKS[suffix](data[half:])
        )
    assert [document.text for document in read_documents(tmp_path)] == [
        "text five",
        "text one",
        "text two",
        "text three",
        "text four",
        "six",
    ]
    whole = (tmp_path / ("a.txt" + suffix.upper())).read_bytes()
    (tmp_path / f"cut.txt{suffix}").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="cut.txt.*the compressed file is cut short or damaged"):
        list(read_documents(tmp_path))


# --- from the command line


def _launch(*arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "launch/prepare_data.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_reports_omitted_files(tmp_path):
    _write(tmp_path / "in", "a/a.txt", "b.pdf", ".c.txt")
    (tmp_path / "in/a/a.txt").write_text("One sentence follows another. " * 300)
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/a/l.txt").write_bytes("Der alte Müller ging über die Brücke.".encode("cp1252"))
    code, _, error = _launch(
        f"--input={tmp_path}/in", f"--output={tmp_path}/out", "--vocab_size=300"
    )
    assert code == 2 and "a/l.txt: line 1: byte 0xfc at 10 is not UTF-8; name its encoding" in error
    code, said, error = _launch(
        f"--input={tmp_path}/in",
        f"--output={tmp_path}/out",
        "--vocab_size=300",
        "--encoding=cp1252",
    )
    assert code == 0, error
    for line in (
        "1 files decoded from cp1252: a/l.txt",
        "1 files with the suffix .pdf, not read: b.pdf",
        f"1 left out, {open_files.HIDDEN}: .c.txt",
        f"1 left out, {open_files.CIRCLE}: loop/",
    ):
        assert line in said
    assert _launch(f"--input={tmp_path}/in/b.pdf", f"--output={tmp_path}/x")[0] == 2


def _recipe(*sources, **more):
    return Recipe(
        sources=tuple(Source(name, (name,)) for name in sources), stages=("decontaminate",), **more
    )


def test_a_recipe_reads_links_and_reports_omitted_files(tmp_path):
    root = tmp_path / "root"
    store = tmp_path / "store"
    _write(store, "x.txt", "y.txt")
    _write(root, "web/w.txt", "web/.hidden", "web/no.pdf", "beside.pdf")
    (root / "books").symlink_to(store)
    (root / "copies").mkdir()
    (root / "copies/x.txt").symlink_to(store / "x.txt")
    (root / "copies/z.txt").symlink_to(root / "web/w.txt")
    _write(root, "copies/own.txt")
    info = make(
        _recipe("books", "copies", "web"),
        root,
        tmp_path / "out",
        engine=in_processes(1),
        progress=False,
    )
    assert sorted(info["inputs"]) == ["books/x.txt", "books/y.txt", "copies/own.txt", "web/w.txt"]
    assert {reason: noted["names"] for reason, noted in info["stages"][0]["notes"].items()} == {
        f"left out, {open_files.READ_ALREADY}": ["copies/x.txt", "copies/z.txt"],
        f"left out, {open_files.HIDDEN}": ["web/.hidden"],
        "files with the suffix .pdf, not read": ["web/no.pdf"],
        "left out, in no source": ["beside.pdf"],
    }
    assert "web/no.pdf" in (tmp_path / "out/report.html").read_text()


QUESTIONS = [
    "Which bird flies from one pole of the earth to the other every single year of its long life?",
    "How does a steam engine turn the heat of burning coal "
    "into the motion of its heavy iron wheels?",
    "What do the divers of the southern islands carry with them "
    "when they look for sponges at night?",
]


def test_test_sets_in_a_folder_are_all_used_or_reported(tmp_path):
    filler = (
        "The mill stood at the end of the village where the road turned towards the hills. " * 8
    )
    _write(tmp_path / "in", "web/a.txt")
    (tmp_path / "in/web/a.txt").write_text(filler + f" {filler}".join(QUESTIONS) + filler)
    tests = tmp_path / "tests"
    _write(tests, "notes.pdf")
    (tests / "one.jsonl").write_text(
        json.dumps({"id": 7, "question": QUESTIONS[0], "answer": "a tern"})
    )
    (tests / "two.jsonl.zst").write_bytes(
        PACKS[".zst"](json.dumps({"choices": {"text": QUESTIONS[1:2]}}).encode())
    )
    (tests / "three.csv.bz2").write_bytes(PACKS[".bz2"](f'q\n"{QUESTIONS[2]}"\n'.encode()))
    config = DecontaminationConfig(test_sets=(str(tests),))
    info = make(
        _recipe("web", decontamination=config),
        tmp_path / "in",
        tmp_path / "out",
        engine=in_processes(1),
        progress=False,
    )
    left = "".join(
        text
        for path in (tmp_path / "out/stages/decontaminate").glob("*.parquet")
        for text in pyarrow.parquet.read_table(path)["text"].to_pylist()
    )
    stage = info["stages"][-1]
    assert filler[:80] in left and not any(question[:40] in left for question in QUESTIONS)
    assert "of 3 files of test sets" in stage["note"]
    assert "Fields searched for: 0 (1), question (1), text (1)." in stage["note"]
    assert (
        "under 8 words: 0 (1), answer (1)" in stage["note"]
        and "numbers, not text: id (1)" in stage["note"]
    )
    assert info["stages"][0]["notes"]["files with the suffix .pdf, not read"]["names"] == [
        "test sets/notes.pdf"
    ]
