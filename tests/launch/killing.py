"""Run a command that appends to a file, and kill it at random moments."""

import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_with_kills(
    command: Sequence[str], path: Path, rows: int, kills: int, seed: int, **options
) -> dict:
    """Run ``command`` until it ends by itself, after ``kills`` deaths by SIGKILL.

    Each time it is killed at a random moment after a random number of new lines, which leaves
    lines for all the kills to come.

    Returns: the lines at each kill, the seconds, and (exit code, output) of the last run.
    """
    draws = random.Random(seed)
    began = time.monotonic()
    at = []
    for left in range(kills, 0, -1):
        before = lines_of(path)
        wanted = draws.randint(1, max(1, (rows - before) // (left + 1)))
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
        )
        while lines_of(path) < before + wanted and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draws.random() * 0.05)
        process.kill()
        output, _ = process.communicate()
        if process.returncode != -9:
            raise AssertionError(f"the command ended before it was killed: {output.decode()}")
        at.append(lines_of(path))
    last = subprocess.run(command, capture_output=True, text=True, **options)
    return {
        "lines_at_kills": at,
        "seconds": time.monotonic() - began,
        "returncode": last.returncode,
        "output": last.stdout + last.stderr,
    }


if __name__ == "__main__":  # killing.py FILE ROWS KILLS SEED COMMAND ...
    name, rows, kills, seed, *command = sys.argv[1:]
    print(run_with_kills(command, Path(name), int(rows), int(kills), int(seed)))
