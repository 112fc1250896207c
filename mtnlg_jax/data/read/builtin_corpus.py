"""A corpus that needs no download: the prose of Python's own documentation."""

import ast
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mtnlg_jax.data.read.documents import Document


def embedded_documents() -> Iterator[Document]:
    """Yield the prose of the running interpreter's own documentation, about 1 MB.

    First come the topics of ``help()``, then a document for each module of the standard library
    with the docstrings of the module, its classes and its functions; modules are parsed, never
    imported. Code, tables and signatures are omitted, and no paragraph occurs twice. The text is
    the same on every machine with the same version of Python.
    """
    seen = set()
    for source, docstrings in _documentation():
        paragraphs = []
        for docstring in docstrings:
            for paragraph in _prose(docstring):
                if paragraph.casefold() not in seen:
                    seen.add(paragraph.casefold())
                    paragraphs.append(paragraph)
        if paragraphs:
            yield Document("\n\n".join(paragraphs) + "\n", source)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return {}
    return topics


def _documentation() -> Iterator[tuple[str, list[str]]]:
    topics = _topics()
    for name in sorted(topics):
        yield f"topic:{name}", [topics[name]]
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        folder = library / name
        files = [library / f"{name}.py", *folder.rglob("*.py")] if name != "test" else []
        for file in sorted(files, key=lambda file: file.relative_to(library).as_posix()):
            # Tests have little prose, and not every installation has them.
            if file.is_file() and not {"test", "tests", "idle_test"} & set(
                file.relative_to(library).parts
            ):
                try:
                    tree = ast.parse(file.read_bytes())
                except SyntaxError:
                    continue
                yield f"module:{file.relative_to(library).as_posix()}", list(_docstrings(tree))


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[str]:
    yield ast.get_docstring(node, clean=False) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


_BULLET = re.compile(r"^\s*(?:[-*+•]|\(?\w{1,2}[.)])\s+")
_ROLE = re.compile(r":[a-z:]+:(?=`)|`")
_EMPHASIS = re.compile(r"(?<![\w\"'*])(\*\*?)(\w(?:[^*]*\w)?)\1(?![\w\"'*])")


def _prose(docstring: str) -> Iterator[str]:
    """Yield the paragraphs of a docstring that are sentences, each on one line, without markup."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        # Each item of a list is a separate paragraph.
        items: list[list[str]] = [[]]
        for line in block.split("\n"):
            if _BULLET.match(line):
                items.append([])
            items[-1].append(_BULLET.sub("", line).strip())
        for lines in items:
            if any(line.startswith((">>>", "...", "::=")) for line in lines):
                continue
            paragraph = " ".join(" ".join(line for line in lines if line).split())
            paragraph = _EMPHASIS.sub(r"\2", _ROLE.sub("", paragraph))
            if _is_prose(paragraph):
                yield paragraph


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    plain = sum(word.strip("'\"(),.;:!?-").isalpha() for word in words)
    return (
        len(words) >= 5
        and plain >= 0.75 * len(words)
        and paragraph[0].isupper()
        # Not ":", which introduces code or a table that was omitted.
        and paragraph.rstrip("\"')").endswith((".", "!", "?"))
    )
