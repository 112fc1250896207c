"""Find the files of a task in a folder by their names, and read their rows."""

import gzip
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtnlg_jax import storage

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Names that files of a task go by, each a tuple of parts that must all occur; the first that fits.
ALIASES: dict[str, tuple[tuple[str, ...], ...]] = {
    "lambada": (("lambadaopenai",), ("lambada",)),
    "race": (("racehigh",), ("race", "high"), ("race",)),
    "anli_r1": (("anli", "r1"),),
    "anli_r2": (("anli", "r2"),),
    "anli_r3": (("anli", "r3"),),
    "hans": (("hans",), ("heuristics", "set")),
    "rte": (("rte",),),
    "winogrande": (("winograndexl",), ("winogrande",)),
}
# Parts that tell another variant of a task.
OTHERS = {"race": ("middle", "racemiddle")}

_SHARD = re.compile(r"-\d{5}-of-\d{5}")


class Rows(NamedTuple):
    """Rows of a split, and "FILE row N" of each."""

    rows: list[dict[str, Any]]
    places: list[str]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _runs(component: str) -> set[str]:
    """Return the words of a name, and what neighbors spell together: arc_easy has arceasy."""
    words = re.findall(r"[a-z0-9]+", component.lower())
    return {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def _split_of(path: Path, root: Path) -> str | None:
    """Return the split that the name of a file, or of a folder above, contains; None without."""
    inside = path.relative_to(root).parts
    for part in reversed(inside):
        words = re.findall(r"[a-z]+", part.lower())
        for split, names in SPLITS.items():
            if any(word in names for word in words):
                return split
    return None


def _fit(path: Path, root: Path, aliases: Sequence[tuple[str, ...]]) -> int | None:
    """Return how well a file's name fits, 0 the best; None if it does not."""
    parts = [*path.relative_to(root).parts[:-1], path.name.removesuffix(".gz")]
    inside = set().union(*map(_runs, [*parts[:-1], os.path.splitext(parts[-1])[0]]))
    around = inside | _runs(root.name)
    for rank, alias in enumerate(aliases):
        # A file in the folder counts for more than the name of the folder itself.
        for worse, found in ((0, inside), (1, around)):
            if all(part in found for part in alias):
                return 2 * rank + worse
    return None


def _listed(root: Path) -> list[Path]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return [
        path
        for path in paths
        if path.name.removesuffix(".gz").endswith(SUFFIXES)
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]


def find(folder: str, name: str, evaluated: str, form: str | None = None) -> dict[str, list[Path]]:
    """Return {split: files} of the task ``name`` below ``folder``; the files of a split are shards.

    ``evaluated``: the split that the task evaluates, "validation" or "test". Another takes its
    place where the folder lacks it. A file whose name contains no split is evaluated. ``form``: the
    task whose files it shares (lambada for lambada_openai). Raise FileNotFoundError or ValueError
    without a file, and with several that fit alike.
    """
    if storage.is_remote(folder):
        raise ValueError(f"--task_data={folder}: tasks read local files; copy the folder first")
    root = Path(folder)
    if root.is_file():
        return {evaluated: [root]}
    if not root.is_dir():
        raise FileNotFoundError(storage.missing(folder))
    key = name if name in ALIASES else form or name
    aliases = ALIASES.get(key, ((_plain(key),),))
    if key != name:
        # A file of the task's own name counts before those of the task whose rows it shares.
        aliases = ((_plain(name),), *aliases)
    found: dict[str | None, list[tuple[int, Path]]] = {}
    for path in _listed(root):
        fit = _fit(path, root, aliases)
        words = set().union(*map(_runs, path.relative_to(root).parts))
        if fit is None or words & set(OTHERS.get(key, ())):
            continue
        found.setdefault(_split_of(path, root), []).append((fit, path))
    if not found:
        raise FileNotFoundError(
            f"--task_data={folder} has no file for the task {name}: a name or a folder must "
            f"contain {' or '.join('+'.join(alias) for alias in dict.fromkeys(aliases))}, and "
            f"end with {', '.join(SUFFIXES)}"
        )
    splits = {split: _only(paths, name) for split, paths in found.items()}
    other = "validation" if evaluated == "test" else "test"
    chosen = next((split for split in (evaluated, None, other) if split in splits), None)
    if chosen not in splits:
        names = ", ".join(map(str, splits["train"]))
        raise FileNotFoundError(
            f"the task {name} needs rows of a {evaluated} split; --task_data={folder} has those "
            f"for training alone ({names})"
        )
    result = {evaluated: splits[chosen]}
    if "train" in splits:
        result["train"] = splits["train"]
    if evaluated == "test" and chosen != "validation" and "validation" in splits:
        result["validation"] = splits["validation"]
    return result


def _only(ranked: list[tuple[int, Path]], name: str) -> list[Path]:
    """Return the files of the best fit if they are one file or its shards."""
    best = min(fit for fit, _ in ranked)
    paths = [path for fit, path in ranked if fit == best]
    stems = {(path.parent, _SHARD.sub("", path.name)) for path in paths}
    # RACE has a folder of files, one for each article.
    numbered = {path.parent for path in paths if path.stem.isdigit() and path.suffix == ".txt"}
    if len(stems) > 1 and numbered != {paths[0].parent}:
        shown = ", ".join(map(str, paths[:4]))
        raise ValueError(
            f"{len(paths)} files fit the task {name}: {shown}; leave one of them in the folder, "
            "or name the file itself with --task_data"
        )
    return paths


def read(paths: Sequence[str | Path]) -> Rows:
    """Return the rows of files of one split, in order.

    JSON lines, JSON (a list, or an object with the key data), Parquet, CSV, TSV, each may be
    compressed (.gz). Raise ValueError with file and row for a row that is not an object, and for
    files without rows.
    """
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(storage.missing(str(path)))
        for number, row in enumerate(_rows(path), 1):
            if not isinstance(row, dict):
                raise ValueError(f"{path} row {number} is not an object with fields: {row!r:.60}")
            rows.append(row)
            places.append(f"{path} row {number}")
    if not rows:
        raise ValueError(f"{', '.join(map(str, paths))} has no rows; a task needs at least one")
    return Rows(rows, places)


def _rows(path: Path) -> Iterator[Any]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is not a Parquet file that can be read: {error}") from None
        return
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if name.endswith((".csv", ".tsv")) or (name.endswith(".txt") and not _is_json(text)):
        yield from _table(text, "," if name.endswith(".csv") else "\t")
    elif name.endswith(".jsonl"):
        yield from _json_lines(path, text)
    else:
        yield from _json(path, text)


def _is_json(text: str) -> bool:
    return text.lstrip()[:1] in ("{", "[")


def _table(text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    import csv
    import io

    file = io.StringIO(text, newline="")
    if delimiter == ",":
        yield from csv.DictReader(file)
    else:
        # Tables between tabs have no quoting: HANS has sentences with single quotation marks.
        yield from csv.DictReader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    # Not splitlines, which also splits at characters inside of strings (U+2028).
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from None


def _json(path: Path, text: str) -> Iterator[Any]:
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except ValueError:
        yield from _json_lines(path, text)
        return
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    yield from content if isinstance(content, list) else [content]
