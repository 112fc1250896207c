"""Patches between two prompts, and passages that raise a continuation's probability."""

# Shapes: P points, L layers, S positions

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from mtnlg_jax.evaluate.inside import figures, pages
from mtnlg_jax.evaluate.inside.influence import influences
from mtnlg_jax.evaluate.inside.pages import Cell, token_texts
from mtnlg_jax.evaluate.inside.passages import Passage, after_bos
from mtnlg_jax.evaluate.inside.patching import patch_everywhere
from mtnlg_jax.evaluate.inside.projected import (
    draw_projections,
    examples_of,
    project_gradients,
    projecting_config,
)
from mtnlg_jax.evaluate.inside.record import POINTS
from mtnlg_jax.evaluate.inside.subject import Answer, Subject
from mtnlg_jax.train.describe import header

_SHOWN = 300  # characters of a passage


def patch(
    subject: Subject, clean: str, corrupt: str, answers: Sequence[str], batch: int = 32
) -> Answer:
    """Patch activations of the ``clean`` prompt into the ``corrupt`` one, and see how much of the
    logit difference of the two ``answers`` returns.

    Raises ValueError where the prompts have different numbers of tokens, or the answers begin with
    one token.
    """
    firsts = _first_tokens(subject, answers)
    prompts = [subject.ids(clean, "clean"), subject.ids(corrupt, "corrupt")]
    tokens = [token_texts(subject.tokenizer, ids) for ids in prompts]
    if len(prompts[0]) != len(prompts[1]):
        at = next(
            (n for n, pair in enumerate(zip(*prompts, strict=False)) if pair[0] != pair[1]),
            min(map(len, prompts)),
        )
        raise ValueError(
            f"--clean has {len(prompts[0])} tokens and --corrupt {len(prompts[1])}, from token "
            f"{at} on {tokens[0][at : at + 4]} and {tokens[1][at : at + 4]}; patches need "
            "the same number in both: exchange words for others of as many tokens"
        )
    found = patch_everywhere(subject.model, prompts[0], prompts[1], firsts, subject.causal, batch)
    names = _both_names(*tokens)
    parts = [
        pages.paragraph(
            f"Logit of {answers[0]!r} minus that of {answers[1]!r}: {found.clean:.4f} behind the "
            f"clean prompt, {found.corrupt:.4f} behind the corrupt one. A cell is the share of "
            "this gap that returns where the activation of the clean prompt stands in place of "
            "the corrupt one's: 1 all, 0 nothing, below 0 (in blue) the gap grows."
        )
    ]
    for point, values in zip(POINTS, found.recovered_PLS, strict=True):
        rows = [
            (f"layer {layer}", [Cell(f"{x:.2f}", float(x)) for x in values[layer]])
            for layer in range(len(values))
        ]
        parts += [pages.heading(point), pages.grid("", names, rows)]
    order = np.argsort(-found.recovered_PLS, axis=None)[:8]
    best = [np.unravel_index(index, found.recovered_PLS.shape) for index in order]
    lines = [
        f"logit difference {found.clean:.4f} clean, {found.corrupt:.4f} corrupt; the patches that "
        "recover most:"
    ]
    for place in best:
        at_point, layer, position = map(int, place)
        share = float(found.recovered_PLS[place])
        lines.append(f"{share:8.3f}  {POINTS[at_point]:<9} layer {layer} at {names[position]}")
    result = header("patch", subject.step) | {
        "workdir": subject.workdir,
        "clean": clean,
        "corrupt": corrupt,
        "answers": [
            {"text": text, "token": index} for text, index in zip(answers, firsts, strict=True)
        ],
        "tokens": [{"clean": a, "corrupt": b} for a, b in zip(*tokens, strict=True)],
        "difference": {"clean": found.clean, "corrupt": found.corrupt},
        "recovered": {
            point: np.round(values.astype(np.float64), 6).tolist()
            for point, values in zip(POINTS, found.recovered_PLS, strict=True)
        },
    }
    title = f"Activation patching in {subject.workdir}, checkpoint {subject.step}"
    drawn = figures.patches(found.recovered_PLS, POINTS, names)
    return Answer(result, pages.page(title, parts), drawn, "\n".join(lines))


def _first_tokens(subject: Subject, answers: Sequence[str]) -> tuple[int, int]:
    """Return the tokens with which the two answers begin."""
    if len(answers) != 2:
        raise ValueError(f"--answers was given {len(answers)} times; give two answers to compare")
    ids = [subject.tokenizer.encode(text) for text in answers]
    for text, each in zip(answers, ids, strict=True):
        if not each:
            raise ValueError(f"--answers={text} is empty; give a text, such as ' Paris'")
    if ids[0][0] == ids[1][0]:
        begin = token_texts(subject.tokenizer, ids[0][:1])[0]
        raise ValueError(
            f"--answers={answers[0]!r} and {answers[1]!r} begin with one token, {begin!r}; move "
            "what they share to the end of both prompts"
        )
    return ids[0][0], ids[1][0]


def _both_names(clean: Sequence[str], corrupt: Sequence[str]) -> list[str]:
    """Return names of positions: of both prompts where they differ."""
    return [
        repr(a)[1:-1] if a == b else f"{repr(a)[1:-1]} / {repr(b)[1:-1]}"
        for a, b in zip(clean, corrupt, strict=True)
    ]


