"""An audit of a small run from end to end, its report, and its errors."""

import html
import json
import re
import shutil
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from mtnlg_jax.config import load_config
from mtnlg_jax.data.canaries import CanaryConfig
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.evaluate.audit.planted import canaries_of
from mtnlg_jax.evaluate.audit.report import describe, render
from mtnlg_jax.evaluate.audit.run import audit
from mtnlg_jax.evaluate.audit.settings import AuditSettings, ExtractionSettings
from mtnlg_jax.evaluate.audit.sources import (
    Source,
    draw_passages,
    held_out_of,
    open_run_data,
)
from mtnlg_jax.interop import registry
from mtnlg_jax.interop.huggingface import convert
from mtnlg_jax.train.checkpoint import config_of

_PARTS = ("extraction", "canaries", "membership", "personal_data")
SETTINGS = AuditSettings(
    passages=20,
    extraction=ExtractionSettings((8, 16), 8, samples=2),
    candidates=200,
    texts=6,
    text_tokens=16,
    member_tokens=32,
)


def _audit(workdir, settings=SETTINGS, **options):
    return audit(str(workdir), "last", settings, progress=False, **options)


@pytest.fixture(scope="module")
def report(trained):
    return _audit(trained)


def _changed(**changes):
    return AuditSettings(**(vars(SETTINGS) | changes))


def test_exposure_rises_with_copies_and_is_chance_at_none(report):
    none, many = report["canaries"]["by_copies"]
    assert (none["copies"], many["copies"]) == (0, 60)
    assert none["chance_probability"] > 0.01
    assert none["exposure"]["low"] < report["canaries"]["chance"] < none["exposure"]["high"]
    assert many["exposure"]["low"] > none["exposure"]["high"]
    assert many["chance_probability"] < 1e-6


def test_the_report_has_every_part(report, prepared):
    assert report["kind"] == "audit"
    assert report["step"] == 80
    assert report["data"] == [str(prepared)]
    assert report["skipped"] == {}
    assert report["notes"] == []
    extraction = report["extraction"]
    assert [row["prefix"] for row in extraction["training"]] == [8, 16]
    assert extraction["training"][0]["greedy"]["trials"] == 20
    assert report["membership"]["members"] == report["membership"]["others"] == 20
    assert set(report["membership"]["scores"]) == {"loss", "zlib", "min_k", "min_k_plus"}
    assert report["personal_data"]["texts"] == 6
    assert set(report["seconds"]) == {"counting", *_PARTS}
    json.dumps(report, allow_nan=False)
    # Nothing shows a secret, unless it was asked for.
    assert all(row["secret"] is None for row in report["canaries"]["canaries"])


def test_the_page_shows_the_figures_of_the_json(report):
    page = html.unescape(render(report))
    rows = [re.sub(r"<[^>]+>", " ", row) for row in re.findall(r"<tr>.*?</tr>", page, re.S)]
    rows = [row.split() for row in rows]
    for row in report["canaries"]["by_copies"]:
        shown = next(each for each in rows if each[:2] == [str(row["copies"]), "8"])
        assert float(shown[2]) == round(row["exposure"]["mean"], 2)
        assert float(shown[3]) == round(row["exposure"]["low"], 2)
    for name, each in report["membership"]["scores"].items():
        shown = next(row for row in rows if row[0] == name)
        assert float(shown[1]) == round(each["auc"], 3)
    shares = [row for row in rows if row[:2] in (["8", "20"], ["16", "20"])]
    greedy = report["extraction"]["training"]
    assert [row[2] for row in shares[:2]] == [f"{100 * e['greedy']['share']:.1f}" for e in greedy]
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    text = describe(report)
    assert f"{report['canaries']['by_copies'][1]['exposure']['mean']:.2f}" in text


@pytest.mark.slow
def test_a_second_audit_measures_the_same(report, trained):
    again = _audit(trained)
    for part in _PARTS:
        assert again[part] == report[part], part


