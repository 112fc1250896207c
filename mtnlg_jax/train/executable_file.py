"""Files of compiled programs: a header in JSON, whose hash comes first, and the programs' bytes.

    MAGIC, 32 bytes SHA-256 of the header, 8 bytes length of the header (little-endian), header,
    the bytes of each program in the order of the header

The header says for each program its name, the key that decided it (`program_key`), the fingerprint
of its lowered text, the structure of its outputs, and the length and SHA-256 of its bytes.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from mtnlg_jax import storage

MAGIC = b"mtnlg_jax executable 1\n"
_START = len(MAGIC) + 32 + 8


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, as JAX serializes it in ``content``."""

    name: str  # "causal", "masked", with the number of a stage that has a teacher
    key: dict[str, Any]  # of `program_key`
    fingerprint: str  # of the lowered program, as in `step.CompiledStep`
    outputs: Any  # JSON with the structure of what it returns after the state
    content: bytes = dataclasses.field(repr=False)


def write(path: str, programs: Sequence[Program]) -> None:
    """Write ``programs`` to a file or a URL, atomically and durably."""
    entries = [
        {
            "name": program.name,
            "fingerprint": program.fingerprint,
            "outputs": program.outputs,
            "bytes": len(program.content),
            "sha256": hashlib.sha256(program.content).hexdigest(),
            "key": program.key,
        }
        for program in programs
    ]
    header = json.dumps({"programs": entries}, indent=1).encode()
    start = MAGIC + hashlib.sha256(header).digest() + len(header).to_bytes(8, "little")
    folder, name = _split(path)
    with storage.disk_errors(path, "the executable was not written"):
        storage.write_file(
            folder, name, b"".join([start, header, *(each.content for each in programs)])
        )


def read(path: str) -> dict[str, Program]:
    """Return the programs of a file or a URL by name.

    Nothing is unpickled or loaded here. Raises FileNotFoundError, and ValueError where it is a
    folder, foreign, truncated or damaged.
    """
    if not storage.is_remote(path) and os.path.isdir(path):
        raise ValueError(
            f"{path} is a folder; give a file of launch/compile_ahead.py --save=FILE, or "
            f"--executable_folder={path}"
        )
    folder, name = _split(path)
    content = storage.read_file(folder, name)
    if content is None:
        raise FileNotFoundError(
            f"{storage.missing(path) if not storage.is_remote(path) else f'{path} does not exist'}"
            "; write it with launch/compile_ahead.py --save=FILE"
        )
    if not content.startswith(MAGIC):
        raise ValueError(
            f"{path} is not an executable of this version of mtnlg_jax: it begins with "
            f"{content[: len(MAGIC)]!r}; write it with launch/compile_ahead.py --save=FILE"
        )
    end = _START + int.from_bytes(content[_START - 8 : _START], "little")
    header = content[_START:end]
    digest = content[len(MAGIC) : len(MAGIC) + 32]
    if hashlib.sha256(header).digest() != digest:
        raise ValueError(_damaged(path, "its header", len(content)))
    programs = {}
    for entry in json.loads(header)["programs"]:
        payload = content[end : end + entry["bytes"]]
        end += entry["bytes"]
        if hashlib.sha256(payload).hexdigest() != entry["sha256"]:
            raise ValueError(_damaged(path, f"the program {entry['name']!r}", len(content)))
        programs[entry["name"]] = Program(
            entry["name"], entry["key"], entry["fingerprint"], entry["outputs"], payload
        )
    return programs


def _damaged(path: str, what: str, size: int) -> str:
    return (
        f"{path} is truncated or damaged: {what} is not what was written ({size:,} bytes); copy "
        "it again, or write it again with launch/compile_ahead.py --save=FILE"
    )


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder or ("/" if path.startswith("/") else "."), name
