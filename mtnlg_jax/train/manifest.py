"""The record that makes a folder a checkpoint: what it holds, and the bytes of every file.

It is written last.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from mtnlg_jax.storage import is_remote, write_file

RECORD = "record.json"
HASH_THREADS = 4


def marker(folder: epath.Path, step: int) -> epath.Path:
    """Return the path of the empty file that exists while checkpoint ``step`` is written or
    deleted."""
    return folder / f"{step}.unfinished"


def candidates(folder: epath.Path) -> list[int]:
    """Return the steps of the checkpoints that are not known to be unfinished, ascending."""
    if not folder.exists():
        return []
    # Names such as 200.damaged are not numbers and drop out.
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    # There are no markers on an object store, where each would hold up the step that is saved.
    if is_remote(folder):
        return [step for step in steps if _has_record(folder, step)]
    return [
        step for step in steps if _has_record(folder, step) or not marker(folder, step).exists()
    ]


def finished(folder: epath.Path) -> list[int]:
    """Return the steps of the checkpoints of ``folder`` that have a record, ascending."""
    return [step for step in candidates(folder) if _has_record(folder, step)]


def best(folder: epath.Path) -> int | None:
    """Return the step with the lowest metric, the newest of equals; None without any metric."""
    rated = _rated(folder)
    # The pair sorts by metric, then by minus step: of equals the newest.
    return -min(rated)[1] if rated else None


def best_metric(folder: epath.Path) -> float | None:
    """Return the lowest metric of the checkpoints of ``folder``; None without any metric."""
    rated = _rated(folder)
    return min(rated)[0] if rated else None


def _rated(folder: epath.Path) -> list[tuple[float, int]]:
    """Return (metric, minus step) of each checkpoint that has a metric."""
    # A record that is damaged is None here; `damage` finds it when the checkpoint is read.
    records = [read_record(folder / str(step))[0] for step in finished(folder)]
    rated = [found for found in records if found and found["metric"] is not None]
    # Version 0.1.0 evaluated other rows: only metrics of the newest checkpoint's kind compare.
    kind = _kind(rated[-1]) if rated else None
    return [(found["metric"], -found["step"]) for found in rated if _kind(found) == kind]


def _kind(record: dict) -> str | None:
    return record["meta"].get("order_of_samples")


def write_record(path: epath.Path, content: dict) -> None:
    """Make ``path`` a checkpoint: sync all its files, then write a record of ``content`` and them.

    The first line of the record is the SHA-256 of the rest.
    """
    # The inventory also syncs the files: once the record exists, everything that it names is on
    # disk.
    body = json.dumps(content | {"files": _inventory(path)}, indent=1)
    # `write_file` renames a whole file into place. The digest in it shows later damage of the
    # record itself.
    write_file(path, RECORD, f"{_digest_of_text(body)}\n{body}".encode())
    # The folder's entry of the record must reach the disk as well.
    if not is_remote(path):
        _sync(path)


def read_record(path: epath.Path) -> tuple[dict | None, str | None]:
    """Return (record, None), or (None, what is wrong with it)."""
    try:
        digest, _, body = (path / RECORD).read_bytes().decode("utf-8", "replace").partition("\n")
    except FileNotFoundError:
        return None, f"{RECORD} is missing"
    # Compared before it is parsed, so that damage is never taken for settings.
    if _digest_of_text(body) != digest:
        return None, f"{RECORD} is not what was written"
    return json.loads(body), None


def damage(path: epath.Path, record: dict, below: str = "") -> str | None:
    """Return what is wrong with the files of ``path`` whose names begin with ``below``, if
    anything."""
    files = {name: pair for name, pair in record["files"].items() if name.startswith(below)}
    # Sizes first: they find a missing or truncated file without reading gigabytes.
    for name, (size, _) in files.items():
        if not (path / name).exists():
            return f"{name} is missing"
        found = (path / name).stat().length
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    hashed = {name: digest for name, (_, digest) in files.items() if digest is not None}
    # hashlib releases Python's lock, so threads hash in parallel.
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = pool.map(lambda name: _digest(path / name), hashed)
        for name, digest in zip(hashed, digests, strict=True):
            if digest != hashed[name]:
                return f"{name} is not what was written (SHA-256 differs)"
    return None


def refuse_difference(path: epath.Path, what: str, saved: dict, given: dict, way_out: str) -> None:
    """Raise ValueError naming each key in which the nested dicts ``saved`` and ``given`` differ."""
    # Leaf by leaf, so that the message names the setting and both values.
    saved = _leaves(saved)
    given = _leaves(given)
    pairs = {
        key: (saved.get(key, "absent"), given.get(key, "absent")) for key in {**saved, **given}
    }
    differences = [f"{key}: {old} -> {new}" for key, (old, new) in pairs.items() if old != new]
    if differences:
        more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ValueError(
            f"checkpoint {path} was saved with other {what} (saved -> given): "
            f"{', '.join(differences[:8])}{more}; {way_out}"
        )


def _has_record(folder: epath.Path, step: int) -> bool:
    return (folder / str(step) / RECORD).exists()


def _leaves(tree: dict, path: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def _files(path: epath.Path) -> Iterator[epath.Path]:
    for child in path.iterdir():
        if child.is_dir():
            yield from _files(child)
        else:
            yield child


def _inventory(path: epath.Path) -> dict[str, tuple[int, str | None]]:
    """Return {relative name: (bytes, SHA-256)} of all files below ``path``; sync local ones."""
    files = list(_files(path))
    names = [os.fspath(file.relative_to(path)) for file in files]
    sizes = [file.stat().length for file in files]
    # The store keeps checksums itself; reading everything back would cost as much as the save.
    if is_remote(path):
        return {name: (size, None) for name, size in zip(names, sizes, strict=True)}
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        # Synced first, so that an error of the disk shows before there is a record.
        digests = list(pool.map(_sync_and_digest, files))
    # A file's name is on disk only after its folder was synced.
    for folder, _, _ in os.walk(path):
        _sync(folder)
    # The entry of the checkpoint's own folder.
    _sync(path.parent)
    return {name: (size, digest) for name, size, digest in zip(names, sizes, digests, strict=True)}


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: str | os.PathLike) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_and_digest(path: os.PathLike) -> str:
    _sync(path)
    return _digest(path)
