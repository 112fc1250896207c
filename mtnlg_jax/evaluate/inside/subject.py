"""The model that is looked into, and texts as its tokens."""

from typing import Any, NamedTuple

from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.model.transformer import Transformer, abstract_model
from mtnlg_jax.train.checkpoint import load_run


class Subject(NamedTuple):
    """A model with its tokenizer."""

    model: Transformer
    tokenizer: Tokenizer
    step: int  # of the checkpoint
    workdir: str

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def causal(self) -> bool:
        """Whether attention is causal; it sees both ways in models of masked text alone."""
        return not self.config.mlm_head

    def ids(self, text: str, what: str) -> list[int]:
        """Return the tokens of ``text`` as the model reads it, with bos where its texts have it.

        ``what`` names the flag in errors. Raises ValueError on an empty text, and on one that is
        longer than the context.
        """
        ids = self.tokenizer.encode(text)
        if not ids:
            raise ValueError(f"--{what} is empty; give a text")
        if self.tokenizer.prompt_bos:
            ids = [self.tokenizer.bos_id, *ids]
        self.check_length(ids, what)
        return ids

    def check_length(self, ids: list[int], what: str) -> None:
        """Raise ValueError where ``ids`` are more than the context."""
        most = self.config.max_position_embeddings
        if len(ids) > most:
            raise ValueError(
                f"--{what} has {len(ids)} tokens and the model's context holds {most}; shorten it"
            )


class Answer(NamedTuple):
    """A result: for JSON, as a page, as a picture, and for the terminal."""

    result: dict[str, Any]
    page: str
    picture: bytes | None
    lines: str


def load_subject(workdir: str, which: str) -> Subject:
    """Load the checkpoint ``which`` ("best" or "last") of a run, or a model of another format."""
    run = load_run(workdir, which)
    model = nnx.merge(abstract_model(run.config.model)[0], run.params)
    return Subject(model, run.tokenizer, run.step, str(workdir))