def test_passages_stay_within_documents_and_apart(trained):
    config = config_of(trained)
    tokenizer, (source,) = open_run_data(str(trained), config, None)
    rng = np.random.default_rng(0)
    found = draw_passages("a", source.train, tokenizer, 20, 100, rng, apart=True)
    starts = sorted(each.start for each in found)
    assert len(found) == 100
    assert min(np.diff(starts)) >= 20
    part = source.train[0]
    for each in found:
        assert each.tokens.tolist() == part.read(each.start, each.start + 20).tolist()
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(each.tokens.tolist())
    # There are only so many that do not overlap.
    heldout = draw_passages("a", [source.heldout], tokenizer, 60, 1000, rng, apart=True)
    assert 0 < len(heldout) < len(source.heldout) / 60


def test_the_first_passages_are_a_sample_of_all_parts(trained):
    tokenizer, (source,) = open_run_data(str(trained), config_of(trained), None)
    parts = [source.heldout, *source.train]
    found = draw_passages("", parts, tokenizer, 16, 1000, np.random.default_rng(0))[:100]
    first = parts[0]
    held = [each.start + 16 <= len(first) for each in found]
    held = [
        inside and first.read(each.start, each.start + 16).tolist() == each.tokens.tolist()
        for inside, each in zip(held, found, strict=True)
    ]
    share = len(first) / sum(map(len, parts))
    assert 0 < sum(held) < 100 * (share + 0.15)


class _Held(NamedTuple):
    """Held-out text of 10 tokens."""

    location: str
    meta: dict

    def __len__(self):
        return 10


def test_a_source_of_a_recipe_has_its_own_held_out_text(tmp_path):
    place = tmp_path / "data"
    held = _Held(f"{place}/heldout", {"sources": [["a", 5], ["b", 3], ["a", 2]]})
    train = (SimpleNamespace(location=f"{place}/sources/b/train"),)
    chosen = held_out_of(Source(f"{place}/sources/b", train, held))(np.arange(10))
    assert np.flatnonzero(chosen).tolist() == [5, 6, 7]
    # Held-out text from elsewhere is taken whole.
    other = Source(str(tmp_path / "other"), train, held)
    assert held_out_of(other)(np.arange(10)).all()


def test_an_empty_held_out_part_is_not_replaced(prepared, corpus, tmp_path):
    empty = tmp_path / "data"
    tokenizer = str(prepared / "tokenizer")
    prepare(corpus, empty, tokenizer=tokenizer, heldout=0, progress=False)
    data = [str(prepared), str(empty)]
    _, sources = open_run_data("run", load_config("configs/tiny.py"), None, data)
    assert [len(each.heldout) > 0 for each in sources] == [True, False]


def test_canaries_of_two_folders_add_up_and_a_folder_counts_once(prepared, corpus, tmp_path):
    other = tmp_path / "data"
    config = CanaryConfig(8, (0, 60))
    tokenizer = str(prepared / "tokenizer")
    prepare(corpus, other, tokenizer=tokenizer, canaries=config, progress=False)
    config = load_config("configs/tiny.py")
    _, sources = open_run_data("run", config, None, [str(prepared), str(other)])
    found = canaries_of(sources)
    assert [each.copies for each in found] == [0] * 8 + [120] * 8
    assert canaries_of([sources[0], sources[0]]) == canaries_of(sources[:1])


