"""Find the input files of a recipe, each once, and note what is left out."""

import dataclasses
import os

from mtnlg_jax import storage
from mtnlg_jax.data.read.documents import ReadReport, list_files, note_lines
from mtnlg_jax.data.read.open_files import READ_ALREADY, File, find
from mtnlg_jax.data.recipe import texts
from mtnlg_jax.data.recipe.settings import Recipe


def input_files(recipe: Recipe) -> tuple[dict[str, list[File]], list[dict]]:
    """Return the files of each source, sorted by name, and notes (of `ReadReport`) on those left
    out.

    A file that two sources reach through links, or one by a link and one by its own name, belongs
    to only one of them.

    Raises ValueError if a source has nothing to read, or names a file twice.
    """
    found = {}
    reports = {source.name: ReadReport() for source in recipe.sources}
    for source in recipe.sources:
        report = reports[source.name]
        listed = [list_files(path, report) for path in source.paths]
        files = [file for part in listed for file in part]
        if not files:
            lines = [
                f"source {source.name!r} has nothing to read: {', '.join(source.paths)} "
                f"({report.skipped_files} files of unknown suffix)",
                *note_lines(report.notes)[:3],
            ]
            raise ValueError("; ".join(lines))
        if len({file.name for file in files}) < len(files):
            # Two folders hold files of the same name: put the number of the folder before it.
            files = [
                dataclasses.replace(file, name=f"{number}/{file.name}")
                for number, part in enumerate(listed)
                for file in part
            ]
        paths = [file.path for file in files]
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise ValueError(f"source {source.name!r} would read {twice} twice; name it once")
        found[source.name] = sorted(files, key=lambda file: file.name)
    _drop_repeated_links(found, reports)
    left_out = [texts.named_after(name, report.notes) for name, report in reports.items()]
    return found, left_out


def _drop_repeated_links(found: dict[str, list[File]], reports: dict[str, ReadReport]) -> None:
    if not any(file.linked for files in found.values() for file in files):
        return
    own = {file.real for files in found.values() for file in files if not file.linked}
    for name, files in found.items():
        kept = []
        for file in files:
            if file.linked and file.real in own:
                reports[name].note(f"left out, {READ_ALREADY}", file.name)
            else:
                kept.append(file)
                own.add(file.real)
        found[name] = kept


def beside_sources(recipe: Recipe, root: str) -> dict[str, dict]:
    """Return notes on entries of ``root`` that are in no source."""
    if storage.is_remote(root):
        listed = find(root)
        paths = [file.name for file in listed.files] if listed else []
        paths += [name for _, name in listed.left_out] if listed else []
        names = {path.split("/")[0] for path in paths}
    else:
        names = set(os.listdir(root)) if os.path.isdir(root) else set()
    sources = [path.rstrip("/") + "/" for source in recipe.sources for path in source.paths]
    report = ReadReport()
    for name in sorted(names):
        entry = storage.join(root, name) + "/"
        if not any(entry.startswith(path) or path.startswith(entry) for path in sources):
            report.note("left out, in no source", name)
    return report.notes
