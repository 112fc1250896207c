"""Score texts with the model of a run, and report the result."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from mtnlg_jax.decode.cache import Decoder, unstack
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.evaluate.perplexity import Evaluation, evaluate_texts, merged
from mtnlg_jax.model.transformer import Transformer, abstract_model
from mtnlg_jax.train.checkpoint import Before, load_run


class RunScore(NamedTuple):
    """The score of a checkpoint on some texts.

    ``other`` is the score with the model as ``rounded`` describes it; None if that is empty.
    """

    total: Evaluation
    other: Evaluation | None
    rounded: dict[str, str]
    documents: int
    step: int
    adapt: float
    losses: tuple[str, ...] = ()  # what the tokenizer loses of a text


def score_run(
    workdir: str,
    which: str,
    texts: Sequence[str],
    stride: int | None = None,
    adapt: float = 0.0,
    rounded: dict[str, str] | None = None,
    mesh: Mesh | None = None,
    before: Before = lambda config, tokenizer: None,
) -> RunScore:
    """Score ``texts`` with the checkpoint ``which`` ("best" or "last"), with a progress bar.

    ``stride`` and ``adapt`` are for `evaluate_texts`. ``rounded`` may hold dtype, weights and cache
    of `unstack`; the texts are then scored a second time with the model as those hold it. ``mesh``:
    devices to split the model over. ``before`` is that of `load_run`.
    """
    rounded = rounded or {}
    model: Transformer | Decoder
    if mesh is not None and not adapt:
        run, model = load_decoder(workdir, which, mesh=mesh, before=before)
    else:
        # Only this form can be trained.
        run = load_run(workdir, which, mesh, before=before)
        model = nnx.merge(abstract_model(run.config.model)[0], run.params)
    in_context = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with in_context, tqdm(unit="window", disable=None, leave=False) as bar:

        def show(done: int, windows: int) -> None:
            bar.total = windows
            bar.update(done - bar.n)

        found = evaluate_texts(model, run.tokenizer, texts, stride, adapt=adapt, on_batch=show)
    other = None
    if rounded:
        if mesh is None:
            decoder = unstack(run.config.model, run.params, **rounded)  # type: ignore[arg-type]
        else:
            decoder = load_decoder(workdir, which, **rounded, mesh=mesh)[1]  # type: ignore[arg-type]
        other = merged(evaluate_texts(decoder, run.tokenizer, texts, stride))
    losses = tuple(run.tokenizer.losses())
    return RunScore(merged(found), other, rounded, len(texts), run.step, adapt, losses)


def as_json(score: RunScore, left_out: dict[str, int]) -> dict[str, Any]:
    """Return the content of the JSON object of a score."""
    result: dict[str, Any] = dataclasses.asdict(score.total) | {
        "step": score.step,
        "documents": score.documents,
        "adapt": score.adapt,
        "left_out": left_out,
    }
    if score.losses:
        result["tokenizer_losses"] = list(score.losses)
    if score.other is not None:
        losses = {"loss": score.other.loss, "perplexity": score.other.perplexity}
        result["rounded"] = score.rounded | losses
    return result


def describe(name: str, score: RunScore) -> str:
    """Return the report of a score for a person; ``name`` is that of the text."""
    total = score.total
    adapting = f", adapting at {score.adapt:g}" if score.adapt else ""
    lines = [
        f"{name}: {score.documents} document(s), {total.bytes:,} bytes, {total.tokens:,} tokens",
        f"loss {total.loss:.4f} nats a token, perplexity {total.perplexity:.2f}, "
        f"{total.bits_per_byte:.4f} bits per byte, word perplexity {total.word_perplexity:.2f} "
        f"of {total.words:,} words (checkpoint of step {score.step}{adapting})",
    ]
    if score.losses:
        lines.append(
            f"the tokenizer is not lossless; a text loses {', '.join(score.losses)}, so bits per "
            "byte do not compare with those of other tokenizers"
        )
    if score.other is not None:
        kinds = ", ".join(f"{key} {value}" for key, value in score.rounded.items())
        other = score.other.perplexity
        lines.append(
            f"with {kinds}: loss {score.other.loss:.4f}, perplexity {other:.3f} against "
            f"{total.perplexity:.3f}: {100 * (other / total.perplexity - 1):+.2f} %"
        )
    return "\n".join(lines)
