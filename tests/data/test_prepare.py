import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtnlg_jax.data.heldout import split
from mtnlg_jax.data.prepare import describe, prepare
from mtnlg_jax.data.read import documents
from mtnlg_jax.data.spool import Spool
from mtnlg_jax.data.store.prepared import read_prepared
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import TokenWriter
from mtnlg_jax.data.tokenizer import load_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "launch/prepare_data.py"
SETTINGS = {"vocab_size": 400, "progress": False}


def _sentence(number):
    product = number * 7919 % 1000
    return f"Sentence {number} says that {product} is a number, and no other than {number}. "


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Write three long documents and an empty one."""
    folder = tmp_path_factory.mktemp("few")
    for name in range(3):
        text = "".join(_sentence(1000 * name + n) + "\n\n" * (n % 5 == 4) for n in range(300))
        (folder / f"{name}.txt").write_text(text)
    (folder / "blank.txt").write_text("\n")
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Write two hundred short documents, each of them twice."""
    folder = tmp_path_factory.mktemp("many")
    texts = ["".join(_sentence(10 * n + i) for i in range(3 + n % 9)) for n in range(200)]
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts * 2)
    )
    return folder


def _parts(folder):
    """Return the texts of the two parts, and check that each document has its bos and eos."""
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    texts = {}
    for part in ("train", "heldout"):
        tokens = open_tokens(Path(folder) / part)
        texts[part] = []
        for start, stop in zip(tokens.document_offsets, tokens.document_offsets[1:], strict=False):
            ids = tokens.read(start, stop)
            assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
            assert not tokenizer.is_special[ids[1:-1]].any()
            texts[part].append(tokenizer.decode(ids))
        assert tokens.meta["bytes"] == sum(len(text.encode()) for text in texts[part])
        assert tokens.meta["tokenizer"] == tokenizer.fingerprint
        assert tokens.meta["vocab_size"] == tokenizer.vocab_size
    return texts["train"], texts["heldout"]


def _read(folder):
    return [document.text for document in documents.read_documents(folder)]


def test_few_documents_have_their_ends_held_out(few, tmp_path):
    info = prepare(few, tmp_path / "out", heldout=0.1, **SETTINGS)
    assert info == read_prepared(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "heldout",
        "prepared.json",
        "tokenizer",
        "train",
    ]
    train, held = _parts(tmp_path / "out")
    wholes = _read(few)
    # Training documents are shuffled, held-out ones are not.
    assert sorted(
        next(text for text in train if whole.startswith(text)) + end
        for whole, end in zip(wholes, held, strict=True)
    ) == sorted(wholes)
    assert all(text.endswith("\n\n") for text in train)  # cut between paragraphs
    share = sum(map(len, held)) / sum(map(len, wholes))
    assert 0.08 < share < 0.12
    assert info["input"]["documents"] == 3 and info["input"]["empty"] == 1


def test_many_documents_are_held_out_whole(many, tmp_path):
    prepare(many, tmp_path / "out", heldout=0.1, **SETTINGS)
    train, held = _parts(tmp_path / "out")
    assert sorted(train + held) == sorted(_read(many))
    assert not set(train) & set(held)  # copies of a text are in one part
    share = sum(map(len, held)) / sum(map(len, train + held))
    assert 0.07 < share <= 0.12
    wholes = _read(many)
    assert train != [text for text in wholes if text in train]

    prepare(many, tmp_path / "other", heldout=0.1, seed=1, **SETTINGS)
    other_train, other_held = _parts(tmp_path / "other")
    assert set(other_held) != set(held) and other_train != train


@pytest.mark.parametrize("share", [0.11, 0.12, 0.13, 0.14, 0.15])
def test_copies_of_a_text_are_in_one_part(many, tmp_path, share):
    with Spool(str(tmp_path / "texts"), seed=0) as spool:
        spool.fill(documents.read_documents(many))
        train, held = (
            {spool.read(*span[:2]) for span in part.in_order()} for part in split(spool, share)
        )
    assert train and held and not train & held


def test_a_small_corpus_holds_out_a_tenth(many, few, tmp_path):
    """Two per cent of it would not fill a window, so a tenth is held out."""
    for corpus in (many, few):
        info = prepare(corpus, tmp_path / corpus.name, **SETTINGS)
        total = info["train"]["bytes"] + info["heldout"]["bytes"]
        assert 0.07 < info["heldout"]["bytes"] / total < 0.13


def test_short_texts_and_one_long_one(tmp_path):
    (tmp_path / "in").mkdir()
    for name in range(5):
        (tmp_path / f"in/{name}.txt").write_text(_sentence(name) * 2)
    prepare(tmp_path / "in", tmp_path / "out", vocab_size=320, progress=False)
    train, held = _parts(tmp_path / "out")
    assert (len(train), len(held)) == (4, 1) and sorted(train + held) == _read(tmp_path / "in")

    (tmp_path / "giant.txt").write_text("x" * 300_000)  # no place to cut
    info = prepare(tmp_path / "giant.txt", tmp_path / "giant", vocab_size=266, progress=False)
    train, held = _parts(tmp_path / "giant")
    assert train[0] + held[0] == "x" * 300_000 and info["heldout"]["bytes"] == 16_384


