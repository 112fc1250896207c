"""Show what each measure of long texts says of a book, of the same texts spoiled, and of a model's.

    python benchmarks/spoiled_texts.py --workdir=RUN --text=BOOK.txt

BOOK.txt should be a book that the model has not read. Its passages are measured as they are, with
their sentences shuffled, with their words shuffled, with their first paragraph over and over, and
beside texts that the model continues from their beginnings by nucleus sampling, half a context at a
time. All have the same number of words. MAUVE compares with the rest of the book. The table that is
printed stands in docs/measuring_text.md.
"""

import argparse
import datetime
import json
import os
import platform
import random
from collections.abc import Sequence
from pathlib import Path

import jax

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.segment import words
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.evaluate.coherence import split_sentences
from mtnlg_jax.evaluate.comparison import References, split_references
from mtnlg_jax.evaluate.longtext import MEASURES, LongTextSettings, measure_texts

RESULT = Path(__file__).parent / "results" / "spoiled_texts.json"
TOP_P = 0.95
LOOPED = 80  # words of the paragraph that is repeated
PROMPT = 32  # tokens of the beginning that the model continues


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--text", required=True, help="a book that the model has not read")
    parser.add_argument("--texts", type=int, default=2, help="number of passages")
    parser.add_argument("--words", type=int, default=1000, help="of each passage")
    parser.add_argument("--windows", type=int, default=64, help="of MAUVE's features")
    parser.add_argument("--output", default=os.fspath(RESULT), help="file for the result")
    args = parser.parse_args(argv)
    run, decoder = load_decoder(args.workdir)
    book = Path(args.text).read_text(encoding="utf-8-sig")
    # The first part is a title page and a table of contents.
    passages, rest = split(book[len(book) // 20 :], args.texts, args.words)
    settings = LongTextSettings(feature_windows=args.windows)
    kinds = {
        "real": passages,
        "sentences shuffled": [shuffled(split_sentences(each)) for each in passages],
        "words shuffled": [shuffled([f" {word}" for word in each.split()]) for each in passages],
        "looped": [looped(each) for each in passages],
        "sampled": sampled(decoder, run.tokenizer, passages, args.words),
    }
    results = {}
    for kind, texts in kinds.items():
        report = measure_texts(decoder, run.tokenizer, texts, rest, settings)
        results[kind] = {name: each._asdict() for name, each in report.figures.items()}
        print(kind, json.dumps(results[kind]), flush=True)
    report = {
        "command": "python benchmarks/spoiled_texts.py --workdir=RUN --text=BOOK.txt",
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": platform.processor() or jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "book": Path(args.text).name,
        "model": {
            "parameters": run.config.model.parameter_count(),
            "positions": decoder.context,
            "step": run.step,
        },
        "texts": args.texts,
        "words": args.words,
        "windows": args.windows,
        "results": results,
    }
    Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))


def split(text: str, count: int, number: int) -> References:
    """Return ``count`` passages of ``number`` words, one behind the other, and what is left."""
    return split_references([text], ["word " * number] * count)


def shuffled(parts: Sequence[str]) -> str:
    """Return the parts in another order."""
    order = list(parts)
    random.Random(0).shuffle(order)
    return "".join(order)


def looped(text: str) -> str:
    """Return the beginning of a text over and over, with as many words as the text."""
    part = split(text, 1, LOOPED).pieces[0]
    size = len(words(text))
    return split(f"{part} " * (size // LOOPED + 1), 1, size).pieces[0]


def sampled(decoder: Decoder, tokenizer, texts: Sequence[str], number: int) -> list[str]:
    """Return ``number`` words of the model's own behind the beginning of each text."""
    half = decoder.context // 2
    written = [tokenizer.encode(text)[:PROMPT] for text in texts]
    seed = 0
    while min(len(words(tokenizer.decode(each[PROMPT:]))) for each in written) < number:
        prompts = [[tokenizer.bos_id, *each[-half:]] for each in written]
        room = decoder.context - max(map(len, prompts))
        settings = DecodeConfig(
            temperature=1.0, top_p=TOP_P, max_new_tokens=room, min_new_tokens=room, seed=seed
        )
        for each, result in zip(
            written, generate(decoder, tokenizer, prompts, settings), strict=True
        ):
            each += result.tokens
        seed += 1
    return [split(tokenizer.decode(each[PROMPT:]), 1, number).pieces[0] for each in written]


def table(results: dict[str, dict]) -> str:
    """Return the table of the page."""

    def cell(figure: dict) -> str:
        if figure["value"] is None:
            return "absent"
        error = figure["error"]
        return f"{figure['value']:.3g}" + (f" ± {error:.2g}" if error else "")

    lines = [
        f"| measure | {' | '.join(results)} |",
        "| --- " * (1 + len(results)) + "|",
        *(
            f"| {kind.title} | {' | '.join(cell(each[name]) for each in results.values())} |"
            for name, kind in MEASURES.items()
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
