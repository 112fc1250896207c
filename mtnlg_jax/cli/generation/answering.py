"""Load the model and answer the prompts in the mode of --mode."""

import functools
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mtnlg_jax.cli.decoding import devices, shared_flags
from mtnlg_jax.cli.decoding.output import dump
from mtnlg_jax.cli.generation import options
from mtnlg_jax.cli.generation.many import answer_all
from mtnlg_jax.cli.generation.other_modes import fill_masks
from mtnlg_jax.cli.generation.ranking import rank_candidates
from mtnlg_jax.cli.generation.settings import decode_settings, with_words
from mtnlg_jax.cli.generation.writing import write

if TYPE_CHECKING:
    from mtnlg_jax.decode.cache import Decoder
    from mtnlg_jax.train.checkpoint import Run


def load_model() -> "tuple[Run, Decoder]":
    """Load the run of --workdir and its decoder."""
    # Objects made by imports and loading stay alive; collecting garbage among them takes a tenth
    # of the start-up time.
    gc.disable()
    from mtnlg_jax import compat
    from mtnlg_jax.decode.load import load_decoder

    compat.quiet()
    compat.configure_cache(least_seconds=0)
    found = load_decoder(
        options.WORKDIR.value,
        shared_flags.CHECKPOINT.value,
        shared_flags.DTYPE.value,
        weights=options.WEIGHTS.value,
        cache=options.CACHE.value,
        mesh=devices.mesh(),
    )
    gc.freeze()
    gc.enable()
    return found


def answer(rows: list[dict], given: dict[str, Any]) -> None:
    """Load the model, answer every row with the settings ``given``, and print the answers."""
    from mtnlg_jax.decode.stopping import ShownSpecials

    run, decoder = load_model()
    run.tokenizer.parse_special = options.PARSE_SPECIAL.value
    decode = decode_settings(rows, run.config.decode, with_words(run.tokenizer, given))
    tokenizer = ShownSpecials(run.tokenizer) if options.SHOW_SPECIAL.value else run.tokenizer
    ranking = functools.partial(rank_candidates, stages=run.config.train.stages)
    if options.PROMPTS.value:
        answer_all(decoder, tokenizer, rows, decode, ranking)
        return
    modes: dict[str, Callable] = {"generative": write, "ranking": ranking, "fill": fill_masks}
    prompt = rows[0]["prompt"]
    result = modes[options.MODE.value](decoder, tokenizer, prompt, decode)
    if shared_flags.JSON.value:
        print(dump({"mode": options.MODE.value, "step": run.step, "prompt": prompt} | result))
