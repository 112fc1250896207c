"""What a card says of the model and of its training."""

import math
import re
from collections.abc import Iterator

from mtnlg_jax.evaluate.card.facts import Fact, Facts, pointer
from mtnlg_jax.evaluate.card.page import Cell, Section
from mtnlg_jax.evaluate.card.run_files import CONFIG, METRICS, STARTS, RunFiles, without_folders
from mtnlg_jax.train import lora
from mtnlg_jax.train.metrics import TRAINING_LOSSES, training_loss
from mtnlg_jax.train.report.files import hidden_keys

_MODEL = {
    "num_layers": "Layers",
    "hidden_size": "Width",
    "num_attention_heads": "Attention heads",
    "num_query_groups": "Key and value heads",
    "ffn_hidden_size": "Width of the MLP",
    "vocab_size": "Rows of the embedding",
    "max_position_embeddings": "Positions",
    "position_embedding_type": "Kind of positions",
    "normalization": "Normalization",
    "activation": "Activation",
    "tie_embeddings": "Tied embeddings",
}
_OPTIMIZER = {
    "name": "Optimizer",
    "learning_rate": "Peak learning rate",
    "min_learning_rate_ratio": "Lowest learning rate, as a share of the peak",
    "lr_decay_style": "Curve of the learning rate",
    "warmup_fraction": "Share of the run with rising learning rate",
    "weight_decay": "Weight decay",
    "clip_grad_norm": "Largest norm of the gradient",
}
_TRAIN = {
    "global_batch_size": "Sequences in a step",
    "compute_dtype": "Type of products",
    "label_smoothing": "Label smoothing",
    "seed": "Seed",
}
# Of an evaluation, besides its losses: how it was made.
_NOT_RESULTS = ("kind", "step", "time", "scored_tokens", "scored_bytes")


def model_section(facts: Facts, run: RunFiles, show_paths: bool) -> Section:
    """Return the section on the model, and add its facts."""
    section = Section("Model")
    count = run.config.model.parameter_count()
    key = "ModelConfig.parameter_count() of /model"
    listed = [facts.given(count, CONFIG, key, "Parameters", "", "parameters")]
    model = run.content[CONFIG].get("model", {})
    listed += [
        facts.read(CONFIG, pointer("model", key), label)
        for key, label in _MODEL.items()
        if model.get(key) is not None
    ]
    if model.get("moe", {}).get("num_moe_experts"):
        listed.append(facts.read(CONFIG, "/model/moe/num_moe_experts", "Experts"))
        listed.append(facts.read(CONFIG, "/model/moe/moe_router_topk", "Experts of a token"))
    listed.append(_sequence_length(facts, run))
    section.listing([*listed, *_origin(facts, run, show_paths)])
    return section


def _sequence_length(facts: Facts, run: RunFiles) -> Fact:
    own = run.config.data.sequence_length
    key = "/data/sequence_length" if own else "/model/max_position_embeddings"
    return facts.read(CONFIG, key, "Tokens in a row", name="sequence_length")


def _origin(facts: Facts, run: RunFiles, show_paths: bool) -> Iterator[Fact]:
    """Yield what the parameters started from, the adapters, and the teachers."""
    short = None if show_paths else without_folders
    train = run.config.train
    if train.init:
        words = "Base model of the adapters" if lora.used(run.config) else "Trained further from"
        yield facts.read(CONFIG, "/train/init", words, name="init", short=short)
    if lora.used(run.config):
        for key in ("rank", "alpha", "targets", "base"):
            label = f"Low-rank adaptation: {key}"
            yield facts.read(CONFIG, f"/optimizer/lora_{key}", label)
        yield from _adapter_size(facts, run)
    for number, stage in enumerate(train.stages):
        if stage.distill:
            place = pointer("train", "stages", number, "distill")
            label = f"Teacher of the stage {stage.name}"
            yield facts.read(CONFIG, place, label, name=f"teacher_{number}", short=short)


