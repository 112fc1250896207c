"""Scores a text with a trained model: python launch/evaluate.py --workdir=RUN --input=FILE [--json]

FILE is anything that launch/prepare_data.py reads (text, JSON lines, Parquet; a folder too), or - for standard
input. Every token counts once and is scored with context (--stride). --adapt=4e-4 lets the model learn from each
window after it has scored it, as a compressor does: three times as long, and a fairer comparison with one.
--dtype, --weights and --cache score it a second time as launch/generate.py would hold the model: what that costs.
"""

import dataclasses
import json
import sys

from absl import flags

from mtnlg_jax import command

_WORKDIR = command.define_path("workdir", None, "folder of the run", required=True)
_INPUT = command.define_path("input", None, "file or folder to score, - for standard input", required=True)
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "which checkpoint")
_STRIDE = flags.DEFINE_integer("stride", None, "tokens that a window scores; default: half the context")
_ADAPT = flags.DEFINE_float("adapt", 0.0, "learning rate of dynamic evaluation, from the trained weights anew for "
                            "each document; 0: the weights stay as they are")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "as launch/generate.py: type of products")
_WEIGHTS = flags.DEFINE_enum("weights", None, ["int8"], "as launch/generate.py: weights of products")
_CACHE = flags.DEFINE_enum("cache", None, ["int8"], "as launch/generate.py: keys and values")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")


def main() -> None:
    from flax import nnx
    from tqdm import tqdm

    from mtnlg_jax import compat
    from mtnlg_jax.data.documents import read_documents
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.evaluate.perplexity import evaluate_text
    from mtnlg_jax.model.transformer import abstract_model
    from mtnlg_jax.train.checkpoint import load_run

    compat.quiet()
    compat.configure_cache()
    if _INPUT.value == "-":
        texts = [sys.stdin.buffer.read().decode("utf-8", "replace")]
    else:
        texts = [document.text for document in read_documents(_INPUT.value)]
    run = load_run(_WORKDIR.value, _CHECKPOINT.value)
    model = nnx.merge(abstract_model(run.config.model)[0], run.params)
    rounded = {name: flag.value for name, flag in (("dtype", _DTYPE), ("weights", _WEIGHTS), ("cache", _CACHE))
               if flag.value not in (None, "float32")}
    if rounded and _ADAPT.value:
        name, value = next(iter(rounded.items()))
        raise ValueError(f"--adapt={_ADAPT.value} trains weights, and --{name}={value} rounds them; leave one of "
                         "the two out")
    decoder = unstack(run.config.model, run.params, **rounded) if rounded else None
    results, again = [], []
    for text in texts:
        with tqdm(unit="window", disable=None, leave=False) as bar:

            def show(done, total, bar=bar):
                bar.total = total
                bar.update(done - bar.n)

            results.append(evaluate_text(model, run.tokenizer, text, _STRIDE.value, adapt=_ADAPT.value,
                                         on_batch=show))
        if decoder:
            again.append(evaluate_text(decoder, run.tokenizer, text, _STRIDE.value))
    total = merge(results)
    loss = {}
    if decoder:
        other = merge(again)
        loss = {"rounded": rounded | {"loss": other.loss, "perplexity": other.perplexity}}
    if _JSON.value:
        print(json.dumps(dataclasses.asdict(total) | {"step": run.step, "documents": len(texts),
                                                       "adapt": _ADAPT.value} | loss))
    else:
        print(f"{_INPUT.value}: {len(texts)} document(s), {total.bytes:,} bytes, {total.tokens:,} tokens\n"
              f"loss {total.loss:.4f} nats a token, perplexity {total.perplexity:.2f}, "
              f"{total.bits_per_byte:.4f} bits per byte (checkpoint of step {run.step}"
              f"{f', adapting at {_ADAPT.value:g}' if _ADAPT.value else ''})")
        if decoder:
            print(f"with {', '.join(f'{k} {v}' for k, v in rounded.items())}: loss {other.loss:.4f}, perplexity "
                  f"{other.perplexity:.3f} against {total.perplexity:.3f}: "
                  f"{100 * (other.perplexity / total.perplexity - 1):+.2f} %")


def merge(results: list):
    """One Evaluation for several documents."""
    import math

    from mtnlg_jax.evaluate.perplexity import Evaluation

    tokens, size = sum(r.tokens for r in results), sum(r.bytes for r in results)
    nats = sum(r.loss * r.tokens for r in results)
    if not tokens:
        raise ValueError(f"{_INPUT.value} holds no text")
    loss = nats / tokens
    return Evaluation(tokens, size, loss, math.exp(min(loss, 700.0)), nats / math.log(2) / size)


if __name__ == "__main__":
    command.run(main)
