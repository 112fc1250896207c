"""Try a regular expression of a request on its texts in a process that ends when time is over.

Python's expressions can take exponential time, such as (a|a)*b on a text of a's, and nothing inside
the process can stop one. So it is tried apart before the engine's thread runs it.
"""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Sequence

from mtnlg_jax.serve.refusals import Refused

# Seconds of processor time for all texts of a request; the engine then needs as long again.
PATTERN_SECONDS = 0.25
# Seconds until the process is given up, on a machine that is busy.
WALL_SECONDS = 20.0
# Starting Python is not counted. SIGVTALRM ends the process.
_TRY = """
import json, re, signal, sys
pattern, texts, seconds = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
for text in texts:
    for match in re.finditer(pattern, text):
        pass
"""


async def check_time(name: str, pattern: str, texts: Sequence[str]) -> None:
    """Raise Refused if finding all matches of ``pattern`` in ``texts`` takes too long.

    ``name``: what the request calls the pattern.
    """
    given = json.dumps([pattern, list(texts), PATTERN_SECONDS]).encode()
    if not await asyncio.to_thread(_is_quick, given):
        raise Refused(
            f"{name}={pattern!r} takes more than {PATTERN_SECONDS:g} s on these texts; write a "
            "simpler pattern, without repetitions that overlap",
            "options",
        )


def _is_quick(given: bytes) -> bool:
    """Return whether the process ends in time. Raise RuntimeError if it fails in another way."""
    command = [sys.executable, "-I", "-S", "-c", _TRY]
    try:
        # close_fds=False: Python then starts it by posix_spawn, without a fork of JAX's threads.
        done = subprocess.run(
            command,
            input=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            close_fds=False,
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, -signal.SIGVTALRM):
        told = done.stderr.decode(errors="replace")
        raise RuntimeError(f"the trial of a pattern ended with {done.returncode}: {told}")
    return done.returncode == 0
