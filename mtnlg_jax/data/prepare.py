"""Prepare: documents -> held-out split -> tokenizer -> token arrays, whole or not at all.

A recipe (`mtnlg_jax.data.recipe`) makes the same data set in parallel tasks, after cleaning.

Needs disk space for another copy of the text, and memory for 50 bytes of each document. A long text
file is read and tokenized in pieces of some megabytes. A single value or page (a line of JSON, a
cell, HTML) takes some five times its size in memory, and so does a text without a line end or space
where it could be cut.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
from tqdm import tqdm

from mtnlg_jax import storage
from mtnlg_jax.data import canaries as planted
from mtnlg_jax.data.canaries import Canary, CanaryConfig
from mtnlg_jax.data.conversations import Conversations, open_conversations
from mtnlg_jax.data.description import describe
from mtnlg_jax.data.encode import Text, encode_documents, in_memory
from mtnlg_jax.data.heldout import Part, split
from mtnlg_jax.data.output import check_output, new_folder
from mtnlg_jax.data.prefix.rows import KEY_BYTES, PrefixInput, PrefixRows
from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.data.read.documents import Document, ReadReport, note_lines, read_documents
from mtnlg_jax.data.read.pairs import pair_maker
from mtnlg_jax.data.spool import Spool
from mtnlg_jax.data.store.prefixes import write_prefixes
from mtnlg_jax.data.store.prepared import PREPARED, prepared_info, tokenizer_info, write_prepared
from mtnlg_jax.data.store.tokens import TokenWriter
from mtnlg_jax.data.tokenizer import Tokenizer, tokenizer_for_data, train_tokenizer

__all__ = ["describe", "prepare"]

_EXAMPLES = 3
_EXAMPLE_TOKENS = 20  # of a conversation
_LANGUAGE_DOCUMENTS = 100  # whose beginnings tell the language of canaries


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
    prefix: PrefixInput | None = None,
    messages: str | None = None,
    chat_template: str | os.PathLike | None = None,
    sequence_length: int | None = None,
    show: int = 0,
    on_error: str = "raise",
    encoding: str = "",
    canaries: CanaryConfig | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Turn text into a folder to train from (`mtnlg_jax.data.store.tokens` shows its layout), and
    return what its prepared.json holds.

    ``input_path`` is for `read_documents`; None is the embedded text. ``tokenizer`` is "bpe" or
    "unigram", trained on the training part with ``vocab_size``, or the path of an existing one.
    ``heldout`` is the share of the text (0 to 0.5) in the held-out part: documents drawn by a hash
    of their text and ``seed``, or if there are fewer than 100 the end of each, cut after a
    sentence.

    ``answer``, a template such as " {label}" over the keys of JSON rows, makes pairs: each document
    is the row in the template ``prompt``, then the answer, and a model is trained on the answer
    alone. The two are tokenized separately. Pairs with the same prompt are held out together,
    always whole. ``prefix``: where rows, also of Parquet, have an image or features ahead of the
    prompt; then pairs of one image are held out together.

    ``messages``, a key of JSON rows, makes conversations: a list of {"role": ..., "content": ...}
    under it, rendered by the tokenizer's chat template or by the file ``chat_template``. A model is
    trained on the assistant's turns alone. A row that leaves nothing to train on, or one of more
    than ``sequence_length`` + 1 tokens, is damaged. ``show`` prints as many of them with what is
    trained on marked, before anything is written.

    ``encoding`` is that of text that is not UTF-8 and does not declare one (`charsets`).
    ``canaries``: random secrets, planted as documents of the training part, of which the tokenizer
    knows nothing, and recorded in canaries.json.

    The result depends on the input and the arguments alone. It is written to
    ``output.partial-<process>`` and renamed at the end; at a URL (gs://, s3://) prepared.json,
    without which nothing opens it, comes last.

    Raises ValueError, FileNotFoundError, FileExistsError (``output`` exists and not ``overwrite``)
    or OSError (cannot be written), before any work where that can be known.
    """
    if not 0 <= heldout <= 0.5:
        raise ValueError(f"heldout={heldout} must be in 0 to 0.5")
    output = str(output).rstrip("/")
    check_output(output, PREPARED, overwrite=overwrite, input_path=input_path)
    pairs = answer is not None
    _check_rows(input_path, answer, messages, bool(chat_template or sequence_length or show))
    canaries = _checked(canaries or CanaryConfig(), pairs or messages is not None)
    ahead = _prefix_rows(input_path, prefix, prompt, answer)
    ready = None if tokenizer in ("bpe", "unigram") else tokenizer_for_data(tokenizer)
    talks = open_conversations(ready, messages, chat_template, sequence_length)
    if ready is not None and talks is None:
        ready.check_end()
    make_row = ahead or _row_maker(text_key, prompt, answer, talks)
    report = ReadReport()
    documents = _documents(input_path, make_row, on_error, encoding, report)
    settings: dict = {"input": str(input_path or "embedded"), "tokenizer": str(tokenizer)}
    settings |= {"vocab_size": vocab_size, "heldout": heldout, "seed": seed}
    settings |= {"text_key": text_key, "on_error": on_error} | _named(encoding=encoding)
    settings |= _pair_settings(prompt, answer, prefix) if pairs else {}
    settings |= {"messages": messages, "sequence_length": sequence_length} if talks else {}
    bar = partial(tqdm, disable=None if progress else True)  # None: on a terminal only
    with (
        storage.disk_errors(output, "nothing was kept"),
        new_folder(output, overwrite) as (work, target),
    ):
        if storage.is_remote(output) and overwrite:
            storage.remove_file(output, PREPARED)
        with (
            Spool(os.path.join(work, "texts"), seed, KEY_BYTES if ahead else 0) as spool,
            ahead.keeping_in(work) if ahead else contextlib.nullcontext(),
        ):
            _fill(spool, bar(documents, "reading", unit=" documents"), input_path, report)
            train, held = split(spool, heldout, pairs or talks is not None)
            secret = _draw_canaries(spool, train, canaries, seed)
            ready = ready or _train(spool, train, tokenizer, vocab_size, seed, bar)
            _show(spool, itertools.islice(_shuffled(train, seed), show), talks)
            ready.save(storage.join(target, "tokenizer"))
            with bar(desc="encoding", total=spool.size, unit="B", unit_scale=True) as encoded:
                write = partial(_write_tokens, spool, ready, talks, pairs, ahead, seed, encoded)
                parts: dict = _write_parts(write, target, train, held, secret, seed)
            examples = _examples(spool, _shuffled(train, seed), ready, talks)
        os.unlink(spool.path)
        parts |= {"settings": settings, "input": asdict(report), "examples": examples}
        info = prepared_info(tokenizer_info(ready), **parts)
        write_prepared(target, info)
    return info


