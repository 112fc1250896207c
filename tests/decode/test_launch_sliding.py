"""Run launch/generate.py beyond the context: lengths, notes, costs near words, and errors."""

import json
import re

import pytest

from mtnlg_jax.cli.generation import sliding
from mtnlg_jax.decode.words import Pace

BEYOND = ("--workdir=RUN", "--temperature=1.5", "--min_new_tokens=100", "--max_new_tokens=100")


@pytest.fixture(scope="module")
def ask(answering, tokenizer, tmp_path_factory):
    """Return a function (*arguments) -> (exit code, standard output, standard error) of a model
    with learned positions."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return answering("generate.py", folder, positions=32, new_tokens=6)


def test_a_window_slides_over_the_text(ask):
    code, out, err = ask(*BEYOND, "--prompt=The cat", "--slide=auto")
    assert (code, err) == (0, "")
    assert ask(*BEYOND, "--prompt=The cat", "--slide=recompute", "--sinks=4", "--stream")[1] == out
    record = json.loads(ask(*BEYOND, "--prompt=The cat", "--window=32", "--json")[1])
    (sequence,) = record["sequences"]
    assert record["prompt"] + sequence["text"] + "\n" == out
    assert (len(sequence["tokens"]), sequence["finish_reason"]) == (100, "length")
    other = json.loads(ask(*BEYOND, "--prompt=The cat", "--sinks=1", "--json")[1])
    assert other["sequences"][0]["logprobs"] != sequence["logprobs"]


def test_words_give_the_length(ask):
    arguments = ("--workdir=RUN", "--prompt=The cat", "--words=5", "--temperature=1.5")
    code, out, err = ask(*arguments, "--min_new_tokens=80", "--stats")
    assert code == 0 and "tokens_per_second: " in err and "late_over_early: " not in err
    assert re.search(r"so it needs a text of 1,250 words; this one has \d+\)", err)
    code, out, err = ask(*arguments, "--max_new_tokens=3")
    assert code == 0
    assert err.startswith("(ended after ") and err.endswith(" of 5 words: max_new_tokens=3)\n")


def test_stats_compare_words_that_are_far_apart(capsys):
    class Words:
        def token_bytes(self, token):
            return b"word "

    def near(words):
        seconds = 0.0
        pace = Pace(lambda: seconds)
        for word in range(words):
            seconds += 0.002 if word < 900 else 0.003
            pace.on_text(0, "word ")
        return sliding.near_words(pace, Words(), [0] * words)

    found = near(1400)
    assert (found["early_word"], found["late_word"]) == (500, 1150)
    assert found["late_over_early"] == pytest.approx(1.5, 0.01)
    assert capsys.readouterr().err == ""
    assert near(1249) == {} and "this one has 1,249" in capsys.readouterr().err
    assert near(1250)["late_word"] == 1000


def test_a_prompt_beyond_the_window_is_read_in_part_and_said_to_be(ask):
    code, out, err = ask("--workdir=RUN", f"--prompt={'The cat ' * 30}", "--words=1")
    assert code == 0 and out.startswith("The cat " * 30)
    assert "tokens and the window 32: the model reads the first 4 and the last 28)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--words=0"], "--words"),
        (["--slide=shift"], "mode=shift .* learned positions"),
        (["--window=33"], "window=33 is not between 2 and the model's context of 32"),
        (["--keep=40"], "keep=40 is not between 1 and 27"),
        (["--words=9", "--num_beams=2"], "a sliding window writes rows, and num_beams=2"),
        (["--words=9", "--chat"], "--words is for a sliding window, and --chat is given"),
        (["--sinks=2", "--draft=RUN"], "--sinks .* and --draft is given: guesses"),
        (["--words=9", "--mode=fill"], "--words is for --mode=generative, not --mode=fill"),
    ],
    ids=" ".join,
)
def test_what_cannot_slide_is_one_line(ask, arguments, message):

    prompt = [] if "--chat" in arguments else ["--prompt=The cat"]
    code, out, err = ask("--workdir=RUN", *prompt, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err
