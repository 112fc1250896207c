"""Check the density of code: lengths of functions and files, one value an assignment, legends.

Each rule is also tested on a planted violation. Ruff checks the width of lines (.ruff.toml).
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FUNCTION_LINES = 100
FILE_LINES = 450
SCRIPT_LINES = 120

PACKAGE = sorted((ROOT / "mtnlg_jax").rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "launch").glob("*.py")), *sorted((ROOT / "mtnlg_jax/cli").glob("*.py"))]
EVERYTHING = [
    path
    for folder in ("mtnlg_jax", "launch", "configs", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

# x_BSD, tokens_VD: one or more capital letters, or capital letters and digits, behind the last "_".
SUFFIX = re.compile(r"_([A-Z][A-Z0-9]*)$")
LEGEND = "# Shapes: "


def packed(text: str) -> list[int]:
    """Return the lines of assignments ``a, b = x, y``; a swap, which reads a target, may stay."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and not _is_swap(target.elts, node.value.elts):
            found.append(node.lineno)
    return found


def _is_swap(targets: list[ast.expr], values: list[ast.expr]) -> bool:
    if any(isinstance(value, ast.Starred) for value in values):
        return True  # the number of values is known only at run time
    read = {ast.unparse(node) for value in values[1:] for node in ast.walk(value)}
    return any(ast.unparse(target) in read for target in targets[:-1]) or any(
        isinstance(target, ast.Subscript) for target in targets
    )


def long_functions(text: str, most: int) -> list[str]:
    return [
        f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= most
    ]


def letters_without_legend(text: str) -> set[str]:
    """Return letters of shape suffixes of parameters and local variables that no legend
    explains."""
    used = set()
    for node in ast.walk(ast.parse(text)):
        name = (
            node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
        )
        match = SUFFIX.search(name)
        if match and not name.isupper():
            used |= set(re.sub(r"\d", "", match[1]))
    legend = "".join(_legend(text))
    return {letter for letter in used if not re.search(rf"\b{letter}\b", legend)}


def _legend(text: str) -> list[str]:
    """Return the lines of the comment that begins with "# Shapes: "."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(LEGEND)), None)
    if start is None:
        return []
    end = start
    while end < len(lines) and lines[end].strip().startswith("#"):
        end += 1
    return lines[start:end]


def _offenders(paths, rule) -> list[str]:
    found = []
    for path in paths:
        hits = rule(path.read_text(encoding="utf-8"))
        if hits:
            found.append(f"{path.relative_to(ROOT)}: {hits}")
    return found


def test_assignments_have_one_value():
    assert _offenders(EVERYTHING, packed) == []


def test_functions_are_short():
    assert _offenders(PACKAGE, lambda text: long_functions(text, FUNCTION_LINES)) == []


def _long(paths: list[Path], most: int) -> dict[str, int]:
    """Return the lengths of files that are longer than ``most``."""
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in paths
    }
    return {name: n for name, n in lengths.items() if n > most}


def test_files_are_short():
    assert _long(PACKAGE, FILE_LINES) == {}


def test_scripts_are_thin():
    assert _long(SCRIPTS, SCRIPT_LINES) == {}


def test_every_file_explains_its_letters():
    assert _offenders(PACKAGE, letters_without_legend) == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a, b = 1, 2", [1]),
        ("x = 0\nself.a, self.b = f(x), g(x)", [2]),
        ("a, b = b, a", []),
        ("a, b, c = c, a, b", []),
        ("x[0], x[1] = x[1], x[0]", []),
        ("a, b = f()", []),
        ("a, b = *c, d", []),
    ],
)
def test_a_planted_packed_assignment_is_found(text, lines):
    assert packed(text) == lines


def test_a_planted_long_function_is_found():
    body = "    pass\n" * 10
    assert long_functions(f"def f():\n{body}", 10) == ["f has 11 lines"]
    assert long_functions(f"def f():\n{body}", 11) == []


def test_a_planted_letter_is_found():
    text = "# Shapes: B rows, S query\n# positions\n\ndef f(x_BS, y_BD):\n    return x_BS\n"
    assert letters_without_legend(text) == {"D"}
    assert letters_without_legend("LIMIT_BS = 3\n") == set()
    assert letters_without_legend("x_B1 = 3\n") == {"B"}


def test_the_order_of_imports_does_not_depend_on_what_the_quickstart_leaves(tmp_path):
    shutil.copy(ROOT / ".ruff.toml", tmp_path)
    (tmp_path / "runs").mkdir()  # made by the quickstart; tests have a module of this name
    imports = "import pytest\nfrom runs import save_run\n\nfrom mtnlg_jax import errors\n"
    (tmp_path / "test_a.py").write_text(imports)
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select=I", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
