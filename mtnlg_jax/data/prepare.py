"""Prepare: documents -> held-out split -> tokenizer -> token arrays, whole or not at all."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mtnlg_jax import storage
from mtnlg_jax.data.batches import permute
from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.data.read.documents import Document, ReadReport, note_lines, read_documents
from mtnlg_jax.data.read.pairs import pair_maker
from mtnlg_jax.data.store.tokens import TokenWriter, token_dtype
from mtnlg_jax.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

# From this many documents on, whole ones are held out; of fewer, the end of each.
_MANY_DOCUMENTS = 100
# Held out at the least, so that there are a few windows to evaluate, but never more than a tenth of
# the text.
_LEAST_HELDOUT_BYTES = 16_384
# Of text encoded at once, of documents among it, and of a longer document's pieces.
_TEXT_AT_ONCE = 4_000_000
_DOCUMENTS_AT_ONCE = 1 << 14
_PIECE = 4 << 20
_EXAMPLE_BYTES = 1 << 16  # of a document, where its example is looked for


def prepare(
    input_path: str | os.PathLike | None,
    output: str | os.PathLike,
    *,
    vocab_size: int = 8000,
    tokenizer: str = "bpe",
    heldout: float = 0.02,
    seed: int = 0,
    text_key: str = "text",
    prompt: str = "{prompt}",
    answer: str | None = None,
    on_error: str = "raise",
    encoding: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Turn text into a folder to train from, laid out as `mtnlg_jax.data.store.tokens` says, and
    return its report.

    ``input_path`` is for `read_documents`; None stands for the embedded text. ``tokenizer`` is
    "bpe" or "unigram", trained on the training part with ``vocab_size``, or the path of one that
    exists. ``heldout`` is the share of the text (0 to 0.5) that goes into the held-out part:
    documents drawn by a hash of their text and ``seed``, or where there are fewer than 100 the end
    of each, cut after a sentence.

    ``answer``, a template such as " {label}" over the keys of JSON rows, makes pairs: each document
    is the row in the template ``prompt``, then the answer, of which alone a model learns. The two
    are tokenized apart. Pairs with one prompt are held out together, always whole.

    The result depends on the input and the arguments alone. It is written to
    ``output.partial-<process>`` and renamed at the end; at a URL (gs://, s3://) prepared.json,
    without which nothing opens it, comes last. ``encoding`` is what text is in that is not UTF-8
    and does not say so (`charsets`).

    Needs as much space again as the text has, and memory for 50 bytes of each document. A long text
    file is read and tokenized in pieces of some megabytes; what is one value or page (a line of
    JSON, a cell, HTML) is held some five times over, and so is a text without a line end or space
    where it could be cut.

    Raises ValueError, FileNotFoundError, FileExistsError (``output`` exists and not ``overwrite``)
    or OSError (cannot be written) before any work where that can be known.
    """
    if not 0 <= heldout <= 0.5:
        raise ValueError(f"heldout={heldout} must lie in 0 to 0.5")
    remote = storage.is_remote(output)
    output = str(output).rstrip("/")
    _check_output(input_path, output, remote, overwrite)
    pairs = answer is not None
    if pairs and input_path is None:
        raise ValueError("--answer makes pairs of the rows of a JSON file; give that as --input")
    ready = None if tokenizer in ("bpe", "unigram") else load_tokenizer(tokenizer)
    if ready is not None:
        ready.check_end()
    report = ReadReport()  # None: a bar on a terminal only
    silent = None if progress else True
    if input_path is None:
        documents = embedded_documents()
    else:
        # No limit to the length: a corpus may be one text file, which is one document.
        make = pair_maker(prompt, answer) if pairs else text_key
        documents = read_documents(
            input_path,
            make,
            on_error,
            report,
            max_document_bytes=1 << 60,
            encoding=encoding,
            pieces=True,
        )

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
                    report.documents = len(spool)
                    report.bytes = spool.size
                if not len(spool):
                    raise ValueError(
                        "; ".join(
                            [
                                f"{input_path} holds no text: {report.files} files read, {report.skipped_files} skipped, "
                                f"{report.empty} documents empty, {report.damaged} damaged",
                                *note_lines(report.notes)[:3],
                                "give a file or a folder with text in it",
                            ]
                        )
                    )
                train, held = _split(spool, heldout, pairs)
                shuffle = np.uint64(seed & (1 << 64) - 1)
                if ready is None:
                    # In the order read, not shuffled: that is how a sample of a huge corpus is
                    # spread over it.
                    bar = tqdm(
                        train.in_order(),
                        f"training {tokenizer}",
                        len(train),
                        unit=" documents",
                        disable=silent,
                    )
                    texts = (text for span in bar for text in spool.lines(*span[:2]))
                    ready = train_tokenizer(texts, vocab_size, tokenizer, seed)
                ready.save(storage.join(target, "tokenizer"))
                info = {
                    "tokenizer": {
                        "kind": ready.kind,
                        "fingerprint": ready.fingerprint,
                        "vocab_size": ready.vocab_size,
                        "losses": ready.losses(),
                    },
                    "settings": {
                        "input": str(input_path or "embedded"),
                        "tokenizer": str(tokenizer),
                        "vocab_size": vocab_size,
                        "heldout": heldout,
                        "seed": seed,
                        "text_key": text_key,
                        "on_error": on_error,
                        **({"encoding": encoding} if encoding else {}),
                        **({"prompt": prompt, "answer": answer} if pairs else {}),
                    },
                    "input": asdict(report),
                }
                with tqdm(
                    desc="encoding", total=spool.size, unit="B", unit_scale=True, disable=silent
                ) as bar:
                    for part, spans in (
                        ("train", train.shuffled(shuffle)),
                        ("heldout", held.in_order()),
                    ):
                        place = storage.join(target, part)
                        writer = TokenWriter(place, ready.vocab_size, ready.fingerprint, seed)
                        for tokens, size, asked, continued in _encode(spool, spans, ready, pairs):
                            writer.add(tokens, size, asked, continued)
                            bar.update(size)
                        info[part] = writer.finish()
                first = itertools.islice(train.shuffled(shuffle), 3)
                info["examples"] = [_example(ready, spool.head(*span[:2])) for span in first]
            os.unlink(spool.path)
            content = [ready.fingerprint, info["train"]["sha256"], info["heldout"]["sha256"]]
            info = {"fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest(), **info}
            storage.write_file(
                target, "prepared.json", json.dumps(info, indent=1, ensure_ascii=False).encode()
            )
            if not remote:
                put_in_place(work, output, overwrite)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return info


def describe(info: dict) -> str:
    """The report of `prepare` for a person, some ten lines."""
    read = info["input"]
    train = info["train"]
    held = info["heldout"]
    lines = [
        f"read       {read['documents']:,} documents, {read['bytes']:,} bytes"
        + (
            f", from {read['files']:,} files ({read['skipped_files']:,} of unknown suffix skipped)"
            if read["files"]
            else ""
        ),
        f"dropped    {read['empty']:,} empty, {read['damaged']:,} damaged",
        f"mended     {read['repaired']:,} documents with invalid UTF-8, {read['control_characters']:,} "
        "control characters",
        *(f"           {line}" for line in note_lines(read["notes"])),
        f"tokenizer  {info['tokenizer']['kind']}, {info['tokenizer']['vocab_size']:,} pieces",
    ]
    if info["tokenizer"].get("losses"):
        losses = ", ".join(info["tokenizer"]["losses"])
        lines.append(f"           it is not lossless; a text loses {losses}")
    for name, part in (("train", train), ("heldout", held)):
        ratio = part["bytes"] / max(1, part["tokens"])
        lines.append(
            f"{name:<10} {part['documents']:,} documents, {part['bytes']:,} bytes, "
            f"{part['tokens']:,} tokens, {ratio:.2f} bytes/token"
            + (f"; {part['answer_tokens']:,} tokens are answers" if "answer_tokens" in part else "")
        )
    if not held["tokens"]:
        lines.append("           nothing is held out: there will be no held-out loss")
    lines += ["for example", *("           " + "|".join(pieces) for pieces in info["examples"])]
    return "\n".join(lines)


class _Spool:
    """The texts on disk as they were read: input is read once, memory holds two numbers for each,
    three for pairs."""

    def __init__(self, path: str, seed: int):
        self.path = path
        self.size = 0
        self._key = str(seed).encode()
        self._ends = array("q")
        self._hashes = array("Q")
        self._answers: array | None = None
        self._file = open(path, "w+b")

    def __enter__(self) -> "_Spool":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends)

    def fill(self, documents: Iterable[Document]) -> None:
        digest = self._digest()
        for document in documents:
            data = document.text.encode()
            if document.prompt is not None:
                # Pairs are told apart by their prompts.
                prompt = document.prompt.encode()
                self._answers = array("q") if self._answers is None else self._answers
                self._answers.append(self.size + len(prompt))
                digest.update(prompt)
                self._file.write(prompt)
                self.size += len(prompt)
            else:
                digest.update(data)
            self._file.write(data)
            self.size += len(data)
            if document.continued:
                continue
            self._ends.append(self.size)
            self._hashes.append(int.from_bytes(digest.digest(), "little"))
            digest = self._digest()
        self._file.flush()

    def _digest(self):
        return hashlib.blake2b(digest_size=8, key=self._key)

    @property
    def ends(self) -> np.ndarray:
        """[documents] int64: where each text stops; no copy."""
        return np.frombuffer(self._ends, np.int64)

    @property
    def hashes(self) -> np.ndarray:
        """[documents] uint64; no copy."""
        return np.frombuffer(self._hashes, np.uint64)

    def sizes(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def spans(self, numbers: np.ndarray) -> np.ndarray:
        """[n, 3] int64: where each of these texts starts and stops, and where the answer of a pair
        starts."""
        ends = self.ends
        starts = np.where(numbers > 0, ends[numbers - 1], 0)
        answers = (
            starts if self._answers is None else np.frombuffer(self._answers, np.int64)[numbers]
        )
        return np.stack([starts, ends[numbers], answers], axis=1)

    def read(self, start: int, stop: int, answer: int | None = None) -> str:
        return self.read_bytes(start, stop).decode()

    def read_bytes(self, start: int, stop: int) -> bytes:
        self._file.seek(start)
        return self._file.read(stop - start)

    def head(self, start: int, stop: int) -> str:
        """The beginning of a text."""
        return self.read_bytes(start, min(stop, start + _EXAMPLE_BYTES)).decode("utf-8", "ignore")

    def lines(self, start: int, stop: int) -> Iterator[str]:
        """A text, a long one in pieces of whole lines."""
        while start < stop:
            end = min(stop, start + _PIECE)
            while end < stop:
                data = self.read_bytes(start, end)
                if cut := data.rfind(b"\n") + 1:
                    end = start + cut
                    break
                end = min(stop, end + _PIECE)
            yield self.read(start, end)
            start = end

    def place_of(self, start: int, stop: int, character: int) -> int:
        """Where in the file the ``character`` of a text begins."""
        for first in range(start, stop, _PIECE):
            data = np.frombuffer(self.read_bytes(first, min(stop, first + _PIECE)), np.uint8)
            begins = np.flatnonzero((data & 0xC0) != 0x80)
            if character < len(begins):
                return first + int(begins[character])
            character -= len(begins)
        return stop

    def characters(self, start: int, stop: int) -> int:
        """How many characters a text has."""
        count = 0
        for first in range(start, stop, _PIECE):
            data = np.frombuffer(self.read_bytes(first, min(stop, first + _PIECE)), np.uint8)
            count += int(np.count_nonzero((data & 0xC0) != 0x80))
        return count


class _Part:
    """Some of the texts of a spool: by their ``numbers``, or ends and beginnings of some by their
    ``spans``."""

    def __init__(
        self, spool: _Spool, numbers: np.ndarray | None = None, spans: np.ndarray | None = None
    ):
        self._spool = spool
        self._numbers = numbers
        self._spans = spans

    def __len__(self) -> int:
        return len(self._numbers if self._spans is None else self._spans)

    def in_order(self) -> Iterator[np.ndarray]:
        """[3] int64 of each, as `_Spool.spans` has them."""
        return self._each(lambda numbers: numbers)

    def shuffled(self, key: np.uint64) -> Iterator[np.ndarray]:
        return self._each(lambda numbers: permute(numbers, len(self), key))

    def _each(self, order) -> Iterator[np.ndarray]:
        # Some at a time: shuffling takes a dozen times the memory of what is shuffled.
        for first in range(0, len(self), _DOCUMENTS_AT_ONCE):
            chosen = order(np.arange(first, min(first + _DOCUMENTS_AT_ONCE, len(self))))
            yield from (
                self._spool.spans(self._numbers[chosen])
                if self._spans is None
                else self._spans[chosen]
            )


def _split(spool: _Spool, share: float, pairs: bool = False) -> tuple[_Part, _Part]:
    """The training part and the held-out part."""
    count = len(spool)
    wanted = max(share * spool.size, min(_LEAST_HELDOUT_BYTES, spool.size / 10))
    if share == 0:
        return _Part(spool, np.arange(count)), _Part(spool, np.arange(0))
    if pairs or count >= _MANY_DOCUMENTS:
        last = _last_hash(spool, wanted)
        if last is not None:
            # By the hash and not by the place: copies of one text stay on one side.
            held = (spool.hashes <= last) & (spool.sizes() <= wanted)
            return _Part(spool, np.flatnonzero(~held)), _Part(spool, np.flatnonzero(held))
    everything = spool.spans(np.arange(count))
    train = everything.copy()
    held = everything if not pairs else everything[:0]
    for index, (start, stop, _) in enumerate(held):
        train[index, 1] = held[index, 0] = _cut_of(
            spool, int(start), int(stop), wanted / spool.size
        )
    held = held[held[:, 0] < held[:, 1]]
    several = len(np.unique(spool.hashes)) if pairs else count
    if not len(held) and several > 1:  # only short ones
        least = np.argmin(spool.hashes)
        chosen = spool.hashes == spool.hashes[least] if pairs else np.arange(count) == least
        return _Part(spool, np.flatnonzero(~chosen)), _Part(spool, np.flatnonzero(chosen))
    return _Part(spool, spans=train), _Part(spool, spans=held)


def _last_hash(spool: _Spool, wanted: float) -> np.uint64 | None:
    """The highest hash of the texts that are held out, the lowest ones first until there are
    ``wanted`` bytes of them; None where the first is too long already."""
    sizes = spool.sizes()
    share = min(1.0, 2 * wanted / spool.size)
    while True:
        # Of most texts the hash is far too high: only the others are sorted.
        limit = np.uint64(min(share * 2.0**64, 2.0**64 - 2048))
        some = np.flatnonzero(
            (spool.hashes <= limit) & (sizes <= wanted) if share < 1 else sizes <= wanted
        )
        some = some[
            np.argsort(spool.hashes[some], kind="stable")
        ]  # one long document is not to be all of it
        total = np.cumsum(sizes[some])
        if share >= 1 or (len(total) and total[-1] > wanted):
            count = np.searchsorted(total, wanted, side="right")
            return spool.hashes[some[count - 1]] if count else None
        share = min(1.0, 2 * share)


def _cut_of(spool: _Spool, start: int, stop: int, share: float) -> int:
    """Where in the file the held-out end of a text begins: at its `cut_place`, of which only the
    surroundings are read."""
    target, low, high = _cut_window(spool.characters(start, stop), share)
    if low == high:
        return spool.place_of(start, stop, target)
    first = spool.place_of(start, stop, low)
    window = spool.read(first, spool.place_of(start, stop, high))
    return first + len(window[: _cut_inside(window, target - low)].encode())


def cut_place(text: str, share: float) -> int:
    """Where the last ``share`` of a text begins: after a paragraph, a sentence or a word near that
    place."""
    target, low, high = _cut_window(len(text), share)
    return low + _cut_inside(text[low:high], target - low)


def _cut_window(length: int, share: float) -> tuple[int, int, int]:
    """(where a text of ``length`` characters is best cut, between which places it may be); short
    ones are not."""
    if length < 400:
        return length, length, length
    target = round(length * (1 - share))
    reach = max(200, round(length * share / 4))
    return target, max(1, target - reach), min(length - 1, target + reach)


def _cut_inside(window: str, target: int) -> int:
    for end in (r"\n\s*\n", r"[.!?][\"'”’)]*\s|[。！？][”’]*|\n", r"\s"):
        found = [match.end() for match in re.finditer(end, window)]
        if found:
            return min(found, key=lambda place: abs(place - target))
    return target


def _encode(
    spool: _Spool, spans: Iterable[np.ndarray], tokenizer: Tokenizer, pairs: bool
) -> Iterator[tuple[np.ndarray, int, tuple[int, int] | None, bool]]:
    """(<bos> text <eos>, bytes of the text, of a pair tokens and bytes of the prompt, whether the
    document goes on) of each span, some megabytes of text at a time; a long text in pieces."""
    dtype = token_dtype(tokenizer.vocab_size)
    threads = os.cpu_count() or 1
    for chosen in _groups(spans):
        if pairs:
            prompts = tokenizer.encode_batch(
                [spool.read(start, middle) for start, _, middle in chosen], threads
            )
            answers = tokenizer.encode_batch(
                [spool.read(middle, stop) for _, stop, middle in chosen], threads
            )
            for (start, stop, middle), ids, more in zip(chosen, prompts, answers, strict=True):
                yield (
                    np.array([tokenizer.bos_id, *ids, *more, tokenizer.eos_id], dtype),
                    int(stop - start),
                    (1 + len(ids), int(middle - start)),
                    False,
                )
        elif len(chosen) == 1 and chosen[0][1] - chosen[0][0] > _PIECE:
            start, stop, _ = map(int, chosen[0])
            first = [tokenizer.bos_id]
            for ids, size in encode_long(tokenizer, spool.read_bytes, start, stop, threads):
                last = [] if start + size < stop else [tokenizer.eos_id]
                yield np.array([*first, *ids, *last], dtype), size, None, not last
                start += size
                first = []
        else:
            encoded = tokenizer.encode_batch([spool.read(*span) for span in chosen], threads)
            for (start, stop, _), ids in zip(chosen, encoded, strict=True):
                yield (
                    np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype),
                    int(stop - start),
                    None,
                    False,
                )


