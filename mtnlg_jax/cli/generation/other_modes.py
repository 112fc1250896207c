"""--mode=tokens: show the ids of a prompt; --mode=fill: fill its masks."""

import dataclasses
import os
import sys
from typing import TYPE_CHECKING

from mtnlg_jax.cli.decoding import shared_flags
from mtnlg_jax.cli.decoding.output import dump, print_table
from mtnlg_jax.cli.generation import options

if TYPE_CHECKING:
    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.decode.cache import Decoder


def show_tokens(prompt: str) -> None:
    """Show the tokens of a text, without a model."""
    from mtnlg_jax import foreign
    from mtnlg_jax.data.tokenizer import load_tokenizer

    workdir = options.WORKDIR.value
    reader = foreign.reader_of(workdir)
    if reader is not None:
        tokenizer = reader.settings(workdir)[1][0]
    else:
        tokenizer = load_tokenizer(os.path.join(workdir, "tokenizer"))
    tokenizer.parse_special = options.PARSE_SPECIAL.value
    ids = tokenizer.encode(prompt)
    pieces = [tokenizer.decode([index], skip_special=False) for index in ids]
    before = [tokenizer.bos_id] if tokenizer.prompt_bos or not ids else []
    if shared_flags.JSON.value:
        content = {"mode": "tokens", "prompt": prompt, "tokens": ids}
        print(dump(content | {"pieces": pieces, "before": before}))
        return
    rows = [[str(index), repr(piece)] for index, piece in zip(ids, pieces, strict=True)]
    print_table([["id", "text"], *rows], {"text"})
    print(",".join(map(str, ids)))
    if before:
        print(f"(as a prompt, it follows token {before[0]})", file=sys.stderr)


def fill_masks(decoder: "Decoder", tokenizer, prompt: str, _: "DecodeConfig") -> dict:
    """Fill the masks of the prompt, print the guesses unless in JSON, and return them."""
    from mtnlg_jax.decode.infill import fill

    filled = fill(decoder, tokenizer, prompt, options.GUESSES.value)
    if not (shared_flags.JSON.value or options.PROMPTS.value):
        for number, guesses in enumerate(filled.masks, 1):
            print(f"mask {number}")
            for guess in guesses:
                print(f"  {guess.probability:6.1%}  {guess.text!r}")
        print(filled.text)
    return dataclasses.asdict(filled)
