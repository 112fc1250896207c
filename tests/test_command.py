"""Check what every script shares: file names, transient errors, broken output, the launcher's
end."""

import errno
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mtnlg_jax import command, errors
from mtnlg_jax.train import processes

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60  # seconds, on a busy machine


def python(program: str, *arguments: str, **options) -> subprocess.Popen:
    """Start a process that runs ``program`` with the required parts of the package."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("environment", {})
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        text=True,
        env=environment,
        **options,
    )


# --- transient errors


class StoreError(Exception):
    """An error as gcsfs raises it."""

    def __init__(self, code):
        super().__init__(f"HTTP {code}")
        self.code = code


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    "error",
    [
        *(
            OSError(number, os.strerror(number))
            for number in (
                errno.ESTALE,
                errno.EIO,
                errno.ETIMEDOUT,
                errno.ENOSPC,
                errno.EDQUOT,
                errno.EAGAIN,
                errno.ECONNRESET,
                errno.ENETDOWN,
                errno.EPIPE,
                errno.EHOSTUNREACH,
            )
        ),
        TimeoutError("no answer"),
        ConnectionResetError("gone"),
        StoreError(503),
        StoreError(429),
        errors.PassingError("the disk is full"),
        chained(
            OSError("checkpoint 2 could not be written"), OSError(errno.EIO, "Input/output error")
        ),
        chained(ValueError("the tokens cannot be read"), StoreError(500)),
        ValueError(
            "RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']"
        ),
        ValueError("UNAVAILABLE: CURL error: Could not connect [http_response_code='503']"),
        ValueError("DEADLINE_EXCEEDED: All 32 retry attempts failed"),
    ],
)
def test_transient_errors_have_the_exit_code_for_a_restart(error):
    line, code = errors.explain(error)
    assert code == errors.PASSING and code not in errors.FINAL and line.count("\n") == 0


@pytest.mark.parametrize(
    "error",
    [
        *(
            OSError(number, os.strerror(number), "x")
            for number in (
                errno.ENOENT,
                errno.EACCES,
                errno.EISDIR,
                errno.ENOTDIR,
                errno.EROFS,
                errno.EPERM,
                errno.ENAMETOOLONG,
            )
        ),
        OSError("another run is writing"),
        BlockingIOError("another run writes"),
        ValueError("train.steps=0"),
        StoreError(404),
        ValueError("NOT_FOUND: no such bucket [http_response_code='404']"),
        ValueError("FAILED_PRECONDITION: Not a directory [os_error_code='20']"),
    ],
)
def test_invalid_input_is_not_retried(error):
    code = errors.explain(error)[1]
    assert code == (1 if isinstance(error, StoreError) else errors.BAD_INPUT)


def test_handled_errors_do_not_count():
    try:
        try:
            raise OSError(errno.EAGAIN, "locked")
        except OSError:
            raise OSError("another run is writing") from None
    except OSError as error:
        assert not errors.is_passing(error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), errors.PassingError),
        (OSError(errno.EACCES, "denied"), OSError),
        (ValueError("data.path"), ValueError),
    ],
)
def test_all_processes_raise_the_same_kind_of_error(error, kind, monkeypatch):
    sent = []
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes.multihost_utils, "broadcast_one_to_all", lambda x: sent.append(x) or x
    )

    def fails():
        raise error

    with pytest.raises((ValueError, OSError)) as caught:
        processes.run_on_first(fails)
    assert (
        type(caught.value) is kind and errors.explain(caught.value)[1] == errors.explain(error)[1]
    )
    assert len(sent) == 2


# --- file names


def test_a_home_folder_is_expanded_after_the_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert command.expand("~/run") == "/home/me/run" and command.expand("~") == "/home/me"
    assert command.expand("~root/x") == os.path.expanduser("~root/x")
    for same in ("run", "./~/run", "a~b", "/x/~", "gs://bucket/~x", "-", "", "größe/運"):
        assert command.expand(same) == same
    with pytest.raises(ValueError, match=r"no user 'nobody-here'.*\./~nobody-here/x"):
        command.expand("~nobody-here/x")


def test_a_name_that_is_not_utf_8_raises_an_error():
    with pytest.raises(ValueError, match="its bytes are not UTF-8"):
        command.expand(os.fsdecode(b"run-\xff"))


SCRIPTS = sorted((ROOT / "launch").rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_flags_that_name_files_are_paths(script):
    """A flag whose help mentions a file or folder is made by define_path, or expands its value
    itself."""
    text = script.read_text()
    words = [
        call
        for call in text.split("DEFINE_string(")[1:] + text.split("DEFINE_multi_string(")[1:]
        if any(
            word in call.split(")")[0].lower()
            for word in ("folder", "a file", "file of", "file for")
        )
    ]
    names = {call.split('"')[1] for call in words}
    assert names <= {"image", "workdir" if script.name == "launch.py" else "image"}, names


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "größe"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "運行"),
    ],
)
def test_an_unencodable_name_raises_before_any_work(environment, name, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "launch/plan.py", f"--config={tmp_path}/{name}.py"],
        text=True,
        env=os.environ | environment,
        capture_output=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "PYTHONUTF8=1" in done.stderr


GROUPED = '''
    """Do a thing, 10 % of the time, or %s.
    """
    import sys
    from absl import flags
    from mtnlg_jax import command
    with command.flag_group("The thing"):
        flags.DEFINE_string("b", None, "second: 5 % of it")
        command.define_path("a", None, "first")
    with command.flag_group("The rest"):
        flags.DEFINE_bool("c", False, "third")
    sys.argv = ["do", "--help"]
    command.run(lambda: None)
'''


def test_help_shows_flags_in_groups(tmp_path):
    module = tmp_path / "grouped.py"
    module.write_text(textwrap.dedent(GROUPED).strip())
    done = subprocess.run(
        [sys.executable, "-c", "import grouped"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.stdout == (
        "Do a thing, 10 % of the time, or %s.\n"
        "\nThe thing:\n  --a: first\n  --b: second: 5 % of it\n"
        "\nThe rest:\n  --[no]c: third\n    (default: 'false')\n"
        "\nTry --helpfull to get a list of all flags.\n"
    ), done.stderr


# --- broken output


class Broken(io.StringIO):
    errors = "strict"

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))

    def flush(self):
        self.write("")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF])
def test_a_broken_output_raises_nothing(number, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(number))
    monkeypatch.setattr(sys, "stderr", None)
    with command.lasting_output():
        print("a line", flush=True)
        print("another", file=sys.stderr)
        sys.stdout.writelines(["x\n"])
    assert isinstance(sys.stdout, Broken) and sys.stderr is None


PRINTS = """
    import sys, time
    from mtnlg_jax import command
    def main():
        for number in range(200):
            print(number, "a line " * 40, flush=number % 2 == 0)
            print("warning", file=sys.stderr)
        with open(sys.argv[0], "w") as file:
            file.write("done")
    program, sys.argv = sys.argv, ["x"]
    sys.argv[0] = program[1]
    command.run(main)
