"""The sides of benchmarks/data.py: the same task by our data recipe and by other tools. A worker of
either Python runs one of them."""

import hashlib
import json
import multiprocessing
import time
from pathlib import Path

END = 50_256  # GPT-2's <|endoftext|>


# --- tokenize: each side returns (seconds, of processors, digest of the ids) ---


def lines_of(args) -> list[bytes]:
    return Path(args.folder, "text.jsonl").read_bytes().splitlines()


def digest_of(documents) -> str:
    """Digest of the ids without bos and eos."""
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
    tokenizer.encode_batch([" the" * 100_000])  # builds its tables
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
    """Encode one document with its end, as Encoder.encode in Megatron's preprocess_data.py."""
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
    """Write token arrays, and .bin/.idx of them. Lengths of documents are log-normal around 400
    tokens."""
    import numpy as np

    from mtnlg_jax.data.store.megatron import write_megatron
    from mtnlg_jax.data.store.sources import open_tokens
    from mtnlg_jax.data.store.tokens import TokenWriter

    for number in range(args.sources):
        rng = np.random.default_rng(number)
        path = f"{args.folder}/source-{number}"
        writer = TokenWriter(path, 50_257, "")
        total = 0
        while total < args.tokens:
            for length in np.clip(rng.lognormal(6, 1, 1000), 2, 20_000).astype(int):
                writer.add(rng.integers(0, 50_256, length), 0)
                total += length
        writer.finish()
        write_megatron(open_tokens(path), f"{path}-megatron")


def make_records(args) -> None:
    """Write ArrayRecord files of the same documents. Random access needs small groups."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for number in range(args.sources):
        writer = ArrayRecordWriter(f"{args.folder}/source-{number}.array_record", "group_size:1")
        data = IndexedDataset(f"{args.folder}/source-{number}-megatron")
        for document in range(len(data)):
            writer.write(data[document].tobytes())
        writer.close()


def time_batches(args, opening, names) -> tuple[float, float, float]:
    """Time the batches of ``opening()``, an iterator of {name: (batch, length or one more)}."""
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
