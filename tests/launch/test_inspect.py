"""launch/inspect.py and launch/why.py from end to end, and that no script is shadowed by them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtnlg_jax.data.tokenizer import train_tokenizer

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TEXT = "the whale swam north again\n"


def _started(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )


QUICK = ("inspect.py", "pretrain.py", "quickstart.py", "why.py")
SCRIPTS = [
    path.name if path.name in QUICK else pytest.param(path.name, marks=pytest.mark.slow)
    for path in sorted(LAUNCH.glob("*.py"))
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_starts_beside_a_file_named_inspect(script):
    done = _started(LAUNCH / script, "--help")
    assert "--help" in done.stdout + done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "ImportError" not in done.stderr


@pytest.mark.parametrize("how", ["script", "folder", "main"])
def test_inspect_is_the_standard_module_for_others(tmp_path, how):
    folder = tmp_path / "launch"
    folder.mkdir()
    shutil.copy(LAUNCH / "inspect.py", folder)
    lines = "import inspect, sys\nprint(inspect.__file__, inspect.signature(len))"
    (folder / "other.py").write_text(lines)
    if how == "script":
        done = _started(folder / "other.py")
    elif how == "folder":
        done = _started("-c", lines, cwd=folder)  # the folder is in the path as ""
    else:
        # As a child process of multiprocessing imports the main script.
        program = f"import runpy; runpy.run_path({str(folder / 'inspect.py')!r}, run_name='x')"
        done = _started("-c", program + "\n" + lines, cwd=LAUNCH.parent)
    name, *signature = done.stdout.split()
    assert name == os.path.join(os.path.dirname(os.__file__), "inspect.py"), done.stderr
    assert signature, done.stderr


def test_the_standard_module_is_found_only_with_the_way_around(tmp_path):
    """The guard is needed: a plain file of this name breaks dataclasses."""
    (tmp_path / "inspect.py").write_text("")
    (tmp_path / "other.py").write_text("import dataclasses\n@dataclasses.dataclass\nclass A: pass")
    assert "inspect" in _started(tmp_path / "other.py").stderr


def test_why_refuses_what_is_no_step_of_a_run(tmp_path):
    for step, words in (("3", "is not a run of launch/pretrain.py"), ("0", "--step=0")):
        done = _started(LAUNCH / "why.py", f"--workdir={tmp_path}", f"--step={step}")
        assert done.returncode == 2 and words in done.stderr and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def ask(answering, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    tokenizer = train_tokenizer([TEXT] * 9, 300)
    tokenizer.save(folder / "tokenizer")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "swam swam swam", "again"))
    )
    answer = answering("inspect.py", folder / "tokenizer", positions=16, new_tokens=8)

    def asked(*arguments):
        given = [each.replace("{folder}", str(folder)) for each in arguments]
        return answer("--workdir=RUN", f"--output={folder}/out", *given)

    asked.folder = folder / "out"
    return asked


def _found(ask, name):
    assert (ask.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (ask.folder / f"{name}.html").read_text()
    assert "<script" not in page and "https:" not in page
    result = json.loads((ask.folder / f"{name}.json").read_text())
    assert result["kind"] == name and result["step"] == 7 and "versions" in result
    return result


def test_a_lens(ask):
    code, out, err = ask("--text=the whale", "--guesses=2")
    assert (code, err) == (0, "") and "layer 0" in out and "lens.html" in out
    result = _found(ask, "lens")
    assert [each["layer"] for each in result["layers"]] == ["embedding", "layer 0"]
    assert len(result["layers"][0]["guesses"]) == len(result["tokens"])
    assert len(result["layers"][0]["guesses"][0]) == 2


def test_attention_of_a_layer(ask):
    assert ask("--mode=attention", "--text=the whale swam", "--layer=0")[0] == 0
    result = _found(ask, "attention")
    assert len(result["heads"]) == 2
    assert sum(result["weights"][0][0][-1]) == pytest.approx(1, abs=1e-3)


def test_losses_of_a_text_beyond_the_context(ask):
    code, out, _ = ask("--mode=loss", "--input={folder}/texts.jsonl", "--documents=2")
    assert code == 0 and "document 1: " in out
    documents = _found(ask, "loss")["documents"]
    assert [len(each["losses"]) == len(each["tokens"]) for each in documents] == [True, True]


def test_patches(ask):
    code, out, err = ask(
        "--mode=patch",
        "--clean=the whale swam again",
        "--corrupt=the whale again swam",
        "--answers= again",
        "--answers= the",
    )
    assert (code, err) == (0, "") and "residual" in out
    result = _found(ask, "patch")
    assert set(result["recovered"]) == {"residual", "attention", "mlp"}
    assert len(result["recovered"]["mlp"][0]) == len(result["tokens"])


def test_influence_of_given_passages(ask):
    code, out, err = ask(
        "--mode=influence",
        "--continuation=swam swam",
        "--passages={folder}/texts.jsonl",
        "--length=8",
        "--rank=2",
    )
    assert (code, err) == (0, "") and "1." in out
    ranked = _found(ask, "influence")["ranked"]
    assert ranked[0]["text"] == "swam swam swam"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode=lens"], "--mode=lens needs --text"),
        (["--text="], "needs --text"),
        (["--text=a", "--layer=0"], "--layer=0 has no effect"),
        (["--text=" + TEXT * 9], "the model's context holds 16"),
        (["--mode=attention", "--text=a", "--layer=1"], "--layer=1 is outside [0, 0]"),
        (["--mode=loss"], "needs one of --text and --input"),
        (["--mode=loss", "--text=the whale", "--stride=17"], "stride=17"),
        (
            ["--mode=patch", "--clean=the whale", "--corrupt=the", "--answers=a", "--answers=b"],
            "the same number in both",
        ),
        (
            ["--mode=patch", "--clean=the", "--corrupt=whale", "--answers=a"],
            "--answers was given 1 times",
        ),
        (
            ["--mode=patch", "--clean=the", "--corrupt=whale", "--answers=a", "--answers=a"],
            "begin with one token",
        ),
        (["--mode=influence"], "needs --continuation"),
        (["--mode=influence", "--continuation=a", "--length=17"], "--length=17 is outside"),
        (["--mode=influence", "--continuation=a", "--damping=-1"], "--damping=-1"),
        (["--mode=influence", "--continuation=a", "--damping=nan"], "--damping=nan must be"),
        (["--mode=influence", "--continuation=a"], "is not a run"),
        (
            [
                *("--mode=influence", "--continuation=a", "--rank=999"),
                "--passages={folder}/texts.jsonl",
            ],
            "--rank=999 is outside",
        ),
    ],
)
def test_bad_input_is_one_line(ask, arguments, words):
    code, out, err = ask(*arguments)
    assert (code, out) == (2, "") and words in err and len(err.splitlines()) == 1
