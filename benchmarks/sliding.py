"""Measure a window that slides over a text: what a token costs, and what it does to the loss.

    python benchmarks/sliding.py --workdir=RUN                   the cost of a token, by the word
    python benchmarks/sliding.py --workdir=RUN --text=FILE       the loss on a text

*Cost*: the run writes a text of --words words. Then it goes on behind word 500 and behind the last
one, in turn, each time for the same number of tokens and of drops. The result is the median of the
ratios of neighboring calls, and their quartiles. Beside the wall clock stands the CPU time of the
process, which other processes disturb less.

*Loss*: --rows pieces of the text are read token by token, in nats per token, beside the
recomputation of the whole window for every token (the last --last tokens of each piece, as it is
slow). Tokens of the first window are not counted. The difference of two modes on the same tokens
has its standard error.
"""

# Shapes: B rows, S positions, V vocabulary

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.decode.sliding import Sliding, continue_sliding, room_of
from mtnlg_jax.decode.words import words_by_token

RESULT = Path(__file__).parent / "results" / "sliding.json"
EARLY = 500
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="a run, or a model of another format")
    parser.add_argument("--text", help="file to compute the loss on")
    parser.add_argument("--words", type=int, default=5000, help="length of the text to time")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of pieces to time")
    parser.add_argument("--drops", type=int, default=3, help="length of a piece to time")
    parser.add_argument("--rows", type=int, default=8, help="pieces of the text")
    parser.add_argument("--windows", type=int, default=4, help="length of a piece, in windows")
    parser.add_argument("--last", type=int, default=64, help="tokens with a window each")
    parser.add_argument("--output", default=os.fspath(RESULT), help="file for the result")
    flags = parser.parse_args()
    run, decoder = load_decoder(flags.workdir)
    output = Path(flags.output)
    result = json.loads(output.read_text()) if output.exists() else {}
    for part, measure in (("cost", costs), ("loss", losses)):
        # A part that is not measured stays in the file as it was.
        if (part == "loss") == (flags.text is not None):
            result[part] = {
                "command": " ".join(
                    ["python benchmarks/sliding.py --workdir=RUN", *_shown(sys.argv[1:])]
                ),
                "parameters": decoder.config.parameter_count(),
                "context": decoder.context,
                "positions": decoder.config.position_embedding_type,
                "date": datetime.date.today().isoformat(),
                "cores": os.cpu_count(),
                "load": round(os.getloadavg()[0], 1),
                "machine": platform.machine(),
            } | measure(decoder, run.tokenizer, flags)
    print(json.dumps(result, indent=2))
    output.write_text(json.dumps(result, indent=2) + "\n")


def _shown(arguments: list[str]) -> list[str]:
    """Return the arguments without the folders of this machine."""
    hidden = ("--workdir", "--output")
    parts = [each.partition("=") for each in arguments if not each.startswith(hidden)]
    return [f"{name}{equals}{os.path.basename(value)}" for name, equals, value in parts]


def modes_of(decoder) -> dict[str, Sliding]:
    """Return the modes that the model supports, by name."""
    found = {"recompute": Sliding("recompute")}
    if decoder.config.position_embedding_type != "learned":
        found["shift"] = Sliding("shift")
    return found


def costs(decoder, tokenizer, flags) -> dict:
    """Return the milliseconds of a token behind two words of one text, and their ratio."""
    new = flags.words * 16
    decode = DecodeConfig(max_new_tokens=new, min_new_tokens=new, temperature=1.0, top_p=0.95)
    (text,) = continue_sliding(decoder, tokenizer, [""], decode, Sliding(words=flags.words))
    words_T, _ = words_by_token(tokenizer, text.tokens)
    at = [int(np.searchsorted(words_T, word)) for word in (EARLY, words_T[-1])]
    result: dict = {"words": [EARLY, words_T[-1]], "tokens": at}
    for name, sliding in modes_of(decoder).items():
        # Each piece has the same number of drops.
        room = room_of(decoder.config, sliding)
        new = flags.drops * room.dropped
        decode = dataclasses.replace(decode, max_new_tokens=new, min_new_tokens=new)
        rounds = []
        for turn in range(flags.rounds + 1):
            pair = [{}, {}]
            # The sides alternate, so that neither is always the first.
            for side in (0, 1) if turn % 2 else (1, 0):
                pair[side] = timed(decoder, tokenizer, text.tokens[: at[side]], decode, sliding)
            if turn:  # the first calls compile
                rounds.append(pair)
        result[name] = {clock: summary(rounds, clock) for clock in CLOCKS}
    result["recompute every token"] = every_token(decoder, tokenizer)
    return result


