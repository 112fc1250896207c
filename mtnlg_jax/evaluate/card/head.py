"""The YAML head of a card, which the Hub reads: huggingface_hub's ModelCardData."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mtnlg_jax.evaluate.card.about import Stated
from mtnlg_jax.evaluate.card.data_facts import kept_languages
from mtnlg_jax.evaluate.card.facts import Facts, pointer
from mtnlg_jax.evaluate.card.result_facts import is_of_this_run
from mtnlg_jax.evaluate.card.run_files import RunFiles
from mtnlg_jax.train import lora

# Of the records of a checkpoint: the metrics that the Hub's pages name.
_HELD_OUT = {
    "causal_loss": "loss",
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
    "masked_loss": "masked_loss",
}


def head(facts: Facts, run: RunFiles, stated: Mapping[str, Stated], folder: str) -> ModelCardData:
    """Return the head of the card of ``run`` that is to lie in ``folder``."""
    results = [*_held_out(facts, run), *_tasks(facts, run)]
    causal = any(stage.masked < 1 for stage in run.config.train.stages)
    given = {key: stated[key].value for key in stated if key.startswith("license")}
    more: dict[str, Any] = dict(given)
    base = _base_model(run, stated)
    if base and run.config.train.init:
        more["base_model_relation"] = "adapter" if lora.used(run.config) else "finetune"
    emissions = next((fact for fact in facts if fact.name == "emissions_in_grams"), None)
    if emissions is not None and emissions.known:
        source = "devices, watts and hours, in the section on energy"
        more["co2_eq_emissions"] = {"emissions": emissions.value, "source": source}
    told = kept_languages(facts, run)
    return ModelCardData(
        language=stated["language"].value if "language" in stated else told or None,
        library_name="transformers" if _is_export(folder) else "mtnlg_jax",
        tags=["mtnlg_jax", "jax"],
        datasets=stated["datasets"].value if "datasets" in stated else None,
        base_model=base,
        metrics=sorted({result.metric_type for result in results}) or None,
        pipeline_tag="text-generation" if causal else "fill-mask",
        model_name=run.config.name,
        eval_results=results or None,
        **more,
    )


def _base_model(run: RunFiles, stated: Mapping[str, Stated]) -> str | None:
    if "base_model" in stated:
        return stated["base_model"].value
    init = run.config.train.init
    return os.path.basename(init.rstrip("/")) if init else None


def _is_export(folder: str) -> bool:
    """Return whether ``folder`` is a model that transformers reads, as launch/convert.py writes."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "model_type" in found


def _held_out(facts: Facts, run: RunFiles) -> Iterator[EvalResult]:
    record = run.record(run.best)
    found = run.content.get(record, {}).get("meta", {}).get("metrics", {})
    for key, metric in _HELD_OUT.items():
        if _is_number(found.get(key)):
            words = f"Checkpoint: held out, {key.replace('_', ' ')}"
            fact = facts.read(record, pointer("meta", "metrics", key), words)
            yield _result("held-out", "held-out text of the run", metric, fact.value, key)


def _tasks(facts: Facts, run: RunFiles) -> Iterator[EvalResult]:
    for file in run.evaluations:
        # Results of another run, or of another checkpoint of this one, are in the text alone.
        if not is_of_this_run(run, file) or run.content[file].get("step") != run.best:
            continue
        tasks = run.content[file].get("tasks")
        for task, result in tasks.items() if isinstance(tasks, dict) else ():
            if not isinstance(result, dict):
                continue
            shots = result.get("num_fewshot")
            for metric, found in (result.get("metrics") or {}).items():
                place = ["tasks", task, "metrics", metric]
                place += ["value"] if isinstance(found, dict) else []
                value = facts.read(file, pointer(*place), f"{task}: {metric}").value
                if _is_number(value):
                    args = {} if shots is None else {"num_few_shot": shots}
                    yield _result(task, task, metric, value, metric, args)


def _result(
    kind: str, name: str, metric: str, value: Any, words: str, args: dict[str, Any] | None = None
) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=kind,
        dataset_name=name,
        dataset_args=args or None,
        metric_type=metric,
        metric_name=words.replace("_", " "),
        metric_value=value,
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)
