"""Measure long texts with the model of a run, and report the result."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh
from tqdm import tqdm

from mtnlg_jax.config import Config
from mtnlg_jax.data.segment import language_of
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.evaluate.comparison import compare_with
from mtnlg_jax.evaluate.figures import Figure
from mtnlg_jax.evaluate.longtext import (
    MEASURES,
    LongTextReport,
    LongTextSettings,
    as_json,
    measure_texts,
)
from mtnlg_jax.evaluate.needle import Needle, lengths_of, measure_needles
from mtnlg_jax.train.checkpoint import Before


@dataclasses.dataclass(frozen=True)
class NeedleSettings:
    """How pass keys are asked for; the arguments of `measure_needles`."""

    language: str | None = None  # None: that of the texts
    lengths: tuple[int, ...] | None = None
    trials: int = 4


class LongTextScore(NamedTuple):
    """What a checkpoint measures; ``real`` and ``needles`` are None where nobody asked."""

    texts: LongTextReport
    real: LongTextReport | None
    needles: list[Needle] | None
    step: int


def measure_run(
    workdir: str,
    which: str,
    texts: Sequence[str],
    references: Sequence[str] | None = None,
    settings: LongTextSettings | None = None,
    needle: NeedleSettings | None = None,
    held: dict[str, str] | None = None,
    mesh: Mesh | None = None,
    before: Before = lambda config, tokenizer: None,
) -> LongTextScore:
    """Measure ``texts`` with the checkpoint ``which`` ("best" or "last"), with a progress bar.

    ``references`` are real texts for `compare_with`. ``needle``: also ask for pass keys. ``held``
    may hold dtype and weights of `unstack`. ``mesh``: devices to split the model over. ``before``
    is that of `load_run`. Raises ValueError before the model is loaded if a length of ``needle``
    does not fit.
    """
    settings = settings or LongTextSettings()
    language = (needle.language or language_of(" ".join(texts))) if needle else ""

    def check(config: Config, tokenizer: Any) -> None:
        before(config, tokenizer)
        if needle is not None:
            context = config.model.max_position_embeddings
            lengths_of(tokenizer, context, language, needle.lengths)

    run, decoder = load_decoder(workdir, which, **(held or {}), mesh=mesh, before=check)
    real = needles = None
    with tqdm(unit="part", disable=None, leave=False) as bar:

        def show(part: str) -> None:
            bar.set_description(part)
            bar.update()

        if references is None:
            report = measure_texts(decoder, run.tokenizer, texts, settings=settings, on_part=show)
        else:
            report, real = compare_with(
                references, decoder, run.tokenizer, texts, settings, on_part=show
            )
        if needle is not None:
            needles = measure_needles(
                decoder,
                run.tokenizer,
                language,
                needle.lengths,
                trials=needle.trials,
                seed=settings.seed,
                on_cell=lambda done, total: show(f"pass keys, {done} of {total}"),
            )
    return LongTextScore(report, real, needles, run.step)


def score_json(score: LongTextScore, left_out: dict[str, int]) -> dict[str, Any]:
    """Return the content of the JSON object of a score."""
    return {
        "step": score.step,
        "texts": as_json(score.texts),
        "references": None if score.real is None else as_json(score.real),
        "needles": None if score.needles is None else [each._asdict() for each in score.needles],
        "left_out": left_out,
    }


def describe(name: str, score: LongTextScore) -> str:
    """Return the report of a score for a person; ``name`` is that of the texts."""
    texts = score.texts
    reports = {"texts": texts}
    if score.real is not None:
        reports["references"] = score.real
    rows = [["measure", *reports, "better"]]
    for key, kind in MEASURES.items():
        shown = [_shown(report.figures[key]) for report in reports.values()]
        rows.append([kind.title, *shown, kind.better])
    lines = [
        f"{name}: {texts.texts:,} text(s), {texts.words:,} words, {texts.tokens:,} tokens "
        f"(checkpoint of step {score.step})",
        *_table(rows),
    ]
    for column, report in reports.items():
        for key, figure in report.figures.items():
            if figure.absent:
                lines.append(f"{MEASURES[key].title}, {column}: absent, {figure.absent}")
    if texts.repeated:
        lines.append(f"the longest repeated span: {texts.repeated[:200]!r}")
    if score.needles is not None:
        lines += ["pass keys: share that ranks first / is written", *_needle_table(score.needles)]
    return "\n".join(lines)


def _shown(figure: Figure) -> str:
    if figure.value is None:
        return "-"
    shown = f"{figure.value:.4g}"
    return shown if figure.error is None else f"{shown} ± {figure.error:.2g}"


def _needle_table(needles: Sequence[Needle]) -> list[str]:
    depths = list(dict.fromkeys(each.depth for each in needles))
    cells = {(each.length, each.depth): f"{each.ranked:.2f} / {each.exact:.2f}" for each in needles}
    rows = [["tokens", *(f"depth {depth:g}" for depth in depths)]]
    for length in dict.fromkeys(each.length for each in needles):
        rows.append([str(length), *(cells[length, depth] for depth in depths)])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
