"""Open the data of a run: prepared folders and Megatron's files, with one tokenizer."""

import os
import shlex
from collections.abc import Sequence

from mtnlg_jax import storage
from mtnlg_jax.data.store.megatron import MegatronTokens, kept_documents, open_megatron, prefix_of
from mtnlg_jax.data.store.prefixes import open_with_prefixes
from mtnlg_jax.data.store.prepared import PREPARED, read_prepared
from mtnlg_jax.data.store.tokens import Tokens
from mtnlg_jax.data.tokenizer import Tokenizer, tokenizer_for_data


def open_tokens(location: str | os.PathLike) -> Tokens:
    """Open the tokens in a folder (path or URL) such as ``OUT/train``, or in Megatron's PREFIX.bin
    and PREFIX.idx.

    Raises FileNotFoundError if nothing was prepared, ValueError if something is damaged or missing.
    """
    location = str(location).rstrip("/")
    return open_megatron(location) if prefix_of(location) else open_with_prefixes(location)


def spread(blend: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Return ``blend`` with each output of a recipe (launch/prepare_data.py --config) replaced by
    its sources, which share its weight according to prepared.json."""
    spread: list[tuple[str, float]] = []
    for path, weight in blend:
        prepared = not prefix_of(path) and storage.exists(path, PREPARED)
        parts = read_prepared(path).get("sources") if prepared else None
        spread += (
            [(path, weight)]
            if parts is None
            else [(storage.join(path, name), weight * share) for name, share in parts if share]
        )
    return tuple(spread)


def open_sources(
    paths: Sequence[str], tokenizer: str = "", heldout: float | str = 0.01
) -> tuple[Tokenizer, dict[str, Tokens], dict[str, Tokens]]:
    """Open prepared folders and Megatron prefixes: return (tokenizer, training tokens by path,
    held-out tokens by path).

    The paths of training tokens are those that `spread` returns; each of ``paths`` has one held-out
    part. One source of a recipe's output, OUT/sources/NAME, is also a path; its held-out part is
    that of OUT.

    A prepared folder holds its tokenizer and its held-out part. Megatron's files need
    ``tokenizer``, and their last documents are held out, a share of ``heldout`` (0 to 0.5). If
    ``heldout`` is a string, the tokens at this path are the whole held-out part.

    If Megatron's documents do not begin with bos (its own tools write none), the tokenizer's
    ``prompt_bos`` is off: the model never reads a bos in training, so no prompt should begin with
    one.

    Raises ValueError if tokenizers differ or a token is outside the vocabulary, and the errors of
    opening.
    """
    for path in paths:
        _refuse_other_folders(path)
    foreign = [path for path in paths if prefix_of(path)]
    if foreign and not tokenizer:
        raise ValueError(
            f"{foreign[0]} is a Megatron data set, which does not hold its tokenizer; give "
            "--set=data.tokenizer=FOLDER, the one that made it"
        )
    parts = [part for part, _ in spread([(path, 1.0) for path in paths])]
    opened = {
        path: open_tokens(path if path in foreign else storage.join(path, "train"))
        for path in parts
    }
    prints = {path: opened[path].meta["tokenizer"] for path in parts if path not in foreign}
    if len(set(prints.values())) > 1:
        raise ValueError(
            f"the sources were tokenized differently: {prints}; prepare them with one --tokenizer"
        )
    other = tokenizer or storage.join(_home(paths[0]), "tokenizer")
    found = tokenizer_for_data(other)
    if set(prints.values()) - {found.fingerprint}:
        raise ValueError(
            f"{next(iter(prints))} was not tokenized with {other}; leave data.tokenizer out if "
            f"that names it, or prepare the text with --tokenizer={other}"
        )
    held_out = _held_out(paths, opened, heldout)
    for tokens in [*opened.values(), *held_out.values()]:
        if isinstance(tokens, MegatronTokens):
            tokens.attach(found)
    megatron = [tokens for tokens in opened.values() if isinstance(tokens, MegatronTokens)]
    if not all(tokens.begins_with(found.bos_id) for tokens in megatron):
        found.prompt_bos = False
    return found, opened, held_out


def _refuse_other_folders(path: str) -> None:
    """Check that ``path`` is a prepared folder or a Megatron prefix. Raises FileNotFoundError that
    explains what it is instead, and what to give."""
    if (
        prefix_of(path)
        or storage.exists(path, PREPARED)
        or storage.exists(storage.join(path, "train"), "meta.json")
    ):
        return
    make = "make data of text with launch/prepare_data.py --output=OUT and give OUT"
    if storage.is_remote(path):
        raise FileNotFoundError(f"{path} holds no prepared data (no prepared.json); {make}")
    if not os.path.exists(path):
        found = storage.missing(path)
        raise FileNotFoundError(found if found.endswith("?") else f"{found}; {make}")
    if os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} is a file that was not prepared; give the folder that launch/prepare_data.py "
            f"--input={shlex.quote(path)} --output=OUT makes"
        )
    above = os.path.abspath(path)
    while (above := os.path.dirname(above)) != os.path.dirname(above):
        if os.path.isfile(os.path.join(above, PREPARED)):
            whole = above if os.path.isabs(path) else os.path.relpath(above)
            raise FileNotFoundError(f"{path} is one part of prepared data; give {whole}")
    entries = sorted(os.listdir(path))
    prefixes = [os.path.join(path, entry[:-4]) for entry in entries if entry.endswith(".idx")]
    if prefixes:
        more = f", or one of {len(prefixes) - 1} more" if len(prefixes) > 1 else ""
        raise FileNotFoundError(
            f"{path} is a folder of Megatron data sets; give the prefix of one: {prefixes[0]}{more}"
            "; several go into data.blend"
        )
    within = [entry for entry in entries if os.path.isfile(os.path.join(path, entry, PREPARED))]
    if within:
        raise FileNotFoundError(
            f"{path} holds prepared data in {', '.join(within[:4])}; give "
            f"{os.path.join(path, within[0])}"
        )
    if "meta.json" in entries:
        raise FileNotFoundError(
            f"{path} is one part of prepared data; give the folder that contains it"
        )
    if "checkpoints" in entries:
        raise FileNotFoundError(
            f"{path} is a run, which holds no data; give what it was trained on (data.path in "
            f"{path}/config.json)"
        )
    raise FileNotFoundError(
        f"{path} holds no prepared data (no prepared.json); make it with launch/prepare_data.py "
        f"--input={shlex.quote(path)} --output=OUT and give OUT"
    )


def _home(path: str) -> str:
    """Return the folder that holds the tokenizer and the held-out part of a prepared ``path``: OUT
    of OUT/sources/NAME, otherwise itself."""
    output, _, name = path.rstrip("/").rpartition("/sources/")
    inside = output and "/" not in name and storage.exists(output, PREPARED)
    return output if inside else path


def _held_out(
    paths: Sequence[str], opened: dict[str, Tokens], heldout: float | str
) -> dict[str, Tokens]:
    """Return the held-out tokens by path. Those of Megatron's files are their last documents, and
    ``opened`` gets the rest."""
    if isinstance(heldout, str):
        named = prefix_of(heldout)
        if named and named in {prefix_of(path) for path in opened}:
            raise ValueError(
                f"data.heldout={heldout} is also trained on; name other files, or a share such as "
                "0.01"
            )
        return {heldout: open_tokens(heldout)}
    parts = {}
    for path in dict.fromkeys(paths):
        if not prefix_of(path):
            parts[path] = open_tokens(storage.join(_home(path), "heldout"))
        else:
            documents = opened[path].documents
            kept = kept_documents(documents, heldout)
            opened[path] = open_megatron(path, 0, kept)
            parts[path] = open_megatron(path, kept, documents)
    return parts
