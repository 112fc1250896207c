"""Check the reading path from the command to the gradient: few calls, few lines, and correct.

One device, the causal objective, AdamW, no adapters and no teacher. README.md shows this path.
"""

import ast
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mtnlg_jax"
MOST_CALLS = 5
MOST_LINES = 700


class Stop(NamedTuple):
    """A function of the path.

    ``called`` is the name that the callee of a call in the function before must be, or be made of:
    a variable counts if an assignment, or the result of a factory in the same file, leads from it
    to this name.
    """

    file: str
    function: str  # dotted: a method, or a function inside its factory
    called: str


PATH = [
    Stop("cli/pretrain.py", "main", ""),
    Stop("train/loop.py", "train", "train"),
    # The loop holds steps made by CompiledStep(make_train_step(...)).
    Stop("train/step.py", "CompiledStep.__call__", "CompiledStep"),
    # The compiled form of the jitted function that CompiledStep was given.
    Stop("train/step.py", "make_train_step.train_step", "self._train_step"),
    # make_train_step names the result of this factory loss_and_gradients.
    Stop(
        "train/gradients.py",
        "make_loss_and_gradients.loss_and_gradients",
        "make_loss_and_gradients",
    ),
]
GRADIENT = "jax.value_and_grad"

FUNCTIONS = (ast.FunctionDef, ast.ClassDef)


def _find(tree: ast.Module, dotted: str) -> list[ast.FunctionDef | ast.ClassDef]:
    """Return the definition of ``dotted`` and those around it, outermost first; [] for none."""
    found: list = []
    inside: ast.AST = tree
    for name in dotted.split("."):
        matches = [n for n in ast.walk(inside) if isinstance(n, FUNCTIONS) and n.name == name]
        if not matches:
            return []
        inside = matches[0]
        found.append(inside)
    return found


def _names(node: ast.AST) -> set[str]:
    """Return all names in an expression, such as x and self.x."""
    nodes = ast.walk(node)
    return {ast.unparse(n) for n in nodes if isinstance(n, (ast.Name, ast.Attribute))}


def _root(target: ast.expr) -> str:
    """Return x for x and x[...], and self.x for self.x."""
    return ast.unparse(target.value if isinstance(target, ast.Subscript) else target)


def _traced(tree: ast.Module, scopes: list, name: str, seen: set[tuple[str, str]]) -> set[str]:
    """Return ``name`` and all names it is made of in ``scopes``, or by a factory of this file."""
    key = (scopes[-1].name, name)
    if key in seen:
        return set()
    seen.add(key)
    found = {name}
    for scope in scopes:
        for node in ast.walk(scope):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            value = getattr(node, "value", None)
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and value is not None:
                if name in map(_root, targets):
                    for part in _names(value):
                        found |= _traced(tree, scopes, part, seen)
    factory = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    return found | (_returned(tree, factory, seen) if factory else set())


def _returned(tree: ast.Module, scopes: list, seen: set[tuple[str, str]]) -> set[str]:
    """Return all names that the results of the innermost of ``scopes`` are made of."""
    returns = [n for n in ast.walk(scopes[-1]) if isinstance(n, ast.Return) and n.value]
    names = {name for node in returns for name in _names(node.value)}
    return names.union(*(_traced(tree, scopes, name, seen) for name in names))


def _calls(tree: ast.Module, scopes: list, name: str) -> bool:
    """Return whether the innermost of ``scopes`` calls ``name``, or a variable made of it."""
    calls = [node for node in ast.walk(scopes[-1]) if isinstance(node, ast.Call)]
    return any(name in _traced(tree, scopes, _root(call.func), set()) for call in calls)


def _imports(tree: ast.Module, name: str, file: str) -> bool:
    """Return whether ``name`` is imported from ``file`` of the package."""
    module = "mtnlg_jax." + file.removesuffix(".py").replace("/", ".")
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == module
        and name in [alias.name for alias in node.names]
        for node in ast.walk(tree)
    )


def _faults(package: Path, path: list[Stop]) -> list[str]:
    """Return one line for each way in which ``path`` is not a path, or is too long."""
    trees = {stop.file: ast.parse((package / stop.file).read_text()) for stop in path}
    places = [(trees[stop.file], _find(trees[stop.file], stop.function)) for stop in path]
    faults = [
        f"{stop.file} does not define {stop.function}"
        for stop, (_, scopes) in zip(path, places, strict=True)
        if not scopes
    ]
    if faults:
        return faults
    targets = [*path[1:], Stop("", GRADIENT, GRADIENT)]
    for stop, (tree, scopes), target in zip(path, places, targets, strict=True):
        if not _calls(tree, scopes, target.called):
            faults.append(f"{stop.function} does not call {target.function}")
        if target.file not in ("", stop.file) and not _imports(tree, target.called, target.file):
            faults.append(f"{stop.file} does not import {target.called} from {target.file}")
    # A function inside a factory is on the path only if the factory returns it.
    for tree, scopes in places:
        if len(scopes) > 1 and isinstance(scopes[0], ast.FunctionDef):
            if scopes[-1].name not in _returned(tree, scopes[:1], set()):
                faults.append(f"{scopes[0].name} does not return {scopes[-1].name}")
    if len(path) > MOST_CALLS:
        faults.append(f"{len(path)} calls from {path[0].function} to {GRADIENT}")
    outermost = {
        (stop.file, scopes[0].name): scopes[0]
        for stop, (_, scopes) in zip(path, places, strict=True)
    }
    lines = sum(node.end_lineno - node.lineno + 1 for node in outermost.values())
    if lines > MOST_LINES:
        faults.append(f"{lines} lines from {path[0].function} to {GRADIENT}")
    return faults


def test_the_path_from_command_to_gradient_is_short():
    assert _faults(PACKAGE, PATH) == []


def test_the_steps_of_the_loop_are_train_steps():
    # What CompiledStep is given, which the list above cannot show.
    tree = ast.parse((PACKAGE / "train/loop.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    made = [call for call in calls if _root(call.func) == "CompiledStep"]
    assert len(made) == 1
    scopes = [n for n in tree.body if isinstance(n, FUNCTIONS) and made[0] in ast.walk(n)]
    given = _names(made[0].args[0])
    assert any("make_train_step" in _traced(tree, scopes, name, set()) for name in given)
    assert _imports(tree, "make_train_step", "train/step.py")


@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        ("cli/pretrain.py", "= train(", "= other(", "main does not call train"),
        ("train/loop.py", "import CompiledStep, ", "import ", "does not import CompiledStep"),
        ("train/step.py", "self._compiled(*args)", "(*args,)", "does not call make_train_step"),
        ("train/step.py", "jax.jit(train_step,", "jax.jit(other,", "does not return train_step"),
        ("train/step.py", "loss_and_gradients(model,", "other(model,", "does not call make_loss"),
        ("train/gradients.py", "jax.value_and_grad(loss_of)", "loss_of", "call jax.value_and_grad"),
        ("train/gradients.py", "    zero = ", "\n" * 700 + "    zero = ", "lines from main"),
    ],
)
def test_a_planted_detour_is_found(tmp_path, file, old, new, fault):
    for stop in PATH:
        (tmp_path / stop.file).parent.mkdir(exist_ok=True)
        shutil.copy(PACKAGE / stop.file, tmp_path / stop.file)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    (found,) = _faults(tmp_path, PATH)
    assert fault in found


def test_an_additional_call_is_found():
    longer = [PATH[0], *PATH]
    assert any("6 calls" in fault for fault in _faults(PACKAGE, longer))