"""


@pytest.mark.parametrize(
    "shell", ["| head -1", "2>&1 | true", ">/dev/full", ">&- 2>&-", "2>/dev/full | head -c 5"]
)
def test_a_script_finishes_if_its_output_is_closed(shell, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PRINTS))
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'{sys.executable} {program} {tmp_path}/out {shell}; exit "${{PIPESTATUS[0]}}"',
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    full = shell == ">/dev/full"  # a reader may still wait for the lost output: exit code 74
    assert done.returncode == (errors.PASSING if full else 0), done.stderr
    assert ("standard output could not be written whole" in done.stderr) == full
    assert (tmp_path / "out").read_text() == "done", done.stderr
    assert "Traceback" not in done.stderr and "Broken pipe" not in done.stderr


def test_unencodable_characters_are_escaped():
    process = python(
        """
        from mtnlg_jax import command
        command.run(lambda: print("größe 運 " + chr(0xdcff)))
    """,
        stdout=subprocess.PIPE,
        environment={"PYTHONIOENCODING": "ascii"},
    )
    assert (
        process.communicate(timeout=PATIENCE)[0] == "gr\\xf6\\xdfe \\u904b \\udcff\n"
        and process.returncode == 0
    )


@pytest.mark.usefixtures("heeded_signals")
def test_an_interrupt_prints_one_line():
    process = python(
        """
        import time
        from mtnlg_jax import command
        def main():
            print("ready", flush=True)
            time.sleep(60)
        command.run(main)
    """,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE)[1] == "interrupted\n"
        assert process.returncode == errors.INTERRUPTED
    finally:  # a test that fails leaves nothing that a later one is blamed for
        process.kill()
        process.communicate()


# --- the launcher's end

CHILD = """
    import signal, sys, time
    from mtnlg_jax import command
    def main():
        ended = []
        signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
        print("ready", flush=True)
        while not ended:
            time.sleep(0.01)
        open(sys.argv[0], "w").close()
        return 75
    sys.argv[0:] = sys.argv[1:]
    command.run(main)
"""


def test_a_process_notices_the_end_of_its_launcher(tmp_path):
    reading, writing = os.pipe()
    child = python(
        CHILD,
        str(tmp_path / "saved"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[reading],
        environment={command.LAUNCHER_PIPE: str(reading)},
    )
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.2)
    assert child.poll() is None and not (tmp_path / "saved").exists()
    os.close(writing)  # as when the launcher is killed
    assert child.wait(PATIENCE) == 75 and (tmp_path / "saved").exists()
    os.close(reading)
    child.stdout.close()


@pytest.mark.parametrize("value", ["", "77", "0", "x"])
def test_a_process_without_a_launcher_watches_none(value):
    child = python(
        "from mtnlg_jax import command; command.run(lambda: None)",
        stdin=subprocess.DEVNULL,
        environment={command.LAUNCHER_PIPE: value},
        stderr=subprocess.PIPE,
    )
    assert child.communicate(timeout=PATIENCE)[1] == "" and child.returncode == 0
