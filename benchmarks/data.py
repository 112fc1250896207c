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
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
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
END = 50_256  # GPT-2's <|endoftext|>
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


# --- tokenize: each side returns (seconds, of processors, digest of the ids) ---


def lines_of(args) -> list[bytes]:
    return Path(args.folder, "text.jsonl").read_bytes().splitlines()


def digest_of(documents) -> str:
    """Of the ids without bos and eos."""
    import numpy as np

    digest = hashlib.sha256()
    for ids in documents:
        digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, np.int32).tobytes())
    return digest.hexdigest()


def tokenize_ours(args):
    import numpy as np

    from mtnlg_jax.data.read.documents import read_documents
    from mtnlg_jax.data.store.convert import documents_of
    from mtnlg_jax.data.store.sources import open_tokens
    from mtnlg_jax.data.store.tokens import TokenWriter
    from mtnlg_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    tokenizer.encode_batch([" the" * 100_000])  # builds what it builds once
    begin = time.perf_counter()
    begin_cpu = time.process_time()
    writer = TokenWriter(f"{args.folder}/ours", tokenizer.vocab_size, tokenizer.fingerprint)
    texts = []
    size = 0

    def write():
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            writer.add(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id]), len(text.encode()))

    for document in read_documents(f"{args.folder}/text.jsonl"):
        texts.append(document.text)
        size += len(document.text)
        if size > 4_000_000:
            write()
            texts = []
            size = 0
    write()
    writer.finish()
    seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    return *seconds, digest_of(
        ids[1:-1] for ids in documents_of(open_tokens(f"{args.folder}/ours"))
    )


def tokenize_megatron(args):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    prefix = f"{args.folder}/megatron"
    lines = lines_of(args)
    with multiprocessing.get_context("fork").Pool(1, start_tokenizer, (args.tokenizer,)) as pool:
        list(pool.imap(encode_line, lines[:64], 32))
        begin = time.perf_counter()
        begin_cpu = time.process_time() + pool.apply(time.process_time)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(50_257))
        for ids, lengths, _ in pool.imap(
            encode_line, open(f"{args.folder}/text.jsonl", encoding="utf-8"), 32
        ):
            builder.add_document(ids, lengths)
        builder.finalize(f"{prefix}.idx")
        seconds = (
            time.perf_counter() - begin,
            time.process_time() + pool.apply(time.process_time) - begin_cpu,
        )
    data = IndexedDataset(prefix)
    return *seconds, digest_of(data[number][:-1] for number in range(len(data)))


def start_tokenizer(folder: str) -> None:
    global TOKENIZER
    import tokenizers

    names = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
    files = next(
        [f"{folder}/{name}" for name in pair] for pair in names if Path(folder, pair[0]).exists()
    )
    TOKENIZER = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    TOKENIZER.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    TOKENIZER.add_special_tokens(["<|endoftext|>"])


def encode_line(line):
    """As Encoder.encode of Megatron's tools/preprocess_data.py: one document, with its end."""
    ids = TOKENIZER.encode(json.loads(line)["text"]).ids
    ids.append(END)
    return ids, [len(ids)], len(line)


# --- minhash: each side returns (seconds, of processors, digest of the signatures) ---


def minhash_ours(args):
    from mtnlg_jax.data.filter.dedup import MinHashConfig, signatures

    texts = [json.loads(line)["text"] for line in lines_of(args)]
    signatures(texts[:2], MinHashConfig())
    begin = time.perf_counter()
    begin_cpu = time.process_time()
    found = signatures(texts, MinHashConfig())
    seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    return *seconds, hashlib.sha256(found.astype("<u4").tobytes()).hexdigest()


def minhash_datasketch(args):
    import datasketch
    import numpy as np

    texts = [json.loads(line)["text"] for line in lines_of(args)]
    begin = time.perf_counter()
    begin_cpu = time.process_time()
    shingles = ({text[i : i + 5].encode() for i in range(max(1, len(text) - 4))} for text in texts)
    found = np.stack([one.hashvalues for one in datasketch.MinHash.bulk(shingles, num_perm=100)])
    seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    return *seconds, hashlib.sha256(found.astype("<u4").tobytes()).hexdigest()


# --- load: each side returns (seconds of the batches, of processors, seconds to the first) ---


def weights_of(args) -> list[float]:
    return [1 / (1 + number) for number in range(args.sources)]


def make_sources(args) -> None:
    """Token arrays, and .bin/.idx of them. Lengths of documents are log-normal around 400
    tokens."""
    import numpy as np

    from mtnlg_jax.data.store.megatron import write_megatron
    from mtnlg_jax.data.store.sources import open_tokens
    from mtnlg_jax.data.store.tokens import TokenWriter

    for number in range(args.sources):
        rng = np.random.default_rng(number)
        place = f"{args.folder}/source-{number}"
        writer = TokenWriter(place, 50_257, "")
        total = 0
        while total < args.tokens:
            for length in np.clip(rng.lognormal(6, 1, 1000), 2, 20_000).astype(int):
                writer.add(rng.integers(0, 50_256, length), 0)
                total += length
        writer.finish()
        write_megatron(open_tokens(place), f"{place}-megatron")


