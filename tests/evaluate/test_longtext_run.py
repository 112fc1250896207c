"""The report and the plots of long texts."""

import io

import numpy as np
import pytest
from matplotlib import image

from mtnlg_jax.evaluate.figures import Figure
from mtnlg_jax.evaluate.longtext import MEASURES, LongTextReport
from mtnlg_jax.evaluate.longtext_plots import write_plots
from mtnlg_jax.evaluate.longtext_run import LongTextScore, describe, score_json
from mtnlg_jax.evaluate.needle import Needle
from mtnlg_jax.evaluate.windows import Bucket

NEEDLES = [
    Needle(length, depth, ranked, 0.5, 4)
    for length, ranked in ((128, 1.0), (256, 0.25))
    for depth in (0.0, 1.0)
]


def _report(**changes) -> LongTextReport:
    figures = {name: Figure(0.25, 9) for name in MEASURES}
    figures["context_gain"] = Figure(0.0863, 64, 0.0172)
    figures["mauve"] = Figure(None, absent="needs references: real texts to compare with")
    fields = {
        "figures": figures,
        "texts": 2,
        "words": 1200,
        "tokens": 1500,
        "positions": (Bucket(1, 8, 5.0, 0.1), Bucket(9, 16, 4.0, None)),
        "along": ((0.0, 0.5, 1.0), (0.1,)),
        "frequencies": (9, 5, 1),
        "curve": (),
        "repeated": "the edge of the pit",
    }
    return LongTextReport(**(fields | changes))


def test_the_table_has_a_line_for_each_measure():
    lines = describe("a.txt", LongTextScore(_report(), _report(), NEEDLES, 7)).splitlines()
    assert lines[0] == "a.txt: 2 text(s), 1,200 words, 1,500 tokens (checkpoint of step 7)"
    assert lines[1].split() == ["measure", "texts", "references", "better"]
    table = dict(zip(MEASURES, lines[2 : 2 + len(MEASURES)], strict=True))
    assert all(line.startswith(MEASURES[name].title) for name, line in table.items())
    assert table["context_gain"].count("0.0863 ± 0.017") == 2
    assert table["mauve"].split()[-3:] == ["-", "-", "higher"]
    text = "\n".join(lines)
    assert "MAUVE by the model's features, texts: absent, needs references" in text
    assert "the longest repeated span: 'the edge of the pit'" in text
    assert lines[-2].split() == "128 1.00 / 0.50 1.00 / 0.50".split()
    assert lines[-1].split() == "256 0.25 / 0.50 0.25 / 0.50".split()
    alone = describe("a.txt", LongTextScore(_report(repeated=""), None, None, 7))
    assert "references  " not in alone and "pass keys" not in alone and "span:" not in alone


def test_the_object_holds_everything():
    content = score_json(LongTextScore(_report(), None, NEEDLES, 7), {"damaged": 1})
    assert content["step"] == 7 and content["left_out"] == {"damaged": 1}
    assert content["references"] is None and content["needles"][0]["ranked"] == 1.0
    assert content["texts"]["figures"]["context_gain"]["error"] == 0.0172
    assert content["texts"]["positions"][0] == {"first": 1, "last": 8, "loss": 5.0, "error": 0.1}


@pytest.mark.parametrize("real", [None, _report()])
def test_plots_are_pictures_of_what_there_is(tmp_path, real):
    curve = ((0.0, 1.0), (0.8, 0.8), (1.0, 0.0))
    figures = _report().figures | {"mauve": Figure(0.7, 40)}
    names = write_plots(tmp_path, _report(curve=curve, figures=figures), real, NEEDLES)
    assert names == [
        "zipf.png",
        "repetition.png",
        "loss_by_position.png",
        "divergence.png",
        "needle.png",
    ]
    for name in names:
        picture = image.imread(io.BytesIO((tmp_path / name).read_bytes()))
        assert picture.shape[:2] >= (400, 700) and np.ptp(picture) > 0.5
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(names)
    short = _report(positions=(), along=((),))
    assert write_plots(tmp_path, short) == ["zipf.png"]
