"""Check a card figure by figure against the files of its run."""

import datetime
import hashlib
import json
import math
import re
import statistics

import pytest
from huggingface_hub import ModelCard

from mtnlg_jax.evaluate.card.about import read_about
from mtnlg_jax.evaluate.card.card import build_card
from mtnlg_jax.evaluate.card.compute_facts import Energy
from mtnlg_jax.evaluate.card.facts import ARITHMETIC
from mtnlg_jax.evaluate.card.written import render

ENERGY = Energy(65.0, 1.2, 0.4)
# A number, also inside a word such as step_6 or v2.
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


def build(run, **options):
    return build_card(str(run), str(run), **options)


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def at(value, pointer):
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def value_in_file(run, fact):
    """Return the value of a fact from its file, in this test's own reading of keys."""
    path = run / fact.file
    if path.suffix == ".json":
        text = path.read_text()
        # The first line of a checkpoint's record is its digest.
        return at(
            json.loads(text.partition("\n")[2] if "checkpoints" in fact.file else text), fact.key
        )
    found = re.fullmatch(r"(?:(\w+) of )?\[(.*)\](.*)", fact.key)
    group, conditions, pointer = found.groups()
    rows = [row | {"line": number} for number, row in enumerate(json_lines(path), 1)]
    for condition in filter(None, conditions.split(", ")):
        name, wanted = condition.split("=")
        rows = [row for row in rows if str(row[name]) == wanted]
    if group == "count":
        return len(rows)
    values = [at(row, pointer) for row in rows if pointer[1:] in row or "/" in pointer[1:]]
    if group:
        return {"max": max, "median": statistics.median, "sum": sum}[group](values)
    assert len(values) == 1
    return values[0]


def recomputed(facts, fact):
    names = {other.name: other.value for other in facts}
    names["unix"] = lambda date: datetime.datetime.fromisoformat(date).timestamp()
    return eval(fact.key, {"__builtins__": {}}, names)


def test_every_fact_is_in_its_file(run):
    facts = build(run, energy=ENERGY).facts
    counted = {"file": 0, "arithmetic": 0, "other": 0}
    for fact in facts:
        if fact.file == ARITHMETIC:
            assert fact.value == pytest.approx(recomputed(facts, fact), rel=1e-12), fact
            counted["arithmetic"] += 1
        elif fact.key.startswith(("/", "[")) or " of [" in fact.key:
            if fact.known:
                assert fact.value == value_in_file(run, fact), fact
                counted["file"] += 1
            else:
                with pytest.raises((LookupError, OSError)):
                    value_in_file(run, fact)
        else:
            counted["other"] += 1
            assert fact.name in ("parameters", "flops", "watts", "pue", "carbon"), fact
    assert counted["file"] > 120 and counted["arithmetic"] >= 10


def test_parameters_and_flops_by_hand(run):
    facts = build(run).facts
    rows = 384
    width = 16
    layers = 1
    length = 32
    record = json.loads((run / "checkpoints/6/record.json").read_text().partition("\n")[2])
    sizes = {
        name: math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2])))
        for name, shape in record["arrays"].items()
        if name.startswith("params.")
    }
    assert facts["parameters"].value == sum(sizes.values())
    # 6 N + 12 L H T: rotary positions have no parameters, and the embedding is tied to the head.
    assert record["meta"]["config"]["model"]["vocab_size"] == rows
    each = 6 * sum(sizes.values()) + 12 * layers * width * length
    assert facts["flops"].value == each
    assert facts["tokens"].value == 6 * 8 * length
    assert facts["total_flops"].value == each * 6 * 8 * length