def make_records(args) -> None:
    """ArrayRecord files of the same documents; random access wants small groups."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for number in range(args.sources):
        writer = ArrayRecordWriter(f"{args.folder}/source-{number}.array_record", "group_size:1")
        data = IndexedDataset(f"{args.folder}/source-{number}-megatron")
        for document in range(len(data)):
            writer.write(data[document].tobytes())
        writer.close()


def time_batches(args, opening, names) -> tuple[float, float, float]:
    """``opening`` gives an iterator of batches, {name: (batch, length or one more)}."""
    begin = time.perf_counter()
    batches = opening()
    first = next(batches)
    waited = time.perf_counter() - begin
    for name in names:
        if tuple(first[name].shape) not in [
            (args.batch, args.length),
            (args.batch, args.length + 1),
        ]:
            raise ValueError(f"{name} has shape {tuple(first[name].shape)}")
    begin = time.perf_counter()
    begin_cpu = time.process_time()
    for _ in range(args.batches):
        next(batches)
    return time.perf_counter() - begin, time.process_time() - begin_cpu, waited


def load_ours(args, suffix=""):
    import numpy as np

    from mtnlg_jax.data.batches import Batches
    from mtnlg_jax.data.store.sources import open_tokens

    def opening():
        sources = [
            open_tokens(f"{args.folder}/source-{number}{suffix}") for number in range(args.sources)
        ]
        batches = Batches(list(zip(sources, weights_of(args), strict=True)), args.length, seed=0)
        number = 0
        while True:
            yield batches.rows(np.arange(number, number + args.batch))
            number += args.batch

    return time_batches(args, opening, ("tokens", "segment_ids", "positions"))


def load_ours_megatron(args):
    return load_ours(args, "-megatron")


def load_grain(args):
    import grain
    import numpy as np
    from grain.experimental import ConcatThenSplitIterDataset

    def decode(record):
        return {"tokens": np.frombuffer(record, np.uint16).astype(np.int32)}

    def opening():
        sources = [
            grain.MapDataset.source(
                grain.sources.ArrayRecordDataSource(f"{args.folder}/source-{number}.array_record")
            )
            .shuffle(seed=number)
            .map(decode)
            .repeat()
            for number in range(args.sources)
        ]
        # A weight is a share of documents; all sources have the same lengths.
        mixed = grain.MapDataset.mix(sources, weights_of(args)).to_iter_dataset()
        return iter(
            ConcatThenSplitIterDataset(mixed, length_struct={"tokens": args.length + 1}).batch(
                args.batch
            )
        )

    return time_batches(args, opening, ("tokens", "tokens_segment_ids", "tokens_positions"))


def load_megatron(args, reset=False):
    import types

    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    prefixes = [f"{args.folder}/source-{number}-megatron" for number in range(args.sources)]
    tokenizer = types.SimpleNamespace(
        eod=END, pad=50_258, vocab_size=50_257, unique_identifiers={"name": "gpt2"}
    )

    def opening():
        config = GPTDatasetConfig(
            random_seed=0,
            sequence_length=args.length,
            blend=(prefixes, weights_of(args)),
            split="100,0,0",
            path_to_cache=f"{args.folder}/cache",
            tokenizer=tokenizer,
            reset_position_ids=reset,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        samples = args.batch * (args.batches + 1)
        train, *_ = BlendedMegatronDatasetBuilder(
            GPTDataset, [samples, 0, 0], lambda: True, config
        ).build()
        return iter(torch.utils.data.DataLoader(train, batch_size=args.batch))

    return time_batches(args, opening, ("tokens", "labels", "position_ids"))


def load_megatron_again(args):
    return load_megatron(args)


def load_megatron_reset(args):
    return load_megatron(args, reset=True)


# --- the run ---


def work(args) -> None:
    case, side = args.worker
    answers = sys.stdout  # what libraries print must not mix with the answer
    sys.stdout = sys.stderr
    if side == "make_records":
        make_records(args)
        return
    if hasattr(os, "sched_setaffinity"):  # before any library counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: 2 if case == "load" else 1])
    if side.startswith("ours"):
        sys.path.insert(0, str(ROOT))
    seconds, processor_seconds, other = globals()[f"{case}_{side}"](args)
    names = (
        ("numpy", "tiktoken", "tensorstore")
        if side.startswith("ours")
        else (
            "numpy",
            "torch",
            "megatron-core",
            "grain",
            "array_record",
            "datasketch",
            "tokenizers",
        )
    )
    versions = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }
    print(
        json.dumps(
            {
                "seconds": seconds,
                "processor_seconds": processor_seconds,
                "other": other,
                "versions": versions,
            }
        ),
        file=answers,
        flush=True,
    )


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
    """text.jsonl: documents of the folder, long ones in parts, in an order that mixes them. Returns
    its UTF-8 bytes."""
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
        make_sources(args)
        turn(args, "load", "make_records")
    for case in args.cases:
        turns = {side: [] for side in SIDES[case]}
        for number in range(args.rounds):
            order = SIDES[case] if number % 2 == 0 or case == "load" else SIDES[case][::-1]
            for side in order:
                if side == "megatron":  # whose indices are to be built anew
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
    """Amounts a second of each side, and ours over each peer's by round."""
    unit = "batches_per_second" if case == "load" else "bytes_per_second"
    if case != "load" and len({one["other"] for found in turns.values() for one in found}) > 1:
        raise RuntimeError(f"{case}: the sides did not make the same")
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
    names = (
        [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def command(args) -> str:
    """The line that repeats the run; where things lie on this machine says nothing about the
    result."""
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
