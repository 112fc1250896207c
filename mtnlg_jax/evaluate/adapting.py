"""Adapt a model to a person: train an adapter, measure what it gains and costs, and write it."""

import dataclasses
import datetime
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mtnlg_jax import foreign, storage
from mtnlg_jax.config import Config
from mtnlg_jax.data.store.sources import open_sources
from mtnlg_jax.data.store.tokens import Tokens
from mtnlg_jax.decode.adapters import for_rows, stack
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.evaluate.perplexity import evaluate_texts, merged
from mtnlg_jax.train import adapter_file
from mtnlg_jax.train.adapt import AdaptSettings, Texts, train_adapter

# Of held-out texts, so that measuring takes seconds. All documents have equal shares.
MOST_TOKENS = 20_000


class Change(NamedTuple):
    """Bits per byte of some texts, without and with an adapter."""

    before: float
    after: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class Adapted:
    path: str
    adapter: adapter_file.Adapter
    person: Change
    others: Change | None  # None: there are no texts of others to measure


def output_of(workdir: str, name: str, output: str | None, overwrite: bool) -> str:
    """Return the path of a new adapter.

    Raises ValueError on a name that cannot be, in a folder that is not a run, and if the file
    exists and not ``overwrite``.
    """
    if output is None:
        adapter_file.check_name(name)
        if foreign.reader_of(workdir) is not None or storage.is_remote(workdir):
            raise ValueError(
                f"{workdir} is not a run here, and nothing is written into the folders of others; "
                "say where the adapter goes with --output=FILE.safetensors"
            )
        output = adapter_file.path_of(workdir, name)
    if not output.endswith(adapter_file.SUFFIX):
        raise ValueError(f"--output={output} must end with {adapter_file.SUFFIX}")
    if os.path.exists(output) and not overwrite:
        raise ValueError(
            f"{output} exists; give another name, delete it, or replace it with --overwrite"
        )
    return output


def adapt(
    workdir: str,
    texts: Texts,
    output: str,
    settings: AdaptSettings | None = None,
    others: Sequence[str] | None = None,
    *,
    progress: bool = True,
    announce: Callable[[str], None] = lambda text: None,
) -> Adapted:
    """Train an adapter of the model at ``workdir`` on ``texts`` and write it to ``output``.

    The file is written at the end, as a whole; until then a folder beside it holds the run, from
    which the same call resumes. ``others`` are texts of others; None: the held-out text that the
    model was trained beside, if it is still there. Raises what `train_adapter` raises.
    """
    folder, name = os.path.split(os.path.abspath(output))
    work = os.path.join(folder, f".{name.removesuffix(adapter_file.SUFFIX)}.training")
    trained = train_adapter(workdir, texts, work, settings, progress=progress, announce=announce)
    run, decoder = load_decoder(workdir)
    if others is None:
        others = _held_out_of(run.config, workdir, run.tokenizer)
    adapted = for_rows(stack(decoder, {"adapter": trained.adapter}), ["adapter"])

    def change(given: Sequence[str]) -> Change:
        before, after = (
            merged(evaluate_texts(model, run.tokenizer, given)) for model in (decoder, adapted)
        )
        return Change(before.bits_per_byte, after.bits_per_byte, before.bytes)

    person = change(_texts_of([trained.held_out], run.tokenizer))
    of_others = change(others) if others else None
    described: dict[str, Any] = {
        **trained.adapter.trained,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "bits_per_byte": person[:2],
        "bits_per_byte_of_others": of_others[:2] if of_others else None,
    }
    adapter = dataclasses.replace(trained.adapter, trained=described)
    adapter_file.write(output, adapter)
    shutil.rmtree(work, ignore_errors=True)
    return Adapted(output, adapter, person, of_others)


def _held_out_of(config: Config, workdir: str, tokenizer) -> list[str]:
    """Return the held-out texts of the data that a run was trained on; [] if they are gone."""
    for beside in ("", os.path.dirname(os.path.abspath(workdir))):
        # A path may be relative to the folder in which the run was started.
        paths = [os.path.join(beside, path) for path, _ in config.data.sources]
        try:
            found = open_sources(paths, config.data.tokenizer, config.data.heldout) if paths else ()
        except (OSError, ValueError):
            continue
        return _texts_of(list(found[2].values()), tokenizer) if found else []
    return []


def _texts_of(parts: Sequence[Tokens], tokenizer) -> list[str]:
    """Return the beginnings of all documents, together about MOST_TOKENS tokens."""
    documents = sum(each.documents for each in parts)
    share = max(64, MOST_TOKENS // max(1, documents))
    texts = []
    left = MOST_TOKENS
    for tokens in parts:
        offsets = tokens.document_offsets.tolist()
        for start, stop in zip(offsets, offsets[1:], strict=False):
            size = min(stop - start, share, left)
            text = tokenizer.decode(tokens.read(start, start + size).tolist()) if size > 0 else ""
            left -= size
            if text.strip():
                texts.append(text)
    return texts


def describe(adapted: Adapted, name: str) -> str:
    """Return the report for a person."""
    trained = adapted.adapter.trained
    size = os.path.getsize(adapted.path)
    optimizer = adapted.adapter.config.optimizer
    lines = [
        f"trained    {trained['bytes']:,} bytes of {trained['documents']:,} document(s), step "
        f"{trained['best_step']} of {trained['steps']}, {trained['seconds'] / 60:.1f} minutes",
        f"adapter    {adapted.path}: {size:,} bytes, rank {optimizer.lora_rank}, of "
        f"{', '.join(optimizer.lora_targets)}",
        _line("this text", adapted.person),
    ]
    if adapted.others is None:
        lines.append("others     not measured: the run's own held-out text is gone; give --others")
    else:
        lines.append(_line("others", adapted.others))
    if adapted.person.after >= adapted.person.before:
        lines.append(
            "the adapter does not help on the held-out text; give more texts, or another "
            "--learning_rate"
        )
    lines.append(f"delete it by deleting its file; use it: --adapter={name}")
    return "\n".join(lines)


def _line(what: str, change: Change) -> str:
    share = 100 * (change.after / change.before - 1)
    return (
        f"{what:<10} {change.before:.4f} bits per byte before, {change.after:.4f} after "
        f"({share:+.1f} %), on {change.bytes:,} bytes held out"
    )