def _check_rows(
    input_path: str | os.PathLike | None,
    answer: str | None,
    messages: str | None,
    for_conversations: bool,
) -> None:
    """Raise ValueError if settings of rows are given that do not fit together."""
    if answer is not None and input_path is None:
        raise ValueError("--answer makes pairs of the rows of a JSON file; give that as --input")
    if messages is not None and (answer is not None or input_path is None):
        raise ValueError("--messages reads the rows of a JSON --input, without --answer")
    if messages is None and for_conversations:
        raise ValueError(
            "--chat_template, --sequence_length and --show are for conversations; give the key of "
            "the messages with --messages, or leave them out"
        )


def _checked(canaries: CanaryConfig, rows: bool) -> CanaryConfig:
    """Return ``canaries``. Raise ValueError if they cannot be planted; ``rows``: in pairs or
    conversations."""
    planted.check(canaries)
    if canaries.count and rows:
        raise ValueError(
            f"canaries={canaries.count} are plain text, and --answer and --messages make rows of "
            "prompts with answers; leave --canaries out"
        )
    return canaries


def _named(**given: str) -> dict[str, str]:
    return {name: value for name, value in given.items() if value}


def _pair_settings(prompt: str, answer: str | None, prefix: PrefixInput | None) -> dict:
    ahead = {} if prefix is None else {"prefix": prefix._asdict()}
    return {"prompt": prompt, "answer": answer} | ahead


def _prefix_rows(
    input_path: str | os.PathLike | None,
    prefix: PrefixInput | None,
    prompt: str,
    answer: str | None,
) -> PrefixRows | None:
    """Return what makes pairs of rows with images or features. Raise ValueError if the input has
    none."""
    if prefix is None:
        return None
    if answer is None or input_path is None:
        raise ValueError(
            "--image and --prefix are for rows with an answer; give their file with --input, and "
            "the text to learn with --answer='{caption}'"
        )
    if storage.is_remote(input_path):
        raise ValueError(
            f"--input={input_path} is not on this machine, from which images and features are "
            "read; copy it here"
        )
    folder = str(input_path) if os.path.isdir(input_path) else os.path.dirname(str(input_path))
    return PrefixRows(prefix, prompt, answer, folder)


def _row_maker(
    text_key: str, prompt: str, answer: str | None, talks: Conversations | None
) -> str | Callable[[object], str]:
    """Return what `read_documents` makes a text of a row by."""
    if talks is not None:
        return talks.make
    return text_key if answer is None else pair_maker(prompt, answer)


def _train(
    spool: Spool, train: Part, model_type: str, vocab_size: int, seed: int, bar: partial
) -> Tokenizer:
    """Train a tokenizer on the training part."""
    # In the order read, not shuffled: that spreads the sample of a huge corpus over it.
    spans = bar(train.in_order(), f"training {model_type}", len(train), unit=" documents")
    texts = (text for span in spans for text in spool.lines(*span[:2]))
    return train_tokenizer(texts, vocab_size, model_type, seed)


def _draw_canaries(spool: Spool, train: Part, canaries: CanaryConfig, seed: int) -> list[Canary]:
    """Return the canaries for the training part. Raise ValueError if it is too small for them."""
    if not canaries.count:
        return []
    spans = [*itertools.islice(train.in_order(), _LANGUAGE_DOCUMENTS)]
    letters = planted.count_letters(spool.head(start, stop) for start, stop, _ in spans)
    found = planted.make_canaries(canaries, seed, {"": planted.language_of(*letters)})
    planted.check_size(found, spool.size)
    return found


