import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.read.documents import read_documents
from mtnlg_jax.data.store import convert as module
from mtnlg_jax.data.store import offsets
from mtnlg_jax.data.store.convert import convert
from mtnlg_jax.data.store.prepared import read_prepared
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
TEXTS = [
    f"Line {number} of the tale, é 天下 \U0001f600.\n" * (1 + number % 7) for number in range(150)
]


@pytest.fixture(scope="module")
def prepared(gpt2_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare(
        folder / "text.jsonl",
        folder / "data",
        tokenizer=str(gpt2_files),
        heldout=0.1,
        progress=False,
    )
    return folder / "data"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(offsets, "BLOCK", 16)
    monkeypatch.setattr(module, "_PIECE", 600)


def _texts(path):
    return [document.text for document in read_documents(path)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_texts_are_recovered(prepared, tmp_path, suffix):
    for part in ("train", "heldout"):
        assert str(tmp_path / part) in convert(str(prepared / part), str(tmp_path / part) + suffix)
    found = _texts(tmp_path / f"train{suffix}") + _texts(tmp_path / f"heldout{suffix}")
    assert sorted(found) == sorted(TEXTS)
    before = (tmp_path / f"train{suffix}").read_bytes()
    convert(str(prepared / "train"), str(tmp_path / "train") + suffix, overwrite=True)
    assert (tmp_path / f"train{suffix}").read_bytes() == before


def test_a_round_trip_is_exact(prepared, gpt2_files, tmp_path):
    prefix = str(tmp_path / "megatron" / "x")
    train = open_tokens(prepared / "train")
    convert(str(prepared / "train"), prefix)
    convert(prefix, str(tmp_path / "text.jsonl"), tokenizer=str(gpt2_files))
    convert(prefix, str(tmp_path / "data"), tokenizer=str(gpt2_files), heldout=0.2)
    parts = [open_tokens(tmp_path / "data" / part) for part in ("train", "heldout")]
    # Documents that have their bos and eos stay as they are.
    assert np.array_equal(
        np.concatenate([part.read(0, len(part)) for part in parts]), train.read(0, len(train))
    )
    assert sum(part.meta["bytes"] for part in parts) == train.meta["bytes"]
    assert (
        parts[1].documents == -(-train.documents // 5)
        and parts[0].meta["tokenizer"] == train.meta["tokenizer"]
    )
    assert read_prepared(tmp_path / "data")["train"] == parts[0].meta
    assert load_tokenizer(tmp_path / "data" / "tokenizer").fingerprint == train.meta["tokenizer"]
    convert(str(prepared / "train"), str(tmp_path / "direct.jsonl"))
    assert (tmp_path / "text.jsonl").read_bytes() == (tmp_path / "direct.jsonl").read_bytes()


def test_documents_get_their_bos_and_eos(gpt2_files, tmp_path):
    fixture = Path(__file__).parents[1] / "fixtures" / "sentences"
    convert(str(fixture), str(tmp_path / "data"), tokenizer=str(gpt2_files), heldout=0)
    tokens = open_tokens(tmp_path / "data" / "train")
    theirs = open_tokens(fixture)
    for ids, old in zip(module.documents_of(tokens), module.documents_of(theirs), strict=True):
        assert ids.tolist() == [259, *old] and old[-1] == 259
    assert tokens.predicted == (len(theirs), len(theirs) - 40)


def test_pairs_keep_their_parts(gpt2_files, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{number} and one?", "answer": str(number + 1)}) + "\n"
            for number in range(30)
        )
    )
    prepare(
        tmp_path / "pairs.jsonl",
        tmp_path / "data",
        tokenizer=str(gpt2_files),
        answer=" {answer}",
        heldout=0,
    )
    convert(str(tmp_path / "data/train"), str(tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(rows, key=lambda row: int(row["answer"])) == [
        {"prompt": f"{number} and one?", "answer": f" {number + 1}"} for number in range(30)
    ]


def test_invalid_requests_raise_an_error(prepared, trained, gpt2_files, tmp_path):
    train = str(prepared / "train")
    prefix = str(tmp_path / "x")
    there = tmp_path / "there"
    convert(train, prefix)
    there.mkdir()
    (there / "precious").write_text("")
    trained["bpe"].save(tmp_path / "other")
    for arguments, error, message in [
        ((train, prefix), FileExistsError, "x.bin exists"),
        ((prefix, prefix + ".idx"), ValueError, "is the source itself"),
        (
            (prefix, str(tmp_path / "y")),
            ValueError,
            "does not hold its tokenizer; give --tokenizer=FOLDER",
        ),
        ((prefix, str(there), str(gpt2_files)), FileExistsError, "there exists"),
        (
            (prefix, str(there), str(gpt2_files), 0.1, True),
            FileExistsError,
            "is not a prepared data set",
        ),
        (
            (prefix, str(tmp_path / "y"), str(gpt2_files), 0.7),
            ValueError,
            "heldout=0.7 must be in 0 to 0.5",
        ),
        ((train, str(tmp_path / "y"), "", -0.1), ValueError, "--heldout=-0.1 must be in 0 to 0.5"),
        (
            (train, str(tmp_path / "y"), "", 0.01),
            ValueError,
            "--heldout=0.01 is for Megatron's files .*/y is a prefix of them, so leave it out",
        ),
        (
            (train, str(tmp_path / "y.jsonl"), "", 0.01),
            ValueError,
            "--heldout=0.01 is for Megatron's files .*/y.jsonl is text, so leave it out",
        ),
        (
            (train, str(tmp_path / "y"), str(gpt2_files)),
            ValueError,
            "--tokenizer=.* is for text or a prepared folder; .*/y becomes Megatron's files",
        ),
        (
            (train, str(tmp_path / "y.jsonl"), str(tmp_path / "other")),
            ValueError,
            "with another tokenizer",
        ),
        ((train, "gs://bucket/y"), ValueError, "is a URL"),
        ((str(tmp_path / "nowhere"), "y"), FileNotFoundError, "nowhere does not exist"),
    ]:
        with pytest.raises(error, match=message):
            convert(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"x.bin", "x.idx", "there", "other"}
    convert(prefix, str(tmp_path / "y"), str(gpt2_files))
    convert(prefix, str(tmp_path / "y"), str(gpt2_files), 0.3, True)
    assert not [
        path for path in tmp_path.iterdir() if "partial" in path.name or "before" in path.name
    ]


def test_the_command_line(prepared, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, ROOT / "launch/convert_data.py", *arguments],
            text=True,
            capture_output=True,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
        )

    done = run(f"--from={prepared}/train", f"--to={tmp_path}/x")
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path}/x.bin, .idx: "), done.stderr
    done = run(f"--from={prepared}/train", f"--to={tmp_path}/x")
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
