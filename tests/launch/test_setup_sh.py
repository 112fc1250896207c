"""launch/setup.sh on machines that lack something: each gets one line and exit code 2, none is left
broken.

The machines are folders of small stand-ins on an otherwise empty PATH, so nothing here installs or
downloads.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "awk bash cat cksum cp cut df dirname du flock mkdir mv rm sleep sort tr touch"

# A Python of the wanted version. It answers the questions of setup.sh by running them in the real
# one, with what differs put in first; `-m venv` copies it into the new folder; `-m pip` ends as the
# file "pip" says.
STAND_IN = """#!{bash}
home="${{0%/*}}"
case "$2 $3" in
  "-c import mtnlg_jax") [[ -e "$home/../installed" ]] ;;
  "-c import pip") ;;
  "-c "*) exec {python} -c 'import sys; {lie}; exec(sys.argv[1])' "$3" ;;
  "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip")
    echo "$*" >>{room}/pip_calls
    case "$(<{room}/pip)" in
      works) touch "$home/../installed"; echo "Successfully installed everything" ;;
      slow) sleep 0.3; touch "$home/../installed" ;;
      hangs) touch {room}/hanging; sleep 30 ;;
      *) cat {room}/pip; exit 1 ;;
    esac ;;
  *) exit 127 ;;
