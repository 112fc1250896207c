"""Readings of one text: logit lens, attention, loss by token, each as an `Answer`."""

# Shapes: N heads, S query positions, T key positions, L layers, K guesses

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtnlg_jax.evaluate.inside import figures, pages
from mtnlg_jax.evaluate.inside.logit_lens import attention_maps, read_layers
from mtnlg_jax.evaluate.inside.pages import Cell, token_texts
from mtnlg_jax.evaluate.inside.passages import after_bos
from mtnlg_jax.evaluate.inside.subject import Answer, Subject
from mtnlg_jax.evaluate.inside.token_loss import TokenLosses, token_losses
from mtnlg_jax.train.describe import header

# Attention takes L N S^2 numbers: in the file, and as cells of the page.
MOST_WEIGHTS = 2**24
_LAST = 8  # positions that the terminal shows


def lens(subject: Subject, text: str, guesses: int) -> Answer:
    """Read the predictions of every layer for ``text``."""
    ids = subject.ids(text, "text")
    guesses = min(guesses, subject.tokenizer.vocab_size)
    found = read_layers(subject.model, ids, subject.causal, guesses)
    tokens = token_texts(subject.tokenizer, ids)
    layers = ["embedding", *(f"layer {n}" for n in range(len(found.guesses_LSK) - 1))]
    words = [
        [token_texts(subject.tokenizer, best_K) for best_K in best_SK]
        for best_SK in found.guesses_LSK
    ]
    firsts = [[best[0] for best in row] for row in words]
    rows = []
    for at in reversed(range(len(layers))):
        cells = []
        for position in range(len(ids)):
            title = _guess_lines(words[at][position], found.probabilities_LSK[at, position])
            if found.ranks_LS[at, position] >= 0:
                title += f"\nthe next token is number {found.ranks_LS[at, position] + 1}"
            shade = float(found.probabilities_LSK[at, position, 0])
            cells.append(Cell(firsts[at][position], shade, title))
        rows.append((layers[at], cells))
    where = "next" if subject.causal else "in each place"
    shown = pages.page(
        f"Logit lens of {subject.workdir}, checkpoint {subject.step}",
        [
            pages.paragraph(
                f"The token that each layer would predict {where}: the final norm and the output "
                "embedding applied to its residual stream. The darker, the more probable; a "
                "pointer on a cell shows other guesses.",
                soft=True,
            ),
            pages.grid("", [repr(token)[1:-1] for token in tokens], rows),
        ],
    )
    result = header("lens", subject.step) | {
        "workdir": subject.workdir,
        "text": text,
        "tokens": _tokens(ids, tokens),
        "layers": [
            {
                "layer": layers[at],
                "guesses": words[at],
                "probabilities": _rounded(found.probabilities_LSK[at]),
                "rank_of_next": found.ranks_LS[at].tolist(),
                "log_prob_of_next": found.log_probs_LS[at].tolist(),
                "divergence_from_model": found.divergence_LS[at].tolist(),
            }
            for at in range(len(layers))
        ],
    }
    drawn = figures.lens(found.probabilities_LSK[..., 0], firsts, tokens)
    return Answer(result, shown, drawn, _lens_lines(layers, firsts, tokens))


def _lens_lines(layers: list[str], firsts: list[list[str]], tokens: list[str]) -> str:
    columns = range(max(0, len(tokens) - _LAST), len(tokens))
    head = f"{'':<11}" + "".join(f"{repr(tokens[at])[:13]:>14}" for at in columns)
    lines = [
        f"{name:<11}" + "".join(f"{repr(row[at])[:13]:>14}" for at in columns)
        for name, row in zip(layers, firsts, strict=True)
    ]
    return "\n".join([head, *lines])


def attention(subject: Subject, text: str, layer: int | None = None) -> Answer:
    """Read the attention weights of every head for ``text``; the page shows those of ``layer``
    token by token.

    Raises ValueError on a layer that the model lacks, and where there are more than MOST_WEIGHTS.
    """
    ids = subject.ids(text, "text")
    config = subject.config
    if layer is not None and not 0 <= layer < config.num_layers:
        raise ValueError(f"--layer={layer} is outside [0, {config.num_layers - 1}]")
    weights = config.num_layers * config.num_attention_heads * len(ids) ** 2
    if weights > MOST_WEIGHTS:
        each = config.num_layers * config.num_attention_heads
        raise ValueError(
            f"--text has {len(ids)} tokens, so that {each} heads have {weights:,} weights; at "
            f"most {MOST_WEIGHTS:,} are written: give up to {math.isqrt(MOST_WEIGHTS // each)} "
            "tokens"
        )
    maps = attention_maps(subject.model, ids, subject.causal)
    tokens = token_texts(subject.tokenizer, ids)
    heads = _head_figures(maps.attention_LNST, maps.sinks_LNS)
    drawn = figures.attention(maps.attention_LNST, tokens)
    parts = [
        pages.paragraph(
            "Weights by which a query (row) attends to keys (columns). To previous: mean weight "
            "of the token before. To first: of the first token, and of a sink. Entropy: in nats, "
            "of a row.",
            soft=True,
        ),
        pages.picture(drawn, "attention weights of every head"),
        pages.heading("Heads"),
        _heads_table(heads),
    ]
    if layer is not None:
        names = [repr(token)[1:-1] for token in tokens]
        for head in range(config.num_attention_heads):
            rows = [
                (
                    names[s],
                    [Cell(f"{x:.2f}", float(x)) for x in maps.attention_LNST[layer, head, s]],
                )
                for s in range(len(ids))
            ]
            parts += [pages.heading(f"Layer {layer}, head {head}"), pages.grid("", names, rows)]
    result = header("attention", subject.step) | {
        "workdir": subject.workdir,
        "text": text,
        "tokens": _tokens(ids, tokens),
        "heads": heads,
        "weights": _rounded(maps.attention_LNST),
        "sinks": None if maps.sinks_LNS is None else _rounded(maps.sinks_LNS),
    }
    title = f"Attention of {subject.workdir}, checkpoint {subject.step}"
    lines = [f"{'layer':>5} {'head':>4} {'to previous':>12} {'to first':>9} {'entropy':>8}"]
    for figures_of_head in heads:
        lines.append(
            "{layer:>5} {head:>4} {to_previous:>12.3f} {to_first:>9.3f} {entropy:>8.3f}".format(
                **figures_of_head
            )
        )
    return Answer(result, pages.page(title, parts), drawn, "\n".join(lines))


