"""Load the model and answer the prompts in the mode of --mode."""

import functools
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mtnlg_jax.cli.decoding import devices, fitting, held_flags, shared_flags
from mtnlg_jax.cli.decoding.output import dump
from mtnlg_jax.cli.generation import adapters, options, prefixes, sliding
from mtnlg_jax.cli.generation.many import answer_all
from mtnlg_jax.cli.generation.other_modes import fill_masks
from mtnlg_jax.cli.generation.ranking import rank_candidates
from mtnlg_jax.cli.generation.settings import decode_settings, with_words
from mtnlg_jax.cli.generation.writing import write

if TYPE_CHECKING:
    from mtnlg_jax.config import Config, DecodeConfig
    from mtnlg_jax.data.tokenizer import Tokenizer
    from mtnlg_jax.decode.cache import Decoder
    from mtnlg_jax.train.checkpoint import Run


def load_model(rows: list[dict], given: dict[str, Any]) -> "tuple[Run, Decoder, DecodeConfig]":
    """Load the run of --workdir and its decoder, and return the settings for ``rows`` as well.

    Raise ValueError before anything is loaded if the settings, or the memory, do not do.
    """
    # Objects made by imports and loading stay alive; collecting garbage among them takes a tenth
    # of the start-up time.
    gc.disable()
    from mtnlg_jax import compat
    from mtnlg_jax.decode.load import load_decoder

    compat.quiet()
    compat.configure_cache(least_seconds=0)
    mesh = devices.mesh()
    found = adapters.load(rows, 1 if mesh is None else mesh.shape["pipe"])
    settings: list[DecodeConfig] = []

    def before(config: "Config", tokenizer: "Tokenizer | None") -> None:
        assert tokenizer is not None, "a decoder is loaded with its tokenizer"
        tokenizer.parse_special = options.PARSE_SPECIAL.value
        # Not once more where a damaged checkpoint is skipped.
        settings[:] = [decode_settings(rows, config.decode, with_words(tokenizer, given))]
        if sliding.asked():
            sliding.check_model(config.model, settings[0])
        ahead = prefixes.check(rows, config.model, prefixes.folder_of(options.PROMPTS.value))
        if ahead:
            prefixes.check_ways(settings[0], rows)
        _check_memory(config, tokenizer, rows, settings[0], ahead)

    run, decoder = load_decoder(
        options.WORKDIR.value,
        held_flags.CHECKPOINT.value,
        held_flags.DTYPE.value,
        weights=held_flags.WEIGHTS.value,
        cache=held_flags.CACHE.value,
        mesh=mesh,
        before=before,
    )
    if found:
        from mtnlg_jax.decode.adapters import stack

        decoder = stack(decoder, found)
    gc.freeze()
    gc.enable()
    return run, decoder, settings[0]


def _check_memory(
    config: "Config",
    tokenizer: "Tokenizer",
    rows: list[dict],
    decode: "DecodeConfig",
    ahead: int = 0,
) -> None:
    """Raise ValueError if weights and caches do not fit, with ``ahead`` positions ahead of
    prompts."""
    from mtnlg_jax.decode.cache import bucket
    from mtnlg_jax.decode.memory import Caches, Choices, Plan, caches_of
    from mtnlg_jax.decode.results import encode_prompt
    from mtnlg_jax.train.checkpoint import config_of

    model = config.model
    mode = options.MODE.value
    drafted = options.DRAFT.value is not None and mode == "generative"
    shrink = None
    caches: tuple[Caches, ...] = ()  # infilling has none
    if mode != "fill":
        longest = ahead + max(len(encode_prompt(tokenizer, row["prompt"])) for row in rows)
        at_once = 1
        if mode == "generative" and options.PROMPTS.value:
            at_once = min(len(rows), options.BATCH.value)
            shrink = ("--batch", at_once)
        elif decode.num_return_sequences > 1 and decode.num_beams == 1:
            shrink = ("--n", decode.num_return_sequences)
        caches = caches_of(model, at_once, longest, decode, drafted)
    given = bool(options.CANDIDATES.value) or all("candidates" in row for row in rows)
    form = (
        held_flags.DTYPE.value,
        held_flags.WEIGHTS.value,
        held_flags.CACHE.value,
        devices.mesh(),
    )
    if mode == "ranking":
        # Candidates are read behind one prompt, which is cached, after they are written.
        size = bucket(longest, model.max_position_embeddings)
        read = (Caches(1, size, floats=True, whole=True),)
        shrink = None if given else shrink
        held_in_turn = (read,) if given else (read, caches)
        caches = max(held_in_turn, key=lambda each: Plan(model, *form, each).cache_bytes)
    plans = [Plan(model, *form, caches)]
    if drafted:
        draft = config_of(options.DRAFT.value, held_flags.CHECKPOINT.value)
        plans += [] if draft is None else [Plan(draft.model, *form, caches)]
    # The cache of beams and of prompts holds only floats.
    rounds = any(not each.floats for each in caches)
    choices = Choices(cache=rounds, rows=shrink)
    fitting.check(options.WORKDIR.value, plans, choices, devices.mesh())


def answer(rows: list[dict], given: dict[str, Any]) -> None:
    """Load the model, answer every row with the settings ``given``, and print the answers."""
    from mtnlg_jax.decode.stopping import ShownSpecials

    run, decoder, decode = load_model(rows, given)
    tokenizer = ShownSpecials(run.tokenizer) if options.SHOW_SPECIAL.value else run.tokenizer
    ranking = functools.partial(rank_candidates, stages=run.config.train.stages)
    if options.PROMPTS.value:
        answer_all(decoder, tokenizer, rows, decode, ranking)
        return
    ahead = prefixes.array_of(rows[0], decoder.config)
    modes: dict[str, Callable] = {
        "generative": functools.partial(write, prefix=ahead),
        "ranking": functools.partial(ranking, prefix=ahead),
        "fill": fill_masks,
    }
    prompt = rows[0]["prompt"]
    result = modes[options.MODE.value](decoder, tokenizer, prompt, decode)
    if shared_flags.JSON.value:
        print(dump({"mode": options.MODE.value, "step": run.step, "prompt": prompt} | result))
