"""Samples through time: a few fixed prompts that a run continues while it trains.

What writes them is in `mtnlg_jax.decode.in_training`, above this package; `train` receives it.
"""

from collections.abc import Callable
from typing import Protocol

from flax import nnx
from jax.sharding import Mesh

from mtnlg_jax.config import Config
from mtnlg_jax.data.tokenizer import Tokenizer

KIND = "samples"  # of the records in metrics.jsonl

# ``state.params`` -> the continuation of each prompt
Write = Callable[[nnx.State], list[str]]


class Samples(Protocol):
    """Prompts of a run, as `decode.in_training.RunSamples` has them."""

    def start(self, config: Config, mesh: Mesh, tokenizer: Tokenizer) -> Write:
        """Return what continues the prompts; it is called by all processes together."""


def check_given(config: Config, samples: Samples | None) -> None:
    """Raise ValueError if the config has prompts and the caller of `train` gives nothing that
    continues them."""
    if config.train.sample_prompts and samples is None:
        raise ValueError(
            "train.sample_prompts needs what continues them: from Python call train(config, "
            "workdir, samples=mtnlg_jax.decode.in_training.RunSamples(config)), or leave "
            "train.sample_prompts out"
        )


def record_of(prompts: tuple[str, ...], texts: list[str], step: int) -> dict:
    """Return the record of metrics.jsonl after ``step`` steps."""
    pairs = zip(prompts, texts, strict=True)
    found = [{"prompt": prompt, "text": text} for prompt, text in pairs]
    return {"kind": KIND, "step": step, "texts": found}
