"""The scripts as a user starts them: the quickstart on a small text, then every mode on its
checkpoint."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TEXT = (
    "the whale swam north while the old captain slept and nobody on the ship "
    "dared to wake him again"
).split()


def run(script, *flags, code=0, stdin=None):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0"
    }  # compiles in half the time
    done = subprocess.run(
        [sys.executable, LAUNCH / script, *flags],
        capture_output=True,
        text=True,
        input=stdin,
        env=environment,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    folder = tmp_path_factory.mktemp("road")
    rng = np.random.default_rng(0)
    (folder / "book.txt").write_text(
        "\n\n".join(" ".join(rng.choice(TEXT, 30)) + "." for _ in range(300))
    )
    said = run(
        "quickstart.py",
        f"--corpus={folder}/book.txt",
        f"--workdir={folder}/run",
        "--vocab_size=300",
        "--set=train.steps=8",
        "--set=model.num_layers=1",
        "--set=model.hidden_size=32",
        "--set=model.max_position_embeddings=64",
        "--set=train.eval_every=4",
        "--set=train.save_every=4",
    )
    return folder, said


def test_the_quickstart_prints_every_part(road):
    folder, said = road
    for part in (
        "loss over 8 steps",
        "a unigram model",
        "xz -9e",
        "a filled mask",
        "greedy",
        "sampled",
        "ranked",
        "loss.png",
        "next:",
    ):
        assert part in said, said
    assert (folder / "run" / "loss.png").stat().st_size > 1000


def test_evaluate_for_people_and_for_programs(road):
    folder, _ = road
    text = "the old captain slept. " * 4
    (folder / "short.txt").write_text(text)
    base = ["evaluate.py", f"--workdir={folder}/run", f"--input={folder}/short.txt"]
    counts = json.loads(run(*base, "--json"))
    assert counts["bytes"] == len(text) and counts["bits_per_byte"] > 0
    assert "adapting at 0.001" in run(*base, "--adapt=1e-3")


def test_generate_in_three_modes(road):
    folder, _ = road
    ranked = json.loads(
        run(
            "generate.py",
            f"--workdir={folder}/run",
            "--mode=ranking",
            "--prompt=the old",
            "--candidates= captain",
            "--candidates= whale",
            "--json",
        )
    )
    scores = [candidate["score"] for candidate in ranked["candidates"]]
    assert {candidate["text"] for candidate in ranked["candidates"]} == {" captain", " whale"}
    assert scores[0] > scores[1]
    written = json.loads(
        run(
            "generate.py",
            f"--workdir={folder}/run",
            "--json",
            "--max_new_tokens=5",
            stdin="the old captain",
        )
    )
    (sequence,) = written["sequences"]
    assert 1 <= len(sequence["tokens"]) <= 5 and len(sequence["logprobs"]) == len(
        sequence["tokens"]
    )
    assert (sequence["finish_reason"] == "length") == (len(sequence["tokens"]) == 5)
    filled = run(
        "generate.py", f"--workdir={folder}/run", "--mode=fill", "--prompt=the <mask> captain"
    )
    shares = [float(share) for share in re.findall(r"([0-9.]+)%", filled)]
    assert (
        1 < len(shares) and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.5
    ), filled


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        pytest.param(
            "pretrain.py",
            ["--config=nowhere.py", "--workdir=x"],
            "nowhere.py",
            marks=pytest.mark.slow,  # tests/test_config.py has it without a process
        ),
        (
            "pretrain.py",
            ["--config={configs}/tiny.py", "--set=train.step=3", "--workdir=x"],
            "did you mean 'steps'",
        ),
        pytest.param(
            "evaluate.py",
            ["--workdir=/nowhere", "--input={book}"],
            "/nowhere",
            marks=pytest.mark.slow,  # as the next
        ),
        ("evaluate.py", ["--workdir={folder}/run", "--input=/nowhere.txt"], "/nowhere.txt"),
        ("evaluate.py", ["--workdir={folder}/run", "--input={book}", "--adapt=-1"], "adapt=-1.0"),
    ],
)
def test_bad_input_is_one_line_and_code_2(road, script, flags, message):
    folder, _ = road
    places = {"configs": LAUNCH.parent / "configs", "book": folder / "book.txt", "folder": folder}
    said = run(script, *(flag.format(**places) for flag in flags), code=2)
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 1 and message in lines[0], said
