"""What a card says of evaluations, memorization, privacy and bias."""

from collections.abc import Iterator, Mapping
from typing import Any

from mtnlg_jax.evaluate.card.facts import Fact, Facts, pointer
from mtnlg_jax.evaluate.card.measured import measured
from mtnlg_jax.evaluate.card.page import Cell, Section
from mtnlg_jax.evaluate.card.run_files import CONFIG, RunFiles


def evaluation_sections(facts: Facts, run: RunFiles) -> list[Section]:
    """Return the section on the evaluations of tasks, and add its facts."""
    section = Section("Evaluation")
    rows: list[list[Cell]] = []
    others = []
    for file in run.evaluations:
        content = run.content[file]
        section.blocks.append(_of_checkpoint(facts, run, file))
        if not isinstance(content.get("tasks"), dict):
            others.append(measured(facts, run, file, Section(f"Results in {file}", level=3)))
            continue
        for task, result in content["tasks"].items():
            rows += _task(facts, file, task, result)
    if not run.evaluations:
        section.blocks.append(
            "Unknown: the run's folder holds no results of tasks. Its held-out losses are above."
        )
    head = (
        "task",
        "version",
        "shots",
        "rows",
        "metric",
        "value",
        "standard error",
        "checkpoint of step",
    )
    section.table(head, rows)
    return [section, *others]


def other_sections(facts: Facts, run: RunFiles) -> list[Section]:
    """Return the sections on memorization, privacy and bias, and add their facts."""
    private = run.content[CONFIG].get("optimizer", {}).get("dp_noise_multiplier")
    parts = (
        (
            "Memorization",
            "audit.json",
            "Unknown: the run's folder holds no audit of what the model remembers of its data.",
        ),
        (
            "Differential privacy",
            "privacy.json",
            "Unknown: the run was trained with noise, and its folder does not say what it spent."
            if private
            else "The model was not trained with differential privacy: nothing bounds what it may "
            "remember of one example.",
        ),
        (
            "Bias",
            "bias.json",
            "Unknown: the run's folder holds no measures of the model's bias.",
        ),
    )
    sections = []
    for title, file, without in parts:
        section = Section(title)
        if not run.has(file):
            section.blocks.append(without)
        elif file == "privacy.json":
            measured(facts, run, file, section)
        else:
            section.blocks.append(_of_checkpoint(facts, run, file))
            measured(facts, run, file, section)
        sections.append(section)
    return sections


def is_of_this_run(run: RunFiles, file: str) -> bool:
    """Return whether the step in a file of results is one that the run has done."""
    step = run.content[file].get("step")
    return isinstance(step, int) and step <= run.last_step


def _of_checkpoint(facts: Facts, run: RunFiles, file: str) -> str:
    """Return the sentence that names the checkpoint of which ``file`` tells."""
    step = facts.read(file, "/step", "Results: step of the checkpoint")
    facts.read(file, "/created", "Results: date")
    if not step.known:
        return f"`{file}`: the checkpoint is unknown."
    text = f"`{file}`: checkpoint of step {step.shown}"
    if not is_of_this_run(run, file):
        return f"{text}, which this run has not reached; the results are of another run."
    if step.value != run.best and run.best is not None:
        best = facts.read(run.record(run.best), "/step", "Checkpoint that this card describes")
        return f"{text}; this card describes the checkpoint of step {best.shown}."
    return f"{text}."


def _task(facts: Facts, file: str, task: str, result: Mapping[str, Any]) -> Iterator[list[Cell]]:
    if not isinstance(result, dict):
        return

    def read(label: str, *parts: str) -> Fact:
        return facts.read(file, pointer("tasks", task, *parts), f"{task}: {label}")

    common: list[Cell] = [task]
    common += [
        read(label, key)
        for key, label in (("version", "version"), ("num_fewshot", "shots"), ("rows", "rows"))
    ]
    if "prompt_hash" in result:
        read("hash of the prompts", "prompt_hash")
    step = facts.read(file, "/step", f"{task}: step of the checkpoint")
    for metric, found in (result.get("metrics") or {}).items():
        nested = isinstance(found, dict)
        place = ("metrics", metric, "value") if nested else ("metrics", metric)
        error: Cell = ""
        if nested and found.get("stderr") is not None:
            error = read(f"{metric}, standard error", "metrics", metric, "stderr")
        yield [*common, metric, read(metric, *place), error, step]
    for label in result.get("predicted_classes") or {}:
        share = read(f"share of predicted {label}", "predicted_classes", label)
        yield [*common, f"predicted {label}", share, "", step]
