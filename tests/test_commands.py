"""Check every command in the documentation and scripts: its script, its flags, and its config."""

import argparse
import ast
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from mtnlg_jax.cli.decoding.settings import read_assignments
from mtnlg_jax.config import Config, load_config, override
from mtnlg_jax.data.recipe.settings import load_recipe

ROOT = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"\b(?:python|bash) (?:launch|benchmarks)/[\w/]+\.(?:py|sh)[^`\n]*")
# The script that a shell script passes its flags to, and the number of arguments before them.
HANDS_TO = {
    "launch/quickstart.sh": ("launch/quickstart.py", 0),
    "launch/cluster/tpu_pod.sh": ("launch/pretrain.py", 2),
}


def _documents():
    """Yield (path, text) of everything that may show a command: pages, notebooks, scripts, and
    strings of modules."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listing.stdout.split() if listing.returncode == 0 else []
    if not names:
        pytest.skip("not a git checkout")
    for name in names:
        path = ROOT / name
        if name.startswith("tests/") or not path.is_file():
            continue
        if path.suffix == ".md":
            yield name, path.read_text()
        elif path.suffix in (
            ".sh",
            ".sbatch",
        ):  # the commands that they run are tested in tests/launch
            lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
            yield name, "\n".join(lines)
        elif path.suffix == ".ipynb":
            cells = json.loads(path.read_text())["cells"]
            yield from ((name, "".join(cell["source"])) for cell in cells)
        elif path.suffix == ".py":
            yield from ((name, text) for text in _strings(ast.parse(path.read_text())))


def _strings(tree):
    """Return the strings of a module, with three dots in place of the values of f-strings."""
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "..." for part in node.values
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
        ):
            yield node.value


def commands(text: str) -> list[list[str]]:
    """Return the commands in ``text``, each as [script, argument, ...]."""
    found = []
    text = re.sub(r"\s*\\\n[\s#]*", " ", text)
    text = re.sub(r"(='[^'\n]*)\n\s*([^'\n]*')", r"\1 \2", text)  # a quoted value over two lines
    for match in COMMAND.finditer(text):
        line = re.split(r"\s{2,}(?!--)| \| | && |; ", match[0])[0]
        if line.count(")") > line.count("("):  # punctuation of the surrounding prose
            line = line.removesuffix(")")
        try:
            words = shlex.split(line, comments=True)[1:]
        except ValueError:  # a quotation mark of the surrounding prose
            words = line.split()[1:]
        words = [word.removeprefix("[") for word in words]  # around optional parts
        words = [
            word.removesuffix("]") if word.count("]") > word.count("[") else word for word in words
        ]
        script, *given = words
        count = HANDS_TO.get(script, (script, 0))[1]
        if script.startswith("launch/"):
            # Scripts accept only --name=value: anything else is prose.
            end = next(
                (n for n, word in enumerate(given) if n >= count and not word.startswith("--")),
                len(given),
            )
            given = given[:end] + ["..."] * ("..." in given[end:])
        found.append([script, *given])
    return found


def problem(command: list[str]) -> str | None:
    """Return why ``command`` cannot run, in one line."""
    script, *given = command
    if not (ROOT / script).is_file():
        return f"{script} does not exist"
    if script == "launch/test.sh":
        return None  # its arguments are pytest's
    script, count = HANDS_TO.get(script, (script, 0))
    shortened = "..." in given
    given = [word for word in given[count:] if word != "..."]
    parse = _absl_problem if script.startswith("launch/") else _argparse_problem
    found = parse(script, given)
    if found and shortened and re.search(r"must (have a value|be specified)", found):
        found = None
    return found or (None if shortened else _config_problem(script, given))


def _absl_problem(script: str, given: list[str]) -> str | None:
    _forget_scripts()
    before = set(flags.FLAGS)
    try:
        runpy.run_path(str(ROOT / script), run_name="shown")
        try:
            left = flags.FLAGS([script, *given])
        except flags.Error as error:
            return str(error)
        return f"{left[1]!r} is not a flag" if len(left) > 1 else None
    finally:
        _forget_scripts()
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


def _forget_scripts() -> None:
    """Unload scripts: their flags are defined on import, and the next command needs them again."""
    for name in [name for name in sys.modules if name.startswith("mtnlg_jax.cli.")]:
        del sys.modules[name]
    for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
        if module.startswith("mtnlg_jax.cli."):
            for flag in list(defined):
                if flag.name in flags.FLAGS:
                    delattr(flags.FLAGS, flag.name)


class _Parsed(Exception):
    """Raised to end a benchmark once it has parsed its arguments."""


def _argparse_problem(script: str, given: list[str]) -> str | None:
    def parse_and_stop(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {unknown}")
        raise _Parsed

    def error(self, message):
        raise ValueError(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(argparse.ArgumentParser, "error", error)
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        try:
            main = runpy.run_path(str(ROOT / script), run_name="shown")["main"]
            main(*([given] if inspect.signature(main).parameters else []))
        except _Parsed:
            return None
        except ValueError as error:
            return str(error)
    return "parsed no arguments"


def _config_problem(script: str, given: list[str]) -> str | None:
    values = [
        word.partition("=")[2] for word in given if word.startswith("--set=") and "..." not in word
    ]
    config = next(
        (word.partition("=")[2] for word in given if word.startswith("--config=configs/")), None
    )
    try:
        if script in ("launch/task.py", "launch/generate.py"):
            read_assignments(values)
        elif script == "launch/quickstart.py":
            load_config(str(ROOT / "configs/quickstart.py"), values)
        elif config and script == "launch/prepare_data.py":
            load_recipe(str(ROOT / config), tuple(values))
        elif config:
            load_config(str(ROOT / config), values)
        elif values:
            override(Config(), *values)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def test_every_command_shown_can_run():
    shown = [(name, command) for name, text in _documents() for command in commands(text)]
    assert sum(name.startswith(("README", "docs/")) for name, _ in shown) > 20 and len(shown) > 90
    known = {}
    wrong = []
    for name, command in shown:
        key = tuple(command)
        if key not in known:
            known[key] = problem(command)
        if known[key]:
            wrong.append(f"{name}: {shlex.join(command)}: {known[key]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("python launch/pretrain.py --confg=configs/tiny.py --workdir=RUN", "confg"),
        ("python launch/pretrain.py --config=configs/tiny.py", "workdir"),
        ("python launch/pretrain.py --config=configs/tony.py --workdir=RUN", "tony.py"),
        (
            "python launch/pretrain.py --config=configs/tiny.py --workdir=RUN --set=train.step=3",
            "step",
        ),
        ("`python launch/generate.py --workdir=RUN --mode=rank` ranks", "mode"),
        ("python launch/generat.py --workdir=RUN", "does not exist"),
        ("python launch/prepare_data.py --output=OUT \\\n    --vocab_size=many", "many"),
        ("bash launch/quickstart.sh --corpse=FOLDER", "corpse"),
        ("python launch/task.py --workdir=RUN --task=answer --set=max_tokens=3", "max_tokens"),
        ("python benchmarks/compile_ahead.py --outptu=x", "outptu"),
        (
            "python launch/plan.py --config=configs/mtnlg_530b.py --set=data.path=a "
            "--set=\"data.blend=(('b',1),)\"",
            "both",
        ),
    ],
)
def test_an_invalid_command_is_found(text, words):
    (command,) = commands(text)
    assert words in problem(command)


@pytest.mark.parametrize(
    "text",
    [
        "python launch/pretrain.py --config=configs/mtnlg_530b.py --set=data.path=OUT "
        "--workdir=RUN",
        "bash launch/test.sh           # every test",
        "start it by python launch/plan.py --config=configs/tiny.py on a laptop",
        "python launch/cluster/launch.py --cluster=gke_gpu --nodes=4 ...",
        "bash launch/cluster/tpu_pod.sh TPU_NAME ZONE --config=... --workdir=RUN",
    ],
)
def test_a_valid_command_passes(text):
    (command,) = commands(text)
    assert problem(command) is None


@pytest.mark.parametrize(
    "command", sorted((ROOT / "mtnlg_jax/cli").glob("[a-z]*.py")), ids=lambda path: path.stem
)
def test_a_command_shows_its_own_help(command):
    program = (
        "import sys; sys.argv = ['mtnlg', '--help']; "
        f"from mtnlg_jax.cli.{command.stem} import run; run()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    docstring = ast.get_docstring(ast.parse(command.read_text()), clean=False)
    # Flags may be defined in the modules of subpackages that the command imports.
    imports = re.findall(r"from mtnlg_jax\.cli\.(\w+) import ([\w, ]+)", command.read_text())
    paths = [
        command.parent / folder / f"{name}.py"
        for folder, names in imports
        for name in names.split(", ")
    ]
    parts = [path for path in paths if path.is_file()]
    assert parts or not imports
    source = "".join(path.read_text() for path in [command, *parts])
    own = re.findall(r'(?:DEFINE_\w+|define_paths?)\(\s*"(\w+)"', source)
    assert docstring.splitlines()[0] in done.stdout, done.stdout + done.stderr
    assert all(re.search(rf"--(?:\[no\])?{name}\b", done.stdout) for name in own)


def test_console_commands_exist():
    given = re.findall(
        r'"mtnlg-[a-z-]+=(mtnlg_jax\.cli\.\w+):run"', (ROOT / "setup.py").read_text()
    )
    assert len(given) == 11
    for module in given:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        assert "\ndef run() -> None:\n" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
