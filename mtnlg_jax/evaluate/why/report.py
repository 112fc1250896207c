"""The report of a replayed step as one object for JSON."""

# Shapes: L layers

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mtnlg_jax.evaluate.inside.pages import token_texts
from mtnlg_jax.evaluate.why.neighbors import REACH, Deviation, Recorded
from mtnlg_jax.evaluate.why.replay import Replayed
from mtnlg_jax.evaluate.why.suspects import Suspect
from mtnlg_jax.train.step_batch import Document

SHOWN = 400  # characters of a document's text
TOP_TOKENS = 8

_GROUPS = (
    ("blocks.attention", "attention"),
    ("blocks.mlp", "mlp"),
    ("blocks.lora", "adapters"),
    ("blocks", "norms of blocks"),
    ("head_VD", "head"),
    ("b_head_V", "head"),
    ("mlm", "head"),
    ("final_norm", "final norm"),
)


def pieces_of(
    step: Replayed, document: Document, losses: np.ndarray
) -> Iterator[tuple[int, list[int], list[float]]]:
    """Yield (row, ids, loss of each id or nan) of each stretch of a document in the batch, as it
    stands in the data."""
    rows = step.batch.rows
    places = step.batch.documents[document]
    for row in np.unique(places[:, 0]):
        at = places[places[:, 0] == row, 1]
        labels = rows["labels"][row, at]
        own = losses[row, at]
        if step.batch.masked:
            yield int(row), labels.tolist(), own.tolist()
            continue
        # A label is the next token. The last one is of the document if it is predicted.
        ids = rows["tokens"][row, at].tolist()
        shades = [math.nan, *own[:-1].tolist()]
        if rows["weights"][row, at[-1]] > 0:
            ids.append(int(labels[-1]))
            shades.append(float(own[-1]))
        yield int(row), ids, shades


def text_of(step: Replayed, document: Document, losses: np.ndarray) -> str:
    """Return the text of a document in the batch, its stretches joined by " ... "."""
    tokenizer = step.batch.data.tokenizer
    parts = []
    for _, ids, _ in pieces_of(step, document, losses):
        parts.append(tokenizer.decode([i for i in ids if 0 <= i < tokenizer.vocab_size]))
    text = " ... ".join(parts)
    return text if len(text) <= SHOWN else text[: SHOWN - 4] + " ..."


def gradient_norms(step: Replayed) -> dict[str, Any]:
    """Return the norms of the gradient by layer, by group and by parameter."""
    layers: np.ndarray | float = 0.0
    groups: dict[str, float] = {}
    for name, found in step.squares.items():
        if found.ndim:
            layers = layers + found
        group = next((to for begin, to in _GROUPS if name.startswith(begin)), "embedding")
        groups[group] = groups.get(group, 0.0) + float(found.sum())
    return {
        "layers": np.sqrt(layers).tolist() if isinstance(layers, np.ndarray) else [],
        "groups": {name: math.sqrt(x) for name, x in sorted(groups.items())},
        "parameters": {
            name: np.sqrt(found).tolist() for name, found in sorted(step.squares.items())
        },
    }


def neighbors_of(records: Sequence[Recorded], step: int) -> list[dict[str, Any]]:
    """Return the recorded figures of the steps around ``step``, itself included."""
    near = [each for each in records if abs(each.step - step) <= 2 * REACH]
    return [{"step": each.step, **each.figures} for each in near]


def described(deviation: Deviation) -> dict[str, float]:
    return deviation._asdict() | {"deviation": deviation.deviation}


def document_row(step: Replayed, suspect: Suspect, losses: np.ndarray) -> dict[str, Any]:
    """Return the figures of a document."""
    part = suspect.part
    tokenizer = step.batch.data.tokenizer
    tokens: list[dict[str, Any]] = []
    for row, ids, own in pieces_of(step, part.document, losses):
        for position, (index, loss) in enumerate(zip(ids, own, strict=True)):
            if not math.isnan(loss):
                before = tokenizer.decode(
                    [i for i in ids[max(0, position - 8) : position] if i >= 0]
                )
                shown = token_texts(tokenizer, [index])[0]
                tokens.append({"token": shown, "loss": loss, "row": row, "behind": before})
    tokens.sort(key=lambda each: -each["loss"])
    return {
        "source": step.batch.source_name(part.document),
        "document": part.document.number,
        "rows": list(part.rows),
        "tokens": part.tokens,
        "loss": part.loss,
        "gradient_norm": part.norm,
        "gradient_share": part.share,
        "loss_without": part.loss_without,
        "grad_norm_without": part.norm_without,
        "deviations_of_loss": suspect.of_loss,
        "deviations_of_grad_norm": suspect.of_norm,
        "left_out": suspect.left_out
        and {"loss": suspect.left_out[0], "grad_norm": suspect.left_out[1]},
        "text": text_of(step, part.document, losses),
        "highest_losses": tokens[:TOP_TOKENS],
    }


def sources_of(step: Replayed, losses: np.ndarray) -> list[dict[str, Any]]:
    """Return documents, predicted tokens and mean loss of the batch by source."""
    found: dict[str, dict[str, Any]] = {}
    for document, places in step.batch.documents.items():
        name = step.batch.source_name(document)
        entry = found.setdefault(name, {"source": name, "documents": 0, "tokens": 0, "loss": 0.0})
        own = losses[tuple(places.T)]
        entry["documents"] += 1
        entry["tokens"] += int((~np.isnan(own)).sum())
        entry["loss"] += float(np.nansum(own))
    for entry in found.values():
        entry["loss"] = entry["loss"] / entry["tokens"] if entry["tokens"] else math.nan
    return [found[name] for name in sorted(found)]


def row_losses(step: Replayed, losses: np.ndarray) -> list[dict[str, Any]]:
    """Return the predicted tokens and mean loss of each row."""
    counts = (~np.isnan(losses)).sum(1)
    sums = np.nansum(losses, 1)
    return [
        {"row": row, "tokens": int(count), "loss": float(total / count) if count else math.nan}
        for row, (count, total) in enumerate(zip(counts, sums, strict=True))
    ]


def folder_of(workdir: str, step: int) -> str:
    return os.path.join(workdir, "why", f"step_{step}")
