"""Replay a step of a run: from its number to the report and its files."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from mtnlg_jax.evaluate.inside import files
from mtnlg_jax.evaluate.why import page, report, states
from mtnlg_jax.evaluate.why.neighbors import (
    FIGURES,
    Recorded,
    deviations,
    largest,
    recorded_steps,
)
from mtnlg_jax.evaluate.why.replay import Opened, Replayed
from mtnlg_jax.evaluate.why.settings import Settings
from mtnlg_jax.evaluate.why.suspects import choose_documents, leave_out, rank
from mtnlg_jax.parallel.mesh import described
from mtnlg_jax.train.describe import header
from mtnlg_jax.train.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Question:
    """Which step of which run, and how closely to look."""

    workdir: str
    step: int | None  # as metrics.jsonl counts, from 1; None: the most unusual one
    spike: str | None = None  # without a step: in which of `neighbors.FIGURES`; None: either
    checkpoint: int | None = None  # None: the newest before the step
    replay: bool = False  # run the true steps from the checkpoint on
    entries: tuple[str, ...] = ()  # KEY=VALUE, as for `settings.Settings`
    most: int = 32  # documents whose gradients are computed
    top: int = 3  # documents without which the whole step is computed again


def find_step(workdir: str, figure: str | None = None) -> tuple[int, str]:
    """Return the most unusual step of a run, by one figure or by any, and why it is.

    Raises FileNotFoundError without metrics.jsonl, and ValueError with too few steps in it.
    """
    records = _records(workdir)
    if not records:
        raise FileNotFoundError(
            f"{workdir}/metrics.jsonl has no training step, so no unusual one can be found; give "
            "the number with --step"
        )
    step, name, deviation = largest(records, FIGURES if figure is None else (figure,))
    return step, f"{name} is {deviation:.1f} robust deviations above its neighbors"


def _records(workdir: str) -> list[Recorded]:
    return recorded_steps(read_metrics(os.path.join(workdir, "metrics.jsonl")))


def answer(question: Question) -> tuple[dict[str, Any], str]:
    """Return (the report for JSON, its page as HTML).

    Raises ValueError and OSError, with one line, on a step, checkpoint or data that do not fit.
    """
    workdir = question.workdir
    settings = Settings(workdir, question.entries)  # first of all, whether this is a run
    if settings.at((question.step or 1) - 1).optimizer.private:
        raise ValueError(
            f"--workdir={workdir} was trained with differential privacy: each row is clipped and "
            "noise is added, so no document can be found that a step is due to; give a run without "
            "it"
        )
    why_this = None
    if question.step is None:
        number, why_this = find_step(workdir, question.spike)
    else:
        number = question.step
    if number < 1:
        raise ValueError(f"--step={number}: the first step of a run is 1")
    records = _records(workdir)
    done = number - 1
    chosen = states.choose(workdir, done, question.checkpoint, question.replay)
    if question.replay and chosen is not None and chosen > done:
        raise ValueError(
            f"--replay goes forward, and --checkpoint={chosen} is after step {number}; leave "
            "--checkpoint out"
        )
    run = Opened(workdir, done, question.entries)
    if records and number > records[-1].step:
        raise ValueError(
            f"--step={number} was not run yet: the last recorded step is {records[-1].step}"
        )
    found = run.load(chosen)
    steps_apart = done - found.step
    notes = [] if why_this is None else [f"chosen     {why_this}"]
    if question.replay:
        found = run.forward(found, done, lambda step, metrics: None)
    step = Replayed(run, found, done)
    losses = step.token_losses()
    near = deviations(records, number)
    documents = choose_documents(step, losses, question.most)
    suspects = rank(step, [step.measure(each, losses) for each in documents], near)
    suspects = leave_out(step, suspects, question.top)
    recorded = next((each for each in records if each.step == number), None)
    if not records:
        notes.append("metrics.jsonl has no training step: nothing to compare with")
    elif recorded is None:
        notes.append(f"step {number} is not recorded (train.log_every): nothing to compare with")
    result = _result(question, number, run.mesh, step, losses, suspects, documents)
    result |= {
        "parameters": _parameters(found, done, steps_apart, question.replay),
        "recorded": recorded and dict(recorded.figures),
        "deviations": {name: report.described(each) for name, each in near.items()},
        "neighbors": report.neighbors_of(records, number),
        "replay": None,
    }
    if question.replay:
        # Last, since the step takes the memory of its state.
        exact: dict[str, Any] = {}
        run.forward(found, number, lambda _, metrics: exact.update(metrics))
        result["replay"] = compared(exact, recorded)
        notes.append(f"replay     {result['replay']['text']}")
    result["notes"] = notes
    result = files.finite(result)
    return result, page.render(result, step, suspects, losses)


def _result(
    question: Question,
    number: int,
    mesh: Mesh,
    step: Replayed,
    losses: Any,
    suspects: Sequence,
    documents: Sequence,
) -> dict[str, Any]:
    """Return what the batch and the gradients say."""
    batch = step.batch
    return header("why", number) | {
        "workdir": question.workdir,
        "mesh": described(mesh.shape),
        "stage": batch.config.train.stages[batch.stage].name,
        "objective": "masked" if batch.masked else "causal",
        "first_sample": batch.first,
        "sequences": batch.sequences,
        "tokens": int((batch.rows["weights"] > 0).sum()),
        "documents_in_batch": len(batch.documents),
        "documents_measured": len(documents),
        "replayed": {"loss": step.loss, "grad_norm": step.norm},
        "gradient": report.gradient_norms(step),
        "sources": report.sources_of(step, losses),
        "rows": report.row_losses(step, losses),
        "documents": [report.document_row(step, each, losses) for each in suspects],
    }


def _parameters(found: states.Found, done: int, apart: int, replayed: bool) -> dict[str, Any]:
    if apart == 0 or replayed:
        text = f"{found.source}: those of the step exactly"
    elif apart > 0:
        text = f"{found.source}, {apart} steps before those of the step; --replay computes these"
    else:
        text = f"{found.source}, {-apart} steps after the step, which has trained on its batch"
    return {
        "source": found.source,
        "steps_before": 0 if replayed else apart,
        "exact": apart == 0 or replayed,
        "text": text,
    }


def compared(exact: dict[str, Any], recorded: Recorded | None) -> dict[str, Any]:
    """Return the train step's own figures, and whether they are those of the record to every
    bit."""
    figures = {name: exact[name] for name in ("loss", "grad_norm")}
    if recorded is None:
        return figures | {"equal": None, "text": f"loss {figures['loss']:.6f}, not recorded"}
    # A figure that is not finite is null in metrics.jsonl.
    equal = all(
        figures[name] == recorded.figures[name]
        or not (math.isfinite(figures[name]) or math.isfinite(recorded.figures[name]))
        for name in figures
    )
    text = "loss and grad_norm are the recorded ones, bit for bit"
    if not equal:
        changes = ", ".join(
            f"{name} {figures[name]:.9g} instead of {recorded.figures[name]:.9g}"
            for name in figures
        )
        text = f"{changes}: another mesh, device or version rounds differently"
    return figures | {"equal": equal, "text": text}
