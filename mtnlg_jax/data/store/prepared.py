"""prepared.json, the file that makes a folder a prepared data set.

    fingerprint   identifies the tokenizer and all tokens; a run records it
    tokenizer     kind, fingerprint, vocab_size; losses: what it does not keep of a text
    train         meta.json of the training tokens; over all sources where there are several
    heldout       meta.json of the held-out tokens
    sources       [[folder, weight], ...] if the training tokens are in folders of their own, as a
                  recipe writes them; without it they are in train/
    settings, input, examples   for people, if the command recorded them

It is written last, since nothing opens the data without it.
"""

import hashlib
import json
import os

from mtnlg_jax import storage
from mtnlg_jax.data.store.tokens import damaged
from mtnlg_jax.data.tokenizer import Tokenizer

PREPARED = "prepared.json"


def tokenizer_info(tokenizer: Tokenizer) -> dict:
    """Return what prepared.json records of a tokenizer."""
    return {
        "kind": tokenizer.kind,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "losses": tokenizer.losses(),
    }


def prepared_info(tokenizer: dict, train: dict, heldout: dict, **more) -> dict:
    """Return the content of prepared.json for tokens in train/ and heldout/."""
    content = [tokenizer["fingerprint"], train["sha256"], heldout["sha256"]]
    parts = {"tokenizer": tokenizer, "train": train, "heldout": heldout}
    return {"fingerprint": _sha256(content), **parts, **more}


def prepared_sources(
    tokenizer: dict, trained: dict[str, dict], heldout: dict, weights: dict[str, float]
) -> dict:
    """Return the content of prepared.json for several sources, by name, in sources/NAME/train."""
    hashes = [meta["sha256"] for meta in trained.values()]
    counts = {
        key: sum(meta[key] for meta in trained.values()) for key in ("tokens", "documents", "bytes")
    }
    train = {**next(iter(trained.values())), **counts, "sha256": _sha256(hashes)}
    # The weights are part of the data: a run draws its samples by them.
    content = [[tokenizer["fingerprint"], heldout["sha256"], *hashes], weights]
    return prepared_info(tokenizer, train, heldout) | {
        "fingerprint": _sha256(content),
        "sources": [[f"sources/{name}", weights[name]] for name in trained],
    }


def write_prepared(location: str | os.PathLike, info: dict) -> None:
    """Write prepared.json: the last file of a data set."""
    content = json.dumps(info, indent=1, ensure_ascii=False).encode()
    storage.write_file(location, PREPARED, content)


def read_prepared(location: str | os.PathLike) -> dict:
    """Return the content of prepared.json.

    Raises FileNotFoundError if nothing was prepared there, ValueError if it is damaged.
    """
    content = storage.read_file(location, PREPARED)
    if content is None:
        raise FileNotFoundError(
            f"{location} holds no prepared data (no {PREPARED}): make it with "
            f"python launch/prepare_data.py --output={location}"
        )
    try:
        prepared = json.loads(content)
        prepared["fingerprint"], prepared["train"], prepared["heldout"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(location, f"{PREPARED}: {error!r}") from None
    return prepared


def _sha256(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
