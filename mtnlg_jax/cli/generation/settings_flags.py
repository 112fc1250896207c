"""Flags of launch/generate.py that set DecodeConfig."""

from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.generation import control_flags
from mtnlg_jax.cli.generation.entries import read_biased, read_forced, read_ids

FLAG_OF = {"num_return_sequences": "n"}  # flags named otherwise than their setting
EARLY = {"false": False, "true": True, "never": "never"}
# Flags by the names of DecodeConfig.
SETTINGS: dict[str, flags.FlagHolder] = {}


class ListFlag(NamedTuple):
    """A flag whose entries are read from text."""

    read: Callable[[str], Any]  # the parser of an entry
    form: str  # of an entry, for messages
    several: bool  # whether the flag can be repeated, with an entry each time
    flag: flags.FlagHolder


with command.flag_group("Length of the text"):
    SETTINGS |= {
        "max_new_tokens": flags.DEFINE_integer(
            "max_new_tokens", None, "maximum number of new tokens"
        ),
        "min_new_tokens": flags.DEFINE_integer(
            "min_new_tokens", None, "minimum number of new tokens"
        ),
        "min_length": flags.DEFINE_integer(
            "min_length", None, "minimum number of tokens of prompt and text together"
        ),
        "max_time": flags.DEFINE_float("max_time", None, "stop after this many seconds"),
    }

with command.flag_group("Sampling"):
    SETTINGS |= {
        "temperature": flags.DEFINE_float(
            "temperature", None, "0: greedy; ranking samples at 1 where the run has 0"
        ),
        "top_k": flags.DEFINE_integer(
            "top_k", None, "sample from the k most probable tokens; 0: from all"
        ),
        "top_p": flags.DEFINE_float(
            "top_p", None, "sample from the smallest set with this total probability, (0, 1]"
        ),
        "min_p": flags.DEFINE_float(
            "min_p", None, "sample from tokens with this share of the highest probability, [0, 1)"
        ),
        "typical_p": flags.DEFINE_float(
            "typical_p", None, "sample from the locally typical tokens, (0, 1]"
        ),
        "epsilon_cutoff": flags.DEFINE_float(
            "epsilon_cutoff", None, "sample from tokens with at least this probability, [0, 1)"
        ),
        "eta_cutoff": flags.DEFINE_float(
            "eta_cutoff", None, "the same, with a lower cutoff where entropy is high, [0, 1)"
        ),
        "seed": flags.DEFINE_integer("seed", None, "the i-th sequence is sampled with seed + i"),
        "num_return_sequences": flags.DEFINE_integer(
            "n", None, "number of sequences to generate, or to sample for ranking"
        ),
    }

with command.flag_group("Beam search"):
    SETTINGS |= {
        "num_beams": flags.DEFINE_integer(
            "num_beams", None, "number of beams; with --temperature: samples without replacement"
        ),
        "length_penalty": flags.DEFINE_float(
            "length_penalty", None, "length penalty of beams; above 0 favors long texts"
        ),
        "length_penalty_type": flags.DEFINE_enum(
            "length_penalty_type", None, ["hf", "gnmt"], "formula of the length penalty"
        ),
        "early_stopping": flags.DEFINE_enum(
            "early_stopping", None, list(EARLY), "when the search ends"
        ),
        "num_beam_groups": flags.DEFINE_integer(
            "num_beam_groups", None, "number of groups of diverse beam search"
        ),
        "diversity_penalty": flags.DEFINE_float(
            "diversity_penalty", None, "penalty for tokens that earlier groups chose"
        ),
    }

with command.flag_group("Penalties"):
    SETTINGS |= {
        "repetition_penalty": flags.DEFINE_float(
            "repetition_penalty",
            None,
            "above 1: makes tokens of the prompt and the text less likely",
        ),
        "presence_penalty": flags.DEFINE_float(
            "presence_penalty", None, "subtracted once from the logit of each generated token"
        ),
        "frequency_penalty": flags.DEFINE_float(
            "frequency_penalty", None, "subtracted for each occurrence of a generated token"
        ),
        "no_repeat_ngram_size": flags.DEFINE_integer(
            "no_repeat_ngram_size", None, "never repeat n tokens in a row; 0: off"
        ),
    }

with command.flag_group("Texts and tokens to forbid, favor, force or stop at"):
    SETTINGS |= {
        "stop_strings": flags.DEFINE_multi_string(
            "stop_strings", None, "stop before this text, \\n: a line end"
        ),
        "forced_bos_token_id": flags.DEFINE_integer(
            "forced_bos_token_id", None, "the first new token"
        ),
        "forced_eos_token_id": flags.DEFINE_integer(
            "forced_eos_token_id", None, "the token at the maximum length"
        ),
    }
    # Texts for settings that DecodeConfig takes as tokens.
    WORDS = {
        name: flags.DEFINE_multi_string(name, None, meaning)
        for name, meaning in {
            "bad_words": "a text that is never generated",
            "suppress_words": "a text of one token that is never generated",
            "begin_suppress_words": "a text of one token that never comes first",
            "stop_words": "stop before the usual tokens of this text, also in beam search",
            "word_bias": "TEXT:BIAS: added to the last token's logit after the others",
        }.items()
    }
    LISTS = {
        name: ListFlag(
            read,
            form,
            several,
            (flags.DEFINE_multi_string if several else flags.DEFINE_string)(
                name, None, f"{meaning}: {form}"
            ),
        )
        for name, read, form, several, meaning in (
            ("eos_token_id", read_ids, "ID,ID", False, "end tokens, instead of the tokenizer's"),
            ("stop_token_ids", read_ids, "ID,ID", False, "stop before any of these tokens"),
            ("stop_sequences", read_ids, "ID,ID", True, "stop before these tokens in a row"),
            ("suppress_tokens", read_ids, "ID,ID", False, "tokens that are never generated"),
            ("begin_suppress_tokens", read_ids, "ID,ID", False, "tokens that never come first"),
            ("bad_words_ids", read_ids, "ID,ID", True, "tokens that never follow each other"),
            ("logit_bias", read_biased, "ID:BIAS", True, "added to a token's logit"),
            (
                "sequence_bias",
                read_biased,
                "ID,ID:BIAS",
                True,
                "added to the last token's logit after the others",
            ),
            (
                "forced_tokens",
                read_forced,
                "POSITION:ID",
                True,
                "token at a position of the text, from 0",
            ),
        )
    }

with command.flag_group("Speculative decoding"):
    SETTINGS |= {
        "prompt_lookup_num_tokens": flags.DEFINE_integer(
            "prompt_lookup_num_tokens",
            None,
            "number of tokens to guess from earlier matches of the last tokens, and verify at once",
        ),
        "max_matching_ngram_size": flags.DEFINE_integer(
            "max_matching_ngram_size", None, "longest suffix n-gram to match"
        ),
        "num_assistant_tokens": flags.DEFINE_integer(
            "num_assistant_tokens", None, "number of tokens that --draft guesses at once"
        ),
    }

SETTINGS |= control_flags.SETTINGS
# The names of all flags above.
NAMES = tuple(FLAG_OF.get(name, name) for name in (*SETTINGS, *LISTS, *WORDS))
