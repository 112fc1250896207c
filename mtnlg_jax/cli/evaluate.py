"""Scores a text with a trained model: python launch/evaluate.py --workdir=RUN --input=FILE [--json]

FILE is anything that launch/prepare_data.py reads (text, JSON lines, Parquet; a folder too), or -
for standard input. Every token counts once and is scored with context (--stride). Perplexity is a
token's; bits per byte and word perplexity (words between white space) compare models of different
tokenizers. --adapt=4e-4 lets the model learn from each window after it has scored it, as a
compressor does: three times as long, and a fairer comparison with one. --dtype, --weights and
--cache score it a second time as launch/generate.py would hold the model: what that costs.
"""

import dataclasses
import json
import sys

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
    "encoding", "", "of text that is not UTF-8 and does not say so, such as cp1252"
)
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "which checkpoint")
_STRIDE = flags.DEFINE_integer(
    "stride", None, "tokens that a window scores; default: half the context"
)
_ADAPT = flags.DEFINE_float(
    "adapt",
    0.0,
    "learning rate of dynamic evaluation, from the trained weights anew for "
    "each document; 0: the weights stay as they are",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "as launch/generate.py: type of products"
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["int8"], "as launch/generate.py: weights of products"
)
_CACHE = flags.DEFINE_enum("cache", None, ["int8"], "as launch/generate.py: keys and values")
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
            f"--adapt={_ADAPT.value} trains weights, and --{name}={value} rounds them; leave one of "
            "the two out"
        )
    texts, read = _texts()
    compat.configure_cache()

    from flax import nnx

    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.evaluate.perplexity import evaluate_texts, merged
    from mtnlg_jax.model.transformer import abstract_model
    from mtnlg_jax.train.checkpoint import load_run

    run = load_run(_WORKDIR.value, _CHECKPOINT.value)
    model = nnx.merge(abstract_model(run.config.model)[0], run.params)
    with tqdm(unit="window", disable=None, leave=False) as bar:

        def show(done, total):
            bar.total = total
            bar.update(done - bar.n)

        total = merged(
            evaluate_texts(
                model, run.tokenizer, texts, _STRIDE.value, adapt=_ADAPT.value, on_batch=show
            )
        )
    again = {}
    if rounded:
        decoder = unstack(run.config.model, run.params, **rounded)
        other = merged(evaluate_texts(decoder, run.tokenizer, texts, _STRIDE.value))
        again = {"rounded": rounded | {"loss": other.loss, "perplexity": other.perplexity}}
    if _JSON.value:
        told = {"step": run.step, "documents": len(texts), "adapt": _ADAPT.value, "left_out": read}
        print(json.dumps(dataclasses.asdict(total) | told | again, allow_nan=False))
        return
    if read:
        print(
            f"{_INPUT.value}: {', '.join(f'{count:,} {what}' for what, count in read.items())}",
            file=sys.stderr,
        )
    print(
        f"{_INPUT.value}: {len(texts)} document(s), {total.bytes:,} bytes, {total.tokens:,} tokens\n"
        f"loss {total.loss:.4f} nats a token, perplexity {total.perplexity:.2f}, "
        f"{total.bits_per_byte:.4f} bits per byte, word perplexity {total.word_perplexity:.2f} of {total.words:,} "
        f"words (checkpoint of step {run.step}"
        f"{f', adapting at {_ADAPT.value:g}' if _ADAPT.value else ''})"
    )
    if rounded:
        print(
            f"with {', '.join(f'{k} {v}' for k, v in rounded.items())}: loss {other.loss:.4f}, perplexity "
            f"{other.perplexity:.3f} against {total.perplexity:.3f}: "
            f"{100 * (other.perplexity / total.perplexity - 1):+.2f} %"
        )


def _texts() -> tuple[list[str], dict[str, int]]:
    """The documents, and counts of what was left out or repaired where anything was."""
    from mtnlg_jax.data.read.documents import ReadReport, note_lines, read_documents, read_stream

    report = ReadReport()
    given = {"on_error": _ON_ERROR.value, "report": report, "encoding": _ENCODING.value}
    if _INPUT.value == "-":
        name = "standard input"
        if sys.stdin.isatty():
            print("the text, ended by Ctrl-D:", file=sys.stderr)
        texts = [document.text for document in read_stream(sys.stdin.buffer, name, **given)]
    else:
        name = _INPUT.value
        texts = [document.text for document in read_documents(name, _TEXT_KEY.value, **given)]
    if not texts:
        raise ValueError(f"{name} holds no text; give a file or a folder with some")
    for line in note_lines(report.notes):
        print(f"{name}: {line}", file=sys.stderr)
    return texts, {
        what: count
        for what, count in report.counts().items()
        if count and what not in ("files", "documents", "bytes")
    }


def run() -> None:
    """Parses the command line, does what it says and exits."""
    command.run(main)