def _head_figures(attention_LNST: np.ndarray, sinks_LNS: np.ndarray | None) -> list[dict[str, Any]]:
    """Return what each head attends to, on the mean of its queries after the first."""
    safe = np.maximum(attention_LNST, 1e-30)
    entropy_LN = -(attention_LNST * np.log(safe)).sum(-1)[..., 1:].mean(-1)
    first_LN = attention_LNST[..., 1:, 0].mean(-1)
    if sinks_LNS is not None:
        first_LN = first_LN + sinks_LNS[..., 1:].mean(-1)
    before_LN = np.diagonal(attention_LNST, -1, -2, -1).mean(-1)
    layers, heads = first_LN.shape
    return [
        {
            "layer": layer,
            "head": head,
            "to_previous": float(before_LN[layer, head]),
            "to_first": float(first_LN[layer, head]),
            "entropy": float(entropy_LN[layer, head]),
        }
        for layer in range(layers)
        for head in range(heads)
    ]


def _heads_table(heads: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(each["layer"]),
            str(each["head"]),
            Cell(f"{each['to_previous']:.3f}", each["to_previous"]),
            Cell(f"{each['to_first']:.3f}", each["to_first"]),
            f"{each['entropy']:.3f}",
        ]
        for each in heads
    ]
    return pages.table(["layer", "head", "to previous", "to first", "entropy"], rows, left=())


def loss(
    subject: Subject, texts: Sequence[str], names: Sequence[str], stride: int | None, guesses: int
) -> Answer:
    """Score each token of ``texts`` in windows of the context; ``names`` are those of the texts.

    Raises ValueError as `token_losses` does, and for a model of masked text.
    """
    if not subject.causal:
        raise ValueError(
            f"{subject.workdir} is a model of masked text, which gives no loss of the next token"
        )
    guesses = min(guesses, subject.tokenizer.vocab_size)
    tokenizer = subject.tokenizer
    documents = []
    parts = [
        pages.paragraph(
            "The darker a token, the higher its loss (full from 10 nats on). A pointer on it "
            "shows its rank and the tokens that the model expected.",
            soft=True,
        )
    ]
    series = []
    lines = []
    for text, name in zip(texts, names, strict=True):
        # Behind bos, which predicts the first token, as `evaluate_texts` scores it.
        ids = after_bos(tokenizer, text)
        found = token_losses(subject.model, ids, stride, guesses)
        titles = [_title(tokenizer, found, at) for at in range(len(found.tokens))]
        shades = [pages.shade_of_loss(float(each)) for each in found.losses]
        mean = float(found.losses.mean())
        summary = f"{name}: {len(found.tokens):,} tokens, loss {mean:.4f}, perplexity "
        summary += f"{math.exp(min(mean, 700)):.2f}; {(found.ranks == 0).mean():.1%} are the guess"
        pieces = pages.shaded_tokens(tokenizer, found.tokens.tolist(), shades, titles)
        parts += [pages.heading(name), pages.paragraph(summary), pages.shaded_text(pieces)]
        documents.append(
            {
                "name": name,
                "loss": mean,
                "tokens": token_texts(tokenizer, found.tokens),
                "ids": found.tokens.tolist(),
                "losses": _rounded(found.losses, 6),
                "ranks": found.ranks.tolist(),
                "guesses": [token_texts(tokenizer, best) for best in found.guesses],
                "probabilities": _rounded(found.probabilities),
            }
        )
        series.append(found.losses)
        worst = np.argsort(-found.losses, kind="stable")[:3]
        shown = token_texts(tokenizer, found.tokens[worst])
        highest = ", ".join(
            f"{word!r} {value:.2f}" for word, value in zip(shown, found.losses[worst], strict=True)
        )
        lines.append(f"{summary}; highest: {highest}")
    result = header("loss", subject.step) | {"workdir": subject.workdir, "documents": documents}
    title = f"Loss by token of {subject.workdir}, checkpoint {subject.step}"
    drawn = figures.losses(series, names)
    return Answer(result, pages.page(title, parts), drawn, "\n".join(lines))


def _title(tokenizer: Any, found: TokenLosses, at: int) -> str:
    own = token_texts(tokenizer, [found.tokens[at]])[0]
    value = float(found.losses[at])
    guesses = token_texts(tokenizer, found.guesses[at])
    return (
        f"{own!r}: loss {value:.3f} nats, probability {math.exp(-value):.2%}, rank "
        f"{found.ranks[at] + 1}\n" + _guess_lines(guesses, found.probabilities[at])
    )


def _guess_lines(words: Sequence[str], probabilities: np.ndarray) -> str:
    return "\n".join(f"{x:.1%} {word!r}" for word, x in zip(words, probabilities, strict=True))


def _tokens(ids: Sequence[int], tokens: Sequence[str]) -> list[dict[str, Any]]:
    return [{"id": int(index), "text": text} for index, text in zip(ids, tokens, strict=True)]


def _rounded(array: np.ndarray, digits: int = 4) -> list:
    return np.round(array.astype(np.float64), digits).tolist()
