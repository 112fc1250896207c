"""Find the source lines of a compiled program's instructions, from its tables of stack frames."""

import re

# Frames of these say how a line was reached, not what it asks for.
_SKIPPED = ("/site-packages/", "/dist-packages/", "<frozen", "/parallel/collectives.py")
_PACKAGE = "mtnlg_jax/"


class SourceLines:
    """The innermost lines of a program's instructions that are not JAX's or a wrapper's."""

    def __init__(self, text: str):
        files = _table(text, "FileNames", r'(\d+) "(.*)"')
        self._files = {int(number): name for number, name in files}
        locations = _table(text, "FileLocations", r"(\d+) \{file_name_id=(\d+) .*?line=(\d+)")
        self._locations = {int(number): (int(file), int(line)) for number, file, line in locations}
        rows = _table(
            text, "StackFrames", r"(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
        )
        frames = {
            int(number): (int(location), int(parent or 0)) for number, location, parent in rows
        }
        # XLA writes the number of the parent plus one. The first frame has no parent.
        offset = frames[min(frames)][1] if frames else 0
        self._frames = {
            number: (location, parent - offset) for number, (location, parent) in frames.items()
        }

    def of(self, attributes: str) -> str:
        """Return "mtnlg_jax/model/block.py:88" for the attributes of an instruction, or ""."""
        found = re.search(r"stack_frame_id=(\d+)", attributes)
        if not found:
            return ""
        number = int(found[1])
        seen: set[int] = set()
        while number in self._frames and number not in seen:
            seen.add(number)
            location, number = self._frames[number]
            file, line = self._locations.get(location, (0, 0))
            name = self._files.get(file, "")
            if name and not any(part in name for part in _SKIPPED):
                start = name.rfind(_PACKAGE)
                return f"{name[start:] if start >= 0 else name.rpartition('/')[2]}:{line}"
        return ""


def _table(text: str, name: str, row: str) -> list[tuple[str, ...]]:
    found = re.search(rf"^{name}\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(f"^{row}", found[1], re.MULTILINE) if found else []
