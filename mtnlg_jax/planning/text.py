"""Write tables, numbers, times and ends of processes for a person."""

import re
import signal
import subprocess


def columns(lines: list[tuple[str, ...]], left: int) -> str:
    """Return ``lines`` as aligned columns, the first ``left`` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for line in lines:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)


def amount(number: float) -> str:
    """Return ``number`` with three digits or more, such as "529.6 B" or "3.38 M"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{2 if number < 10 * size else 1}f} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Return ``seconds`` in the largest unit that fits, such as "45.3 days" or "57.0 s"."""
    units = (("days", 86400), ("hours", 3600), ("s", 1), ("ms", 1e-3))
    unit, size = next((unit for unit in units if seconds >= unit[1]), units[-1])
    digits = 0 if seconds >= 1000 * size else 1 if seconds >= 10 * size else 2
    return f"{seconds / size:,.{digits}f} {unit}"


def last_words(done: subprocess.CompletedProcess) -> str:
    """Describe in one line why a process ended."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"Check failed|Error|^F\d{4}", line)]
    last = (errors or lines or ["it printed nothing"])[-1]
    how = f"exit code {done.returncode}"
    if done.returncode < 0:
        how = signal.Signals(-done.returncode).name
    return f"the compiler ended with {how}: {last[:300]}"
