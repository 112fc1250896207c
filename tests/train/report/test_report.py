"""Check the page of a run: what it shows, that it needs nothing from elsewhere, and its curves."""

import json
import math

import pytest

from mtnlg_jax.train.report import build, charts, content
from mtnlg_jax.train.report.charts import Curve, chart
from mtnlg_jax.train.report.files import differences, read_run


def step(number, **values):
    return {
        "kind": "train",
        "step": number,
        "loss": 5 / number,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "objective": "causal",
        "tokens_per_second": 1000.0,
    } | values


def goodput(number, start):
    shares = {"other": 0.25, "steps": 0.75}
    return {
        "kind": "goodput",
        "step": number,
        "start": start,
        "seconds": 40.0,
        **shares,
        "run_seconds": 100.0,
        **{f"run_{name}": x for name, x in {"steps": 0.5, "lost": 0.2, "down": 0.3}.items()},
    }


RECORDS = [
    *map(step, range(1, 11)),
    {"kind": "eval", "step": 5, "causal_loss": 1.25, "perplexity": 3.49, "ema_causal_loss": 1.5},
    goodput(5, 0),
    {
        "kind": "samples",
        "step": 5,
        "texts": [{"prompt": "the whale", "text": " <script>alert(1)</script> swam"}],
    },
    {"kind": "stats", "step": 5, "grad_norm_by_layer": [0.5, 1.0, 4.0], "noise_scale": 12.5},
    {
        "kind": "spike",
        "step": 7,
        "loss": 91.5,
        "grad_norm": 4.5,
        "deviation_loss": 12.345,
        "deviation_grad_norm": None,
        "left_out": [6, 7],
        "back_to": 4,
        "documents": [{"source": "books", "document": 3, "loss": 8.07}],
    },
    {"kind": "left_out", "step": 6, "spike": 7},
    {
        "kind": "processes",
        "step": 5,
        "batch_slowest": 1,
        "batch_host": "h",
        "batch_seconds": 0.2,
        "batch_median": 0.1,
    },
    goodput(10, 1),
]
STARTS = [
    {"date": "2026-01-02T03:04:05+00:00", "step": 0, "devices": {"kind": "cpu", "count": 8}},
    {
        "date": "2026-01-03T03:04:05+00:00",
        "step": 5,
        "devices": {"kind": "cpu", "count": 8},
        "processes": 2,
        "commit": "0123456789abcdef",
        "changed": {"train.seed": [0, 1]},
    },
]


def folder_of(path, records=RECORDS, **train):
    path.mkdir()
    config = {"name": path.name, "train": {"steps": 10, "seed": 0} | train}
    (path / "config.json").write_text(json.dumps(config))
    for name, lines in (("metrics.jsonl", records), ("starts.jsonl", STARTS)):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_page_shows_every_part_and_needs_nothing_from_elsewhere(tmp_path):
    path = build.write(folder_of(tmp_path / "run"))
    assert path == str(tmp_path / "run" / "report.html")
    page = (tmp_path / "run" / "report.html").read_text()
    for part in (
        "cross entropy, nats a token",
        "causal held out: ",
        "causal held out, averaged weights: ",
        "norm of the gradient",
        "Where the time went",
        "start 2",
        "Spikes",
        "91.5 (12.35)",
        "4.5 (not finite)",
        "went back to step 4, left out 6, 7",
        "books document 3, loss 8.07",
        "Samples through time",
        "stats: grad norm by layer",
        "median layer",
        "stats: noise scale",
        "Processes",
        "train.seed: 0 → 1",
        "0123456789ab<",
        "50.0% of the time since the first start",
    ):
        assert part in page, part
    assert "left_out:" not in page
    # Nothing runs, nothing is loaded, and the model's words are words.
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    for reference in ("http:", "https:", "src=", "href=", "@import", "url("):
        assert reference not in page, reference


def test_a_run_beside_another_one_has_both_curves_and_the_differences(tmp_path):
    one = folder_of(tmp_path / "one")
    slower = [step(number, loss=8 / number) for number in range(1, 21)]
    other = folder_of(tmp_path / "other", slower, steps=20, extra=[1, 2])
    output = tmp_path / "pages" / "both.html"
    assert build.write(one, other, str(output)) == str(output)
    page = output.read_text()
    assert page.count('class="other"') == 4  # loss, learning rate, gradient norm, speed
    assert "Settings that differ" in page and "causal training, other: 0.4" in page
    found = differences(read_run(one), read_run(other))
    assert found == [
        ("name", "one", "other"),
        ("train.steps", 10, 20),
        ("train.extra", None, [1, 2]),
    ]
    assert not (tmp_path / "one" / "report.html").exists()


