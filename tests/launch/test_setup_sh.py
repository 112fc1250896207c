"""launch/setup.sh on machines that lack something: each gets one line and exit code 2, and none is
left broken.

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
TOOLS = (
    "awk bash cat cksum cp cut df dirname du env flock grep mkdir mv rm sleep sort tail tee tr "
    "touch"
)

# A Python of some version: it answers what setup.sh asks an interpreter, without one.
PYTHON = """#!{bash}
home="${{0%/*}}"
case "$2 $3" in
  "-c import mtnlg_jax") [[ -e "$home/../installed" ]] ;;
  "-c import sys; print(sys._base_executable)") cat "$home/base" 2>/dev/null || echo "$0" ;;
  "-c import sys; print("*) version="{version}"; echo "${{version%.*}}" ;;
  "-c import platform"*) echo {version} ;;
  "-c import venv"*) {venv} ;;
  "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip")
    echo "$*" >>{room}/pip_calls
    cat {room}/pip
    [[ "$(<{room}/pip)" == works ]] && cp {room}/uv "$home/uv" ;;
  "-c ") ;;
  *) exit 127 ;;
esac
"""

# uv: finds the Pythons of the PATH by name, makes environments, and ends `pip install` as the file
# "how" says.
UV = """#!{bash}
echo "$*" >>{room}/uv_calls
case "$1 $2" in
  "--version ") ;;
  "python find")
    version="${{!#}}"
    command -v "python${{version#cpython-}}" || exit 2 ;;
  "python install") [[ -e {room}/python_to_download ]] || {{ echo "error: dns error" >&2; exit 1; }}
    mv {room}/python_to_download {room}/bin/python3.13 ;;
  "venv --quiet")
    rm -rf "$6" && mkdir -p "$6/bin" && cp "$5" "$6/bin/python" && echo "$5" >"$6/bin/base" ;;
  "pip install")
    case "$(<{room}/how)" in
      works) touch "${{4%/bin/python}}/installed"; echo "Installed everything" ;;
      slow) sleep 0.3; touch "${{4%/bin/python}}/installed" ;;
      hangs) touch {room}/hanging; sleep 30 ;;
      *) cat {room}/how; exit 1 ;;
    esac ;;
  *) exit 127 ;;
