"""The whole road in one command: text, tokenizer, training, and three ways to write.

bash launch/quickstart.sh [--corpus=PATH] [--workdir=DIR] [--set=train.steps=300]

Without --corpus it reads the prose of Python's own documentation, so nothing is downloaded. Start
it again to go on where it stopped; what is done is not done twice.
"""

import functools
import os
import shlex
import textwrap
import time

from absl import flags

from mtnlg_jax import command

_CORPUS = command.define_path(
    "corpus", None, "your own text: a file or folder (txt, jsonl, parquet, .gz, .zst)"
)
_WORKDIR = command.define_path("workdir", "runs/quickstart", "where everything goes")
_CONFIG = command.define_path(
    "config", os.path.join(os.path.dirname(__file__), "../configs/quickstart.py"), "the run"
)
_SET = flags.DEFINE_multi_string(
    "set", [], "a value of the config, as train.steps=300; repeat for more"
)
_VOCAB = flags.DEFINE_integer("vocab_size", 4096, "pieces of the tokenizer")


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.config import load_config
    from mtnlg_jax.data.prepare import describe, prepare
    from mtnlg_jax.data.store.sources import open_tokens
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.evaluate.baselines import baselines
    from mtnlg_jax.train.checkpoint import load_run
    from mtnlg_jax.train.curve import text_curve
    from mtnlg_jax.train.inputs import load_data
    from mtnlg_jax.train.loop import train

    began = time.monotonic()
    compat.quiet()
    compat.configure_cache()
    workdir = _WORKDIR.value
    data_folder = os.path.join(_WORKDIR.value, "data")
    config = load_config(_CONFIG.value, [f"data.path={data_folder}", *_SET.value])
    _heading("1. Text and tokenizer")
    corpus = os.path.abspath(_CORPUS.value) if _CORPUS.value else None
    if os.path.exists(data_folder):
        print(
            f"{data_folder} is there already: going on with it (remove it to start from other text)"
        )
    else:
        os.makedirs(workdir, exist_ok=True)
        print(describe(prepare(corpus, data_folder, vocab_size=_VOCAB.value, heldout=0.02)))

    _heading("2. Training: " + ", then ".join(stage.name for stage in config.train.stages))
    summary = train(config, workdir, announce=functools.partial(print, flush=True))
    run = load_run(workdir)
    decoder = unstack(run.config.model, run.params)
    data = load_data(run.config)

    _heading("3. What it learnt")
    print(text_curve(os.path.join(workdir, "metrics.jsonl")))
    unigram, compressed = baselines(data, open_tokens(os.path.join(data_folder, "train")))
    ours = (
        f"{summary.final['bits_per_byte']:.3f}"
        if "bits_per_byte" in summary.final
        else "not trained for that"
    )
    print(
        f"held-out text, bits per byte: this model {ours}, "
        f"a unigram model of the same tokens {unigram:.3f}, xz -9e {compressed:.3f}"
    )

    _heading("4. Writing")
    samples(decoder, run.tokenizer, data)
    run = shlex.quote(workdir)
    again = (
        f"bash launch/quickstart.sh --corpus=YOUR_FOLDER --workdir={shlex.quote(workdir + '-mine')}"
    )
    longer = f"bash launch/quickstart.sh --workdir={shlex.quote(workdir + '-long')}"
    print(f"""
{summary.parameters:,} parameters, {summary.tokens:,} tokens in {summary.seconds:.0f} s of training \
({summary.speed}); {time.monotonic() - began:.0f} s in all
  {run}/loss.png       the curve
  {run}/metrics.jsonl  every step;  pip install tensorboard, tensorboard --logdir={run}/tensorboard
  {run}/checkpoints    {summary.kept}
next: .venv/bin/python launch/generate.py --workdir={run} --prompt="The function returns" --temperature=0.8
      .venv/bin/python launch/generate.py --workdir={run} --mode=ranking --n=8 --prompt="The function returns"
      {again}
      more steps:  {longer} --set=train.steps={4 * summary.steps}""")


def samples(decoder, tokenizer, data) -> None:
    """A filled mask, and a greedy, a sampled and a ranked continuation of held-out text."""
    import dataclasses

    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.decode.infill import fill
    from mtnlg_jax.decode.rank import rank
    from mtnlg_jax.evaluate.baselines import held_out_text

    text = held_out_text(data, limit=4000)
    paragraph = max(text.split("\n\n")[:20], key=len).replace("\n", " ").strip()
    words = paragraph.split(" ") if paragraph.count(" ") > 8 else list(paragraph)
    joint = " " if paragraph.count(" ") > 8 else ""
    blank = 7
    masked = joint.join([*words[:blank], "<mask>", *words[blank + 1 : 20]])
    filled = fill(decoder, tokenizer, masked, top_k=5)
    print(_wrapped("a filled mask", masked))
    guesses = ", ".join(
        f"{candidate.text!r} {candidate.probability:.1%}" for candidate in filled.masks[0]
    )
    print(_wrapped("", f"{guesses} (the author wrote {words[blank]!r})"))
    prompt = joint.join(words[:12])
    greedy = DecodeConfig(max_new_tokens=48, min_new_tokens=24)
    sampled = dataclasses.replace(greedy, temperature=0.8, top_p=0.95)
    for name, decode in (("greedy", greedy), ("sampled", sampled)):
        result = generate(decoder, tokenizer, [prompt], decode)[0]
        print("\n" + _wrapped(name, f"{prompt} |{result.text}"))
    ranked = rank(
        decoder, tokenizer, prompt, decode=dataclasses.replace(sampled, num_return_sequences=6)
    )
    print(
        "\n"
        + _wrapped("ranked", f"{len(ranked)} samples by log-probability a token, the best first")
    )
    for candidate in ranked:
        print(_wrapped(f"  {candidate.score:.3f}", candidate.text))


def _wrapped(label: str, text: str) -> str:
    """``text`` without its line breaks, beside ``label``."""
    return textwrap.fill(
        " ".join(text.split()), 100, initial_indent=f"{label:<15}", subsequent_indent=" " * 15
    )


def _heading(text: str) -> None:
    print(f"\n== {text} " + "=" * max(0, 76 - len(text)), flush=True)


if __name__ == "__main__":
    command.run(main, log=True)