def _adapter_size(facts: Facts, run: RunFiles) -> Iterator[Fact]:
    name = run.record(run.best)
    arrays = run.content.get(name, {}).get("arrays", {})
    sizes = [
        math.prod(int(size) for size in re.findall(r"\d+", shape.partition("[")[2]))
        for array, shape in arrays.items()
        if array.startswith("params.lora.")
    ]
    if sizes:
        key = "sizes of /arrays/params.lora.* together"
        yield facts.given(sum(sizes), name, key, "Trained parameters", "", "trained_parameters")


def training_section(facts: Facts, run: RunFiles) -> list[Section]:
    """Return the sections on training, and add their facts. Needs those of model and data."""
    section = Section("Training")
    section.listing([*_amounts(facts, run), *_epochs(facts, run)])
    section.listing(
        [*_chosen(facts, run, "optimizer", _OPTIMIZER), *_chosen(facts, run, "train", _TRAIN)]
    )
    _stages(section, facts, run)
    losses = Section("Losses", level=3)
    losses.blocks.append(
        "Losses are in nats per token. The held-out text was not trained on; the best value is the "
        "lowest of all evaluations of the run."
    )
    losses.listing(_training_losses(facts, run))
    _held_out(losses, facts, run)
    _kept(losses, facts, run)
    speed = Section("Speed", level=3)
    last = f"[kind=train, step={run.last_step}]"
    speed.listing(
        [
            facts.read(
                METRICS,
                "median of [kind=train]/tokens_per_second",
                "Tokens per second, median of the steps",
                name="tokens_per_second",
            ),
            facts.read(METRICS, "median of [kind=train]/mfu", "Model FLOP utilization, median"),
            facts.read(METRICS, f"{last}/skipped", "Steps skipped as not finite"),
            *_resumes(facts, run),
        ]
    )
    return [section, losses, speed]


def _amounts(facts: Facts, run: RunFiles) -> Iterator[Fact]:
    last = f"[kind=train, step={run.last_step}]"
    yield facts.read(METRICS, f"{last}/step", "Steps done", name="steps")
    yield facts.read(CONFIG, "/train/steps", "Steps planned")
    if run.newest is not None:
        record = run.record(run.newest)
        yield facts.read(record, "/step", "Newest checkpoint, step", name="newest_step")
        label = "Sequences trained on, up to that checkpoint"
        yield facts.read(record, "/meta/samples", label, name="samples")
    elif run.config.train.log_every == 1:
        key = "sum of [kind=train]/sequences"
        yield facts.read(METRICS, key, "Sequences trained on", name="samples")
    else:
        yield facts.given(None, METRICS, "", "Sequences trained on", "", "samples")
    yield facts.derive("tokens", "Tokens trained on", "samples * sequence_length")


def _epochs(facts: Facts, run: RunFiles) -> Iterator[Fact]:
    names = [fact.name for fact in facts if re.fullmatch(r"source_\d+_train_tokens", fact.name)]
    if run.data and len(names) == len(run.content[run.data]["sources"]):
        total = names[0] if len(names) == 1 else f"({' + '.join(names)})"
        yield facts.derive(
            "epochs", "Tokens trained on, per token of the data", f"tokens / {total}"
        )


def _chosen(facts: Facts, run: RunFiles, part: str, labels: dict[str, str]) -> list[Fact]:
    given = run.content[CONFIG].get(part, {})
    hidden = hidden_keys(run.content[CONFIG], run.rows(STARTS))
    return [
        facts.read(CONFIG, pointer(part, key), label)
        for key, label in labels.items()
        if key in given and f"{part}.{key}" not in hidden
    ]


def _stages(section: Section, facts: Facts, run: RunFiles) -> None:
    rows: list[list[Cell]] = []
    for number in range(len(run.config.train.stages)):
        rows.append(
            [
                facts.read(CONFIG, pointer("train", "stages", number, key), f"Stage: {label}")
                for key, label in (
                    ("name", "name"),
                    ("fraction", "share of the steps, relative to the other stages"),
                    ("masked", "share of steps with the masked objective"),
                    ("learning_rate_scale", "factor of the learning rate"),
                )
            ]
        )
    head = ("stage", "relative length", "share of masked steps", "factor of the learning rate")
    section.table(head, rows)