esac
"""


class Machine:
    """A copy of the set-up scripts in an empty folder, and a PATH of given programs only."""

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
        self._program(room / "uv", UV.format(bash=shutil.which("bash"), room=room))
        self.uv("works")
        self.pip("works")
        self.add_uv()

    def uv(self, how: str) -> None:
        """`works`, `slow`, `hangs`, or the last words of a uv that fails."""
        (self.room / "how").write_text(how + "\n")

    def pip(self, how: str) -> None:
        """`works`, or the last words of a pip that cannot install uv."""
        (self.room / "pip").write_text(how + "\n")

    def add_uv(self) -> None:
        shutil.copy(self.room / "uv", self.path / "uv")

    def installs(self) -> list[str]:
        """Return the calls of `uv pip install` since the last call of this."""
        record = self.room / "uv_calls"
        calls = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return [call for call in calls if call.startswith("pip install")]

    def _program(self, path: Path, text: str) -> Path:
        path.write_text(text)
        path.chmod(0o755)
        return path

    def add(self, name: str, text: str) -> Path:
        return self._program(self.path / name, text)

    def add_python(self, name: str, version: str, venv: bool = True) -> Path:
        bash = shutil.which("bash")
        text = PYTHON.format(
            bash=bash, version=version, room=self.room, venv="true" if venv else "false"
        )
        return self.add(name, text)

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
        """Return the report of a set-up that works."""
        process = self.start(kind, **environment)
        out, reported = process.communicate(timeout=60)
        assert process.returncode == 0, reported
        assert out.strip() == f"{self.repository}/.venv/bin/python"
        return reported

    def refusal(self, kind="run", **environment) -> str:
        """Return the last line of a set-up that fails."""
        process = self.start(kind, **environment)
        out, reported = process.communicate(timeout=60)
        assert (process.returncode, out) == (2, ""), reported
        return reported.splitlines()[-1]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_uv_downloads_a_python_only_where_none_suits(machine):
    machine.add_python("python3.11", "3.11.9")
    line = machine.refusal()
    assert "needs Python 3.12 to 3.14" in line and "MTNLG_PYTHON=" in line
    assert not (machine.repository / ".venv").exists()
    machine.add_python("downloaded", "3.13.2").rename(machine.room / "python_to_download")
    assert "with Python 3.13.2" in machine.set_up()


@pytest.mark.parametrize(
    ("names", "version"),
    [
        (["python3.12", "python3.14"], "3.12.0"),
        (["python3.14", "python3.15"], "3.14.0"),
        (["python3.12", "python3.13", "python3.14"], "3.13.0"),
    ],
)
def test_versions_are_preferred_in_this_order(machine, names, version):
    for name in names:
        machine.add_python(name, f"{name.removeprefix('python')}.0")
    assert f"with Python {version}" in machine.set_up()


def test_the_versions_of_pyenv_are_found(machine):
    folder = machine.room / ".pyenv/versions/3.13.10/bin"
    folder.mkdir(parents=True)
    machine.add_python("made", "3.13.10").rename(folder / "python3.13")
    assert "with Python 3.13.10" in machine.set_up()


def test_pip_installs_uv_where_it_is_missing(machine):
    (machine.path / "uv").unlink()
    machine.add_python("python3", "3.9.2")
    machine.add_python("python3.13", "3.13.0")
    reported = machine.set_up()
    assert "installing uv" in reported and "with Python 3.13.0" in reported
    # Another checkout of this user finds it.
    (machine.room / "pip_calls").unlink()
    shutil.rmtree(machine.repository / ".venv")
    assert "installing uv" not in machine.set_up()
    assert not (machine.room / "pip_calls").exists()


def test_without_uv_and_without_a_python_to_install_it(machine):
    (machine.path / "uv").unlink()
    assert "needs uv, or a Python 3 with venv" in machine.refusal()
    machine.add_python("python3", "3.13.1", venv=False)
    assert "apt install python3-venv" in machine.refusal()
    machine.add_python("python3.12", "3.12.4")
    assert "with Python 3.12.4" in machine.set_up()


def test_pip_cannot_install_uv(machine):
    (machine.path / "uv").unlink()
    machine.add_python("python3", "3.13.0")
    machine.pip("ERROR: Could not find a version that satisfies uv (from versions: none)")
    assert machine.refusal().startswith("no network:")
    machine.pip("ERROR: the wheel is damaged")
    assert "could not install uv: ERROR: the wheel is damaged" in machine.refusal()


def test_a_forced_interpreter(machine):
    machine.add_python("python3.13", "3.13.0")
    other = machine.add_python("other", "3.12.7")
    assert "with Python 3.13.0" in machine.set_up()
    reported = machine.set_up(MTNLG_PYTHON=str(other))
    assert "making .venv again" in reported and "with Python 3.12.7" in reported
    # Once made from it, it is not made again, nor removed when nothing is forced.
    assert machine.set_up(MTNLG_PYTHON=str(other)) == "" == machine.set_up()

    old = machine.add_python("old", "3.8.1")
    assert f"MTNLG_PYTHON={old} is 3.8;" in machine.refusal(MTNLG_PYTHON=str(old))
    assert "does not run" in machine.refusal(MTNLG_PYTHON="/no/such/python")
    assert machine.set_up() == ""


def test_a_second_run_installs_nothing_until_something_changes(machine):
    machine.add_python("python3.13", "3.13.0")
    machine.set_up()
    calls = machine.installs()
    assert len(calls) == 2 and all("-c launch/constraints.txt" in call for call in calls)
    assert calls[0].endswith("setuptools") and calls[1].endswith("-e .")
    assert machine.set_up() == "" and machine.installs() == []

    assert "ready" in machine.set_up("dev")
    assert machine.installs()[1].endswith("-e .[dev]")
    assert machine.set_up("dev") == "" == machine.set_up("run"), "dev includes run"

    with (machine.repository / "launch/constraints.txt").open("a") as constraints:
        constraints.write("six==1.17.0\n")
    assert "again" not in machine.set_up() and len(machine.installs()) == 2


def test_only_ahead_installs_the_compiler(machine):
    machine.add_python("python3.13", "3.13.0")
    machine.set_up("dev")
    assert not any("libtpu" in call for call in machine.installs())
    machine.set_up("ahead", OSTYPE="linux-gnu", HOSTTYPE="x86_64")
    assert machine.installs()[-1].endswith("/.venv/ahead libtpu")
    assert machine.set_up("dev") == "", "ahead includes dev"


def test_a_copied_environment_is_installed_again(machine):
    machine.add_python("python3.13", "3.13.0")
    machine.set_up()
    copy = machine.room / "a copy"
    shutil.copytree(machine.repository, copy)
    machine.repository = copy
    assert "ready" in machine.set_up() and len(machine.installs()) == 4


def test_a_set_up_that_was_killed_is_made_again(machine):
    machine.add_python("python3.13", "3.13.0")
    machine.uv("hangs")
    process = machine.start()
    deadline = time.monotonic() + 30
    while not (machine.room / "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (machine.repository / ".venv/half of a package").touch()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    machine.uv("works")
    assert "making .venv again" in machine.set_up()
    assert not (machine.repository / ".venv/half of a package").exists()


def test_an_environment_whose_interpreter_is_gone_is_made_again(machine):
    machine.add_python("python3.13", "3.13.0")
    machine.set_up()
    inside = machine.repository / ".venv/bin/python"
    inside.unlink()
    inside.symlink_to(machine.room / "uninstalled")
    assert "making .venv again" in machine.set_up()


def test_an_environment_that_works_needs_no_other_python(machine):
    python = machine.add_python("python3.13", "3.13.0")
    machine.set_up()
    python.unlink()
    assert "again" not in machine.set_up("dev")

    # One that is unfinished needs one, and where none is found nothing is removed.
    (machine.repository / ".venv/setup_state").write_text("installing\n")
    assert "needs Python 3.12 to 3.14" in machine.refusal()
    assert (machine.repository / ".venv/bin/python").exists()


NO_NETWORK = """\
error: Failed to fetch: `https://pypi.org/simple/jax/`
  Caused by: error sending request for url (https://pypi.org/simple/jax/)"""
OFFLINE = "error: Network connectivity is disabled: network connectivity is disabled"


@pytest.mark.parametrize("words", [NO_NETWORK, OFFLINE], ids=["no answer", "offline"])
def test_no_network_is_one_line_and_harms_nothing(machine, words):
    machine.add_python("python3.13", "3.13.0")
    machine.uv(words)
    line = machine.refusal()
    assert line.startswith("no network:") and f"{machine.repository}/.venv.log" in line
    machine.uv("works")
    machine.set_up()

    # The test tools cannot be installed, but what was there still works.
    machine.uv(words)
    assert machine.refusal("dev").startswith("no network:")
    assert machine.set_up("run") == ""


def test_a_disk_that_fills_up(machine):
    machine.add_python("python3.13", "3.13.0")
    machine.uv("error: failed to write\n  Caused by: No space left on device (os error 28)")
    assert machine.refusal().startswith("no space:")
    machine.uv("works")
    assert "making .venv again" in machine.set_up()


def test_any_other_failure_names_its_error_and_the_log(machine):
    machine.add_python("python3.13", "3.13.0")
    machine.uv("Resolved\nerror: jax and flax: versions in conflict\n\nmore words")
    line = machine.refusal()
    assert "versions in conflict" in line and ".venv.log" in line
    assert "more words" in (machine.repository / ".venv.log").read_text()


def test_too_little_space_is_reported_before_anything_is_done(machine):
    machine.add_python("python3.13", "3.13.0")
    (machine.path / "df").unlink()
    bash = shutil.which("bash")
    machine.add("df", f"#!{bash}\necho header\necho /dev/x 9999999 9000000 409600 96% /\n")
    line = machine.refusal()
    assert line.startswith("no space:") and "400 MB free" in line and "2000 MB" in line
    assert not (machine.repository / ".venv").exists()


def test_a_folder_that_cannot_be_written(machine):
    machine.add_python("python3.13", "3.13.0")
    # A folder in the lock's place refuses everyone, the administrator included, who may write
    # anywhere else.
    (machine.repository / ".venv.lock").mkdir()
    line = machine.refusal()
    assert line.startswith("cannot write in") and not (machine.repository / ".venv").exists()


def test_two_at_once_take_turns(machine):
    machine.add_python("python3.13", "3.13.0")
    machine.uv("slow")
    both = [machine.start(), machine.start()]
    reported = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], reported
    assert sum("waiting for it" in text for text in reported) == 1
    assert len(machine.installs()) == 2, "the second found everything done"


def test_the_real_uv_without_a_network(machine):
    """Its own words, which the stand-in repeats: a closed port instead of the package index."""
    cached = Path.home() / ".cache/mtnlg_jax/uv/bin/uv"
    real = shutil.which("uv") or (cached if cached.exists() else None)
    if real is None:
        pytest.skip("no uv on this machine")
    (machine.path / "uv").unlink()
    (machine.path / "uv").symlink_to(real)
    closed = {
        "MTNLG_PYTHON": os.path.realpath(sys.executable),
        "UV_DEFAULT_INDEX": "http://127.0.0.1:9/",
        "UV_NO_CACHE": "1",
        "UV_HTTP_RETRIES": "1",
    }
    assert machine.refusal(**closed).startswith("no network:")
