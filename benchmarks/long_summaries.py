"""Compare summaries of whole inputs with summaries of cut ones, by one model on the same rows.

    python benchmarks/long_summaries.py --workdir=RUN --rows=FILE.jsonl \\
        --columns=input=source,reference=target

Rows are drawn by seed 0 among those whose input does not fit the context, so that the two sides
differ on every row. The sides cut the input, summarize by hierarchy, or refine one summary. Where
the model writes nothing, the first sentence stands in on all sides; the result counts these rows.
--context reduces the context of a model with more positions. The result holds ROUGE of each side
and of the first sentences alone with 95 % bootstrap intervals, and of the differences from the cut
inputs row by row.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import random
import time
from pathlib import Path

import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.interop import registry
from mtnlg_jax.tasks.examples import read_rows
from mtnlg_jax.tasks.long.options import LongOptions
from mtnlg_jax.tasks.long.run import perform_long
from mtnlg_jax.tasks.metrics import RESAMPLES, baseline, measure
from mtnlg_jax.tasks.templates import TASKS

METRICS = ("rouge1", "rouge2", "rougeL")
SHOWN = ("columns", "limit", "context", "new_tokens", "batch")  # flags in the result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="a run, or a model of another format")
    parser.add_argument("--rows", required=True, help="file of rows with references")
    parser.add_argument("--columns", default="input=input,reference=reference")
    parser.add_argument("--limit", type=int, default=50, help="rows to draw")
    parser.add_argument("--context", type=int, help="positions to use of the model's")
    parser.add_argument("--new_tokens", type=int, default=48, help="most tokens of a summary")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", help="file for the result")
    flags = parser.parse_args()
    registry.register()
    run, decoder = load_decoder(flags.workdir, "best")
    if flags.context:
        config = dataclasses.replace(decoder.config, max_position_embeddings=flags.context)
        decoder = decoder._replace(config=config)
    columns = dict(part.split("=") for part in flags.columns.split(","))
    rows = [
        row
        for row in read_rows(flags.rows, columns, needs=("input", "reference"))
        if len(run.tokenizer.encode(row.input)) > decoder.context
    ]
    rows = random.Random(0).sample(rows, min(flags.limit, len(rows)))
    trivial, lead = baseline(TASKS["summarise"], rows)
    found = {}
    given = [f"--{name}={getattr(flags, name)}" for name in SHOWN if getattr(flags, name)]
    command = ["python", f"benchmarks/{Path(__file__).name}", "--workdir=RUN"]
    result: dict = {
        "command": " ".join([*command, f"--rows={Path(flags.rows).name}", *given]),
        "rows": len(rows),
        "context": decoder.context,
        "new_tokens": flags.new_tokens,
    }
    for side, options in SIDES.items():
        begin = time.perf_counter()
        answers = perform_long(
            decoder,
            run.tokenizer,
            TASKS["summarise"],
            rows,
            options=options,
            decode=DecodeConfig(max_new_tokens=flags.new_tokens),
            batch=flags.batch,
        )
        # Where the model writes nothing, both sides show the first sentence.
        found[side] = [answer.text or first for answer, first in zip(answers, lead, strict=True)]
        result[side] = {
            "with a first sentence for an empty summary": sum(
                not answer.text or bool(answer.work and answer.work.notes) for answer in answers
            ),
            "calls": sum(answer.work.calls for answer in answers if answer.work),
            "seconds": round(time.perf_counter() - begin, 1),
        }
    references = [row.references for row in rows]
    for side, texts in (found | {trivial: lead}).items():
        scores = measure(METRICS, texts, references, "en")
        result[side] = result.get(side, {}) | {
            metric: str(score).strip() for metric, score in scores.items()
        }
    for side in ("hierarchical", "refine"):
        result[f"{side} - cut"] = _differences(found[side], found["cut"], references)
    result |= {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=2))
    if flags.output:
        Path(flags.output).write_text(json.dumps(result, indent=2) + "\n")


SIDES = {
    "cut": LongOptions(mode="cut"),
    "hierarchical": LongOptions(),
    "refine": LongOptions(method="refine"),
}


def _differences(texts: list[str], others: list[str], references) -> dict[str, str]:
    """Return the mean difference of each metric with its paired 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    differences = {}
    for name in METRICS:
        # One row at a time, because `measure` gives means.
        ours, theirs = (
            np.array(
                [
                    measure((name,), [text], [reference], "en")[name].value
                    for text, reference in zip(side, references, strict=True)
                ]
            )
            for side in (texts, others)
        )
        each = ours - theirs
        means = [each[rng.integers(0, len(each), len(each))].mean() for _ in range(RESAMPLES)]
        low, high = np.percentile(means, [2.5, 97.5])
        differences[name] = f"{each.mean():.2f} [{low:.2f}, {high:.2f}]"
    return differences


if __name__ == "__main__":
    main()