esac
"""


class Machine:
    """A copy of the set-up scripts in an empty folder, and a PATH with only what is put there."""

    def __init__(self, room: Path):
        self.room = room
        self.repository = room / "a checkout"
        self.path = room / "bin"
        (self.repository / "launch").mkdir(parents=True)
        for name in ("setup.py", "launch/setup.sh", "launch/constraints.txt"):
            shutil.copy(ROOT / name, self.repository / name)
        self.path.mkdir()
        for tool in filter(shutil.which, TOOLS.split()):
            (self.path / tool).symlink_to(shutil.which(tool))
        self.pip("works")

    def pip(self, how: str) -> None:
        """`works`, `slow`, `hangs`, or the last words of a pip that fails."""
        (self.room / "pip").write_text(how + "\n")

    def pip_calls(self) -> list[str]:
        """The calls of pip since the last time this was asked."""
        record = self.room / "pip_calls"
        calls = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return calls

    def add(self, name: str, text: str) -> Path:
        program = self.path / name
        program.write_text(text)
        program.chmod(0o755)
        return program

    def add_python(self, name: str, version: str, without: str = "") -> Path:
        lie = f'sys.version_info = (*map(int, "{version}".split(".")), "final", 0)'
        lie += f'; sys._base_executable = "{self.path / name}"'
        if without:
            lie += f'; sys.modules["{without}"] = None'
        bash = shutil.which("bash")
        return self.add(
            name, STAND_IN.format(bash=bash, python=sys.executable, lie=lie, room=self.room)
        )

    def start(self, kind="run", **environment) -> subprocess.Popen:
        environment = {"PATH": str(self.path), "HOME": str(self.room)} | environment
        program = 'set -euo pipefail; source "$1/launch/setup.sh"; set_up "$2"; echo "$python"'
        return subprocess.Popen(
            [shutil.which("bash"), "-c", program, "bash", self.repository, kind],
            cwd=self.room,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def set_up(self, kind="run", **environment) -> str:
        """What a set-up that works tells the person."""
        process = self.start(kind, **environment)
        out, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
        assert out.strip() == f"{self.repository}/.venv/bin/python"
        return told

    def refusal(self, kind="run", **environment) -> str:
        """The last line of a set-up that does not work."""
        process = self.start(kind, **environment)
        out, told = process.communicate(timeout=60)
        assert (process.returncode, out) == (2, ""), told
        return told.splitlines()[-1]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_only_pythons_that_are_too_old(machine):
    machine.add_python("python3", "3.9.2")
    line = machine.refusal()
    assert (
        "found 3.9.2;" in line and "needs Python 3.12 to 3.14" in line and "MTNLG_PYTHON=" in line
    )
    assert not (machine.repository / ".venv").exists()


def test_a_python_too_new_for_the_pinned_wheels(machine):
    machine.add_python("python3", "3.15.0")
    assert "found 3.15.0;" in machine.refusal()


def test_no_python_at_all(machine):
    assert "found no Python;" in machine.refusal()


def test_a_debian_python_without_venv_is_passed_over(machine):
    machine.add_python("python3.13", "3.13.1", without="ensurepip")
    assert (
        "3.13.1 (without venv; on Debian and Ubuntu: apt install python3-venv)" in machine.refusal()
    )
    machine.add_python("python3", "3.12.4")
    assert "with Python 3.12.4" in machine.set_up()


def test_a_shim_that_does_not_run_is_passed_over(machine):
    machine.add("python3.13", "#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    machine.add_python("python3.12", "3.12.1")
    assert "with Python 3.12.1" in machine.set_up()


def test_the_newest_suitable_of_pyenv(machine):
    machine.add_python("python3", "3.11.9")
    for version in ("3.9.1", "3.13.9", "3.13.10", "3.15.0"):
        folder = machine.room / ".pyenv/versions" / version / "bin"
        folder.mkdir(parents=True)
        machine.add_python("made", version).rename(folder / "python")
    # `made` is what each calls itself, so it must be there to make the environment.
    machine.add_python("made", "3.13.10")
    assert "with Python 3.13.10" in machine.set_up()


def test_uv_is_asked_last_and_only_then_to_download(machine):
    bash = shutil.which("bash")
    found = machine.add_python("from_uv", "3.13.2")
    uv = f'#!{bash}\necho "$*" >>{machine.room}/uv_calls\n'
    uv += f'[[ "$2" == install ]] && touch {machine.room}/brought && exit\n'
    uv += f"[[ -e {machine.room}/brought ]] && echo {found}\n"
    machine.add("uv", uv)
    assert "with Python 3.13.2" in machine.set_up()
    assert "python install" in (machine.room / "uv_calls").read_text()

    (machine.room / "uv_calls").unlink()
    shutil.rmtree(machine.repository / ".venv")
    machine.add_python("python3", "3.12.0")
    assert "with Python 3.12.0" in machine.set_up()
    assert not (machine.room / "uv_calls").exists()


def test_a_forced_interpreter(machine):
    machine.add_python("python3.13", "3.13.0")
    other = machine.add_python("other", "3.12.7")
    assert "with Python 3.13.0" in machine.set_up()
    told = machine.set_up(MTNLG_PYTHON=str(other))
    assert "making .venv anew" in told and "with Python 3.12.7" in told
    # Once made of it, it is not made again, nor thrown away when nothing is forced.
    assert machine.set_up(MTNLG_PYTHON=str(other)) == "" == machine.set_up()

    old = machine.add_python("old", "3.8.1")
    assert f"MTNLG_PYTHON={old} is 3.8.1;" in machine.refusal(MTNLG_PYTHON=str(old))
    assert "not a Python that runs" in machine.refusal(MTNLG_PYTHON="/no/such/python")
    assert machine.set_up() == ""


def test_a_second_run_installs_nothing_until_something_changes(machine):
    machine.add_python("python3", "3.13.0")
    machine.set_up()
    calls = machine.pip_calls()
    assert len(calls) == 2 and all("-c launch/constraints.txt" in call for call in calls)
    assert calls[0].endswith("setuptools") and calls[1].endswith("-e .")
    assert machine.set_up() == "" and machine.pip_calls() == []

    assert "ready" in machine.set_up("dev")
    assert machine.pip_calls()[1].endswith("-e .[dev]")
    assert machine.set_up("dev") == "" == machine.set_up("run"), (
        "the test tools come on top of all the rest"
    )

    with (machine.repository / "launch/constraints.txt").open("a") as constraints:
        constraints.write("six==1.17.0\n")
    assert "anew" not in machine.set_up() and len(machine.pip_calls()) == 2


def test_a_copied_environment_is_installed_again(machine):
    machine.add_python("python3", "3.13.0")
    machine.set_up()
    copy = machine.room / "a copy"
    shutil.copytree(machine.repository, copy)
    machine.repository = copy
    assert "ready" in machine.set_up() and len(machine.pip_calls()) == 4


def test_a_set_up_that_was_killed_is_made_anew(machine):
    machine.add_python("python3", "3.13.0")
    machine.pip("hangs")
    process = machine.start()
    deadline = time.monotonic() + 30
    while not (machine.room / "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (machine.repository / ".venv/half of a package").touch()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    machine.pip("works")
    assert "making .venv anew" in machine.set_up()
    assert not (machine.repository / ".venv/half of a package").exists()
    assert not (machine.repository / ".venv.discarded").exists()


def test_an_environment_whose_interpreter_is_gone_is_made_anew(machine):
    machine.add_python("python3", "3.13.0")
    machine.set_up()
    inside = machine.repository / ".venv/bin/python"
    inside.unlink()
    inside.symlink_to(machine.room / "uninstalled")
    assert "making .venv anew" in machine.set_up()


def test_an_environment_that_works_needs_no_other_python(machine):
    python = machine.add_python("python3", "3.13.0")
    machine.set_up()
    python.unlink()
    assert "anew" not in machine.set_up("dev")

    # One that is unfinished does, and where there is none, nothing is thrown away.
    (machine.repository / ".venv/setup_state").write_text("installing\n")
    assert "found no Python" in machine.refusal()
    assert (machine.repository / ".venv/bin/python").exists()


NO_NETWORK = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': /simple/jax/
ERROR: No matching distribution found for jax"""
NO_NETWORK_NO_RETRIES = """\
ERROR: Cannot install setuptools because these package versions have conflicting dependencies.
ERROR: ResolutionImpossible"""
NO_SPACE = """\
Collecting jax
ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"""


