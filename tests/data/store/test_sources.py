import shutil
from pathlib import Path

import numpy as np
import pytest

from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.store.sources import open_sources, open_tokens
from mtnlg_jax.data.tokenizer import load_tokenizer

SHORT, SENTENCES = (
    str(Path(__file__).parents[1] / "fixtures" / name) for name in ("short", "sentences")
)


@pytest.fixture(scope="module")
def prepared(gpt2_files, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("All this is a text of some words. " * 200)
    trained["bpe"].save(folder / "bpe")
    for name, tokenizer in (("data", gpt2_files), ("other", folder / "bpe")):
        prepare(folder / "text.txt", folder / name, tokenizer=str(tokenizer), progress=False)
    return str(folder / "data"), str(folder / "other")


def test_prepared_folders_have_tokenizer_and_held_out_text(prepared):
    tokenizer, opened, held_out = open_sources([prepared[0]])
    assert tokenizer.fingerprint == opened[prepared[0]].meta["tokenizer"] and tokenizer.prompt_bos
    assert {path: part.location for path, part in held_out.items()} == {
        prepared[0]: f"{prepared[0]}/heldout"
    }


@pytest.mark.parametrize("share, kept", [(0.01, 39), (0.25, 30), (0.0, 40), (0.5, 20)])
def test_the_last_documents_are_held_out(gpt2_files, share, kept):
    tokenizer, opened, held_out = open_sources([SHORT, SENTENCES], str(gpt2_files), share)
    for path in (
        SHORT,
        SENTENCES,
    ):  # of every source: a held-out loss speaks for all that is trained on
        whole = open_tokens(path)
        assert opened[path].documents == kept and held_out[path].documents == 40 - kept
        both = np.concatenate([part.read(0, len(part)) for part in (opened[path], held_out[path])])
        assert np.array_equal(both, whole.read(0, len(whole)))
        assert held_out[path].meta["tokenizer"] == tokenizer.fingerprint
    assert not tokenizer.prompt_bos


def test_a_single_document_is_trained_on(gpt2_files, tmp_path):
    from mtnlg_jax.data.store.megatron import open_megatron, write_megatron

    part = open_megatron(SHORT, 20, 21)
    part.attach(load_tokenizer(gpt2_files))
    write_megatron(part, tmp_path / "one")
    _, opened, held_out = open_sources([str(tmp_path / "one")], str(gpt2_files), 0.3)
    assert opened[str(tmp_path / "one")].documents == 1 and not sum(map(len, held_out.values()))


def test_other_tokens_held_out(prepared, gpt2_files):
    for heldout in (SENTENCES, f"{prepared[0]}/heldout"):
        _, opened, held_out = open_sources([SHORT], str(gpt2_files), heldout)
        assert list(held_out) == [heldout] and opened[SHORT].documents == 40
        assert held_out[heldout].location == heldout and held_out[heldout].predicted[1] > 0
    _, _, held_out = open_sources([prepared[0]], heldout=f"{prepared[0]}/train")
    assert held_out[f"{prepared[0]}/train"].location == f"{prepared[0]}/train"


def test_prompt_bos_is_kept_with_the_tokenizer(gpt2_files, tmp_path):
    tokenizer, _, _ = open_sources([SHORT], str(gpt2_files))
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (
        not again.prompt_bos
        and again.fingerprint == tokenizer.fingerprint == load_tokenizer(gpt2_files).fingerprint
    )
    assert load_tokenizer(gpt2_files).prompt_bos


def test_prompts_have_bos_if_documents_do(prepared, gpt2_files, tmp_path):
    from mtnlg_jax.data.store.megatron import write_megatron

    write_megatron(open_tokens(f"{prepared[0]}/train"), tmp_path / "x")
    tokenizer, _, _ = open_sources([str(tmp_path / "x")], str(gpt2_files))
    assert tokenizer.prompt_bos
    tokenizer, _, _ = open_sources([str(tmp_path / "x"), SHORT], str(gpt2_files))
    assert not tokenizer.prompt_bos


def test_incompatible_sources_raise_an_error(prepared, gpt2_files, tmp_path):
    gpt2 = str(gpt2_files)
    data, other = prepared
    shutil.copytree(data, tmp_path / "copy")
    for arguments, error, message in [
        (([SHORT],), ValueError, "does not hold its tokenizer; give --set=data.tokenizer=FOLDER"),
        (([data, SHORT],), ValueError, "short is a Megatron data set"),
        (
            ([SHORT, other], gpt2),
            ValueError,
            "other was not tokenized with .*; leave data.tokenizer out",
        ),
        (([data, other],), ValueError, "the sources were tokenized differently"),
        (
            ([SHORT], gpt2, SHORT + ".bin"),
            ValueError,
            "data.heldout=.*short.bin is also trained on",
        ),
        (([SHORT], gpt2, str(tmp_path / "x")), FileNotFoundError, "x does not exist"),
        (([str(tmp_path / "x")], gpt2), FileNotFoundError, "x does not exist"),
        (([str(tmp_path / "x.idx")], gpt2), FileNotFoundError, "x.idx does not exist"),
        (([SHORT], str(tmp_path / "x")), FileNotFoundError, "x does not exist"),
    ]:
        with pytest.raises(error, match=message):
            open_sources(*arguments)


def test_unprepared_paths_raise_an_error_with_a_remedy(tmp_path, monkeypatch):
    """Each message suggests a path that works."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "OUT/train",
        "OUT/heldout",
        "OUT/tokenizer",
        "OUT/stages/clean",
        "shards",
        "above",
        "run/checkpoints",
        "raw",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "OUT/prepared.json").write_text("{}")
    for name in (
        "OUT/train/meta.json",
        "shards/web_text.idx",
        "shards/web_text.bin",
        "shards/b.idx",
        "book.txt",
        "raw/a.txt",
    ):
        (tmp_path / name).write_text("")
    (tmp_path / "above/OUT").symlink_to(tmp_path / "OUT")
    for path, words in {
        "OUT2": "OUT2 does not exist; did you mean OUT?",
        "OUT/train": "give OUT",
        "OUT/heldout/": "give OUT",
        "OUT/stages/clean": "give OUT",
        f"{tmp_path}/OUT/tokenizer": f"give {tmp_path}/OUT",
        "shards": "the prefix of one: shards/b, or one of 1 more",
        "shards/web_txt": "did you mean shards/web_text?",
        "book.txt": "is a file that was not prepared",
        "above": "give above/OUT",
        "run": "is a run, which holds no data",
        "raw": "--input=raw --output=OUT",
        "nowhere/at/all": "does not exist; make data",
        "memory://nothing": "holds no prepared data",
    }.items():
        with pytest.raises(FileNotFoundError) as caught:
            open_sources([path])
        assert words in str(caught.value) and "\n" not in str(caught.value), (
            path,
            str(caught.value),
        )
