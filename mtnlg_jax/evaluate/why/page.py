"""The report of a replayed step for people: lines of the terminal, and a page."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtnlg_jax.evaluate.inside.pages import (
    Cell,
    folded,
    grid,
    heading,
    page,
    paragraph,
    shade_of_loss,
    shaded_text,
    shaded_tokens,
    table,
)
from mtnlg_jax.evaluate.why.replay import Replayed
from mtnlg_jax.evaluate.why.report import pieces_of
from mtnlg_jax.evaluate.why.suspects import Suspect

_LEGEND = (
    "Score: by how many robust deviations the recorded loss and gradient norm would be nearer to "
    "those of the neighbors without the document. Share: of the squared gradient norm; those of "
    "all documents add up to 100 %. The darker a token, the higher its loss; a pointer on it shows "
    "the number."
)


def number(value: float | None, form: str = ".4f") -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:{form}}"


def lines(report: dict[str, Any], shown: int = 5) -> str:
    """Return the report as lines for a terminal."""
    found = [
        f"step {report['step']}: {report['objective']}, stage {report['stage']}, "
        f"{report['sequences']} rows, {report['tokens']:,} predicted tokens of "
        f"{report['documents_in_batch']} documents",
        f"parameters: {report['parameters']['text']}",
    ]
    replayed = report["replayed"]
    recorded = report["recorded"]
    for name in ("loss", "grad_norm"):
        line = f"{name:<10} {number(replayed[name])} now"
        if recorded:
            line += f", {number(recorded[name])} recorded"
        if name in report["deviations"]:
            deviation = report["deviations"][name]
            line += (
                f"; its neighbors make {number(deviation['expected'])} expected: "
                f"{number(deviation['deviation'], '+.1f')} deviations"
            )
        found.append(line)
    found += report["notes"]
    layers = report["gradient"]["layers"]
    if layers:
        largest = int(np.argmax([x or 0.0 for x in layers]))
        groups = sorted(report["gradient"]["groups"].items(), key=lambda pair: -(pair[1] or 0))
        found.append(
            f"gradient   largest in layer {largest} ({number(layers[largest])}); "
            + ", ".join(f"{name} {number(x)}" for name, x in groups[:4])
        )
    for at, each in enumerate(report["documents"][:shown], 1):
        without = each["left_out"] or {
            "loss": each["loss_without"],
            "grad_norm": each["grad_norm_without"],
        }
        found.append(
            f"{at}. {each['source']} document {each['document']}: {each['tokens']} tokens, loss "
            f"{number(each['loss'])}, {number(100 * (each['gradient_share'] or 0), '.1f')} % of "
            f"the gradient; without it loss {number(without['loss'])}, grad_norm "
            f"{number(without['grad_norm'])}\n   {each['text'][:160]!r}"
        )
    return "\n".join(found)


def render(
    report: dict[str, Any], step: Replayed, suspects: Sequence[Suspect], losses: np.ndarray
) -> str:
    """Return the page."""
    head = [
        *("source", "document", "tokens", "loss", "share of gradient", "norm of its part"),
        *("loss without", "grad_norm without", "score", "text"),
    ]
    rows = [
        [
            each["source"],
            str(each["document"]),
            str(each["tokens"]),
            Cell(number(each["loss"]), shade_of_loss(each["loss"] or 0.0)),
            Cell(number(100 * (each["gradient_share"] or 0), ".1f") + " %", each["gradient_share"]),
            number(each["gradient_norm"]),
            number((each["left_out"] or {}).get("loss", each["loss_without"])),
            number((each["left_out"] or {}).get("grad_norm", each["grad_norm_without"])),
            number(suspect.score, "+.1f"),
            each["text"][:120],
        ]
        for each, suspect in zip(report["documents"], suspects, strict=True)
    ]
    parts = [
        *(paragraph(line) for line in lines(report, 0).splitlines()),
        heading("Documents"),
        paragraph(_LEGEND, soft=True),
        table(head, rows, left=(0, 9)),
        heading("Text of the first documents"),
    ]
    for suspect in suspects[:8]:
        parts += _text(step, suspect, losses)
    parts += [heading("Gradient norm by layer"), _by_layer(report["gradient"]["parameters"])]
    parts += [heading("Recorded steps"), _neighbors(report)]
    parts += [heading("Sources"), _plain(report["sources"], ("source", "documents", "tokens"))]
    return page(f"Step {report['step']} of {report['workdir']}", parts)


def _text(step: Replayed, suspect: Suspect, losses: np.ndarray) -> list[str]:
    document = suspect.part.document
    tokenizer = step.batch.data.tokenizer
    found = []
    for row, ids, own in pieces_of(step, document, losses):
        shades = [None if math.isnan(loss) else shade_of_loss(loss) for loss in own]
        titles = ["not predicted" if math.isnan(loss) else f"loss {loss:.3f} nats" for loss in own]
        found.append(paragraph(f"document {document.number}, row {row}", soft=True))
        found.append(shaded_text(shaded_tokens(tokenizer, ids, shades, titles)))
    return found


def _by_layer(parameters: dict[str, Any]) -> str:
    stacked = {name: x for name, x in parameters.items() if isinstance(x, list)}
    alone = {name: x for name, x in parameters.items() if not isinstance(x, list)}
    values = [x for row in stacked.values() for x in row if x is not None]
    most = max([*values, *(x for x in alone.values() if x is not None), 1e-30])

    def cell(x: float | None) -> Cell:
        return Cell(number(x, ".3g"), 1.0 if x is None else x / most)

    count = max((len(row) for row in stacked.values()), default=0)
    rows = [(name.removeprefix("blocks."), [cell(x) for x in row]) for name, row in stacked.items()]
    shown = grid("parameter", [f"layer {layer}" for layer in range(count)], rows)
    rest = grid("parameter", ["norm"], [(name, [cell(x)]) for name, x in alone.items()])
    return shown + rest


def _neighbors(report: dict[str, Any]) -> str:
    rows = [
        [
            Cell(str(each["step"]), 1.0 if each["step"] == report["step"] else None),
            number(each["loss"]),
            number(each["grad_norm"]),
        ]
        for each in report["neighbors"]
    ]
    return folded("steps around it", table(["step", "loss", "grad_norm"], rows, left=()))


def _plain(entries: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    rows = [[*(str(each[name]) for name in names), number(each["loss"])] for each in entries]
    return table([*names, "loss"], rows, left=(0,))
