"""Score a text with a trained model: python launch/evaluate.py --workdir=RUN --input=FILE [--json]

FILE is anything that launch/prepare_data.py reads (text, JSON lines, Parquet, or a folder), or -
for standard input. Every token counts once and is scored with context (--stride). Perplexity is per
token; bits per byte and word perplexity (words between white space) compare models with different
tokenizers. --adapt=4e-4 lets the model learn from each window after scoring it, like a compressor:
that takes three times as long, and compares more fairly with one. --dtype, --weights and --cache
score the text a second time with the model as launch/generate.py would hold it, to show the loss in
quality.
"""

import dataclasses
import io
import json
import sys
from typing import Any, cast

from absl import flags

from mtnlg_jax import command

_WORKDIR = command.define_path("workdir", None, "folder of the run", required=True)
_INPUT = command.define_path(
    "input", None, "file or folder to score, - for standard input", required=True
)
_TEXT_KEY = flags.DEFINE_string(
    "text_key",
    "text",
    "key or column of the text in JSON and Parquet; a|b: the first that is there",
)
_ON_ERROR = flags.DEFINE_enum(
    "on_error", "raise", ["raise", "skip"], "what to do about damaged documents: skip counts them"
)
_ENCODING = flags.DEFINE_string(
    "encoding", "", "encoding of text that is not UTF-8 and has no mark of it, such as cp1252"
)
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "which checkpoint")
_STRIDE = flags.DEFINE_integer(
    "stride", None, "tokens scored in each window; default: half the context"
)
_ADAPT = flags.DEFINE_float(
    "adapt",
    0.0,
    "learning rate of dynamic evaluation, which restarts from the trained weights for each "
    "document; 0: the weights stay fixed",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "type of the products, as in launch/generate.py"
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["int8"], "type of the weights, as in launch/generate.py"
)
_CACHE = flags.DEFINE_enum(
    "cache", None, ["int8"], "type of the keys and values, as in launch/generate.py"
)
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")


def main() -> None:
    from tqdm import tqdm

    from mtnlg_jax import compat

    compat.quiet()
    rounded = {
        name: flag.value
        for name, flag in (("dtype", _DTYPE), ("weights", _WEIGHTS), ("cache", _CACHE))
        if flag.value not in (None, "float32")
    }
    if rounded and _ADAPT.value:
        name, value = next(iter(rounded.items()))
        raise ValueError(
            f"--adapt={_ADAPT.value} trains weights, and --{name}={value} rounds them; leave one "
            "of the two out"
        )
    texts, left_out = _texts()
    compat.configure_cache()

    from flax import nnx

    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.evaluate.perplexity import evaluate_texts, merged
    from mtnlg_jax.model.transformer import abstract_model
    from mtnlg_jax.train.checkpoint import load_run

    run = load_run(_WORKDIR.value, _CHECKPOINT.value)
    model = nnx.merge(abstract_model(run.config.model)[0], run.params)
    with tqdm(unit="window", disable=None, leave=False) as bar:

        def show(done: int, windows: int) -> None:
            bar.total = windows
            bar.update(done - bar.n)

        total = merged(
            evaluate_texts(
                model, run.tokenizer, texts, _STRIDE.value, adapt=_ADAPT.value, on_batch=show
            )
        )
    other = None
    if rounded:
        decoder = unstack(run.config.model, run.params, **rounded)
        other = merged(evaluate_texts(decoder, run.tokenizer, texts, _STRIDE.value))
    if _JSON.value:
        result = dataclasses.asdict(total) | {
            "step": run.step,
            "documents": len(texts),
            "adapt": _ADAPT.value,
            "left_out": left_out,
        }
        if other is not None:
            result["rounded"] = rounded | {"loss": other.loss, "perplexity": other.perplexity}
        print(json.dumps(result, allow_nan=False))
        return
    name = _INPUT.value
    if left_out:
        counts = ", ".join(f"{count:,} {what}" for what, count in left_out.items())
        print(f"{name}: {counts}", file=sys.stderr)
    adapting = f", adapting at {_ADAPT.value:g}" if _ADAPT.value else ""
    print(
        f"{name}: {len(texts)} document(s), {total.bytes:,} bytes, {total.tokens:,} tokens\n"
        f"loss {total.loss:.4f} nats a token, perplexity {total.perplexity:.2f}, "
        f"{total.bits_per_byte:.4f} bits per byte, word perplexity {total.word_perplexity:.2f} "
        f"of {total.words:,} words (checkpoint of step {run.step}{adapting})"
    )
    if other is not None:
        kinds = ", ".join(f"{key} {value}" for key, value in rounded.items())
        print(
            f"with {kinds}: loss {other.loss:.4f}, perplexity {other.perplexity:.3f} "
            f"against {total.perplexity:.3f}: "
            f"{100 * (other.perplexity / total.perplexity - 1):+.2f} %"
        )


def _texts() -> tuple[list[str], dict[str, int]]:
    """Return the documents, and nonzero counts of what was left out or repaired."""
    from mtnlg_jax.data.read.documents import ReadReport, note_lines, read_documents, read_stream

    report = ReadReport()
    given: dict[str, Any] = {
        "on_error": _ON_ERROR.value,
        "report": report,
        "encoding": _ENCODING.value,
    }
    if _INPUT.value == "-":
        name = "standard input"
        if sys.stdin.isatty():
            print("type the text, end with Ctrl-D:", file=sys.stderr)
        stream = cast(io.BufferedReader, sys.stdin.buffer)  # typeshed only promises BinaryIO
        texts = [document.text for document in read_stream(stream, name, **given)]
    else:
        name = _INPUT.value
        texts = [document.text for document in read_documents(name, _TEXT_KEY.value, **given)]
    if not texts:
        raise ValueError(f"{name} contains no text; give a file or a folder with text")
    for line in note_lines(report.notes):
        print(f"{name}: {line}", file=sys.stderr)
    return texts, {
        what: count
        for what, count in report.counts().items()
        if count and what not in ("files", "documents", "bytes")
    }


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