def test_nothing_held_out(few, tmp_path):
    info = prepare(few, tmp_path / "out", heldout=0, **SETTINGS)
    train, held = _parts(tmp_path / "out")
    assert held == [] and sorted(train) == sorted(_read(few)) and info["heldout"]["tokens"] == 0
    assert "nothing is held out" in describe(info)


def _content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_the_same_input_gives_the_same_bytes(many, tmp_path):
    first, second = (prepare(many, tmp_path / name, **SETTINGS) for name in ("a", "b"))
    assert first == second and _content(tmp_path / "a") == _content(tmp_path / "b")
    third = prepare(many, tmp_path / "c", **(SETTINGS | {"vocab_size": 401}))
    assert third["fingerprint"] != first["fingerprint"]


# A fingerprint covers the tokenizer and every token and offset of both parts, as version 0.2.0
# wrote them. A change here means that prepared data can no longer be reproduced.
_GOLDEN = {
    ("few", "bpe", 0.1): "65877a8880c20f08d92bca07ab86871b8edf8c970db36ce2da31e4983234bbd6",
    ("few", "bpe", 0.0): "b45835186ca9d720c80c2155e66ca3b4e88382cdff2b4d70053514266ebf520c",
    ("few", "gpt2", 0.1): "165ef918bd225c7cb8e9bfbc15e835f0880ecb952d9689af8977b4441f5e712d",
    ("few", "gpt2", 0.0): "7114435155c5ebdf67364f9f51359e2d1b1f105b45fe79e0db994049d18f8696",
    ("many", "bpe", 0.1): "75f8383b419008c40f6552c5988da589994dc517a2d309a800b68979652289ca",
    ("many", "bpe", 0.0): "a8cffee9724167bf2523c72020f1dbad6618bdbfe6daa0e0b91b1e0ac1764c2e",
    ("many", "gpt2", 0.1): "57b534d8b7212e1240ab7808a8cfce6197bc7da059477dac03bdcc1355649862",
    ("many", "gpt2", 0.0): "25a1fe750fe170513b69b31342b885803db10472a58186fdf4703e41e34eee35",
}


@pytest.mark.parametrize(("corpus", "tokenizer", "heldout"), _GOLDEN)
def test_tokens_equal_those_of_earlier_versions(
    few, many, gpt2_files, tmp_path, corpus, tokenizer, heldout
):
    """ "few" is text files whose ends are held out, "many" is JSON lines held out whole."""
    info = prepare(
        {"few": few, "many": many}[corpus],
        tmp_path / "out",
        tokenizer=str(gpt2_files) if tokenizer == "gpt2" else tokenizer,
        heldout=heldout,
        **SETTINGS,
    )
    assert info["fingerprint"] == _GOLDEN[corpus, tokenizer, heldout]


def test_an_existing_tokenizer(few, gpt2_files, tmp_path):
    ours = prepare(few, tmp_path / "ours", **SETTINGS)
    again = prepare(
        few, tmp_path / "again", tokenizer=str(tmp_path / "ours/tokenizer"), progress=False
    )
    assert again["fingerprint"] == ours["fingerprint"]
    prepare(few, tmp_path / "gpt2", tokenizer=str(gpt2_files), progress=False)
    train, held = _parts(tmp_path / "gpt2")  # with <|endoftext|> at both ends
    assert len(train) == len(held) == 3
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        prepare(few, tmp_path / "none", tokenizer="nowhere", progress=False)


def test_a_unigram_tokenizer(few, tmp_path):
    prepare(few, tmp_path / "out", tokenizer="unigram", vocab_size=300, progress=False)
    train, held = _parts(tmp_path / "out")
    assert sum(map(len, train + held)) == sum(map(len, _read(few)))


