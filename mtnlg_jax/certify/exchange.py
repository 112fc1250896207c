"""Write the small run as a model of Hugging Face's and read it back, by `interop`."""

import dataclasses
import os

import jax
import numpy as np

from mtnlg_jax.certify import figures
from mtnlg_jax.certify.figures import Figure
from mtnlg_jax.config import Config, to_json
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.interop.export import config_of
from mtnlg_jax.interop.huggingface import convert
from mtnlg_jax.model.params import names_of
from mtnlg_jax.storage import write_file
from mtnlg_jax.train.checkpoint import load_run


def family_of(config: Config) -> tuple[str | None, str]:
    """Return (the family of Hugging Face's that computes the same, "") or (None, why not)."""
    # The padding of the vocabulary is cut off.
    model = dataclasses.replace(config.model, vocab_padding=0)
    try:
        return config_of(model)["model_type"], ""
    except ValueError as error:
        return None, str(error)


def exchanged(config: Config, tokenizer: Tokenizer, folder: str, family: str) -> list[Figure]:
    """Return the figures of the checkpoint in ``folder``: every parameter after the way to
    ``family`` and back. With adapters, those of the merged model."""
    tokenizer.save(os.path.join(folder, "tokenizer"))
    write_file(folder, "config.json", to_json(config).encode())
    model = f"{folder}-{family}"
    convert(folder, model, family=family)
    convert(model, f"{model}-back")
    before = load_run(folder, vocab_padding=0)
    after = load_run(f"{model}-back")
    wanted = names_of(jax.tree.map(np.asarray, before.params))
    got = names_of(jax.tree.map(np.asarray, after.params))
    found = []
    for name in {**wanted, **got}:
        missing = name not in wanted or name not in got
        difference = None if missing else figures.differing_bits(got[name], wanted[name])
        found.append(
            Figure(
                figures.EXCHANGE,
                name,
                mesh=family,
                objective="",
                types="float32",
                difference=difference,
                tolerance=figures.EXACT,
                problem=f"only {'after' if name in got else 'before'} the exchange"
                if missing
                else "",
            )
        )
    return found
