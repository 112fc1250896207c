"""Translate a generation_config.json of Hugging Face into our DecodeConfig."""

import numpy as np

from mtnlg_jax.config import BEAM_ORDER, SAMPLING_LIMITS, DecodeConfig, validate_decode
from mtnlg_jax.decode.results import writable

# Fields with the same meaning in both.
_SAME = (
    "max_new_tokens",
    "min_new_tokens",
    "min_length",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "stop_strings",
    "max_time",
    "num_return_sequences",
    "num_beams",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "sequence_bias",
    "num_assistant_tokens",
    "penalty_alpha",
    *SAMPLING_LIMITS,
    *(name for name in BEAM_ORDER if name != "length_penalty_type"),
)
# Hugging Face's defaults that differ from those of DecodeConfig.
_THEIRS = {"temperature": 1.0, "top_k": 50}
# Fields that do not affect the text, or that are read elsewhere.
_SILENT = {
    "transformers_version",
    "_from_model_config",
    "use_cache",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "cache_implementation",
    "cache_config",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "do_sample",
    "temperature",
    "forced_eos_token_id",
    "max_length",
    "disable_compile",
    "remove_invalid_values",
    "renormalize_logits",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prefill_chunk_size",
    "compile_config",
}
_NEUTRAL = {
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}


def decode_of(
    generation: dict, tokenizer, rows: int, whole: bool = True
) -> tuple[DecodeConfig, list[str]]:
    """Return the DecodeConfig equivalent to ``generation``, and the settings without a counterpart.

    Args:
      generation: the object in generation_config.json, or in a config.json that is older than that
        file.
      rows: the model's vocabulary size; ids outside it are left out, because no text has them.
      whole: whether all keys are settings of generation; a config.json has others as well.

    Raises:
      ValueError: a setting is out of range or conflicts with another; the message names it.
    """
    given = {key: value for key, value in generation.items() if value is not None}
    for name in (*_THEIRS, "num_beams", "penalty_alpha"):
        if isinstance(given.get(name, 0), bool) or not isinstance(given.get(name, 0), int | float):
            raise ValueError(_refusal(f"{name}={given[name]!r} must be a number"))
    for name in ("eos_token_id", "suppress_tokens"):
        if not all(type(index) is int for index in _ids(given.get(name))):
            raise ValueError(_refusal(f"{name}={given[name]!r} must be ids of tokens"))
    if given.get("temperature", 1.0) < 0:
        raise ValueError(_refusal(f"temperature={given['temperature']} is below 0"))
    sampled = bool(given.get("do_sample", False)) and given.get("temperature", 1.0) > 0
    beams = given.get("num_beams", 1) > 1
    not_kept = []

    def leave_out(names, why: str) -> None:
        for name in names:
            if name in given and given[name] not in (
                _THEIRS.get(name, getattr(DecodeConfig, name)),
                False,
            ):
                not_kept.append(f"{name}={given[name]} ({why})")
            given.pop(name, None)

    top_k = given.get("top_k", _THEIRS["top_k"])
    contrastive = given.get("penalty_alpha", 0) > 0 and top_k > 1 and not (sampled or beams)
    if not sampled:
        limits = [name for name in SAMPLING_LIMITS if name != "top_k" or not contrastive]
        leave_out(("temperature", *limits), "do_sample is false")
    if not contrastive:
        leave_out(("penalty_alpha",), "contrastive search is off")
    if sampled and beams:
        leave_out(("num_beams",), "beam sampling differs here")
        beams = False
    if not beams:
        leave_out([name for name in BEAM_ORDER if name in given], "num_beams is 1")
    settings = {name: given[name] for name in _SAME if name in given}
    if sampled:
        settings |= {name: given.get(name, value) for name, value in _THEIRS.items()}
    elif contrastive:
        settings["top_k"] = top_k
    if "max_length" in given and "max_new_tokens" not in given:
        settings["max_new_tokens"] = given["max_length"]
        not_kept.append(
            f"max_length={given['max_length']} (it counts the prompt; "
            f"max_new_tokens={given['max_length']} does not)"
        )
    last = given.get("forced_eos_token_id")
    if isinstance(last, list) and len(last) > 1:
        not_kept.append(f"forced_eos_token_id={last} (one token can be forced)")
    elif last is not None:
        settings["forced_eos_token_id"] = last[0] if isinstance(last, list) else last
    if isinstance(settings.get("stop_strings"), str):
        settings["stop_strings"] = [settings["stop_strings"]]
    if isinstance(settings.get("sequence_bias"), dict):
        not_kept.append("sequence_bias (its keys are not lists of ids)")
        del settings["sequence_bias"]
    ends = _ids(given.get("eos_token_id"))
    outside = [index for index in ends if index >= rows]
    if outside and len(outside) < len(ends):
        not_kept.append(f"eos_token_id {outside} (outside the model's {rows} rows)")
    ends = [index for index in ends if index < rows]
    if ends and set(ends) != {tokenizer.eos_id}:
        settings["eos_token_id"] = ends
    # Tokens that are never written anyway, as listed by our own export.
    never = set(np.flatnonzero(~writable(tokenizer, rows, end=False)).tolist())
    if "suppress_tokens" in settings:
        settings["suppress_tokens"] = [
            index for index in settings["suppress_tokens"] if index not in never
        ]
    for name, value in given.items():
        empty = isinstance(value, list | dict) and not value
        neutral = empty or value in (False, "", _NEUTRAL.get(name))
        if whole and name not in _SAME and name not in _SILENT and not neutral:
            not_kept.append(f"{name}={value}")
    try:
        decode = DecodeConfig(**settings)
        validate_decode(decode, standing_by=True)
    except (ValueError, TypeError) as error:
        raise ValueError(_refusal(str(error))) from None
    return decode, not_kept


def _refusal(what: str) -> str:
    return f"generation_config.json cannot be converted: {what}; correct it there"


def _ids(value) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