def influence(
    subject: Subject,
    prompt: str,
    continuation: str,
    passages: Sequence[Passage],
    total: int,
    *,
    rank: int = 8,
    damping: float | None = 0.1,
    seed: int = 0,
    top: int = 20,
) -> Answer:
    """Rank ``passages``, of ``total`` ones, by how much a step on each raises the probability of
    ``continuation`` behind ``prompt``.

    Args:
      rank: of the projections; see `projected`.
      damping: see `influences`.
      top: passages to report from the top, and half as many from the bottom.

    Raises ValueError on an empty continuation, a text beyond the context, and for a model of
    masked text.
    """
    if not subject.causal:
        raise ValueError(f"{subject.workdir} is a model of masked text and continues nothing")
    tokenizer = subject.tokenizer
    # Texts of training begin with bos, and the first token of the continuation needs one before.
    context = after_bos(tokenizer, prompt)
    if not context:
        raise ValueError("this tokenizer has no bos, so --prompt must hold a token")
    answer = tokenizer.encode(continuation)
    if not answer:
        raise ValueError("--continuation is empty; give the text whose probability is asked for")
    ids = np.array([*context, *answer], np.int32)
    subject.check_length(ids[1:].tolist(), "continuation with its prompt")
    weights = (np.arange(1, len(ids)) >= len(context)).astype(np.float32)
    if not passages:
        raise ValueError("there is no passage to rank; give data with text")
    config = projecting_config(subject.config, rank, seed)
    projections = draw_projections(config)
    params = nnx.state(subject.model)
    query = examples_of([(ids, weights)], len(ids) - 1)
    query_loss, query_gradient = project_gradients(config, params, projections, query)
    length = max(len(each.tokens) for each in passages) - 1
    examples = examples_of([(each.tokens, each.weights) for each in passages], length)
    losses, gradients = project_gradients(config, params, projections, examples)
    found = influences(query_gradient[0], gradients, damping)
    order = np.argsort(-found.relative, kind="stable")
    bottom = [index for index in order[::-1][: top // 2] if index not in set(order[:top])]
    rows = [
        {
            "rank": int(place) + 1,
            "source": passages[index].source,
            "document": passages[index].document,
            "first_token": passages[index].begin,
            "tokens": int(passages[index].weights.sum()),
            "loss": float(losses[index]),
            "influence": float(found.influence[index]),
            "relative": float(found.relative[index]),
            "cosine": float(found.cosine[index]),
            "text": _text(tokenizer, passages[index]),
        }
        for place, index in enumerate(order)
        if index in set(order[:top]) | set(bottom)
    ]
    result = header("influence", subject.step) | {
        "workdir": subject.workdir,
        "prompt": prompt,
        "continuation": continuation,
        "loss_of_continuation": float(query_loss[0]),
        "passages": len(passages),
        "passages_in_data": total,
        "rank": rank,
        "damping": damping,
        "seed": seed,
        "ranked": rows,
    }
    shown = _influence_page(subject, result)
    names = [f"{row['document']}: {row['text'][:40]!r}" for row in rows]
    label = "relative influence: above 0 raises the probability"
    drawn = figures.ranking([row["relative"] for row in rows], names, label)
    lines = [
        f"{continuation!r} has loss {query_loss[0]:.4f} a token; {len(passages):,} of {total:,} "
        "passages, those that raise its probability most:"
    ]
    for row in rows[:5]:
        lines.append(
            f"{row['rank']:>3}. {row['relative']:9.4f}  {row['source']} document "
            f"{row['document']} from token {row['first_token']}\n     {row['text'][:140]!r}"
        )
    return Answer(result, shown, drawn, "\n".join(lines))


def _text(tokenizer: Any, passage: Passage) -> str:
    text = tokenizer.decode(passage.tokens)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 4] + " ..."


def _influence_page(subject: Subject, result: dict[str, Any]) -> str:
    most = max((abs(row["relative"]) for row in result["ranked"]), default=0.0) or 1.0
    rows = [
        [
            str(row["rank"]),
            Cell(f"{row['relative']:.4f}", row["relative"] / most),
            f"{row['influence']:.3g}",
            f"{row['cosine']:.3f}",
            f"{row['loss']:.3f}",
            row["source"],
            str(row["document"]),
            str(row["first_token"]),
            row["text"],
        ]
        for row in result["ranked"]
    ]
    head = ["rank", "relative", "influence", "cosine", "loss", "source", "document", "from token"]
    return pages.page(
        f"Passages that raise a continuation's probability in {subject.workdir}",
        [
            pages.paragraph(f"Prompt: {result['prompt']!r}"),
            pages.paragraph(f"Continuation: {result['continuation']!r}"),
            pages.paragraph(
                f"{result['passages']:,} of {result['passages_in_data']:,} passages. A step of "
                "training on a passage changes the loss of the continuation by minus its "
                "influence, to first order, in gradients projected to "
                f"{result['rank']} x {result['rank']} numbers a matrix. Relative: over the length "
                "of the passage's own gradient. Below 0, in blue: it lowers the probability.",
                soft=True,
            ),
            pages.table([*head, "text"], rows, left=(5, 8)),
        ],
    )
