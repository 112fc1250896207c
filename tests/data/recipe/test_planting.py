"""Canaries of a recipe: after all filters, in the training part alone, and the same on resume."""

import dataclasses
import functools
import itertools
import json

import pytest

from mtnlg_jax.data import canaries
from mtnlg_jax.data.canaries import CanaryConfig
from mtnlg_jax.data.description import describe
from mtnlg_jax.data.filter.clean import CleanConfig
from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.data.recipe.run import make
from mtnlg_jax.data.recipe.settings import Recipe, Source
from mtnlg_jax.data.recipe.stages import in_processes
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.tokenizer import load_tokenizer

WANTED = CanaryConfig(3, (0, 2, 9))
RECIPE = Recipe(
    name="planted",
    sources=(Source("books", ("books",)), Source("pages", ("pages",))),
    clean=CleanConfig(languages=("en",)),
    vocab_size=500,
    shard_bytes=20_000,
    heldout=0.1,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    texts = [document.text for document in itertools.islice(embedded_documents(), 40)]
    for source, part in (("books", texts[:25]), ("pages", texts[25:])):
        (root / source).mkdir()
        (root / source / "a.jsonl").write_text(
            "".join(json.dumps({"text": each}) + "\n" for each in part)
        )
    return root


@pytest.fixture(scope="module")
def run(text):
    """Return a function that makes an output with some canaries in one process."""

    def start(output, config, **options):
        recipe = dataclasses.replace(RECIPE, canaries=config)
        return make(recipe, text, output, engine=in_processes(1), progress=False, **options)

    return start


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("made") / "out"
    return output, run(output, WANTED)


def _text(output, part):
    tokenizer = load_tokenizer(output / "tokenizer")
    tokens = open_tokens(output / part)
    # Special tokens are shown, so that a canary is known to be a document of its own.
    return tokenizer.decode(tokens.read(0, len(tokens)).tolist(), skip_special=False)


def test_every_copy_is_a_training_document_of_its_source(made):
    output, info = made
    tokenizer = load_tokenizer(output / "tokenizer")
    bos, eos = (tokenizer.special_names[id] for id in (tokenizer.bos_id, tokenizer.eos_id))
    texts = {name: _text(output, f"sources/{name}/train") for name in ("books", "pages")}
    found = canaries.read_canaries(output)
    assert [each.copies for each in found] == [0] * 3 + [2] * 3 + [9] * 3
    for each in found:
        counts = {name: text.count(f"{bos}{each.text}{eos}") for name, text in texts.items()}
        wanted = {"books": 0, "pages": 0, each.source: each.copies}
        assert counts == wanted
    assert "access code" not in _text(output, "heldout")
    assert info["canaries"]["documents"] == 33
    assert "canaries" in describe(info)
    assert "33 documents" in (output / "report.html").read_text()


def test_a_second_run_changes_nothing(made, run):
    output, info = made

    def files():
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in output.rglob("*")
            if path.is_file() and ("tokens/" in str(path) or path.name == "canaries.json")
        }

    before = files()
    assert before
    assert run(output, WANTED)["outputs"] == info["outputs"]
    assert files() == before


def test_canaries_come_and_go_with_overwrite(made, run, tmp_path):
    _, planted = made
    output = tmp_path / "out"
    plain = run(output, CanaryConfig())
    assert plain["outputs"]["tokenizer"] == planted["outputs"]["tokenizer"]
    assert plain["outputs"]["heldout"] == planted["outputs"]["heldout"]
    assert plain["outputs"]["all"] != planted["outputs"]["all"]
    assert not (output / "canaries.json").exists()
    # Outputs that were begun before there were canaries have none in their settings.
    recorded = json.loads((output / "recipe.json").read_text())["settings"]
    assert not any(key.startswith("canaries") for key in recorded)
    with pytest.raises(FileExistsError, match=r"canaries.copies was None"):
        run(output, WANTED)
    again = run(output, WANTED, overwrite=True)
    assert again["outputs"] == planted["outputs"]
    assert run(output, CanaryConfig(), overwrite=True)["outputs"] == plain["outputs"]
    assert not (output / "canaries.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"canaries": CanaryConfig(2, (-1,))}, "canary_copies=-1"),
        ({"canaries": CanaryConfig(2), "stages": ("clean",)}, "planted by the stage tokens"),
        ({"canaries": CanaryConfig(300, (0, 9))}, "at most 10% may be planted"),
    ],
)
def test_bad_settings_are_one_error(text, tmp_path, change, message):
    recipe = dataclasses.replace(RECIPE, **change)
    started = functools.partial(make, engine=in_processes(1), progress=False)
    with pytest.raises(ValueError) as error:
        started(recipe, text, tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out" / "prepared.json").exists()