@pytest.mark.parametrize(
    "words", [NO_NETWORK, NO_NETWORK_NO_RETRIES], ids=["retries", "no retries"]
)
def test_no_network_is_one_line_and_harms_nothing(machine, words):
    machine.add_python("python3", "3.13.0")
    machine.pip(words)
    line = machine.refusal()
    assert line.startswith("no network:") and f"{machine.repository}/.venv/setup.log" in line
    machine.pip("works")
    machine.set_up()

    # The test tools cannot be had, but what was there goes on to work.
    machine.pip(words)
    assert machine.refusal("dev").startswith("no network:")
    assert machine.set_up("run") == ""


def test_a_disk_that_fills_up(machine):
    machine.add_python("python3", "3.13.0")
    machine.pip(NO_SPACE)
    assert machine.refusal().startswith("no space:")
    machine.pip("works")
    assert "making .venv anew" in machine.set_up()


def test_any_other_failure_of_pip_names_its_error_and_the_log(machine):
    machine.add_python("python3", "3.13.0")
    machine.pip(
        "Collecting jax\nERROR: Cannot install jax and flax: versions in conflict\nmore words"
    )
    line = machine.refusal()
    assert "Cannot install jax and flax" in line and "setup.log" in line
    assert "more words" in (machine.repository / ".venv/setup.log").read_text()


def test_too_little_space_is_said_before_anything_is_done(machine):
    machine.add_python("python3", "3.13.0")
    (machine.path / "df").unlink()
    machine.add(
        "df", f"#!{shutil.which('bash')}\necho header\necho /dev/x 9999999 9000000 409600 96% /\n"
    )
    line = machine.refusal()
    assert line.startswith("no space:") and "400 MB free" in line and "2000 MB" in line
    assert not (machine.repository / ".venv").exists()


def test_a_folder_that_cannot_be_written(machine):
    machine.add_python("python3", "3.13.0")
    # A folder in the lock's place refuses everyone, the administrator included, who may write
    # anywhere else.
    (machine.repository / ".venv.lock").mkdir()
    line = machine.refusal()
    assert line.startswith("cannot write in") and not (machine.repository / ".venv").exists()


def test_two_at_once_take_turns(machine):
    machine.add_python("python3", "3.13.0")
    machine.pip("slow")
    both = [machine.start(), machine.start()]
    told = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sum("waiting for it" in text for text in told) == 1
    assert len(machine.pip_calls()) == 2, "the second found everything done"


def test_the_real_pip_without_a_network(machine):
    """Its own words, of which the stand-in repeats some: a closed port instead of the package
    index."""
    real = getattr(sys, "_base_executable", sys.executable)
    closed = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_RETRIES": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    assert machine.refusal(MTNLG_PYTHON=real, **closed).startswith("no network:")