def _groups(spans: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    group = []
    size = 0
    for span in spans:
        length = span[1] - span[0]
        if group and (length > _PIECE or size >= _TEXT_AT_ONCE or len(group) == _DOCUMENTS_AT_ONCE):
            yield group
            group = []
            size = 0
        group.append(span)
        size += length
        if length > _PIECE:
            yield group
            group = []
            size = 0
    if group:
        yield group


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """<bos> text <eos> of each text, in the tokenizer's type of tokens; some megabytes of text are
    held as ids that Python counts, which are fifteen times as large."""
    dtype = token_dtype(tokenizer.vocab_size)
    group = []
    size = 0
    for text in itertools.chain(texts, [None]):
        long = text is not None and len(text) > _PIECE
        if group and (
            text is None or long or size >= _TEXT_AT_ONCE or len(group) == _DOCUMENTS_AT_ONCE
        ):
            for ids in tokenizer.encode_batch(group):
                yield np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype)
            group = []
            size = 0
        if long:
            data = text.encode()
            parts = encode_long(
                tokenizer, lambda start, stop, data=data: data[start:stop], 0, len(data)
            )
            whole = [
                np.array([tokenizer.bos_id], dtype),
                *(np.array(ids, dtype) for ids, _ in parts),
            ]
            yield np.concatenate([*whole, np.array([tokenizer.eos_id], dtype)])
        elif text is not None:
            group.append(text)
            size += len(text)