def timed(decoder, tokenizer, prompt, decode, sliding) -> dict[str, float]:
    """Return the milliseconds of a token behind ``prompt``, by each clock."""
    before = {name: read() for name, read in CLOCKS.items()}
    continue_sliding(decoder, tokenizer, [prompt], decode, sliding)
    number = decode.max_new_tokens
    return {name: 1000 * (read() - before[name]) / number for name, read in CLOCKS.items()}


def summary(rounds: list, clock: str) -> dict:
    ratios = [late[clock] / early[clock] for early, late in rounds]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    early, late = (statistics.median(pair[side][clock] for pair in rounds) for side in (0, 1))
    return {
        "early_ms_per_token": round(early, 4),
        "late_ms_per_token": round(late, 4),
        "late_over_early": {
            "median": round(float(middle), 3),
            "quartiles": [round(float(low), 3), round(float(high), 3)],
        },
    }


def every_token(decoder, tokenizer, number: int = 48) -> dict:
    """Return the milliseconds of a token whose whole window is read again."""
    prompt = np.random.default_rng(0).integers(
        tokenizer.vocab_size // 2, tokenizer.vocab_size, decoder.context
    )
    sliding = Sliding("recompute", keep=decoder.context - 5)
    decode = DecodeConfig(max_new_tokens=number, min_new_tokens=number)
    for _ in range(2):  # the first call compiles
        found = timed(decoder, tokenizer, prompt.tolist(), decode, sliding)
    return {f"{clock}_ms_per_token": round(value, 4) for clock, value in found.items()}


def losses(decoder, tokenizer, flags) -> dict:
    """Return the mean loss of each mode, and its difference to a window for every token."""
    tokens = tokenizer.encode(Path(flags.text).read_text(encoding="utf-8"))
    window = decoder.context
    length = flags.windows * window
    starts = np.linspace(len(tokens) // 20, len(tokens) - length, flags.rows).astype(int)
    text_BS = np.array([tokens[start : start + length] for start in starts])
    modes = {
        f"{name}, sinks={sinks}": Sliding(mode.mode, sinks=sinks)
        for name, mode in modes_of(decoder).items()
        for sinks in (0, 4)
    }
    found = {name: of_text(decoder, tokenizer, text_BS, 1, mode) for name, mode in modes.items()}
    result: dict = {}
    last = flags.last
    reference = of_text(
        decoder,
        tokenizer,
        text_BS,
        length - last,
        Sliding("recompute", sinks=0, keep=window - 1),
    )
    result["window for every token"] = {"last": _mean(reference)}
    for name, loss_BS in found.items():
        apart = loss_BS[:, -last:] - reference
        result[name] = {
            "all": _mean(loss_BS[:, window:]),
            "last": _mean(loss_BS[:, -last:]),
            "above_reference": _mean(apart),
            "standard_error": round(float(apart.std() / np.sqrt(apart.size)), 4),
        }
    counted = (length - 1 - window) * flags.rows
    return {"tokens": counted, "last_tokens": last * flags.rows, "nats_per_token": result}


def _mean(values) -> float:
    return round(float(np.mean(values)), 4)


def of_text(decoder, tokenizer, text_BS, prompt: int, sliding: Sliding) -> np.ndarray:
    """Return the loss of each token behind the first ``prompt`` ones, (B, S - prompt)."""
    given_BS = jnp.asarray(text_BS)
    rows, length = text_BS.shape

    def only_given(_, lengths_B, prompts_B):
        at_B = jnp.minimum(lengths_B, length - 1)
        return given_BS[jnp.arange(rows), at_B][:, None] == jnp.arange(decoder.config.vocabulary)

    new = length - prompt
    found = continue_sliding(
        decoder,
        tokenizer,
        text_BS[:, :prompt].tolist(),
        DecodeConfig(max_new_tokens=new, min_new_tokens=new),
        sliding,
        constraint=only_given,
    )
    if any(len(each.tokens) != new for each in found):
        raise ValueError("the text has tokens that the model may not write; give a plain text")
    return -np.array([each.logprobs for each in found])


if __name__ == "__main__":
    main()
