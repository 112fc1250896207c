"""Compute the certificates of the 530B config and of the ten rows of the ladder, one by one.

    python benchmarks/prove.py                              all eleven, about half a minute each
    python benchmarks/prove.py --only=ladder.py:1.7b --output=FILE      a quick try

Each is a launch/prove.py in a process of its own, without the cache of compiled programs; with
--cached they share one, so that configs with the same small copy compile it once. The result has,
for each config, whether all is within the tolerances, the largest relative difference of each kind
of figure with its tolerance, and the seconds: of the wall clock, which other load makes longer,
with the load of the machine beside it, and of the processor, for all of the process. It is written
after each config.
"""

import argparse
import datetime
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/prove.json"
LADDER = "1.7b 3.6b 7.5b 18.4b 39.1b 76.1b 145.6b 310.1b 529.6b 1008b".split()
NAMES = ["mtnlg_530b.py", *(f"ladder.py:{row}" for row in LADDER)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=NAMES, help="one of the configs")
    parser.add_argument("--devices", type=int, default=8, help="simulated devices")
    parser.add_argument("--cached", action="store_true", help="share compiled programs")
    parser.add_argument("--output", default=os.fspath(RESULT), help="file for the result")
    flags = parser.parse_args()
    commanded = [each for each in sys.argv[1:] if not each.startswith("--output")]
    result = {
        "date": datetime.date.today().isoformat(),
        "device": "cpu",
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "simulated_devices": flags.devices,
        "command": " ".join(["python benchmarks/prove.py", *commanded]),
        "configs": {},
    }
    with tempfile.TemporaryDirectory() as programs:
        cache = programs if flags.cached else ""
        for name in flags.only or NAMES:
            found, versions = certificate_of(name, flags.devices, cache)
            result["versions"] = versions
            result["configs"][name] = found
            print(name, json.dumps({key: found[key] for key in ("within", "seconds")}), flush=True)
            Path(flags.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(each["within"] for each in result["configs"].values()) else 1


def certificate_of(name: str, devices: int, cache: str) -> tuple[dict, dict]:
    """Return (what is kept of a certificate, the versions that it names). ``cache``: the folder of
    compiled programs, "" for none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "certificate.json")
        command = [
            *(sys.executable, os.fspath(ROOT / "launch/prove.py")),
            *(f"--config={ROOT / 'configs'}/{name}", f"--devices={devices}", f"--output={path}"),
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        done = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
        )
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # 1 is a certificate with figures beyond their tolerances, which is kept.
        if done.returncode not in (0, 1) or not path.is_file():
            sys.exit(f"{name}: launch/prove.py ended with {done.returncode}")
        told = json.loads(path.read_text())
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    kept = {
        "within": told["within"],
        "figures": len(told["figures"]),
        "shrunk": told["shrunk"],
        "seconds": round(seconds, 1),
        "processor_seconds": round(busy, 1),
        "load": [round(each, 1) for each in os.getloadavg()],
        "largest": largest_of(told["figures"]),
    }
    return kept, told["versions"]


def largest_of(figures: list[dict]) -> list[dict]:
    """Return the largest difference of each kind of figure, in each of its types."""
    found: dict[tuple, dict] = {}
    for each in figures:
        key = (each["check"], each["types"])
        if key not in found or size_of(each) > size_of(found[key]):
            found[key] = each
    kept = ("check", "types", "objective", "name", "mesh", "difference", "tolerance")
    return [{name: each[name] for name in kept} for each in found.values()]


def size_of(figure: dict) -> float:
    """Return the difference; infinity where nothing could be computed."""
    return math.inf if figure["difference"] is None else figure["difference"]


if __name__ == "__main__":
    sys.exit(main())