def encode_long(
    tokenizer: Tokenizer, read: Callable[[int, int], bytes], start: int, stop: int, threads: int = 1
) -> Iterator[tuple[list[int], int]]:
    """(ids, bytes of text) of the pieces of a long text; together they are the ids of the whole.
    ``read(start, stop)`` gives its UTF-8 between two places."""
    length = _PIECE
    marks = _cut_marks(tokenizer)
    # SentencePiece alone divides one text among threads; for others each would only keep memory of
    # its own.
    threads = threads if isinstance(tokenizer, SentencePieceTokenizer) else 1
    while start < stop:
        data = read(start, min(stop, start + length))
        end = len(data) if start + len(data) == stop else _safe_cut(data, marks)
        if end is None:
            length *= 2
            continue
        yield tokenizer.encode_batch([data[:end].decode()], threads)[0], end
        start += end
        length = _PIECE


def _cut_marks(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """At which characters a text may be cut without changing its ids: none where a tokenizer puts
    something before each text or strips its ends; line ends alone of SentencePiece, which adds up
    scores along a line."""
    probes = [
        ("ab", "\n", "cd"),
        ("Ab.", "\n", "Cd ef"),
        ("天。", "\n", "地"),
        ("ab", " ", "cd"),
        ("x", "\n", "é"),
    ]
    for before, mark, after in probes:
        parts = (before + mark, after) if mark == "\n" else (before, mark + after)
        if tokenizer.encode("".join(parts)) != [
            *tokenizer.encode(parts[0]),
            *tokenizer.encode(parts[1]),
        ]:
            return ()
    marks = (b"\n",) if isinstance(tokenizer, SentencePieceTokenizer) else (b"\n", b" ")
    # A token that goes over such a place, as an added word of two words does, must not be cut.
    crossing = {b"\n": re.compile(rb"\n\S"), b" ": re.compile(rb"\S ")}
    pieces = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
    return tuple(mark for mark in marks if not any(map(crossing[mark].search, pieces)))


def _safe_cut(data: bytes, marks: tuple[bytes, ...]) -> int | None:
    """The last place in UTF-8 at which both sides are tokenized as one text would be: behind the
    one line end between a character that is not a space and a letter, or before the one space
    between two letters."""
    for mark in marks:
        place = len(data)
        while (place := data.rfind(mark, 1, place)) > 0:
            before = data[max(0, place - 4) : place].decode("utf-8", "ignore")[-1:]
            after = data[place + 1 : place + 5].decode("utf-8", "ignore")[:1]
            if after.isalpha() and (
                before.isalpha() if mark == b" " else before and not before.isspace()
            ):
                return place + (mark == b"\n")
    return None


def _example(tokenizer: Tokenizer, text: str) -> list[str]:
    lines = [line for line in text.split("\n") if line.strip()]
    line = next((line for line in lines if len(line) >= 40), next(iter(lines), ""))[:80]
    return [
        tokenizer.token_bytes(index).decode("utf-8", "replace") for index in tokenizer.encode(line)
    ]


def _check_output(
    input_path: str | os.PathLike | None, output: str, remote: bool, overwrite: bool
) -> None:
    if remote:
        exists = prepared = storage.read_file(output, "prepared.json") is not None
    else:
        path = Path(output)
        exists = path.exists() and not (path.is_dir() and not any(path.iterdir()))
        prepared = (path / "prepared.json").is_file()
        folder = Path(input_path).resolve() if input_path and Path(input_path).is_dir() else None
        if folder and path.resolve().is_relative_to(folder):
            raise ValueError(
                f"output {output} lies inside the input {input_path} and would be read as text; "
                "put it elsewhere"
            )
    if exists and not overwrite:
        raise FileExistsError(
            f"{output} exists; choose another output or replace it with --overwrite"
        )
    if exists and not prepared:
        raise FileExistsError(
            f"{output} is no prepared data set (no prepared.json) and is not replaced; "
            "choose another output"
        )


def put_in_place(work: str, output: str, overwrite: bool) -> None:
    """Renames the folder ``work`` to ``output``; what was there goes once the new one stands, and
    comes back where that fails."""
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
            raise FileExistsError(
                f"{output} was made by another run meanwhile; choose another"
            ) from None
        raise
    folder = os.open(os.path.dirname(os.path.abspath(output)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    if replaced:
        shutil.rmtree(before)
