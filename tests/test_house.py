"""Check the rules of the repository: imports between packages, fixed files, pinned versions."""

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mtnlg_jax import __version__

ROOT = Path(__file__).resolve().parents[1]

# A package may import itself and those on the lines above it, but not others on its line.
ORDER = """
    errors
    compat command storage foreign intervals pages
    config
    xla_flags hardware
    parallel
    model
    data
    train
    decode
    interop
    tasks evaluate planning certify
    serve
    cli
"""

TOP_LEVEL = {
    *("mtnlg_jax", "configs", "launch", "tests", "notebooks", "benchmarks", "docs"),
    *("setup.py", "README.md", "README.zh.md", "LICENSE"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"),
}


def _package_of(module: str) -> str | None:
    """Return the package of ORDER that contains "mtnlg_jax.parallel.mesh", or None."""
    inside = module.removeprefix("mtnlg_jax.") + "."
    return next((package for package in ORDER.split() if inside.startswith(package + ".")), None)


def _imports(path: Path, module: str):
    """Yield (line, dotted name) of every import in a file, including those inside functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            source = ".".join([*start, *filter(None, [node.module])])
            # `from mtnlg_jax.parallel import mesh` imports the module mtnlg_jax.parallel.mesh.
            yield from ((node.lineno, f"{source}.{name.name}") for name in node.names)


def _violations(package: Path) -> list[str]:
    height = {
        name: line
        for line, names in enumerate(ORDER.strip().splitlines())
        for name in names.split()
    }
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        parts = [package.name, *relative.with_suffix("").parts]
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        own = _package_of(module)
        if own is None and path.name != "__init__.py":
            found.append(f"{relative}: is in no package of ORDER")
        for line, name in _imports(path, module):
            if name.split(".")[0] in ("configs", "launch", "tests"):
                found.append(f"{relative}:{line}: imports {name}, which stands above the package")
            elif name.startswith("mtnlg_jax.") and not name.startswith("mtnlg_jax.__"):
                target = _package_of(name)
                if target is None:
                    found.append(
                        f"{relative}:{line}: imports {name}, which is in no package of ORDER"
                    )
                elif own is None or (own != target and height[target] >= height[own]):
                    found.append(f"{relative}:{line}: {own or module} imports {name}")
    return found


def test_imports_flow_one_way():
    assert _violations(ROOT / "mtnlg_jax") == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("config.py", "import mtnlg_jax.model.attention"),
        ("data/filter/clean.py", "from mtnlg_jax.train import loop"),
        ("parallel/mesh.py", "from mtnlg_jax import model"),
        ("storage.py", "from . import config"),
        ("parallel/pipeline.py", "from mtnlg_jax.model.context_attention import ring"),
        ("model/kernels/tpu/flash.py", "from ....train.step import step"),
        ("model/transformer.py", "def late():\n    from mtnlg_jax.decode.cache import Cache"),
        ("evaluate/cloze.py", "import configs.tiny"),
        ("__init__.py", "from mtnlg_jax.parallel.mesh import make_mesh"),
        ("attic.py", ""),
        ("decode/cache.py", "from mtnlg_jax.attic import old"),
    ],
)
def test_a_planted_wrong_import_is_found(tmp_path, where, line):
    path = tmp_path / "mtnlg_jax" / where
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert len(_violations(tmp_path / "mtnlg_jax")) == 1


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("model/attention.py", "from mtnlg_jax.parallel import collectives, mesh"),
        ("model/attention.py", "from .kernels import flash_tpu"),
        ("parallel/pipeline.py", "from .mesh import spec_of"),
        ("train/loop.py", "from mtnlg_jax import __version__, compat, config"),
        ("data/store/tokens.py", "import numpy\nfrom mtnlg_jax.data.tokenizer import load"),
    ],
)
def test_an_import_from_above_is_allowed(tmp_path, where, line):
    path = tmp_path / "mtnlg_jax" / where
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert _violations(tmp_path / "mtnlg_jax") == []


def _circle(package: Path) -> list[str]:
    """Return files that import each other in a cycle, including imports inside functions; [] for
    none."""
    graph = {}
    for path in package.rglob("*.py"):
        module = ".".join(
            [package.name, *path.relative_to(package).with_suffix("").parts]
        ).removesuffix(".__init__")
        graph[module] = path
    imported = {
        # An import names a module or an attribute of one.
        module: {
            found if found in graph else found.rpartition(".")[0]
            for _, found in _imports(path, module)
        }
        for module, path in graph.items()
    }
    try:
        inside = {name: found & set(graph) - {name} for name, found in imported.items()}
        list(graphlib.TopologicalSorter(inside).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_files_do_not_import_each_other():
    assert _circle(ROOT / "mtnlg_jax") == []


@pytest.mark.parametrize(
    "line",
    [
        "from mtnlg_jax.data.b import f",
        "from mtnlg_jax.data import b",
        "from . import b",
        "def late():\n    from mtnlg_jax.data import b",
        "import mtnlg_jax.data.c",
    ],
)
def test_a_planted_cycle_is_found(tmp_path, line):
    folder = tmp_path / "mtnlg_jax" / "data"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text(line + "\n")
    (folder / "b.py").write_text("from mtnlg_jax.data.c import g\n")
    (folder / "c.py").write_text("")
    assert _circle(tmp_path / "mtnlg_jax") == []
    (folder / "c.py").write_text("from mtnlg_jax.data import a\n")
    assert len(_circle(tmp_path / "mtnlg_jax")) >= 3


def _missing(path: Path) -> list[str]:
    """Return names that a file imports from the package and that the package does not define."""
    found = []
    for line, name in _imports(path, "none"):
        if not name.startswith("mtnlg_jax."):
            continue
        module, _, last = name.rpartition(".")
        if _file_of(name) is None and not _defines(_file_of(module), last):
            found.append(f"{path.name}:{line}: {name}")
    return found


def _file_of(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _defines(path: Path | None, name: str) -> bool:
    if path is None:
        return False
    return name in {
        defined
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        for defined in _names_of(node)
    }


def _names_of(node: ast.stmt) -> set[str]:
    """Return names that a statement of a module binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {name.asname or name.name for name in node.names}
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def test_imports_of_files_outside_the_package_exist(tmp_path):
    """Few tests reach the imports inside functions of benchmarks, configs and scripts."""
    paths = [
        path
        for folder in ("benchmarks", "configs", "launch")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(paths) > 20
    assert [line for path in paths for line in _missing(path)] == []
    planted = tmp_path / "planted.py"
    planted.write_text(
        "def f():\n    from mtnlg_jax.data import storage\n    import mtnlg_jax.attic\n"
    )
    assert len(_missing(planted)) == 2


def test_the_data_room_does_not_import_jax():
    modules = []
    for path in sorted((ROOT / "mtnlg_jax/data").rglob("*.py")):
        inside = path.relative_to(ROOT).with_suffix("")
        modules.append(".".join(inside.parts).removesuffix(".__init__"))
        heads = {name.split(".")[0] for _, name in _imports(path, modules[-1])}
        assert not heads & {"jax", "jaxlib", "flax", "optax", "orbax"}, path.name
    # An imported module may import JAX itself, so a new process checks the result.
    program = f"import sys\nfor name in {modules}: __import__(name)\nprint('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_importing_the_package_imports_no_room():
    program = (
        "import sys; before = set(sys.modules); import mtnlg_jax; print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["mtnlg_jax"]


def test_the_top_level_is_fixed():
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout: " + listing.stderr.strip())
    names = {path.split("/")[0] for path in listing.stdout.split("\0") if path}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_the_license_is_the_same_everywhere():
    name = re.search(
        r"^SPDX-License-Identifier: (\S+)$", (ROOT / "LICENSE").read_text(), re.MULTILINE
    )[1]
    assert name == "Apache-2.0" and f'license="{name}"' in (ROOT / "setup.py").read_text()
    assert f"[{name}](LICENSE)" in (ROOT / "README.md").read_text()
    assert f"license: {name}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_citation_has_the_current_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def _requirements() -> list[Requirement]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    call = next(node for node in calls if ast.unparse(node.func) == "setup")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = ast.literal_eval(given["extras_require"])
    return [
        Requirement(line)
        for line in ast.literal_eval(given["install_requires"]) + extras["dev"] + extras["ahead"]
    ]


def test_every_requirement_is_pinned_within_its_range():
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    assert lines[0].startswith("# ") and "uv pip compile" in lines[0]
    pins = dict(re.fullmatch(r"([^=]+)==([^ ;]+)(?: ;.*)?", line).groups() for line in lines[1:])
    assert all("://" not in line and "@" not in line for line in lines), "an address among the pins"
    for requirement in _requirements():
        version = pins.get(canonicalize_name(requirement.name))
        assert version, (
            f"{requirement.name} is not pinned; line 1 of constraints.txt says how to renew it"
        )
        assert requirement.specifier.contains(version), (
            f"pinned {version}, but setup.py wants {requirement}"
        )


SCRIPTS = [*sorted((ROOT / "launch").rglob("*.sh")), ROOT / ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", "-P", "SCRIPTDIR", script], check=True)
