"""Asks a trained model: python launch/generate.py --workdir=RUN --prompt="Once upon a time"

    --mode=generative  continues the prompt; greedy, or sampled with --temperature, --top_k, --top_p ...
    --mode=ranking     scores what may follow: --candidates=" Paris" --candidates=" Rome", or --n=8 samples
    --mode=fill        fills <mask> or [MASK] in the prompt

The prompt comes from --prompt, --input=FILE or standard input; an empty one starts a new text. Settings that are
not given are those of the run's config.decode. The prompt and its continuation share the model's context: where
it is full, the text ends. Exit codes: 0 done, 2 bad input.
"""

import dataclasses
import json
import sys

from absl import flags

from mtnlg_jax import command

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "which checkpoint")
_MODE = flags.DEFINE_enum("mode", "generative", ["generative", "ranking", "fill"], "what to do")
_PROMPT = flags.DEFINE_string("prompt", None, "the prompt")
_INPUT = flags.DEFINE_string("input", None, "file that holds the prompt, - for standard input")
_CANDIDATES = flags.DEFINE_multi_string("candidates", [], "a text to rank, with its leading space; repeat for more")
_NORMALISE = flags.DEFINE_enum("normalise", "per_token", ["sum", "per_token", "per_char", "per_byte"],
                               "score that ranking sorts by")
_GUESSES = flags.DEFINE_integer("guesses", 5, "tokens shown for each mask", lower_bound=1)
_STREAM = flags.DEFINE_bool("stream", None, "write text as it comes; default: on a terminal")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "type of products and cache")

# Names of DecodeConfig; --n is its num_return_sequences.
_SETTINGS = {
    "max_new_tokens": flags.DEFINE_integer("max_new_tokens", None, "longest continuation, in tokens"),
    "min_new_tokens": flags.DEFINE_integer("min_new_tokens", None, "no end before so many tokens"),
    "temperature": flags.DEFINE_float("temperature", None, "0: greedy; ranking samples at 1 where the run has 0"),
    "top_k": flags.DEFINE_integer("top_k", None, "draw from the k best; 0: from all"),
    "top_p": flags.DEFINE_float("top_p", None, "draw from the best with this probability together, (0, 1]"),
    "min_p": flags.DEFINE_float("min_p", None, "draw from those with this share of the best's probability, [0, 1)"),
    "typical_p": flags.DEFINE_float("typical_p", None, "draw from the most typical, (0, 1]"),
    "repetition_penalty": flags.DEFINE_float("repetition_penalty", None, "above 1: what was seen, less"),
    "presence_penalty": flags.DEFINE_float("presence_penalty", None, "taken off once for each token written"),
    "frequency_penalty": flags.DEFINE_float("frequency_penalty", None, "taken off each time that it was written"),
    "no_repeat_ngram_size": flags.DEFINE_integer("no_repeat_ngram_size", None, "no n tokens twice; 0: off"),
    "stop_strings": flags.DEFINE_multi_string("stop_strings", None, "end before this text; repeat for more"),
    "seed": flags.DEFINE_integer("seed", None, "the i-th sequence draws with seed + i"),
    "num_return_sequences": flags.DEFINE_integer("n", None, "sequences to write, or to sample for ranking"),
}


def main() -> None:
    prompt = _prompt()
    given = {name: flag.value for name, flag in _SETTINGS.items() if flag.value is not None}
    if "stop_strings" in given:
        given["stop_strings"] = tuple(given["stop_strings"])
    _answer(prompt, given)


def _prompt() -> str:
    if _PROMPT.value is not None:
        if _INPUT.value is not None:
            raise ValueError("--prompt and --input are both given; keep one of them")
        return _PROMPT.value
    if _INPUT.value in (None, "-"):
        if sys.stdin.isatty():
            print("the prompt, ended by Ctrl-D:", file=sys.stderr)
        name, raw = "standard input", sys.stdin.buffer.read()
    else:
        name = _INPUT.value
        with open(name, "rb") as file:
            raw = file.read()
    try:
        return raw.decode().removesuffix("\n")  # the one that ends a file
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 at byte {error.start}; convert it, as with iconv") from None


def _answer(prompt: str, given: dict) -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.config import validate_decode
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.train.checkpoint import load_run

    compat.quiet()
    compat.configure_cache()
    run = load_run(_WORKDIR.value, _CHECKPOINT.value)
    decode = dataclasses.replace(run.config.decode, **given)
    sampling = _MODE.value == "ranking" and not _CANDIDATES.value
    if sampling and decode.temperature == 0 and "temperature" not in given:
        decode = dataclasses.replace(decode, temperature=1.0)
    validate_decode(decode)
    decoder = unstack(run.config.model, run.params, _DTYPE.value)
    answer = {"generative": _generate, "ranking": _rank, "fill": _fill}[_MODE.value]
    result = answer(decoder, run.tokenizer, prompt, decode)
    if _JSON.value:
        print(json.dumps({"mode": _MODE.value, "step": run.step, "prompt": prompt} | result, ensure_ascii=False))


def _generate(decoder, tokenizer, prompt, decode) -> dict:
    from mtnlg_jax.decode.generate import encode_prompt, generate

    stream = sys.stdout.isatty() if _STREAM.value is None else _STREAM.value
    # Several texts cannot be written to one terminal at once.
    stream = stream and decode.num_return_sequences == 1 and not _JSON.value

    def show(_, text):
        print(text, end="", flush=True)

    if stream:
        show(0, prompt)
    results = generate(decoder, tokenizer, [prompt], decode, on_text=show if stream else None)
    for number, result in enumerate(results, 1):
        if stream:
            print()
        elif not _JSON.value:
            print(f"--- {number} ---\n" * (len(results) > 1) + prompt + result.text)
        if len(encode_prompt(tokenizer, prompt)) + len(result.tokens) == decoder.context and not _JSON.value:
            print(f"(ended: the context of {decoder.context} tokens is full)", file=sys.stderr)
    return {"sequences": [dataclasses.asdict(result) for result in results]}


def _rank(decoder, tokenizer, prompt, decode) -> dict:
    from mtnlg_jax.decode.rank import rank

    ranked = rank(decoder, tokenizer, prompt, _CANDIDATES.value or None, decode=decode, normalise=_NORMALISE.value)
    if not _JSON.value:
        print(f"by {_NORMALISE.value}, log-probabilities (natural logarithm)\nrank       sum per_token  per_char  "
              "per_byte tokens times  text")
        for place, each in enumerate(ranked, 1):
            print(f"{place:4} {each.sum:9.3f} {each.per_token:9.4f} {each.per_char:9.4f} {each.per_byte:9.4f} "
                  f"{len(each.tokens):6} {each.count:5}  {each.text!r}")
    return {"normalise": _NORMALISE.value, "candidates": [dataclasses.asdict(each) for each in ranked]}


def _fill(decoder, tokenizer, prompt, _) -> dict:
    from mtnlg_jax.decode.fill import fill

    filled = fill(decoder, tokenizer, prompt, _GUESSES.value)
    if not _JSON.value:
        for number, guesses in enumerate(filled.masks, 1):
            print(f"mask {number}")
            for guess in guesses:
                print(f"  {guess.probability:6.1%}  {guess.text!r}")
        print(filled.text)
    return dataclasses.asdict(filled)


if __name__ == "__main__":
    command.run(main)
