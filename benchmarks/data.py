"""Time the data recipe beside other tools, in one run, on the same documents:

    python benchmarks/data.py --peer_python=PYTHON

PYTHON has megatron-core, grain, datasketch, tokenizers and torch. Each turn is a fresh process,
held to one core (load: to two). The order of the sides is reversed every round, except in load,
where one side builds what the next one finds. Imports are not timed. The outputs of all sides must
be equal, or the run fails.

tokenize: JSON lines -> token arrays on disk, bytes of text a second on one core. The ids must be
equal.
    megatron  like preprocess_data.py with one worker: a pool takes 32 lines at a time, encodes each
              with the same GPT-2 files by Hugging Face's tokenizers, and sends it back to the
              process that appends it to an IndexedDatasetBuilder
    ours      one process, megabytes of documents at a time, TokenWriter

minhash: documents -> signatures of 100 hashes over shingles of 5 characters, bytes a second on one
core. The signatures must be equal.
    datasketch  MinHash.bulk over the set of each document's shingles

load: batches a second of 8 rows of 2048 tokens, with segments and positions, blended by weights
from 15 sources, and the seconds from opening to the first batch.
    ours            token arrays
    ours_megatron   .bin/.idx of the same tokens
    grain           the same documents as ArrayRecord, shuffled, mixed, ConcatThenSplitIterDataset,
                    batch
    megatron        BlendedDataset of GPTDatasets over the same .bin/.idx (no attention mask, no
                    segments) through torch's DataLoader, building its indices
    megatron_again  the same, with the indices already built
    megatron_reset  the same, with positions that restart in each document, as on the other sides
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
SIDES = {
    "tokenize": ("ours", "megatron"),
    "minhash": ("ours", "datasketch"),
    "load": ("ours", "ours_megatron", "grain", "megatron", "megatron_again", "megatron_reset"),
}
NEEDED = "numpy, torch, grain, datasketch, tokenizers, megatron.core.datasets.indexed_dataset"
H100_TOKENS = 20_000  # a second, of a model of 1.3 B parameters
CHARACTERS = 4000  # of a document that is cut from a book


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer_python", default=sys.executable, help="a Python that has the peers")
    parser.add_argument("--cases", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side and case")
    parser.add_argument("--text", default=str(SHARED / "pretrain"), help="folder of text")
    parser.add_argument(
        "--tokenizer", default=str(SHARED / "tokenizers" / "gpt2"), help="folder of GPT-2's files"
    )
    parser.add_argument(
        "--megabytes", type=float, default=15.0, help="text to tokenize and to sign, at most"
    )
    parser.add_argument("--sources", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="in each source")
    parser.add_argument("--batches", type=int, default=500, help="timed in a turn")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument(
        "--output", default=str(ROOT / "benchmarks/results/data.json"), help="where the JSON goes"
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def work(args) -> None:
    case, side = args.worker
    answers = sys.stdout  # output of libraries must not mix with the answer
    sys.stdout = sys.stderr
    import data_sides  # a worker is a script, whose folder Python searches

    if side == "make_records":
        data_sides.make_records(args)
        return
    if hasattr(os, "sched_setaffinity"):  # set before any library counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: 2 if case == "load" else 1])
    if side.startswith("ours"):
        sys.path.insert(0, str(ROOT))
    seconds, processor_seconds, other = getattr(data_sides, f"{case}_{side}")(args)
    peers = "numpy torch megatron-core grain array_record datasketch tokenizers"
    names = "numpy tiktoken tensorstore" if side.startswith("ours") else peers
    versions = {name: importlib.metadata.version(name) for name in names.split()}
    answer = {
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "other": other,
        "versions": {"python": platform.python_version()} | versions,
    }
    print(json.dumps(answer), file=answers, flush=True)


def turn(args, case: str, side: str) -> dict:
    python = sys.executable if side.startswith("ours") else args.peer_python
    words = [
        f"--{name}={value}" for name, value in vars(args).items() if name not in ("cases", "worker")
    ]
    quiet = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, __file__, *words, "--worker", case, side],
        capture_output=True,
        text=True,
        env=os.environ | quiet,
    )
    if done.returncode:
        raise RuntimeError(f"{case}, {side}: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return json.loads(done.stdout) if done.stdout else {}


def write_text(args) -> int:
    """Write text.jsonl: documents of the folder in mixed order, long ones in parts. Return its
    UTF-8 bytes."""
    import random

    from mtnlg_jax.data.read.documents import read_documents

    texts = []
    for document in read_documents(args.text, on_error="skip"):
        texts += [
            document.text[i : i + CHARACTERS] for i in range(0, len(document.text), CHARACTERS)
        ]
    texts = [text for text in texts if text.strip()]
    random.Random(0).shuffle(texts)
    size = 0
    kept = []
    for text in texts:
        size += len(text.encode())
        if size > args.megabytes * 1e6 and kept:
            size -= len(text.encode())
            break
        kept.append(json.dumps({"text": text}, ensure_ascii=False))
    Path(args.folder, "text.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return size


def measure(args) -> dict:
    result = {}
    load = os.getloadavg()[0]
    versions = {}
    if {"tokenize", "minhash"} & set(args.cases):
        size = write_text(args)
    if "load" in args.cases:
        import data_sides

        data_sides.make_sources(args)
        turn(args, "load", "make_records")
    for case in args.cases:
        turns = {side: [] for side in SIDES[case]}
        for number in range(args.rounds):
            order = SIDES[case] if number % 2 == 0 or case == "load" else SIDES[case][::-1]
            for side in order:
                if side == "megatron":  # it must build its indices again
                    shutil.rmtree(f"{args.folder}/cache", ignore_errors=True)
                turns[side].append(turn(args, case, side))
                versions["ours" if side.startswith("ours") else "peer"] = turns[side][-1].pop(
                    "versions"
                )
            print(
                f"{case}, round {number + 1}: "
                + ", ".join(
                    f"{side} {found[-1]['seconds']:.2f} s" for side, found in turns.items()
                ),
                flush=True,
            )
        amount = args.batches if case == "load" else size
        result[case] = summary(case, turns, amount)
        if case == "load":
            result[case] |= {
                "first_batch_seconds": {
                    side: round(statistics.median(one["other"] for one in found), 4)
                    for side, found in turns.items()
                },
                "first_batch_target": 1.0,
                "target": round(20 * H100_TOKENS / (args.batch * args.length), 1),
            }
    return result | {
        "shapes": {
            name: getattr(args, name)
            for name in ("megabytes", "sources", "tokens", "batches", "batch", "length")
        },
        "device": processor(),
        "cores": os.cpu_count(),
        "load_average": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
        "versions": versions,
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(args),
    }


def summary(case: str, turns: dict[str, list[dict]], amount: float) -> dict:
    """Return the amount a second of each side, and the ratio of ours to each peer by round."""
    unit = "batches_per_second" if case == "load" else "bytes_per_second"
    if case != "load" and len({one["other"] for found in turns.values() for one in found}) > 1:
        raise RuntimeError(f"{case}: the outputs of the sides differ")
    ratios, processor_ratios = (
        {
            side: [
                round(theirs[key] / ours[key], 3)
                for ours, theirs in zip(turns["ours"], turns[side], strict=True)
            ]
            for side in turns
            if side != "ours"
        }
        for key in ("seconds", "processor_seconds")
    )
    target = {"tokenize": 2.0, "minhash": 5.0}.get(case)
    return {
        unit: {
            side: round(amount / statistics.median(one["seconds"] for one in found), 1)
            for side, found in turns.items()
        },
        "ratio": {side: round(statistics.median(found), 3) for side, found in ratios.items()},
        "ratio_by_round": ratios,
        "ratio_processor_seconds": {
            side: round(statistics.median(found), 3) for side, found in processor_ratios.items()
        },
        **{
            key: {side: [round(one[key], 4) for one in found] for side, found in turns.items()}
            for key in ("seconds", "processor_seconds")
        },
        **({"ratio_target": target} if target else {}),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command(args) -> str:
    """Return the command that repeats the run. Paths of this machine are replaced by words."""
    defaults = parse([])
    words = []
    for name, value in vars(args).items():
        if value != getattr(defaults, name) and name not in ("output", "worker", "folder"):
            value = {"peer_python": "PYTHON", "text": "TEXT", "tokenizer": "FOLDER"}.get(
                name, value
            )
            words.append(f"--{name} {' '.join(value)}" if name == "cases" else f"--{name}={value}")
    return " ".join(["python benchmarks/data.py", *words])


def check(args) -> None:
    """Raise ValueError, in one line, if the arguments cannot work."""
    for name in ("rounds", "megabytes", "sources", "tokens", "batches", "batch", "length"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name}={getattr(args, name)} must be above 0")
    for name in ("text", "tokenizer"):
        if {"tokenize", "minhash"} & set(args.cases) and not Path(getattr(args, name)).exists():
            raise ValueError(f"--{name}={getattr(args, name)} does not exist; give one")
    if shutil.which(args.peer_python) is None:
        raise ValueError(
            f"--peer_python={args.peer_python} is not a program; "
            "give the path of a Python with the peers"
        )
    done = subprocess.run(
        [args.peer_python, "-W", "ignore", "-c", f"import {NEEDED}"], capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(
            f"{args.peer_python} lacks a peer ({reason}); run: pip install -e .[benchmarks], or "
            "give --peer_python=PATH of an environment that has them"
        )


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    sys.path.insert(0, str(ROOT))
    from mtnlg_jax import storage  # not in a worker of another Python

    try:
        check(args)
        with tempfile.TemporaryDirectory() as args.folder:
            result = measure(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output = Path(args.output)
    storage.write_file(output.parent, output.name, (json.dumps(result, indent=1) + "\n").encode())
    for case in args.cases:
        print(
            f"{case}: ours over "
            + ", ".join(f"{side} {ratio}" for side, ratio in result[case]["ratio"].items())
        )
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