def test_settings_are_shown_in_full(tmp_path):
    one = folder_of(tmp_path / "one", ema=0.999999, rate=1e-5)
    other = folder_of(tmp_path / "other", ema=1.0, rate=1e-5)
    page = read(build.write(one, other))
    assert '<td class="text">0.999999</td><td class="text">1.0</td>' in page
    assert '<td class="key-name">train.rate</td><td class="text">1e-05</td>' in page


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def test_what_takes_the_noise_of_privacy_away_is_left_out(tmp_path):
    one = folder_of(tmp_path / "one", seed=70007)
    other = folder_of(tmp_path / "other", seed=80008)
    shown = read(build.write(other))
    assert "80008" in shown and "train.seed: 0 → 1" in shown
    for optimizer, starts, seeds in (
        ({"dp_secret": "/keys/secret", "dp_noise_multiplier": 1.0}, [], True),
        ({"dp_secret": "", "dp_noise_multiplier": 1.0}, STARTS, False),
        ({"dp_secret": "", "dp_target_epsilon": 8.0}, STARTS, False),
        # The first start took its noise from the seed.
        (
            {"dp_secret": "/keys/secret", "dp_noise_multiplier": 1.0},
            [{"changed": {"optimizer.dp_secret": ["", "/keys/secret"], "train.seed": [7, 70007]}}],
            False,
        ),
    ):
        config = json.loads((tmp_path / "one" / "config.json").read_text())
        (tmp_path / "one" / "config.json").write_text(json.dumps(config | {"optimizer": optimizer}))
        lines = "".join(json.dumps(start) + "\n" for start in starts)
        (tmp_path / "one" / "starts.jsonl").write_text(lines)
        for page in (build.write(one), build.write(one, other), build.write(other, one)):
            assert "/keys/secret" not in read(page) and "dp_secret" not in read(page)
            assert seeds == ("70007" in read(page))
        assert seeds == ("train.seed" in read(build.write(one)))


def test_records_in_memory_are_not_read_again(tmp_path):
    run = folder_of(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "causal held out: 1.25" in read(build.write(run, records=RECORDS))


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    build.write(folder_of(tmp_path / "run", []))
    assert "No step is recorded yet" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("damage", [None, "{"])
def test_a_folder_without_a_run_is_refused(tmp_path, damage):
    if damage:
        (tmp_path / "config.json").write_text(damage)
    message = "is damaged" if damage else "is not the folder of a run: it has no config.json"
    with pytest.raises(ValueError, match=message):
        build.write(str(tmp_path))


def test_a_file_in_place_of_a_run_and_a_folder_in_place_of_a_page_are_refused(tmp_path):
    run = folder_of(tmp_path / "run")
    with pytest.raises(ValueError, match="metrics.jsonl is not the folder of a run"):
        build.write(run, f"{run}/metrics.jsonl")
    with pytest.raises(ValueError, match=r"run is a folder; name a file, such as .*/report.html"):
        build.write(run, None, run)
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_long_run_is_drawn_as_means_with_a_band():
    points = [(number, 2.0 + (number % 2)) for number in range(1, 30_001)]
    (line,) = chart("loss", [Curve("loss", points)]).lines
    assert len(line.path.split()) == charts.BUCKETS
    heights = {float(pair.split(",")[1]) for pair in line.path.split()}
    assert max(heights) - min(heights) < 0.05 * charts.HEIGHT  # the mean of each bucket is 2.5
    band = {float(pair.split(",")[1]) for pair in line.band.split()}
    assert max(band) - min(band) > 0.8 * (charts.HEIGHT - charts.TOP - charts.BOTTOM)


def test_an_outlier_does_not_press_the_curve_flat():
    points = [(number, 2.0 + number / 100) for number in range(100)]
    points[50] = (50, 1e6)
    made = chart("loss", [Curve("loss", points)])
    heights = [float(pair.split(",")[1]) for pair in made.lines[0].path.split()]
    assert heights[50] == charts.TOP  # cut off at the upper end
    assert heights[0] - heights[99] > 0.4 * charts.HEIGHT


def test_values_that_are_not_finite_or_fit_no_axis_are_left_out():
    points = [(1, math.nan), (2, 0.0), (3, 5.0)]
    (line,) = chart("norm", [Curve("norm", points)], log=True).lines
    assert len(line.path.split()) == 1 and line.dots and line.last == "5"
    assert chart("norm", [Curve("norm", [(1, math.inf)])]) is None


def test_samples_are_spread_over_a_long_run(tmp_path):
    texts = [
        {"kind": "samples", "step": number, "texts": [{"prompt": "a", "text": str(number)}]}
        for number in range(1, 101)
    ]
    (found,) = content.samples_of(read_run(folder_of(tmp_path / "run", texts)), most=4)
    assert [number for number, _ in found.texts] == [1, 34, 67, 100]
