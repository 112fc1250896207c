"""Which documents of a batch made its step unusual."""

import dataclasses
import math

import numpy as np

from mtnlg_jax.evaluate.why.neighbors import Deviation
from mtnlg_jax.evaluate.why.replay import Part, Replayed
from mtnlg_jax.train.step_batch import Document

# Without neighbors, a change of this share of a figure counts as one deviation.
_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A document, and by how many deviations the step's figures are more usual without it."""

    part: Part
    of_loss: float
    of_norm: float
    # Loss and norm of the train step without it; None where it was not computed.
    left_out: tuple[float, float] | None = None

    @property
    def score(self) -> float:
        return self.of_loss + self.of_norm


def choose_documents(step: Replayed, losses: np.ndarray, most: int) -> list[Document]:
    """Return at most ``most`` documents of the batch whose gradients are worth computing.

    These are all if they are few. Otherwise half are those that raise the loss most, and the rest
    those in the rows with the largest gradients, which takes a pass over the rows.
    """
    batch = step.batch
    documents = batch.by_excess(losses)
    if len(documents) <= most:
        return documents
    chosen = documents[: (most + 1) // 2]
    norms = step.row_norms()
    largest = {
        document: norms[np.unique(batch.documents[document][:, 0])].max() for document in documents
    }
    # Sorting keeps the order of equal ones.
    for document in sorted(documents, key=lambda each: -largest[each]):
        if len(chosen) < most and document not in chosen:
            chosen.append(document)
    return chosen


def rank(step: Replayed, parts: list[Part], deviations: dict[str, Deviation]) -> list[Suspect]:
    """Return the documents, the most suspicious one first.

    Its score is by how many deviations (`neighbors`) the recorded loss and gradient norm of the
    step would be nearer to those of its neighbors without it. A bad document often lowers the norm:
    its gradient points away from that of all others.
    """

    def nearer(name: str, value: float, without: float) -> float:
        known = deviations.get(name)
        scale = _SHARE * abs(value) if known is None else known.scale
        change = (value - without) / max(scale, 1e-12)
        if known is not None and math.isfinite(known.value):
            # The change is that of these parameters, which may be of another step; the deviation
            # is that of the run.
            change = abs(known.deviation) - abs(known.deviation - change)
        return change if math.isfinite(change) else 0.0

    found = [
        Suspect(
            part,
            nearer("loss", step.loss, part.loss_without),
            nearer("grad_norm", step.norm, part.norm_without),
        )
        for part in parts
    ]
    # Documents whose own figures are not finite come first.
    broken = [not math.isfinite(each.part.loss + each.part.norm) for each in found]
    order = sorted(range(len(found)), key=lambda at: (not broken[at], -found[at].score))
    return [found[at] for at in order]


def leave_out(step: Replayed, suspects: list[Suspect], count: int) -> list[Suspect]:
    """Return ``suspects``, the first ``count`` with the figures of the step without them."""
    return [
        dataclasses.replace(each, left_out=step.leave_out(each.part.document))
        if number < count
        else each
        for number, each in enumerate(suspects)
    ]