def test_times_devices_and_energy_by_hand(run):
    card = build(run, energy=ENERGY)
    starts = json_lines(run / "starts.jsonl")
    records = json_lines(run / "metrics.jsonl")
    begun = [datetime.datetime.fromisoformat(start["date"]).timestamp() for start in starts]
    # The first start has 4 steps, an evaluation after the last of them, and its goodput.
    first = max(r["time"] for r in records if r["step"] == 4)
    seconds = [first - begun[0], records[-1]["time"] - begun[1]]
    assert [start["devices"]["count"] for start in starts] == [8, 8]
    hours = 8 * sum(seconds) / 3600
    assert card.facts["device_hours"].value == pytest.approx(hours, rel=1e-9)
    assert card.facts["energy"].value == pytest.approx(hours * 65 / 1000 * 1.2, rel=1e-9)
    assert card.facts["emissions"].value == pytest.approx(hours * 65 / 1000 * 1.2 * 0.4, rel=1e-9)
    grams = card.data.to_dict()["co2_eq_emissions"]["emissions"]
    assert grams == pytest.approx(hours * 65 * 1.2 * 0.4, rel=1e-9)
    assert "co2_eq_emissions" not in build(run).data.to_dict()
    assert card.facts["resumes"].value == 1
    shown = re.search(r"Energy: ([\d.e-]+) × 65 / 1000 × 1.2 = ([\d.e-]+) kWh", card.above)
    assert float(shown[2]) == pytest.approx(float(shown[1]) * 65 / 1000 * 1.2, rel=1e-3)


def test_a_single_start_shows_devices_watts_and_hours(run):
    starts = (run / "starts.jsonl").read_text().splitlines()
    (run / "starts.jsonl").write_text(starts[0] + "\n")
    card = build(run, energy=ENERGY)
    hours = card.facts["hours"].shown
    assert f"Energy: 8 × 65 × {hours} / 1000 × 1.2 = " in card.above
    without = build(run, energy=Energy(watts_per_device=65.0))
    assert f"Energy: 8 × 65 × {hours} / 1000 = " in without.above
    assert "nor is cooling" in without.above and "Carbon: unknown" in without.above
    # A CPU's power is in no table.
    assert "Energy: unknown" in build(run).above


def numbers_of(text):
    return set(NUMBER.findall(text))


def strays(text, card):
    """Return the numbers of a card that no fact accounts for."""
    allowed = set()
    for fact in card.facts:
        for part in (fact.name, fact.shown, fact.file, fact.key, repr(fact.value)):
            allowed |= numbers_of(part)
    return numbers_of(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)) - allowed


def test_no_figure_is_without_a_fact(run):
    stated = read_about(None, {"intended_use": "Tests of 17 kinds."})
    card = build(run, stated=stated, energy=ENERGY)
    text = render(card)
    assert strays(text, card) == set() and len(numbers_of(text)) > 100
    assert strays(text + "98.76 % of it", card) == {"98.76"}


def test_every_known_fact_is_shown_with_its_source(run):
    card = build(run, energy=ENERGY)
    rows = card.below.splitlines()
    for fact in card.facts:
        key = fact.key.replace("~1home~1jane~1", "…")
        assert any(row.startswith(f"| `{fact.name}` |") and f"`{key}`" in row for row in rows)


def test_losses_and_results_stand_in_the_text(run):
    above = build(run).above
    records = json_lines(run / "metrics.jsonl")
    losses = [r["causal_loss"] for r in records if r["kind"] == "eval"]
    best = min(losses)
    step = 2 * losses.index(best) + 2
    assert f"| causal loss | {losses[-1]:.4g} | 6 | {best:.4g} | {step} |" in above
    for line in (
        "| anli\\_r1 | 1 | 5 | 321 | acc | 0.3457 | 0.01234 | 6 |",
        "| anli\\_r1 | 1 | 5 | 321 | perplexity | 1,234 |  | 6 |",
        "| anli\\_r1 | 1 | 5 | 321 | predicted True | 0.613 |  | 6 |",
        "| 64 | 8 | 0.4567 |",
        "| 4 | 7.89 | 10,000 |",
        "| personal data: e-mail address | 3 |",
        "| epsilon | 7.654 |",
        "| he | 0.0321 | 17 |",
        "| pairs, crows.csv, by | pairs | stereotype, share | stereotype, low |",
        "| gender | 21 | 0.6789 | 0.53 |",
        # Of unlike rows each part is a table.
        "| sets, groups | count | mean | low | high |",
        "| B | 32 | 0.2 | 0.15 | 0.25 |",
        "Details and texts are in `bias.json` alone.",
        "| Canaries planted | 2 |",
        "| Copies of them | 5 |",
        "`audit.json`: checkpoint of step 4; this card describes the checkpoint of step 6.",
    ):
        assert line in above, line


