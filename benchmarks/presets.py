"""Measure what each preset of decoding does to the texts of one model.

    python benchmarks/presets.py --workdir=RUN --text=BOOK.txt

Prompts are passages of BOOK.txt, which the model must not have been trained on; the same prompts
and seeds serve every preset. Each continuation, and the book's own in the row "real text", is cut
to the same number of words. The measures are those of mtnlg_jax/evaluate/longtext.py. The table
that is printed stands in docs/presets.md.
"""

import argparse
import bisect
import datetime
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.segment import words
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.decode.presets import PRESETS, with_preset
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.decode.repetition import distinct, sequence_repetition
from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.evaluate.coherence import Trial, choose_trials, split_sentences
from mtnlg_jax.evaluate.divergence import divergence
from mtnlg_jax.evaluate.figures import Figure, mean_figure
from mtnlg_jax.evaluate.lexical import self_bleu
from mtnlg_jax.evaluate.windows import window_features

RESULT = Path(__file__).parent / "results" / "presets.json"
REAL = "real text"
# Normal quantile of a 95 % interval.
QUANTILE = 1.96
# Tokens of a window whose mean hidden state is a feature vector of MAUVE. A text of 120 words has
# four or more.
WINDOW = 32
REFERENCE_WINDOWS = 512
SENTENCES = 48  # scored for coherence
GROUPS = 8  # of texts, of which the jackknife leaves out one at a time
COLUMNS = {
    "seq_rep_4": "seq-rep-4",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
    "context_gain": "context gain",
    "mauve": "MAUVE",
    "loss": "loss",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--text", required=True, help="a book that the model has not read")
    parser.add_argument("--prompts", type=int, default=21, help="number of passages")
    parser.add_argument("--prompt_tokens", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--words", type=int, default=120, help="words of a continuation")
    parser.add_argument(
        "--presets", default=",".join((REAL, *PRESETS)), help=f"names, with commas, or {REAL!r}"
    )
    parser.add_argument("--output", default=str(RESULT), help=f"a JSON file; default {RESULT}")
    args = parser.parse_args(argv)
    run, decoder = load_decoder(args.workdir)
    book = Path(args.text).read_text(encoding="utf-8-sig")
    prompts, rests = passages(run.tokenizer, book, args.prompts, args.prompt_tokens, args.words)
    tokens = [run.tokenizer.encode(book)]
    reference_PD = window_features(decoder, run.tokenizer.bos_id, tokens, WINDOW, REFERENCE_WINDOWS)
    names = args.presets.split(",")
    rows = {}
    for name in names:
        written = rests if name == REAL else write(decoder, run.tokenizer, name, prompts)
        cut = [first_words(each, args.words) for each in written]
        rows[name] = measure(decoder, run.tokenizer, prompts, cut, reference_PD)
        print(f"{name}: {cut[0][-60:]!r} {json.dumps(rows[name])}", flush=True)
    report = {
        "command": "python benchmarks/presets.py --workdir=RUN --text=BOOK.txt",
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": platform.processor() or jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "book": Path(args.text).name,
        "model": {
            "parameters": run.config.model.parameter_count(),
            "positions": decoder.context,
            "step": run.step,
        },
        "prompts": len(prompts),
        "prompt_tokens": args.prompt_tokens,
        "words": args.words,
        "presets": {name: dict(PRESETS[name].decode) for name in names if name != REAL},
        "results": rows,
    }
    Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def passages(
    tokenizer, book: str, count: int, prompt_tokens: int, number: int
) -> tuple[list[list[int]], list[str]]:
    """Return ``count`` prompts as tokens, spread over the book, and how the book goes on."""
    tokens = tokenizer.encode(book)
    step = len(tokens) // (count + 1)
    prompts = []
    rests = []
    for start in range(step // 2, step * count, step):
        # The rest is long enough in tokens for any number of words.
        prompts.append([tokenizer.bos_id, *tokens[start : start + prompt_tokens]])
        rest = tokens[start + prompt_tokens : start + prompt_tokens + 4 * number]
        rests.append(tokenizer.decode(rest))
    return prompts, rests


def write(decoder: Decoder, tokenizer, name: str, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Return one continuation of each prompt, up to the context's end, by preset ``name``."""
    room = decoder.context - max(map(len, prompts))
    decode = with_preset(DecodeConfig(max_new_tokens=room, min_new_tokens=room), name)
    scorers = PRESETS[name].scorers
    if scorers:
        texts = [tokenizer.decode(prompt[1:]) for prompt in prompts]
        found = [rank(decoder, tokenizer, each, decode=decode, scorers=scorers) for each in texts]
        return [ranking[0].text for ranking in found]
    return [result.text for result in generate(decoder, tokenizer, prompts, decode)]


def first_words(text: str, number: int) -> str:
    """Return the beginning of a text with at most ``number`` words."""
    ends = range(len(text) + 1)
    end = bisect.bisect_right(ends, number, key=lambda end: len(words(text[:end]))) - 1
    return text[:end]


def measure(
    decoder: Decoder, tokenizer, prompts: Sequence, texts: Sequence[str], reference_PD: np.ndarray
) -> dict[str, dict]:
    """Return each figure of the texts, with half the width of its 95 % interval where it has one.

    Coherence is that of prompt and text together, since a text has few sentences. The loss is that
    of the text behind its prompt.
    """
    bos_id = tokenizer.bos_id
    tokens = [tokenizer.encode(text) for text in texts]
    spoken = list(map(words, texts))
    vectors_PD = window_features(decoder, bos_id, tokens, WINDOW)
    wholes = [
        tokenizer.decode(prompt[1:]) + text for prompt, text in zip(prompts, texts, strict=True)
    ]
    trials = choose_trials(
        [list(map(tokenizer.encode, split_sentences(whole))) for whole in wholes],
        decoder.context - 1,
        trials=SENTENCES,
        candidates=2,
    )
    room = decoder.context - max(map(len, prompts))
    scored = score_rows(
        decoder,
        [[*prompt, *each[:room]] for prompt, each in zip(prompts, tokens, strict=True)],
        list(map(len, prompts)),
    )

    def repeated(part: list) -> float:
        return float(np.mean(list(map(sequence_repetition, part))))

    return {
        "seq_rep_4": jackknife(repeated, spoken),
        "distinct_2": jackknife(lambda part: distinct(part, 2), spoken),
        "self_bleu": {"value": self_bleu(spoken), "half_width": None},
        "context_gain": interval(context_gain(decoder, bos_id, trials)),
        "mauve": {"value": divergence(reference_PD, vectors_PD).mauve, "half_width": None},
        "loss": interval(mean_figure([-float(each.mean()) for each in scored])),
    }


def context_gain(decoder: Decoder, bos_id: int, trials: Sequence[Trial]) -> Figure:
    """Return the gain of a sentence by its true context against a shuffled one, in nats a token."""
    rows = []
    starts = []
    for trial in trials:
        for before in (trial.true_context, trial.shuffled_context):
            rows.append([bos_id, *before, *trial.candidates[0]])
            starts.append(1 + len(before))
    sums = [float(each.sum()) for each in score_rows(decoder, rows, starts)]
    tokens = [float(len(trial.candidates[0])) for trial in trials]
    pairs = zip(sums[::2], sums[1::2], tokens, strict=True)
    return mean_figure([(true - other) / count for true, other, count in pairs], tokens)


def interval(figure: Figure) -> dict[str, float | None]:
    """Return a mean and half the width of its 95 % interval."""
    return {
        "value": figure.value,
        "half_width": None if figure.error is None else QUANTILE * figure.error,
    }


def jackknife(statistic: Callable[[list], float], texts: list) -> dict[str, float | None]:
    """Return a statistic and half the width of its 95 % interval, by the jackknife that leaves out
    one group of texts at a time (Efron 1982)."""
    left = np.array(
        [
            statistic([each for at, each in enumerate(texts) if at % GROUPS != group])
            for group in range(GROUPS)
        ]
    )
    error = np.sqrt((GROUPS - 1) / GROUPS * ((left - left.mean()) ** 2).sum())
    return {"value": statistic(texts), "half_width": float(QUANTILE * error)}


def table(report: dict) -> str:
    """Return the results as a table of Markdown."""
    lines = ["| preset | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("| --- |" + " --- |" * len(COLUMNS))
    for name, row in report["results"].items():
        cells = []
        for column in COLUMNS:
            value = row[column]["value"]
            half = row[column]["half_width"]
            shown = "" if value is None else f"{value:.2f}"
            cells.append(shown if half is None else f"{shown} ± {half:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