def _show(spool: Spool, spans: Iterable[np.ndarray], talks: Conversations | None) -> None:
    if talks is not None:
        for start, stop, _ in spans:
            talks.show(spool.read(start, stop))


def _examples(
    spool: Spool, spans: Iterable[np.ndarray], tokenizer: Tokenizer, talks: Conversations | None
) -> list[list[str]]:
    """Return the pieces of a line of the first documents, or of the start of conversations."""
    examples = []
    for start, stop, _ in itertools.islice(spans, _EXAMPLES):
        if talks is None:
            examples.append(_example(tokenizer, spool.head(start, stop)))
        else:
            ids = talks.row(spool.read(start, stop)).tokens[:_EXAMPLE_TOKENS]
            examples.append([tokenizer.decode([index], skip_special=False) for index in ids])
    return examples


def _documents(
    input_path: str | os.PathLike | None, make_row, on_error: str, encoding: str, report: ReadReport
) -> Iterable[Document]:
    if input_path is None:
        return embedded_documents()
    return read_documents(
        input_path,
        make_row,
        on_error,
        report,
        # Without a limit to the length: a corpus may be one text file, which is one document.
        max_document_bytes=1 << 60,
        encoding=encoding,
        pieces=True,
    )


def _fill(
    spool: Spool,
    documents: Iterable[Document],
    input_path: str | os.PathLike | None,
    report: ReadReport,
) -> None:
    """Write the documents to the spool. Raise ValueError if there are none."""
    spool.fill(documents)
    if input_path is None:
        report.documents = len(spool)
        report.bytes = spool.size
    if not len(spool):
        raise _no_text(input_path, report)


def _no_text(input_path: str | os.PathLike | None, report: ReadReport) -> ValueError:
    lines = [
        f"{input_path} holds no text: {report.files} files read, {report.skipped_files} skipped, "
        f"{report.empty} documents empty, {report.damaged} damaged",
        *note_lines(report.notes)[:3],
        "give a file or a folder with text in it",
    ]
    return ValueError("; ".join(lines))


def _shuffled(train: Part, seed: int) -> Iterator[np.ndarray]:
    return train.shuffled(np.uint64(seed & (1 << 64) - 1))


def _write_parts(
    write: Callable[..., dict],
    target: str,
    train: Part,
    held: Part,
    canaries: Sequence[Canary],
    seed: int,
) -> dict[str, dict]:
    """Write both parts, with the canaries among the training part, and canaries.json; return the
    meta.json of each, and what prepared.json tells of the canaries."""
    storage.remove_file(target, planted.CANARIES)  # of an earlier data set, at a URL
    recorded = {}
    if canaries:
        storage.write_file(target, planted.CANARIES, planted.canaries_file(canaries, seed))
        recorded = {"canaries": planted.summary(canaries)}
    copies = planted.shuffled_copies(canaries, seed)
    among = (copies, planted.places(len(copies), len(train), seed))
    return {
        "train": write(storage.join(target, "train"), _shuffled(train, seed), among),
        "heldout": write(storage.join(target, "heldout"), held.in_order()),
        **recorded,
    }


def _write_tokens(
    spool: Spool,
    tokenizer: Tokenizer,
    talks: Conversations | None,
    pairs: bool,
    ahead: PrefixRows | None,
    seed: int,
    bar: tqdm,
    location: str,
    spans: Iterable[np.ndarray],
    among: tuple[Sequence[str], Sequence[int]] = ((), ()),
) -> dict:
    """Write the tokens of ``spans`` below ``location``, and what is ahead of them; return their
    meta.json. ``among``: further texts, and before which span each goes."""
    keys: list[bytes] = []  # of what is ahead of each text

    def read() -> Iterator[Text]:
        for start, stop, answer in spans:
            if ahead is not None:
                keys.append(spool.key_of(int(start)))
            yield Text(spool.read_bytes, int(start), int(stop), int(answer) if pairs else None)

    texts = planted.interleaved(read(), map(in_memory, among[0]), among[1])
    writer = TokenWriter(location, tokenizer.vocab_size, tokenizer.fingerprint, seed)
    found = (
        encode_documents(tokenizer, texts, os.cpu_count() or 1)
        if talks is None
        else talks.encode(texts)
    )
    for encoded in found:
        writer.add(*encoded)
        bar.update(encoded.text_bytes)
    if ahead is None:
        return writer.finish()
    index, arrays = ahead.stored(keys)
    return writer.finish(write_prefixes(location, index, arrays, ahead.shape, ahead.dtype))


def _example(tokenizer: Tokenizer, text: str) -> list[str]:
    lines = [line for line in text.split("\n") if line.strip()]
    line = next((line for line in lines if len(line) >= 40), next(iter(lines), ""))[:80]
    return [
        tokenizer.token_bytes(index).decode("utf-8", "replace") for index in tokenizer.encode(line)
    ]