def test_held_out_text_that_was_trained_on_is_too_little_to_compare(trained, prepared, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    shutil.rmtree(data / "heldout")
    shutil.copytree(data / "train", data / "heldout")
    settings = _changed(texts=2, extraction=ExtractionSettings((8,), 8, samples=0))
    found = _audit(trained, settings, data=[str(data)])
    assert found["membership"] is None
    assert "has 20 passages and the held-out text 0 of 32 tokens" in found["skipped"]["membership"]
    with pytest.raises(ValueError, match="membership needs 10 of each.*leave membership out"):
        _audit(trained, _changed(parts=("membership",)), data=[str(data)])


def test_other_data_and_a_reference_are_told(trained, prepared, corpus, tmp_path):
    settings = _changed(parts=("membership",))
    found = _audit(trained, settings, reference=str(trained), data=[str(prepared)])
    # The same model: the difference is 0 for all.
    assert found["membership"]["scores"]["reference"]["auc"] == 0.5
    assert found["extraction"] is None
    other = tmp_path / "data"
    prepare(corpus, other, tokenizer=str(prepared / "tokenizer"), heldout=0.05, progress=False)
    found = _audit(trained, _changed(parts=("membership",)), data=[str(other)])
    assert "the data differ" in found["notes"][0]
    assert "the data differ" in render(found)


def test_parts_that_the_data_do_not_allow_are_left_out(trained, prepared, corpus, tmp_path):
    tokenizer = str(prepared / "tokenizer")
    other = tmp_path / "data"
    prepare(corpus, other, tokenizer=tokenizer, heldout=0, progress=False)
    settings = _changed(texts=2, extraction=ExtractionSettings((8,), 8, samples=0))
    found = _audit(trained, settings, data=[str(other)])
    assert set(found["skipped"]) == {"canaries", "membership"}
    assert found["canaries"] is found["membership"] is None
    assert found["extraction"]["heldout"][0]["greedy"]["share"] is None
    assert "Left out: membership" in render(found)
    with pytest.raises(ValueError, match="holds no held-out text.*leave membership out"):
        _audit(trained, _changed(parts=("membership",)), data=[str(other)])
    with pytest.raises(ValueError, match="has no canaries.json; plant some"):
        _audit(trained, _changed(parts=("canaries",)), data=[str(other)])


def test_canaries_that_are_not_in_the_data_are_an_error(trained, prepared, tmp_path):
    changed = tmp_path / "data"
    shutil.copytree(prepared, changed)
    content = json.loads((changed / "canaries.json").read_text())
    content["canaries"][-1]["copies"] = 99
    (changed / "canaries.json").write_text(json.dumps(content))
    settings = _changed(parts=("canaries",))
    with pytest.raises(ValueError, match="1 of 16 canaries are not in .* planted 99 times"):
        _audit(trained, settings, data=[str(changed)])
    with pytest.raises(FileNotFoundError, match="missing.json does not exist"):
        _audit(trained, settings, canaries=str(tmp_path / "missing.json"))


def test_models_that_cannot_be_audited_are_an_error(trained, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="--reference=.*nowhere holds no model; give a"):
        _audit(trained, reference=nowhere)
    masked = load_config("configs/tiny.py", ["train.stages=[{'name': 'm', 'masked': 1}]"])
    with pytest.raises(ValueError, match="every stage of RUN is masked, and an audit reads"):
        open_run_data("RUN", masked, None)


def test_another_tokenizer_is_an_error(trained, corpus, tmp_path):
    other = tmp_path / "data"
    prepare(corpus, other, vocab_size=350, canaries=CanaryConfig(), progress=False)
    with pytest.raises(ValueError, match=r"has another tokenizer \(350 tokens.*trained on"):
        _audit(trained, data=[str(other)])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        _audit(trained, data=[str(tmp_path / "nowhere")])


def test_a_model_of_another_format_reads_the_data_of_its_run(trained, prepared, corpus, tmp_path):
    registry.register()
    folder = tmp_path / "converted"
    convert(str(trained), str(folder))
    config = config_of(folder)
    with pytest.raises(ValueError, match="does not name the data it was trained on; give --data"):
        open_run_data(str(folder), config, None)
    # Its tokenizer is another file with the same ids.
    tokenizer, (source,) = open_run_data(str(folder), config, None, [str(prepared)])
    assert source.path == str(prepared)
    other = tmp_path / "data"
    prepare(corpus, other, vocab_size=400, tokenizer="unigram", progress=False)
    with pytest.raises(ValueError, match="has another tokenizer"):
        open_run_data(str(folder), config, None, [str(other)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extraction": ExtractionSettings((60,), 8)}, "a prefix of 60 tokens .* context of 64"),
        ({"member_tokens": 65}, "member_tokens=65 do not fit the model's context of 64"),
        ({"parts": ("all",)}, "unknown value parts=all; choose of extraction"),
        ({"parts": ()}, "parts is empty"),
        ({"passages": 0}, "passages=0 must be 1 or more"),
        ({"candidates": 0}, "candidates=0"),
        ({"min_k": 0.0}, "min_k=0.0 is a percentage"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"extraction": ExtractionSettings(samples=-1)}, "samples=-1"),
        ({"extraction": ExtractionSettings(temperature=0.0)}, "temperature=0.0 must be above 0"),
    ],
)
def test_bad_settings_are_one_error(trained, changes, message):
    with pytest.raises(ValueError, match=message):
        _audit(trained, _changed(**changes))