def _training_losses(facts: Facts, run: RunFiles) -> Iterator[Fact]:
    """Yield the last training loss of each objective, and of each kind of loss.

    That of a differentially private run is left out: cards are published, and it is not private.
    """
    latest: dict[tuple[str, str], int] = {}
    for row in run.rows(METRICS, "train"):
        name, loss = training_loss(row)
        if name is not None and name != "nonprivate_loss" and math.isfinite(loss):
            latest[row.get("objective", ""), name] = row["step"]
    for (objective, name), step in sorted(latest.items()):
        words = TRAINING_LOSSES[name].replace("\n", " ")
        label = f"Training, {objective} ({words}), last step of it"
        yield facts.read(METRICS, f"[kind=train, step={step}]/{name}", label)


def _results(row: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the places of the numbers in an evaluation, which may be nested by source or task."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _results(value, (*path, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if path or key not in _NOT_RESULTS:
                yield (*path, key)


def _held_out(section: Section, facts: Facts, run: RunFiles) -> None:
    """Add the results of the evaluations, and of tasks that were scored while the run trained."""
    _results_table(section, facts, run, "eval", "held out")
    if not run.rows(METRICS, "eval"):
        section.blocks.append("Nothing was held out, so there is no held-out loss.")
    _results_table(section, facts, run, "tasks", "tasks, while training")


def _results_table(section: Section, facts: Facts, run: RunFiles, kind: str, title: str) -> None:
    """Add a table of each result of the records of ``kind``: the last value and, of losses, the
    best."""
    evaluations = run.rows(METRICS, kind)
    places = dict.fromkeys(place for row in evaluations for place in _results(row))
    rows: list[list[Cell]] = []
    for place in places:
        words = ", ".join(part.replace("_", " ") for part in place)
        found = [(row["step"], _at(row, place)) for row in evaluations]
        steps = {step: value for step, value in found if value is not None}
        if not steps:
            continue
        last = max(steps)
        label = f"{title.capitalize()}: {words}"
        row: list[Cell] = [words, *_at_step(facts, kind, last, place, label)]
        if any("loss" in part for part in place):
            best = min(steps, key=lambda step: (steps[step], step))
            row += _at_step(facts, kind, best, place, label)
        else:
            row += ["", ""]
        rows.append(row)
    section.table((title, "last", "at step", "best", "at step"), rows)


def _at(row: dict, place: tuple[str, ...]) -> float | None:
    value: object = row
    for part in place:
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _at_step(facts: Facts, kind: str, step: int, place: tuple[str, ...], label: str) -> list[Cell]:
    line = f"[kind={kind}, step={step}]"
    value = facts.read(METRICS, line + pointer(*place), label)
    return [value, facts.read(METRICS, f"{line}/step", "Evaluation: step")]


def _kept(section: Section, facts: Facts, run: RunFiles) -> None:
    """Add a table of the checkpoints that are kept."""
    steps = sorted(
        int(name.split("/")[1]) for name in run.content if name.startswith("checkpoints/")
    )
    rows: list[list[Cell]] = []
    for step in steps:
        record = run.record(step)
        samples = facts.read(
            record, "/meta/samples", "Checkpoint: sequences", name=f"samples_{step}"
        )
        rows.append(
            [
                facts.read(record, "/step", "Checkpoint: step"),
                facts.read(record, "/metric", "Checkpoint: held-out loss that selects the best"),
                samples,
                facts.derive(
                    f"tokens_{step}", "Checkpoint: tokens", f"samples_{step} * sequence_length"
                ),
                "yes" if step == run.best else "",
            ]
        )
    head = ("checkpoint of step", "held-out loss", "sequences", "tokens", "described here")
    section.table(head, rows)
    if not steps:
        section.blocks.append("No checkpoint of the run is kept.")


def _resumes(facts: Facts, run: RunFiles) -> list[Fact]:
    starts = facts.read(STARTS, "count of []", "Starts of the run", name="starts")
    if not run.rows(STARTS):
        return []
    return [starts, facts.derive("resumes", "Resumes", "starts - 1")]
