"""Prepare: documents -> held-out split -> tokenizer -> token arrays, whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mtnlg_jax.data import storage
from mtnlg_jax.data.batches import permute
from mtnlg_jax.data.documents import Document, ReadReport, read_documents
from mtnlg_jax.data.embedded import embedded_documents
from mtnlg_jax.data.pairs import pair_maker
from mtnlg_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mtnlg_jax.data.tokens import TokenWriter

# From this many documents on, whole ones are held out; of fewer, the end of each.
_MANY_DOCUMENTS = 100
# Held out at the least, so that there are a few windows to evaluate, but never more than a tenth of the text.
_LEAST_HELDOUT_BYTES = 16_384


def prepare(input_path: str | os.PathLike | None, output: str | os.PathLike, *, vocab_size: int = 8000,
            tokenizer: str = "bpe", heldout: float = 0.02, seed: int = 0, text_key: str = "text",
            prompt: str = "{prompt}", answer: str | None = None, on_error: str = "raise", overwrite: bool = False,
            progress: bool = True) -> dict:
    """Turn text into a folder to train from, laid out as `mtnlg_jax.data.tokens` says, and return its report.

    ``input_path`` is for `read_documents`; None stands for the embedded text. ``tokenizer`` is "bpe" or
    "unigram", trained on the training part with ``vocab_size``, or the path of one that exists. ``heldout``
    is the share of the text (0 to 0.5) that goes into the held-out part: documents drawn by a hash of their
    text and ``seed``, or where there are fewer than 100 the end of each, cut after a sentence.

    ``answer``, a template such as " {label}" over the keys of JSON rows, makes pairs: each document is the row in the
    template ``prompt``, then the answer, of which alone a model learns. The two are tokenized apart. Pairs with one
    prompt are held out together, always whole.

    The result depends on the input and the arguments alone. It is written to ``output.partial-<process>`` and
    renamed at the end; at a URL (gs://, s3://) prepared.json, without which nothing opens it, comes last.
    Needs as much space again as the text has, and memory for the longest document and 24 bytes for each.

    Raises ValueError, FileNotFoundError, FileExistsError (``output`` exists and not ``overwrite``) or OSError
    (cannot be written) before any work where that can be known.
    """
    if not 0 <= heldout <= 0.5:
        raise ValueError(f"heldout={heldout} must lie in 0 to 0.5")
    remote, output = storage.is_remote(output), str(output).rstrip("/")
    _check_output(input_path, output, remote, overwrite)
    pairs = answer is not None
    if pairs and input_path is None:
        raise ValueError("--answer makes pairs of the rows of a JSON file; give that as --input")
    ready = None if tokenizer in ("bpe", "unigram") else load_tokenizer(tokenizer)
    if ready is not None:
        ready.check_end()
    report, silent = ReadReport(), None if progress else True  # None: a bar on a terminal only
    if input_path is None:
        documents = embedded_documents()
    else:
        # No limit to the length: a corpus may be one text file, which is one document.
        make = pair_maker(prompt, answer) if pairs else text_key
        documents = read_documents(input_path, make, on_error, report, max_document_bytes=1 << 60)

    # Beside the output: there is its space, and a rename within one file system is all or nothing.
    work = tempfile.mkdtemp() if remote else f"{output}.partial-{os.getpid()}"
    target = output if remote else work
    try:
        with storage.disk_errors(output, "nothing was kept"):
            if remote and overwrite:
                storage.remove_file(output, "prepared.json")
            if not remote:
                os.makedirs(work)
            with _Spool(os.path.join(work, "texts"), seed) as spool:
                spool.fill(tqdm(documents, "reading", unit=" documents", disable=silent))
                if input_path is None:
                    report.documents, report.bytes = len(spool), spool.size
                if not len(spool):
                    raise ValueError(f"{input_path} holds no text: {report.files} files read, "
                                     f"{report.skipped_files} skipped, {report.empty} documents empty, "
                                     f"{report.damaged} damaged; give a file or a folder with text in it")
                train, held = _split(spool, heldout, pairs)
                order = permute(np.arange(len(train)), len(train), np.uint64(seed & (1 << 64) - 1))
                parts = {"train": train[order], "heldout": held}
                if ready is None:
                    # In the order read, not shuffled: that is how a sample of a huge corpus is spread over it.
                    bar = tqdm(train, f"training {tokenizer}", unit=" documents", disable=silent)
                    ready = train_tokenizer((spool.read(*span) for span in bar), vocab_size, tokenizer, seed)
                ready.save(storage.join(target, "tokenizer"))
                info = {"tokenizer": {"kind": ready.kind, "fingerprint": ready.fingerprint,
                                      "vocab_size": ready.vocab_size, "losses": ready.losses()},
                        "settings": {"input": str(input_path or "embedded"), "tokenizer": str(tokenizer),
                                     "vocab_size": vocab_size, "heldout": heldout, "seed": seed,
                                     "text_key": text_key, "on_error": on_error,
                                     **({"prompt": prompt, "answer": answer} if pairs else {})},
                        "input": asdict(report)}
                with tqdm(desc="encoding", total=spool.size, unit="B", unit_scale=True, disable=silent) as bar:
                    for part, spans in parts.items():
                        place = storage.join(target, part)
                        writer = TokenWriter(place, ready.vocab_size, ready.fingerprint, seed)
                        for tokens, size, asked in _encode(spool, spans, ready, pairs):
                            writer.add(tokens, size, asked)
                            bar.update(size)
                        info[part] = writer.finish()
                info["examples"] = [_example(ready, spool.read(*span)) for span in parts["train"][:3]]
            os.unlink(spool.path)
            content = [ready.fingerprint, info["train"]["sha256"], info["heldout"]["sha256"]]
            info = {"fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest(), **info}
            storage.write_file(target, "prepared.json", json.dumps(info, indent=1, ensure_ascii=False).encode())
            if not remote:
                put_in_place(work, output, overwrite)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return info


def describe(info: dict) -> str:
    """The report of `prepare` for a person, some ten lines."""
    read, train, held = info["input"], info["train"], info["heldout"]
    lines = [
        f"read       {read['documents']:,} documents, {read['bytes']:,} bytes"
        + (f", from {read['files']:,} files ({read['skipped_files']:,} of unknown suffix skipped)"
           if read["files"] else ""),
        f"dropped    {read['empty']:,} empty, {read['damaged']:,} damaged",
        f"mended     {read['repaired']:,} documents with invalid UTF-8, {read['control_characters']:,} "
        "control characters",
        f"tokenizer  {info['tokenizer']['kind']}, {info['tokenizer']['vocab_size']:,} pieces",
    ]
    if info["tokenizer"].get("losses"):
        losses = ", ".join(info["tokenizer"]["losses"])
        lines.append(f"           it is not lossless; a text loses {losses}")
    for name, part in (("train", train), ("heldout", held)):
        ratio = part["bytes"] / max(1, part["tokens"])
        lines.append(f"{name:<10} {part['documents']:,} documents, {part['bytes']:,} bytes, "
                     f"{part['tokens']:,} tokens, {ratio:.2f} bytes/token"
                     + (f"; {part['answer_tokens']:,} tokens are answers" if "answer_tokens" in part else ""))
    if not held["tokens"]:
        lines.append("           nothing is held out: there will be no held-out loss")
    lines += ["for example", *("           " + "|".join(pieces) for pieces in info["examples"])]
    return "\n".join(lines)


class _Spool:
    """The texts on disk as they were read: input is read once, memory holds three numbers for each."""

    def __init__(self, path: str, seed: int):
        self.path, self.size = path, 0
        self._key = str(seed).encode()
        self._ends, self._answers, self._hashes = array("q"), array("q"), array("Q")
        self._file = open(path, "w+b")

    def __enter__(self) -> "_Spool":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends)

    def fill(self, documents: Iterable[Document]) -> None:
        for document in documents:
            data, prompt = document.text.encode(), (document.prompt or "").encode()
            self._file.write(prompt + data)
            self._answers.append(self.size + len(prompt))
            self.size += len(prompt) + len(data)
            self._ends.append(self.size)
            known = data if document.prompt is None else prompt
            digest = hashlib.blake2b(known, digest_size=8, key=self._key).digest()
            self._hashes.append(int.from_bytes(digest, "little"))
        self._file.flush()

    def spans(self) -> np.ndarray:
        """[documents, 3] int64: where each text starts and stops, and where the answer of a pair starts."""
        ends = np.array(self._ends, np.int64)
        return np.stack([np.concatenate([[0], ends[:-1]]), ends, np.array(self._answers, np.int64)], axis=1)

    def hashes(self) -> np.ndarray:
        return np.array(self._hashes, np.uint64)

    def read(self, start: int, stop: int, answer: int | None = None) -> str:
        self._file.seek(start)
        return self._file.read(stop - start).decode()


def _split(spool: _Spool, share: float, pairs: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The spans of the training part and of the held-out part."""
    spans, hashes = spool.spans(), spool.hashes()
    sizes = spans[:, 1] - spans[:, 0]
    wanted = max(share * spool.size, min(_LEAST_HELDOUT_BYTES, spool.size / 10))
    if share == 0:
        return spans, spans[:0]
    if pairs or len(spans) >= _MANY_DOCUMENTS:
        order = np.argsort(hashes, kind="stable")
        order = order[sizes[order] <= wanted]  # one long document is not to be all of it
        count = np.searchsorted(np.cumsum(sizes[order]), wanted, side="right")
        if count:
            # By the hash and not by the place: copies of one text stay on one side.
            held = (hashes <= hashes[order[count - 1]]) & (sizes <= wanted)
            return spans[~held], spans[held]
    train, held = spans.copy(), spans.copy() if not pairs else spans[:0]
    for index, (start, stop, _) in enumerate(held):
        text = spool.read(start, stop)
        train[index, 1] = held[index, 0] = start + len(text[: cut_place(text, wanted / spool.size)].encode())
    held = held[held[:, 0] < held[:, 1]]
    if not len(held) and len(set(hashes.tolist()) if pairs else spans) > 1:  # only short ones
        least = np.argmin(hashes)
        chosen = hashes == hashes[least] if pairs else np.arange(len(spans)) == least
        return spans[~chosen], spans[chosen]
    return train, held


def cut_place(text: str, share: float) -> int:
    """Where the last ``share`` of a text begins: after a paragraph, a sentence or a word near that place."""
    if len(text) < 400:
        return len(text)
    target = round(len(text) * (1 - share))
    reach = max(200, round(len(text) * share / 4))
    low, high = max(1, target - reach), min(len(text) - 1, target + reach)
    for end in (r"\n\s*\n", r"[.!?][\"'”’)]*\s|[。！？][”’]*|\n", r"\s"):
        found = [low + match.end() for match in re.finditer(end, text[low:high])]
        if found:
            return min(found, key=lambda place: abs(place - target))
    return target


def _encode(spool: _Spool, spans: np.ndarray, tokenizer: Tokenizer,
            pairs: bool) -> Iterator[tuple[np.ndarray, int, tuple[int, int] | None]]:
    """(<bos> text <eos>, bytes of the text, of a pair tokens and bytes of the prompt) of each span, some megabytes of
    text at a time."""
    first = 0
    while first < len(spans):
        last, size = first, 0
        while last < len(spans) and (last == first or size < 4_000_000):
            size += spans[last, 1] - spans[last, 0]
            last += 1
        chosen = spans[first:last]
        threads = os.cpu_count() or 1
        if pairs:
            prompts = tokenizer.encode_batch([spool.read(start, middle) for start, _, middle in chosen], threads)
            answers = tokenizer.encode_batch([spool.read(middle, stop) for _, stop, middle in chosen], threads)
            for (start, stop, middle), ids, more in zip(chosen, prompts, answers, strict=True):
                yield (np.array([tokenizer.bos_id, *ids, *more, tokenizer.eos_id]), int(stop - start),
                       (1 + len(ids), int(middle - start)))
        else:
            encoded = tokenizer.encode_batch([spool.read(*span) for span in chosen], threads)
            for (start, stop, _), ids in zip(chosen, encoded, strict=True):
                yield np.array([tokenizer.bos_id, *ids, tokenizer.eos_id]), int(stop - start), None
        first = last


def _example(tokenizer: Tokenizer, text: str) -> list[str]:
    lines = [line for line in text.split("\n") if line.strip()]
    line = next((line for line in lines if len(line) >= 40), lines[0])[:80]
    return [tokenizer.token_bytes(index).decode("utf-8", "replace") for index in tokenizer.encode(line)]


def _check_output(input_path: str | os.PathLike | None, output: str, remote: bool, overwrite: bool) -> None:
    if remote:
        exists = prepared = storage.read_file(output, "prepared.json") is not None
    else:
        path = Path(output)
        exists = path.exists() and not (path.is_dir() and not any(path.iterdir()))
        prepared = (path / "prepared.json").is_file()
        folder = Path(input_path).resolve() if input_path and Path(input_path).is_dir() else None
        if folder and path.resolve().is_relative_to(folder):
            raise ValueError(f"output {output} lies inside the input {input_path} and would be read as text; "
                             "put it elsewhere")
    if exists and not overwrite:
        raise FileExistsError(f"{output} exists; choose another output or replace it with --overwrite")
    if exists and not prepared:
        raise FileExistsError(f"{output} is no prepared data set (no prepared.json) and is not replaced; "
                              "choose another output")


def put_in_place(work: str, output: str, overwrite: bool) -> None:
    """Renames the folder ``work`` to ``output``; what was there goes once the new one stands, and comes back where that
    fails."""
    before = f"{output}.before-{os.getpid()}"
    replaced = overwrite and os.path.isdir(output)
    if replaced:
        os.rename(output, before)
    try:
        os.rename(work, output)
    except OSError as error:
        if replaced:
            os.rename(before, output)
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(f"{output} was made by another run meanwhile; choose another") from None
        raise
    folder = os.open(os.path.dirname(os.path.abspath(output)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    if replaced:
        shutil.rmtree(before)