def test_an_existing_output_is_kept_until_the_new_one_is_complete(few, many, tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()  # empty: like none
    prepare(few, output, **SETTINGS)
    before = _content(output)
    with pytest.raises(FileExistsError, match="out exists; .*--overwrite"):
        prepare(many, output, **SETTINGS)
    with pytest.raises(ValueError, match="vocab_size=30000"):
        prepare(many, output, vocab_size=30000, overwrite=True, progress=False)
    with monkeypatch.context() as patch:

        def fail(writer):
            raise KeyboardInterrupt

        patch.setattr(TokenWriter, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(many, output, overwrite=True, **SETTINGS)
    with monkeypatch.context() as patch:

        def full(spool, documents):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Spool, "fill", full)
        with pytest.raises(OSError, match=f"No space left on device; nothing was kept: '{output}'"):
            prepare(many, output, overwrite=True, **SETTINGS)
    with monkeypatch.context() as patch:

        def full_later(writer):
            raise ValueError(
                "RESOURCE_EXHAUSTED: Error writing local file [source_locations='x'\n, "
                "os_error_code='28']"
            )

        patch.setattr(TokenWriter, "finish", full_later)
        with pytest.raises(OSError, match=f"No space left on device; nothing was kept: '{output}'"):
            prepare(many, output, overwrite=True, **SETTINGS)
    with monkeypatch.context() as patch:
        rename = os.rename

        def refuse(source, target):
            if ".partial-" in source:
                raise OSError(errno.EIO, "Input/output error")
            rename(source, target)

        patch.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            prepare(many, output, overwrite=True, **SETTINGS)
    assert _content(output) == before and list(tmp_path.iterdir()) == [output]

    info = prepare(many, output, overwrite=True, **SETTINGS)
    assert read_prepared(output) == info and list(tmp_path.iterdir()) == [output]


def test_two_runs_into_one_output(few, many, tmp_path, monkeypatch):
    """The one that ends first keeps the output."""
    finish = TokenWriter.finish

    def other_run_first(writer):
        if not (tmp_path / "out").exists():
            (tmp_path / "out").mkdir()
            (tmp_path / "out/prepared.json").write_text("theirs")
        return finish(writer)

    monkeypatch.setattr(TokenWriter, "finish", other_run_first)
    with pytest.raises(FileExistsError, match="out was made by another run meanwhile"):
        prepare(few, tmp_path / "out", **SETTINGS)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "prepared.json"]


def test_folders_that_are_not_data_sets_are_never_replaced(few, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("home", "file"):
        with pytest.raises(
            FileExistsError, match="is not a prepared data set .* and is not replaced"
        ):
            prepare(few, tmp_path / name, overwrite=True, **SETTINGS)
    assert (tmp_path / "home/letter").read_text() == (tmp_path / "file").read_text() == "dear"


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"heldout": 0.6}, ValueError, "heldout=0.6 must be in 0 to 0.5"),
        ({"heldout": float("nan")}, ValueError, "heldout=nan"),
        ({"on_error": "hope"}, ValueError, "on_error='hope'"),
        ({"text_key": "body"}, ValueError, "no 'text' among|no 'body' among text"),
        ({"vocab_size": 100}, ValueError, "vocab_size=100 .* smallest possible is"),
        ({"input_path": "nowhere"}, FileNotFoundError, "nowhere does not exist"),
    ],
)
def test_invalid_arguments_raise_an_error(many, tmp_path, options, error, message):
    arguments = {"input_path": many, "output": tmp_path / "out"} | SETTINGS | options
    with pytest.raises(error, match=message):
        prepare(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_corpus_raises_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="holds no text: 0 files read, 0 skipped"):
        prepare(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/a.txt").write_bytes(b"\0\r\n")
    (tmp_path / "in/b.jsonl").write_bytes(b"{\n")
    (tmp_path / "in/c.pdf").write_bytes(b"%")
    with pytest.raises(ValueError, match="2 files read, 1 skipped, 1 documents empty, 1 damaged"):
        prepare(tmp_path / "in", tmp_path / "out", on_error="skip")
    with pytest.raises(ValueError, match="is inside the input"):
        prepare(tmp_path / "in", tmp_path / "in/out")


def test_an_output_at_a_url(few, tmp_path):
    local = prepare(few, tmp_path / "out", **SETTINGS)
    assert prepare(few, "memory://bucket/data/", **SETTINGS)["fingerprint"] == local["fingerprint"]
    tokens = open_tokens("memory://bucket/data/heldout")
    assert tokens.meta == local["heldout"] and tokens.read(0, len(tokens)).size == len(tokens) > 0
    assert load_tokenizer("memory://bucket/data/tokenizer").vocab_size == 400
    with pytest.raises(FileExistsError, match="memory://bucket/data exists"):
        prepare(few, "memory://bucket/data", **SETTINGS)
    again = prepare(few, "memory://bucket/data", seed=1, overwrite=True, **SETTINGS)
    assert read_prepared("memory://bucket/data") == again


def _launch(*arguments, **options):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_the_command(few, tmp_path):
    done = _launch(f"--input={few}", f"--output={tmp_path}/out", "--vocab_size=400")
    assert done.returncode == 0, done.stderr
    for part in (
        "3 documents",
        "1 empty",
        "400 pieces",
        "bytes/token",
        "Sent",
        f"python launch/pretrain.py --config=configs/small.py --set=data.path={tmp_path}/out ",
    ):
        assert part in done.stdout
    again = _launch(f"--input={few}", f"--output={tmp_path}/out")
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr == (
        f"error: {tmp_path}/out exists; choose another output or replace it with --overwrite\n"
    )
    assert _launch("--output=x", "--nonsense=1").returncode not in (0, None)
    assert _launch(f"--output={tmp_path}/y", "stray").returncode == 2


# JAX warns of every fork in a process with threads; the child calls exec at once.
@pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")
def test_a_full_disk_raises_an_error(few, tmp_path):
    """A limit on the size of files replaces a full disk."""

    def restrict():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = _launch(
        f"--input={few}", f"--output={tmp_path}/out", "--vocab_size=400", preexec_fn=restrict
    )
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert "nothing was kept" in done.stderr and done.stderr.count("\n") == 1
