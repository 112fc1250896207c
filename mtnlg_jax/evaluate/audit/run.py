"""Audit a run: open its data, measure each part, and return one report."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from mtnlg_jax.config import Config
from mtnlg_jax.data.canaries import CANARIES, Canary
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.evaluate.audit import extraction
from mtnlg_jax.evaluate.audit.measures import Inputs, Measures
from mtnlg_jax.evaluate.audit.planted import canaries_of
from mtnlg_jax.evaluate.audit.settings import PARTS, AuditSettings, check
from mtnlg_jax.evaluate.audit.sources import check_reference, open_run_data
from mtnlg_jax.train.checkpoint import Before
from mtnlg_jax.train.describe import header


def audit(
    workdir: str,
    which: str,
    settings: AuditSettings,
    *,
    data: Sequence[str] = (),
    canaries: str | None = None,
    reference: str | None = None,
    mesh: Mesh | None = None,
    before: Before = lambda config, tokenizer: None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure what the checkpoint ``which`` ("best" or "last") of ``workdir`` remembers, and return
    the content of audit.json.

    Args:
      data: paths of the training data, in place of those that the run's config names.
      canaries: file of the planted canaries, in place of canaries.json in the data.
      reference: another run or model with the same tokenizer, for membership.
      mesh: devices to split the models over.
      before: that of `load_decoder`, for the run's model.
      progress: whether to show bars on a terminal.

    Raises ValueError or FileNotFoundError before any parameter is read where the settings, the run
    and its data do not fit together, and ValueError where canaries are missing from the text.
    """
    check(settings)
    inputs: list[Inputs] = []

    def look(config: Config, tokenizer: Tokenizer | None) -> None:
        before(config, tokenizer)
        found = _inputs(workdir, config, tokenizer, settings, data, canaries)
        if reference is not None and "membership" in (settings.parts or PARTS):
            check_reference(reference, found.tokenizer, found.member_tokens)
        inputs.append(found)

    run, decoder = load_decoder(workdir, which, mesh=mesh, before=look)
    found = inputs[-1]
    work = Measures(found.tokenizer, decoder, settings, found, progress)
    work.draw()
    report: dict[str, Any] = header("audit", run.step, ("scipy", "scikit-learn")) | {
        "workdir": str(workdir),
        "checkpoint": which,
        "data": [source.path for source in found.sources],
        "tokens": sum(map(len, work.parts)),
        "settings": dataclasses.asdict(settings),
        "skipped": found.skipped,
        "notes": _notes(run.meta, found, given=bool(data)) + work.notes,
        "seconds": {"counting": round(work.counting, 2)},
    }
    measures: dict[str, Callable[[], dict]] = {
        "extraction": work.measure_extraction,
        "canaries": work.measure_canaries,
        "membership": lambda: work.measure_membership(reference),
        "personal_data": work.measure_personal_data,
    }
    for part in PARTS:
        report[part] = None
        if part in (settings.parts or PARTS) and part not in found.skipped:
            began = time.monotonic()
            report[part] = measures[part]()
            report["seconds"][part] = round(time.monotonic() - began, 2)
    return report


def _inputs(
    workdir: str,
    config: Config,
    tokenizer: Tokenizer | None,
    settings: AuditSettings,
    data: Sequence[str],
    canaries: str | None,
) -> Inputs:
    context = config.model.max_position_embeddings
    lengths = extraction.lengths_of(settings.extraction, context)
    member_tokens = min(128, context) if settings.member_tokens is None else settings.member_tokens
    if member_tokens > context:
        raise ValueError(
            f"member_tokens={member_tokens} do not fit the model's context of {context}; give at "
            "most that"
        )
    found, sources = open_run_data(workdir, config, tokenizer, data)
    skipped = {}
    if not any(len(source.heldout) for source in sources):
        skipped["membership"] = (
            f"{sources[0].path} holds no held-out text, which membership compares with; prepare "
            "the data with --heldout=0.02"
        )
    planted: list[Canary] = []
    if settings.parts is None or "canaries" in settings.parts:
        planted = canaries_of(sources, canaries)
        if not planted:
            skipped["canaries"] = (
                f"{sources[0].path} has no {CANARIES}; plant some with launch/prepare_data.py "
                "--canaries=10 before training"
            )
    if settings.parts is not None:
        for part, why in skipped.items():
            if part in settings.parts:
                raise ValueError(f"{why}, or leave {part} out of --parts")
    if sum(len(part) for source in sources for part in source.train) < 2:
        raise ValueError(f"{sources[0].path} holds no training text; give other --data")
    return Inputs(found, sources, planted, lengths, member_tokens, skipped)


def _notes(meta: dict, found: Inputs, given: bool) -> list[str]:
    """Return what a reader of the report must know about the data."""
    trained = set((meta or {}).get("identity", {}).get("data", {}).values())
    now = {part.meta["sha256"] for source in found.sources for part in source.train}
    if trained and not now <= trained:
        way = "" if given else "; give the data it was trained on with --data"
        return [f"the data differ from those that the run recorded when it was trained{way}"]
    return []
