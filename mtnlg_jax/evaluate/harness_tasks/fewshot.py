"""Few-shot examples, none of which equals the row in question."""

import random
from collections import Counter
from typing import Any, Protocol

from lm_eval.api.samplers import ContextSampler


class Questions(Protocol):
    """The part of a task that recognizes equal rows."""

    config: Any

    def key(self, doc: dict[str, Any]) -> str:
        """Return what two equal questions share."""

    def pool(self) -> Counter:
        """Return how often each question occurs among the rows of examples."""


class Distinct(ContextSampler):
    """The examples that ``inner`` draws, with others in place of those that equal the question."""

    def __init__(self, inner: ContextSampler, task: Questions) -> None:
        super().__init__(inner.df)
        self.inner = inner
        self.task = task
        self.asked: dict[str, Any] | None = None

    def set_rnd(self, rnd: int | None) -> "Distinct":
        self.inner.set_rnd(rnd)
        # Apart from the draws of the harness, which stay those of a run without equal rows.
        self.rnd = random.Random(rnd)
        return self

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **kwargs: Any) -> Any:
        drawn = list(self.inner.sample(n, eval_doc=eval_doc, df=df, **kwargs))
        if self.asked is None or not drawn:
            return drawn
        asked = self.task.key(self.asked)
        if self.task.pool()[asked] == 0:
            return drawn
        kept = [doc for doc in drawn if self.task.key(doc) != asked]
        if len(kept) < n:
            spare = [
                doc for doc in self.inner.df if doc not in kept and self.task.key(doc) != asked
            ]
            if len(spare) < n - len(kept):
                raise ValueError(
                    f"--num_fewshot={n}: only {len(kept) + len(spare)} rows of the task "
                    f"{self.task.config.task} differ from the row in question"
                )
            kept += self.rnd.sample(spare, n - len(kept))
        return kept
