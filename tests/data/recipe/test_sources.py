"""Check recipe settings that differ by source, and the sources of the paper's blend."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import pyarrow.parquet
import pytest

from mtnlg_jax.config import load_config
from mtnlg_jax.data.filter.clean import CleanConfig, clean
from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.data.recipe.run import make
from mtnlg_jax.data.recipe.settings import TECHNICAL_TEXT, Recipe, Source, clean_config, load_recipe
from mtnlg_jax.data.recipe.stages import in_processes
from mtnlg_jax.data.store.prepared import read_prepared
from mtnlg_jax.data.store.sources import open_sources

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def one():
    return functools.partial(in_processes, 1)


def _texts(folder):
    """Return [(source, text)] of the Parquet files that a stage wrote."""
    found = []
    for path in sorted(folder.glob("*.parquet")):
        table = pyarrow.parquet.read_table(path)
        places = table["place"].to_pylist()
        found += zip(
            (place.split("/")[0] for place in places), table["text"].to_pylist(), strict=True
        )
    return found


_CODE = '''
class Reader:
    """Reads rows."""

    def __init__(self, path, size=0x10):
        self.path = path
        self.size = size  # bytes

    def rows(self):
        with open(self.path, "rb") as file:
            while chunk := file.read(self.size):
                yield chunk.replace(b"&amp;", b"&")


#################### end {number} ####################
'''
_FORMULA = r"""
\begin{{equation}} E_{{{number}}} = m c^2 + \sum_{{i=0}}^{{n}} \frac{{a_i}}{{b_i}} \end{{equation}}
\begin{{align}} x &= y_{{1}} \\ y &= z^{{2}} \\ z &= \alpha + \beta \cdot \gamma \end{{align}}
"""
_LICENSE = (
    "Licensed to all who read this file and to all who run it, "
    "under terms that a file beside it holds."
)


@pytest.fixture(scope="module")
def technical(tmp_path_factory):
    """Write (folder, texts by source): code and formulas that a rule for prose would drop, and
    prose that shares a line."""
    root = tmp_path_factory.mktemp("technical")
    documents = (document.text for document in embedded_documents())
    prose = [text for text in documents if not clean(text, CleanConfig()).dropped]
    prose = list(itertools.islice(prose, 8))
    texts = {
        "code": [f"# {_LICENSE}\n\n" + _CODE.replace("{number}", str(n)) * 3 for n in range(50)],
        "math": [_FORMULA.format(number=n) * 6 for n in range(50)],
        "prose": [f"{_LICENSE}\n\n{text}" for text in prose],
    }
    for name, rows in texts.items():
        (root / name).mkdir()
        lines = (json.dumps({"text": text}) for text in rows)
        (root / name / "a.jsonl").write_text("\n".join(lines))
    return root, texts


def _sources(**settings):
    names = ("code", "math", "prose")
    return tuple(Source(name, (name,), **settings.get(name, {})) for name in names)


def test_rules_for_prose_keep_code_and_formulas(one, technical, tmp_path):
    root, texts = technical
    stages = ("clean", "paragraphs")
    plain = Recipe(sources=_sources(), stages=stages)
    marked = Recipe(sources=_sources(code=TECHNICAL_TEXT, math=TECHNICAL_TEXT), stages=stages)
    left = {}
    for name, recipe in (("plain", plain), ("marked", marked)):
        info = make(recipe, root, tmp_path / name, engine=one(), progress=False)
        for stage in stages:
            for source, text in _texts(tmp_path / name / "stages" / stage):
                left.setdefault((name, stage, source), []).append(text)
    assert sorted(left["marked", "clean", "code"]) == sorted(texts["code"])
    assert sorted(left["marked", "clean", "math"]) == sorted(texts["math"])
    assert ("marked", "paragraphs", "code") not in left  # not run over it
    assert info["stages"][-1]["note"] == "Not run over code, math: 100 documents."
    assert (
        len(left.get(("plain", "clean", "code"), ()))
        + len(left.get(("plain", "clean", "math"), ()))
        < 50
    )
    for name in ("plain", "marked"):  # prose is treated alike in both
        assert sum(_LICENSE in text for text in left[name, "paragraphs", "prose"]) == 1


def test_personal_data_is_also_masked_in_code(one, technical, tmp_path):
    _, texts = technical
    (tmp_path / "in/code").mkdir(parents=True)
    row = {"text": "# ask ann.lee@mail.com about this\n" + texts["code"][0]}
    (tmp_path / "in/code/a.jsonl").write_text(json.dumps(row))
    recipe = Recipe(sources=(Source("code", ("code",), **TECHNICAL_TEXT),), stages=("clean",))
    make(recipe, tmp_path / "in", tmp_path / "out", engine=one(), progress=False)
    ((_, text),) = _texts(tmp_path / "out/stages/clean")
    assert text == row["text"].replace("ann.lee@mail.com", "<EMAIL>")


def test_a_source_may_skip_stages_and_inherits_settings(one, technical, tmp_path):
    root, texts = technical
    passed = {"skip_stages": ("clean", "duplicates", "paragraphs")}
    sources = _sources(
        code=passed, math=TECHNICAL_TEXT, prose={"settings": ("clean.min_tokens=100000",)}
    )
    recipe = Recipe(sources=sources, stages=("clean", "duplicates"))
    make(recipe, root, tmp_path / "out", engine=one(), progress=False)
    assert {source for source, _ in _texts(tmp_path / "out/stages/clean")} == {"math"}
    assert clean_config(recipe, "prose").min_tokens == 100000 and recipe.clean.min_tokens == 128
    shorter = dataclasses.replace(recipe, clean=dataclasses.replace(recipe.clean, min_tokens=7))
    assert (
        clean_config(shorter, "math").min_tokens == 7
        and not clean_config(shorter, "math").prose_rules
    )


def test_the_run_and_the_recipe_have_the_same_sources():
    recipe = load_recipe(str(ROOT / "configs/data/mtnlg.py"))
    run = load_config(str(ROOT / "configs/mtnlg_530b.py"))
    assert run.data.blend == tuple((f"data/{s.name}", s.weight) for s in recipe.sources)
    assert [s.name for s in recipe.sources if s.skip_stages] == ["StackExchange", "ArXiv", "GitHub"]
    output = load_config(str(ROOT / "configs/mtnlg_530b.py"), ["data.path=OUT"])
    assert output.data.sources == (("OUT", 1.0),)


def test_a_source_of_an_output_can_be_blended_by_name(one, technical, tmp_path):
    root, _ = technical
    recipe = Recipe(sources=_sources(), stages=("tokens",), vocab_size=400)
    make(recipe, root, tmp_path / "out", engine=one(), progress=False)
    names = [f"{tmp_path}/out/{name}" for name, _ in read_prepared(tmp_path / "out")["sources"]]
    tokenizer, opened, held_out = open_sources(names[1:])
    whole = open_sources([str(tmp_path / "out")])
    assert list(opened) == names[1:] != list(whole[1])
    assert tokenizer.fingerprint == whole[0].fingerprint
    places = {name: tokens.location for name, tokens in held_out.items()}
    assert set(places.values()) == {f"{tmp_path}/out/heldout"} and list(places) == names[1:]