def test_neither_secrets_nor_texts_of_the_data_are_shown(run):
    text = render(build(run)).replace(",", "")
    path = json.loads((run / "config.json").read_text())["data"]["path"]
    folder = path.rpartition("/")[0]
    for hidden in ("4711", "99887", "55443", "jane", "hidden text", "whale", folder, "home"):
        assert hidden not in text, hidden
    whole = render(build(run, show_paths=True))
    assert path.startswith("/") and path in whole and "home" in whole
    # Details stay in their files.
    assert "123.25" not in text and "246" not in build(run).above


def test_a_run_that_holds_nothing_out_has_no_held_out_loss(run):
    records = [row for row in json_lines(run / "metrics.jsonl") if row["kind"] == "train"]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    card = build(run)
    assert "Nothing was held out, so there is no held-out loss." in card.above
    assert strays(render(card), card) == set()


def test_results_by_source_in_the_metrics_are_told(run):
    records = json_lines(run / "metrics.jsonl")
    for record in records:
        if record["kind"] == "eval":
            record["sources"] = {"books": {"causal_loss": 1 / record["step"]}}
            record["causal_loss/web"] = 2.5
            record["causal_loss/none"] = None
        elif record["kind"] == "train":
            record["nonprivate_loss"] = record.pop("loss") + 7.25
    records += [{"kind": "tasks", "step": step, "hellaswag/acc": step / 8} for step in (4, 6)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    card = build(run)
    assert "| sources, books, causal loss | 0.1667 | 6 | 0.1667 | 6 |" in card.above
    assert "| causal loss/web | 2.5 | 6 | 2.5 | 2 |" in card.above
    assert "| hellaswag/acc | 0.75 | 6 |  |  |" in card.above
    # Cards are published.
    assert "nonprivate" not in render(card) and "not private" not in render(card)


def test_the_stages_of_a_recipe_are_told(run, put):
    stages = [
        {"name": "read", "documents": [0, 913], "bytes": [0, 8000], "dropped": {}, "changed": {}},
        {
            "name": "clean",
            "documents": [913, 806],
            "bytes": [8000, 7001],
            "dropped": {"too_short": 105, "language": 2},
            "changed": {"e-mail": 31},
            "tables": {"language": {"en": 811, "fr": 99, "nb": 1, "too short to tell": 2}},
        },
    ]
    part = {"name": "web", "documents": 806, "tokens": 1777, "bytes_per_token": 3.94}
    part |= {"weight": 1.0, "epochs": 2.5}
    data = json.loads((run / "data.json").read_text())
    settings: dict = {"clean.languages": []}
    report = {"name": "sea", "settings": settings, "stages": stages, "blend": [part]}
    data["sources"][0]["report"] = report
    put(run / "data.json", data)
    card = build(run)
    for line in (
        "| read |  | 913 |  | 8,000 |  |  |",
        "| clean | 913 | 806 | 8,000 | 7,001 | too\\_short: 105; language: 2 | e-mail: 31 |",
        "| clean: fr | 99 |",
        "| web | 806 | 1,777 | 3.94 | 1 | 2.5 |",
    ):
        assert line in card.above, line
    # One Norwegian document of 911 is more likely a mistake.
    assert card.data.language == ["en", "fr"]
    assert strays(render(card), card) == set()
    settings["clean.languages"] = ["en"]
    put(run / "data.json", data)
    assert build(run).data.language == ["en"]


def test_the_trained_parameters_of_adapters_are_counted(run, put):
    change(run, put, {"train": {"init": "base"}, "optimizer": {"lora_rank": 2}})
    path = run / "checkpoints/6/record.json"
    record = json.loads(path.read_text().partition("\n")[2])
    record["arrays"] |= {"params.lora.a_DR": "float32[16, 2]", "params.lora.b_RD": "float32[2, 16]"}
    body = json.dumps(record)
    path.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
    card = build(run)
    assert "| Trained parameters | 64 |" in card.above
    assert "| Low-rank adaptation: targets | q, v |" in card.above


def test_huggingface_hub_reads_the_card(run):
    stated = read_about(None, {"license": "apache-2.0", "language": "en,de"})
    (run / "README.md").write_text(render(build(run, stated=stated)))
    data = ModelCard.load(run / "README.md").data
    assert (data.license, data.language) == ("apache-2.0", ["en", "de"])
    assert data.model_name == "quickstart" and data.pipeline_tag == "text-generation"
    assert data.library_name == "mtnlg_jax" and data.base_model is None
    results = {(each.dataset_name, each.metric_type): each for each in data.eval_results}
    record = json.loads((run / "checkpoints/6/record.json").read_text().partition("\n")[2])
    held_out = results["held-out text of the run", "loss"]
    assert held_out.metric_value == record["meta"]["metrics"]["causal_loss"]
    task = results["anli_r1", "acc"]
    assert task.metric_value == 0.34567 and task.dataset_args == {"num_few_shot": 5}


@pytest.mark.parametrize(
    ("settings", "words", "base", "relation"),
    [
        ({"train": {"init": "/models/Base-7B"}}, "Trained further from", "Base-7B", "finetune"),
        (
            {"train": {"init": "/models/Base-7B/"}, "optimizer": {"lora_rank": 2}},
            "Base model of the adapters",
            "Base-7B",
            "adapter",
        ),
    ],
)
def test_the_base_model_is_named(run, put, settings, words, base, relation):
    change(run, put, settings)
    card = build(run)
    assert f"| {words} | {base} |" in card.above
    assert card.data.base_model == base
    assert card.data.to_dict()["base_model_relation"] == relation
    assert "/models" not in render(card)
    stated = read_about(None, {"base_model": "org/base"})
    assert build(run, stated=stated).data.base_model == "org/base"
    # Frozen matrices have no gradient: 4 N in place of 6 N.
    frozen = relation == "adapter"
    assert f"frozen={frozen}" in card.facts["flops"].key


def test_a_teacher_is_named(run, put):
    config = json.loads((run / "config.json").read_text())
    config["train"]["stages"][1]["distill"] = "/models/teacher"
    put(run / "config.json", config)
    assert "| Teacher of the stage causal | teacher |" in build(run).above


def test_a_private_run_does_not_tell_the_seed_of_its_noise(run, put):
    environment = json.loads((run / "environment.json").read_text())
    command = "python p.py --set=train.seed=70007"
    put(run / "environment.json", environment | {"command": command})
    assert "| Seed |" in build(run).above and "70007" in build(run).above
    change(run, put, {"optimizer": {"dp_noise_multiplier": 1.0}})
    for show_paths in (False, True):
        card = render(build(run, show_paths=show_paths))
        assert "| Seed |" not in card and "70007" not in card


def change(run, put, settings):
    config = json.loads((run / "config.json").read_text())
    for section, values in settings.items():
        config[section] |= values
    put(run / "config.json", config)


def test_a_card_beside_an_export_is_for_transformers(run, put, tmp_path):
    put(tmp_path / "export/config.json", {"model_type": "gpt2"})
    assert build_card(str(run), str(tmp_path / "export")).data.library_name == "transformers"


def test_results_of_another_run_are_told_and_not_in_the_head(run, put):
    tasks = json.loads((run / "evaluations/tasks_6.json").read_text())
    put(run / "evaluations/tasks_6.json", tasks | {"step": 99})
    card = build(run)
    assert "checkpoint of step 99, which this run has not reached" in card.above
    assert {each.dataset_name for each in card.data.eval_results} == {"held-out text of the run"}
