"""launch/plan.py: its tables as text, its calibration, and its errors."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mtnlg_jax.config import load_config, to_json

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
CONFIGS = sorted({path.name for path in (ROOT / "configs").glob("*.py")} - {"ladder.py"}) + [
    "ladder.py:1.7b"
]

# Answers many command lines in one process, since importing JAX takes longer than answering.
DRIVER = """
    import contextlib, io, json, runpy, sys
    from absl.testing import flagsaver
    from mtnlg_jax import command

    names = runpy.run_path(sys.argv[1])
    for line in sys.stdin:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(flagsaver.flagsaver())
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            try:
                sys.argv = [sys.argv[0], *json.loads(line)]
                command.run(names["main"])
            except SystemExit as stop:
                code = stop.code or 0
        print("answer", json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def ask():
    """(*arguments) -> (exit code, standard output, standard error)."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), ROOT / "launch" / "plan.py"],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def answer(*arguments):
        print(json.dumps(arguments), file=process.stdin, flush=True)
        line = next(line for line in process.stdout if line.startswith("answer "))
        return json.loads(line.removeprefix("answer "))

    yield answer
    process.stdin.close()
    process.wait()
    process.stdout.close()


def config_flag(name):
    return f"--config={ROOT / 'configs' / name}"


# To renew one: python launch/plan.py FLAGS > tests/golden/NAME.txt, and read what changed.
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("plan_530b", []),
        pytest.param("plan_530b_a100", ["--chips=A100-80:2240", "--top=3"], marks=pytest.mark.slow),
    ],
)
def test_the_plan_of_530b_is_this_text(ask, name, flags):
    code, out, err = ask(*flags)
    assert (code, err) == (0, "") and out == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_a_table_of_all_its_bytes(ask, name):
    code, out, err = ask(config_flag(name))
    assert (code, err) == (0, "")
    config = load_config(config_flag(name).removeprefix("--config="))
    assert out.startswith("model.vocab_size is the tokenizer's; planned with 51,200") == (
        config.model.vocab_size is None
    )
    rows = [line.split() for line in out.split("bytes a device\n")[1].split("\n\n")[0].splitlines()]
    sizes = [int(row[-1].replace(",", "")) for row in rows]
    assert sizes[-1] == sum(sizes[:-1]) and rows[-1][:2] == ["all,", "float32"]


def test_the_data_axis_takes_the_given_devices(ask):
    code, out, _ = ask(config_flag("tiny.py"), "--devices=4", "--set=mesh.tensor=2")
    assert code == 0 and "pipe 1 x data 2 x context 1 x tensor 2 = 4 devices" in out
    code, out, _ = ask(config_flag("tiny.py"), "--set=mesh.tensor=2")
    assert code == 0 and "pipe 1 x data 1 x context 1 x tensor 2 = 2 devices" in out


def test_another_vocabulary(ask):
    _, out, _ = ask(config_flag("tiny.py"), "--set=model.vocab_size=1000")
    assert out.startswith("tiny: ") and "1000 64" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--chips=B100:8"], "unknown chip 'B100'; choose one of A100-80, H100"),
        (["--chips=H100"], "--chips='H100' needs a number"),
        (["--chips=v5e:256"], "mtnlg_530b does not fit 256 v5e: the leanest layout, "),
        (["--chips=H100:8", "--config=nowhere.py"], "'nowhere.py' is not a file"),
        (["--devices=7"], "does not fit 7 devices; their product must be 7"),
        (
            ["--set=mesh.pipe=4"],
            "model.num_layers=105 is not divisible by mesh.pipe=4; try mesh.pipe=3 or 5",
        ),
        (
            [
                "--set=mesh.zero=1",
                "--set=mesh.data=6",
                "--set=train.global_batch_size=1926",
                "--set=train.rampup_batch_size=None",
            ],
            "D=20480 is not divisible by data=6; try mesh.data=4 or 5, or mesh.zero=0",
        ),
        (["--set=train.micro_batch_size=7"], "try"),
        (["--calibrate=RUN"], "--calibrate needs --chips"),
        (["--calibrate=/nowhere", "--chips=H100:8"], "/nowhere/config.json"),
        (["--chips=H100:8", "--calibration=/nowhere.json"], "/nowhere.json"),
        (["--chips=H100:8", f"--calibration={__file__}"], "is not a calibration"),
    ],
)
def test_bad_input_is_one_line(ask, flags, words):
    code, out, err = ask(*flags)
    assert (
        code == 2
        and out == ""
        and err.startswith("error: ")
        and words in err
        and err.count("\n") == 1
    )


@pytest.mark.slow
def test_the_number_of_chips_that_would_be_enough_is_enough(ask):
    _, _, err = ask("--chips=v5e:256")
    enough = err.rsplit("; ", 1)[1].split()[0]
    assert ask(f"--chips=v5e:{enough}")[0] == 0


# Slow: more machines of the same kinds, TPU pods and nodes of eight GPUs.
@pytest.mark.parametrize(
    "chips",
    [
        pytest.param(chips, marks=pytest.mark.slow)
        for chips in ("TPU7x:512", "v5p:1024", "B200:512", "v4:2048", "v6e:2048", "H200:512")
    ],
)
def test_other_chips_have_layouts_for_530b(ask, chips):
    code, out, _ = ask(f"--chips={chips}", "--top=1")
    assert (
        code == 0 and "\n1: --set=mesh." in out and "compute-optimal, 20 tokens a parameter" in out
    )
    assert ("1,024 devices" in out) == (chips == "TPU7x:512")


# --- calibration


@pytest.fixture
def workdir(tmp_path):
    config = load_config(str(ROOT / "configs" / "ladder.py:7.5b"), ["mesh.data=-1"])
    (tmp_path / "config.json").write_text(to_json(config))
    rates = [10.0] * 10 + [300_000.0] * 11  # compiling, then at speed
    lines = [
        {"kind": "train", "step": i, "sequences": 512, "tokens_per_second": rate}
        for i, rate in enumerate(rates)
    ]
    lines += [
        {"kind": "train", "step": 30, "sequences": 8, "tokens_per_second": 1.0},
        {"kind": "eval", "step": 30},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_run_calibrates_the_plan(ask, workdir):
    code, out, err = ask(f"--calibrate={workdir}", "--chips=A100-80:128")
    assert code == 0 and "calibration.json: 3.495 s a step (median of 11)" in out, out + err
    values = json.loads((workdir / "calibration.json").read_text())
    assert (
        values["step_seconds"] == round(512 * 2048 / 300_000, 4)
        and 0.2 < values["efficiency"] < 0.6
    )
    assert [path.name for path in workdir.iterdir() if "partial" in path.name] == []

    calibrated = f"--calibration={workdir / 'calibration.json'}"
    _, out, _ = ask(config_flag("ladder.py:7.5b"), "--chips=A100-80:128", calibrated)
    own = next(line for line in out.splitlines() if line.startswith("own"))
    assert " 3.50 s " in own and f"products at {values['efficiency']:.1%} of peak" in out
    code, out, err = ask("--chips=H100:128", calibrated)
    assert code == 2 and "was measured on A100-80, not H100" in err


def test_a_run_that_cannot_calibrate_is_refused_with_the_reason(ask, workdir):
    assert "is it the chip that the run used?" in ask(f"--calibrate={workdir}", "--chips=v5e:8")[2]
    assert "does not fit 6 devices" in ask(f"--calibrate={workdir}", "--chips=A100-80:6")[2]
    (workdir / "metrics.jsonl").write_text("")
    assert (
        "no timed step of 512 sequences yet"
        in ask(f"--calibrate={workdir}", "--chips=A100-80:128")[2]
    )
