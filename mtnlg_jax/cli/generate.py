"""Generate, rank or fill in text with a trained model.

    python launch/generate.py --workdir=RUN --prompt="Once upon a time"

    --mode=generative  continue the prompt: greedily, by sampling with --temperature, --top_k,
                       --top_p ..., or by beam search with --num_beams
    --mode=ranking     score continuations: --candidates=" Paris" --candidates=" Rome", or --n=8
                       samples, or --num_beams=8; by --scorer=pmi, or by several with weights:
                       --scorer=logprob=1 --scorer=pmi=0.5
    --mode=fill        fill <mask> or [MASK] in the prompt
    --mode=tokens      show the token ids of the prompt

The prompt comes from --prompt, --input=FILE or standard input; an empty prompt starts a new text.
--prompts=FILE holds many prompts, one a line: texts, or in a .jsonl file objects of the form
{"prompt": ..., "candidates": [...]}. The model is loaded once, and each answer is written to
--output as a JSON line as soon as it is known.

Settings that are not given come from config.decode of the run. Settings that have no effect beside
the others are refused. The prompt and its continuation share the context of the model; the text
ends where the context is full. Special tokens other than the end may be generated; they appear in
the text only with --show_special.

Texts to forbid, to favor or to stop at are given as text: --bad_words="of course"
--suppress_words=the --word_bias=sea:2.5 --stop_words=END. These match with and without a space
before the text. They can also be given as ids of --mode=tokens: --suppress_tokens=5,6
--bad_words_ids=7,8 (a sequence; repeat the flag for more) --logit_bias=13:-5 (an id and its bias)
--sequence_bias=7,8:2.5. In these texts, --stop_strings and --reverse, \\n, \\t, \\r and \\\\ mean a
line end, a tab, a carriage return and a backslash. Prompts and candidates are taken literally;
write $'\\n' there.

Exit codes: 0 done, 2 bad input, which includes a model with nonfinite parameters or scores.
"""

import dataclasses
import functools
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.generation import options, settings_flags
from mtnlg_jax.cli.generation.checks import check_flags, check_output
from mtnlg_jax.cli.generation.many import answer_all
from mtnlg_jax.cli.generation.other_modes import fill_masks, show_tokens
from mtnlg_jax.cli.generation.output import dump
from mtnlg_jax.cli.generation.prompts import read_prompt, read_rows
from mtnlg_jax.cli.generation.ranking import rank_candidates
from mtnlg_jax.cli.generation.settings import given_settings, with_words
from mtnlg_jax.cli.generation.settings_flags import FLAG_OF
from mtnlg_jax.cli.generation.writing import write

if TYPE_CHECKING:
    from mtnlg_jax.config import DecodeConfig

# --help lists the key flags of this module.
flags.adopt_module_key_flags(options)
flags.adopt_module_key_flags(settings_flags)


def main() -> None:
    check_flags()
    if options.MODE.value == "tokens":
        return show_tokens(read_prompt())
    given = given_settings()
    path = options.PROMPTS.value
    rows = read_rows(path) if path else [{"prompt": read_prompt()}]
    _answer(rows, given)


def _answer(rows: list[dict], given: dict) -> None:
    """Load the model, answer every row, and print the answers."""
    # Objects made by imports and loading stay alive; collecting garbage among them takes a tenth
    # of the start-up time.
    gc.disable()
    from mtnlg_jax import compat
    from mtnlg_jax.decode.load import load_decoder
    from mtnlg_jax.decode.stopping import ShownSpecials

    compat.quiet()
    compat.configure_cache(least_seconds=0)
    check_output()
    run, decoder = load_decoder(
        options.WORKDIR.value,
        options.CHECKPOINT.value,
        options.DTYPE.value,
        weights=options.WEIGHTS.value,
        cache=options.CACHE.value,
    )
    gc.freeze()
    gc.enable()
    run.tokenizer.parse_special = options.PARSE_SPECIAL.value
    given = with_words(run.tokenizer, given)
    decode = _decode_settings(rows, run.config.decode, given)
    tokenizer = ShownSpecials(run.tokenizer) if options.SHOW_SPECIAL.value else run.tokenizer
    ranking = functools.partial(rank_candidates, stages=run.config.train.stages)
    if options.PROMPTS.value:
        answer_all(decoder, tokenizer, rows, decode, ranking)
        return
    modes: dict[str, Callable] = {"generative": write, "ranking": ranking, "fill": fill_masks}
    result = modes[options.MODE.value](decoder, tokenizer, rows[0]["prompt"], decode)
    if options.JSON.value:
        content = {"mode": options.MODE.value, "step": run.step, "prompt": rows[0]["prompt"]}
        print(dump(content | result))


def _decode_settings(rows: list[dict], run_decode: "DecodeConfig", given: dict) -> "DecodeConfig":
    """Return the settings of the run with those of the command line; refuse idle ones."""
    from mtnlg_jax.config import DecodeConfig, acting, validate_decode

    if options.MODE.value == "ranking" and given and all("candidates" in row for row in rows):
        name = next(iter(given))
        raise ValueError(
            f"--{FLAG_OF.get(name, name)} is for candidates that are written, and each line of "
            f"{options.PROMPTS.value} has its own; leave one of the two out"
        )
    decode = dataclasses.replace(run_decode, **given)
    given_candidates = bool(options.CANDIDATES.value) or all("candidates" in row for row in rows)
    # Ranking needs different samples, which greedy decoding does not give.
    sampling = options.MODE.value == "ranking" and not given_candidates
    greedy = decode.temperature == 0 and decode.num_beams == 1
    if sampling and greedy and "temperature" not in given:
        decode = dataclasses.replace(decode, temperature=1.0)
    # Settings of the run that have no effect are reset; those of the command line are refused.
    decode = acting(decode, given)
    if options.DRAFT.value is None:
        decode = dataclasses.replace(decode, num_assistant_tokens=DecodeConfig.num_assistant_tokens)
    validate_decode(decode)
    if "seed" in given and decode.temperature == 0:
        raise ValueError(
            f"seed={decode.seed} is for what is drawn, and temperature=0 draws nothing; set "
            "temperature "
            "above 0 to sample, or leave seed out"
        )
    return decode


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
