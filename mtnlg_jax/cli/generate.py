"""Asks a trained model: python launch/generate.py --workdir=RUN --prompt="Once upon a time"

    --mode=generative  continues the prompt; greedy, or sampled with --temperature, --top_k, --top_p
                       ..., or by a search with --num_beams
    --mode=ranking     scores what may follow: --candidates=" Paris" --candidates=" Rome", or --n=8
                       samples, or --num_beams=8; by --scorer=pmi, or several with weights:
                       --scorer=logprob=1 --scorer=pmi=0.5
    --mode=fill        fills <mask> or [MASK] in the prompt
    --mode=tokens      shows the ids of the prompt

The prompt comes from --prompt, --input=FILE or standard input; an empty one starts a new text.
--prompts=FILE holds
many, a line each: texts, or in a .jsonl file {"prompt": ..., "candidates": [...]}. The model is
loaded once, and each answer is a JSON line in --output, written as soon as it is known.

Settings that are not given are those of the run's config.decode; those that cannot act beside the
others are refused. The prompt and its continuation share the model's context: where it is full, the
text ends. Special tokens other than the end may be written, and are left out of the text but for
--show_special.

What is never written, favored or stopped at is given by text, --bad_words="of course"
--suppress_words=the --word_bias=sea:2.5 --stop_words=END, which means it with and without a space
before it, or by ids of --mode=tokens: --suppress_tokens=5,6 --bad_words_ids=7,8 (a sequence; repeat
the flag for more) --logit_bias=13:-5 (an id and its bias) --sequence_bias=7,8:2.5. In these texts,
--stop_strings and --reverse, \\n, \\t, \\r and \\\\ mean a line end, a tab, a carriage return and a
backslash; prompts and candidates are taken as they are, so there write $'\\n'.

Exit codes: 0 done, 2 bad input, also a model whose parameters or scores are not finite.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import os
import re
import sys
import time
import unicodedata

from absl import flags

from mtnlg_jax import command

_WORKDIR = command.define_path("workdir", None, "folder of the run", required=True)
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "which checkpoint")
_MODE = flags.DEFINE_enum(
    "mode", "generative", ["generative", "ranking", "fill", "tokens"], "what to do"
)
_PROMPT = flags.DEFINE_string("prompt", None, "the prompt")
_INPUT = command.define_path("input", None, "file that holds the prompt, - for standard input")
_PROMPTS = command.define_path(
    "prompts",
    None,
    "file of prompts, one a line; .jsonl: objects with the key prompt; - for standard input",
)
_OUTPUT = command.define_path(
    "output",
    None,
    "file for the answers to --prompts, one JSON line each; default: standard output",
)
_BATCH = flags.DEFINE_integer("batch", 8, "prompts of --prompts continued at once", lower_bound=1)
_CANDIDATES = flags.DEFINE_multi_string(
    "candidates", [], "a text to rank, with its leading space; repeat for more"
)
_NORMALISE = flags.DEFINE_enum(
    "normalise",
    "per_token",
    ["sum", "per_token", "per_char", "per_byte"],
    "what ranking divides log-probabilities by",
)
_SCORER = flags.DEFINE_multi_string(
    "scorer",
    ["logprob"],
    "NAME or NAME=WEIGHT: logprob, gnmt, pmi, noisy_channel, "
    "pseudo_log_likelihood, mbr, self_consistency; repeat to mix several",
)
# Names of ScorerOptions.
_SCORING = {
    "gnmt_alpha": flags.DEFINE_float("gnmt_alpha", None, "gnmt: 0 does not mind the length"),
    "neutral": flags.DEFINE_string(
        "neutral", None, "pmi, noisy_channel: context that says nothing; default: none"
    ),
    "source": flags.DEFINE_string(
        "source", None, "noisy_channel: what candidates explain; default: the prompt"
    ),
    "reverse": flags.DEFINE_string(
        "reverse", None, "noisy_channel: prompt for the source, with {candidate} in it"
    ),
    "channel_weight": flags.DEFINE_float(
        "channel_weight", None, "noisy_channel: of log p(source | candidate)"
    ),
    "language_weight": flags.DEFINE_float(
        "language_weight", None, "noisy_channel: of log p(candidate)"
    ),
    "within_word_l2r": flags.DEFINE_bool(
        "within_word_l2r", None, "pseudo_log_likelihood: hide the word's rest, too"
    ),
    "utility": flags.DEFINE_enum(
        "utility", None, ["chrf", "bleu", "bleu_zh", "token_f1", "exact"], "mbr"
    ),
    "answer": flags.DEFINE_string(
        "answer", None, "self_consistency: regular expression of the answer"
    ),
    "votes": flags.DEFINE_enum("votes", None, ["count", "probability"], "self_consistency"),
}
_GUESSES = flags.DEFINE_integer("guesses", 5, "tokens shown for each mask", lower_bound=1)
_STREAM = flags.DEFINE_bool("stream", None, "write text as it comes; default: on a terminal")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "type of products and cache"
)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    ["int8"],
    "hold the weights of products so; launch/evaluate.py says what that costs",
)
_CACHE = flags.DEFINE_enum("cache", None, ["int8"], "hold keys and values so")
_PARSE_SPECIAL = flags.DEFINE_bool(
    "parse_special",
    False,
    "read the special tokens that the prompt spells, such as <|im_start|>; off, they are text",
)
_DRAFT = command.define_path(
    "draft",
    None,
    "folder of the run of a smaller model with the same tokenizer, which "
    "guesses tokens that the model verifies; the text stays what it was, or as likely",
)
_SHOW_SPECIAL = flags.DEFINE_bool("show_special", False, "show special tokens by name in the text")
_STATS = flags.DEFINE_bool(
    "stats", False, "print tokens/s, what memory's speed allows, how many guesses were right"
)

_FLAG_OF = {"num_return_sequences": "n"}  # flags whose name is not that of the setting
# Names of DecodeConfig.
_SETTINGS = {
    "max_new_tokens": flags.DEFINE_integer(
        "max_new_tokens", None, "longest continuation, in tokens"
    ),
    "min_new_tokens": flags.DEFINE_integer("min_new_tokens", None, "no end before so many tokens"),
    "temperature": flags.DEFINE_float(
        "temperature", None, "0: greedy; ranking samples at 1 where the run has 0"
    ),
    "top_k": flags.DEFINE_integer("top_k", None, "draw from the k best; 0: from all"),
    "top_p": flags.DEFINE_float(
        "top_p", None, "draw from the best with this probability together, (0, 1]"
    ),
    "min_p": flags.DEFINE_float(
        "min_p", None, "draw from those with this share of the best's probability, [0, 1)"
    ),
    "typical_p": flags.DEFINE_float("typical_p", None, "draw from the most typical, (0, 1]"),
    "epsilon_cutoff": flags.DEFINE_float(
        "epsilon_cutoff", None, "draw from those with this probability, [0, 1)"
    ),
    "eta_cutoff": flags.DEFINE_float(
        "eta_cutoff", None, "the same, lower where the model is less certain, [0, 1)"
    ),
    "repetition_penalty": flags.DEFINE_float(
        "repetition_penalty", None, "above 1: what was seen, less"
    ),
    "presence_penalty": flags.DEFINE_float(
        "presence_penalty", None, "taken off once for each token written"
    ),
    "frequency_penalty": flags.DEFINE_float(
        "frequency_penalty", None, "taken off each time that it was written"
    ),
    "no_repeat_ngram_size": flags.DEFINE_integer(
        "no_repeat_ngram_size", None, "no n tokens twice; 0: off"
    ),
    "min_length": flags.DEFINE_integer(
        "min_length", None, "no end before so many tokens of prompt and text"
    ),
    "forced_bos_token_id": flags.DEFINE_integer("forced_bos_token_id", None, "the first new token"),
    "forced_eos_token_id": flags.DEFINE_integer(
        "forced_eos_token_id", None, "the token at the longest length"
    ),
    "stop_strings": flags.DEFINE_multi_string(
        "stop_strings", None, "end before this text, \\n: a line end; repeat for more"
    ),
    "max_time": flags.DEFINE_float("max_time", None, "end after so many seconds"),
    "prompt_lookup_num_tokens": flags.DEFINE_integer(
        "prompt_lookup_num_tokens",
        None,
        "guess so many tokens by what followed the last ones before, and verify them at once",
    ),
    "max_matching_ngram_size": flags.DEFINE_integer(
        "max_matching_ngram_size", None, "last tokens that are looked up"
    ),
    "num_assistant_tokens": flags.DEFINE_integer(
        "num_assistant_tokens", None, "tokens that --draft guesses at once"
    ),
    "num_beams": flags.DEFINE_integer(
        "num_beams", None, "beam search; with --temperature, different draws"
    ),
    "length_penalty": flags.DEFINE_float(
        "length_penalty", None, "of beams; above 0 long texts gain"
    ),
    "length_penalty_type": flags.DEFINE_enum(
        "length_penalty_type", None, ["hf", "gnmt"], "its formula"
    ),
    "num_beam_groups": flags.DEFINE_integer("num_beam_groups", None, "groups of beams that differ"),
    "diversity_penalty": flags.DEFINE_float(
        "diversity_penalty", None, "for the tokens of earlier groups"
    ),
    "seed": flags.DEFINE_integer("seed", None, "the i-th sequence draws with seed + i"),
    "num_return_sequences": flags.DEFINE_integer(
        "n", None, "sequences to write, or to sample for ranking"
    ),
}
_EARLY = {"false": False, "true": True, "never": "never"}
_SETTINGS["early_stopping"] = flags.DEFINE_enum(
    "early_stopping", None, list(_EARLY), "when the search ends"
)


# Texts for what DecodeConfig takes as tokens.
_WORDS = {
    name: flags.DEFINE_multi_string(name, None, f"{meaning}; repeat for more")
    for name, meaning in {
        "bad_words": "a text that is never written",
        "suppress_words": "a text of one token that is never written",
        "begin_suppress_words": "a text of one token, not at the beginning",
        "stop_words": "end before this text, also of beams, in its usual tokens",
        "word_bias": "TEXT:BIAS: added to the last token's logit behind the others",
    }.items()
}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def _unescape(text: str) -> str:
    return re.sub(r"\\([ntr\\])", lambda match: _ESCAPES[match[1]], text)


def _ids(text: str) -> tuple[int, ...]:
    return tuple(int(token) for token in text.split(","))


def _biased(text: str) -> tuple[tuple[int, ...], float]:
    tokens, _, bias = text.rpartition(":")
    return _ids(tokens), float(bias)


def _forced(text: str) -> tuple[int, int]:
    place, token = text.split(":")
    return int(place), int(token)


# What is read from texts: how one is read, its form, whether the flag is repeated, and the flag.
_LISTS = {
    name: (
        read,
        form,
        several,
        (flags.DEFINE_multi_string if several else flags.DEFINE_string)(
            name, None, f"{meaning}: {form}" + "; repeat for more" * several
        ),
    )
    for name, read, form, several, meaning in (
        ("eos_token_id", _ids, "ID,ID", False, "ends, instead of the tokenizer's"),
        ("stop_token_ids", _ids, "ID,ID", False, "end before these"),
        ("stop_sequences", _ids, "ID,ID", True, "end before these in a row"),
        ("suppress_tokens", _ids, "ID,ID", False, "never"),
        ("begin_suppress_tokens", _ids, "ID,ID", False, "not at the beginning"),
        ("bad_words_ids", _ids, "ID,ID", True, "never in a row"),
        ("logit_bias", _biased, "ID:BIAS", True, "added to a token's logit"),
        (
            "sequence_bias",
            _biased,
            "ID,ID:BIAS",
            True,
            "added to the last one's logit behind the others",
        ),
        ("forced_tokens", _forced, "PLACE:ID", True, "what stands at a place, from 0, of the text"),
    )
}


def main() -> None:
    _check_flags()
    if _MODE.value == "tokens":
        return _tokens(_prompt())
    given = _given()
    _answer(_read_rows(_PROMPTS.value) if _PROMPTS.value else [{"prompt": _prompt()}], given)


def _check_flags() -> None:
    """Raises ValueError on a flag that cannot act beside the others."""
    mode = _MODE.value
    written = ("generative",) if _CANDIDATES.value else ("generative", "ranking")
    acts_in = dict.fromkeys(["stream", "stats", "draft", "num_assistant_tokens"], ("generative",))
    acts_in |= dict.fromkeys(["candidates", "normalise", "scorer", *_SCORING], ("ranking",))
    acts_in |= {"guesses": ("fill",)} | dict.fromkeys(["cache", "show_special"], written)
    acts_in |= dict.fromkeys(
        ["checkpoint", "dtype", "weights", "prompts", "output", "batch"],
        ("generative", "ranking", "fill"),
    )
    settings = [_FLAG_OF.get(name, name) for name in (*_SETTINGS, *_LISTS, *_WORDS)]
    acts_in = dict.fromkeys(settings, ("generative", "ranking")) | acts_in
    for name, modes in acts_in.items():
        if not _is_given(name) or mode in modes:
            continue
        if mode == "ranking" and "ranking" not in modes and name in ("cache", "show_special"):
            raise ValueError(
                f"--{name} is for texts that are written, and --candidates gives them; leave it out"
            )
        raise ValueError(
            f"--{name} is for --mode={' or '.join(modes)}, not --mode={mode}; leave it out"
        )
    if mode == "ranking" and _CANDIDATES.value:
        for name in settings:
            if _is_given(name):
                raise ValueError(
                    f"--{name} is for candidates that are written, and --candidates gives them; leave one "
                    "of the two out"
                )
    for name in ("output", "batch"):
        if _is_given(name) and not _PROMPTS.value:
            raise ValueError(
                f"--{name} is for many prompts; name their file with --prompts, or leave it out"
            )
    if _PROMPTS.value:
        for name in ("prompt", "input", "stream", "stats", "json"):
            if _is_given(name):
                raise ValueError(
                    f"--{name} is for one prompt, and --prompts={_PROMPTS.value} holds many; leave one of "
                    "the two out"
                )
    if _STREAM.value and _JSON.value:
        raise ValueError(
            "--stream shows text as it comes, and --json prints it at the end; leave one of the two out"
        )
    if _STREAM.value and (_SETTINGS["num_return_sequences"].value or 1) > 1:
        raise ValueError(
            f"--stream shows one text as it comes, and --n={_SETTINGS['num_return_sequences'].value} asks "
            "for several; leave one of the two out"
        )
    if _is_given("num_assistant_tokens") and _DRAFT.value is None:
        raise ValueError(
            f"--num_assistant_tokens={_SETTINGS['num_assistant_tokens'].value} are guessed by a draft "
            "model; name its run with --draft, or leave it out"
        )
    for text in (_PROMPT.value or "", *_CANDIDATES.value):
        if re.search(r"\\[nt]", text):
            print(
                f"note: {text[:40]!r} holds a backslash and a letter, not a line end or a tab; for those write "
                "$'\\n' in the shell",
                file=sys.stderr,
            )


def _is_given(name: str) -> bool:
    flag = flags.FLAGS[name]
    return bool(flag.present) and flag.value is not False


def _tokens(prompt: str) -> None:
    """Shows what a text is read as, without a model."""
    from mtnlg_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(os.path.join(_WORKDIR.value, "tokenizer"))
    tokenizer.parse_special = _PARSE_SPECIAL.value
    ids = tokenizer.encode(prompt)
    pieces = [tokenizer.decode([index], skip_special=False) for index in ids]
    before = [tokenizer.bos_id] if tokenizer.prompt_bos or not ids else []
    if _JSON.value:
        print(
            _dump(
                {
                    "mode": "tokens",
                    "prompt": prompt,
                    "tokens": ids,
                    "pieces": pieces,
                    "before": before,
                }
            )
        )
        return
    _print_table(
        [
            ["id", "text"],
            *([str(index), repr(piece)] for index, piece in zip(ids, pieces, strict=True)),
        ],
        {"text"},
    )
    print(",".join(map(str, ids)))
    if before:
        print(f"(as a prompt it stands behind token {before[0]})", file=sys.stderr)


def _read_rows(path: str) -> list[dict]:
    """The prompts of a file, each an object with at least the key "prompt"."""
    name, text = command.read_text(path, "the prompts", "utf-8-sig")
    lines = text.removesuffix("\n").split("\n")
    objects = name.endswith((".jsonl", ".json")) or path == "-" and lines[0].startswith("{")
    rows = []
    for number, line in enumerate(lines, 1):
        row = line.removesuffix("\r")
        if objects:
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_constant=_refuse_constant)
            except ValueError as error:
                raise ValueError(
                    f"{name}, line {number} is not JSON ({error}); write one object a line"
                ) from None
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(
                f'{name}, line {number} has no text under the key "prompt"; write {{"prompt": TEXT}}'
            )
        texts = row.get("candidates", [])
        if _MODE.value == "ranking" and not (
            isinstance(texts, list) and all(isinstance(each, str) for each in texts)
        ):
            raise ValueError(
                f"{name}, line {number} has candidates that are not a list of texts; write [TEXT, TEXT]"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{name} holds no prompts; write one a line")
    return rows


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON does not have; write null")


def _dump(content: dict) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def _given() -> dict:
    """The settings of the command line."""
    given = {name: flag.value for name, flag in _SETTINGS.items() if flag.value is not None}
    if "early_stopping" in given:
        given["early_stopping"] = _EARLY[given["early_stopping"]]
    if "stop_strings" in given:
        given["stop_strings"] = tuple(map(_unescape, given["stop_strings"]))
    for name, (read, form, several, flag) in _LISTS.items():
        texts = flag.value if several else [flag.value]
        if flag.value is None:
            continue
        try:
            entries = [read(text) for text in texts]
        except ValueError:
            raise ValueError(
                f"--{name}={' '.join(texts)} is not of the form {form}, as in --{name}="
                f"{form.replace('BIAS', '-2.5').replace('PLACE', '0').replace('ID', '7')}"
            ) from None
        if name == "logit_bias":
            if any(len(tokens) > 1 for tokens, _ in entries):
                raise ValueError(
                    "--logit_bias is for one token; give several in a row to --sequence_bias"
                )
            entries = [(tokens[0], bias) for tokens, bias in entries]
        given[name] = tuple(entries) if several else entries[0]
    return given


def _prompt() -> str:
    if _PROMPT.value is not None:
        if _INPUT.value is not None:
            raise ValueError("--prompt and --input are both given; keep one of them")
        return _PROMPT.value
    return command.read_text(_INPUT.value, "the prompt")[1].removesuffix(
        "\n"
    )  # the one that ends a file


def _words(tokenizer, given: dict) -> dict:
    """``given`` with what the flags of _WORDS say, in this tokenizer's tokens."""
    texts = {name: list(map(_unescape, flag.value or [])) for name, flag in _WORDS.items()}
    added = {
        "bad_words_ids": [],
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "stop_sequences": [],
        "sequence_bias": [],
    }
    for name, setting in (("bad_words", "bad_words_ids"), ("stop_words", "stop_sequences")):
        for text in texts[name]:
            added[setting] += _forms(tokenizer, name, text)
    for name, setting in (
        ("suppress_words", "suppress_tokens"),
        ("begin_suppress_words", "begin_suppress_tokens"),
    ):
        for text in texts[name]:
            forms = _forms(tokenizer, name, text)
            single = [form[0] for form in forms if len(form) == 1]
            if not single:
                raise ValueError(
                    f"--{name}={text} is {len(forms[0])} tokens, {','.join(map(str, forms[0]))}, which "
                    "stand in other texts, too; --bad_words forbids them in a row"
                )
            added[setting] += single
    for entry in texts["word_bias"]:
        text, _, bias = entry.rpartition(":")
        try:
            added["sequence_bias"] += [
                (form, float(bias)) for form in _forms(tokenizer, "word_bias", text)
            ]
        except ValueError:
            raise ValueError(
                f"--word_bias={entry} is not of the form TEXT:BIAS, as in --word_bias=sea:-2.5"
            ) from None
    return given | {
        name: (*given.get(name, ()), *values) for name, values in added.items() if values
    }


def _forms(tokenizer, name: str, text: str) -> list[tuple[int, ...]]:
    """The tokens of a text at the beginning, and behind a space."""
    if not text:
        raise ValueError(f"--{name} is empty; leave it out")
    forms = [tokenizer.encode(text)] + ([] if text[0].isspace() else [tokenizer.encode(f" {text}")])
    return list(dict.fromkeys(tuple(form) for form in forms if form))


def _answer(rows: list[dict], given: dict) -> None:
    # What imports and loading make stays: looking through it for garbage takes a tenth of the
    # start-up.
    gc.disable()
    from mtnlg_jax import compat
    from mtnlg_jax.config import DecodeConfig, acting, validate_decode
    from mtnlg_jax.decode.load import load_decoder
    from mtnlg_jax.decode.stopping import ShownSpecials

    compat.quiet()
    compat.configure_cache(least_seconds=0)
    _check_output()
    run, decoder = load_decoder(
        _WORKDIR.value, _CHECKPOINT.value, _DTYPE.value, weights=_WEIGHTS.value, cache=_CACHE.value
    )
    gc.freeze()
    gc.enable()
    run.tokenizer.parse_special = _PARSE_SPECIAL.value
    given = _words(run.tokenizer, given)
    if _MODE.value == "ranking" and given and all("candidates" in row for row in rows):
        name = next(iter(given))
        raise ValueError(
            f"--{_FLAG_OF.get(name, name)} is for candidates that are written, and each line of "
            f"{_PROMPTS.value} has its own; leave one of the two out"
        )
    decode = dataclasses.replace(run.config.decode, **given)
    given_candidates = bool(_CANDIDATES.value) or all("candidates" in row for row in rows)
    sampling = _MODE.value == "ranking" and not given_candidates
    if (
        sampling
        and decode.temperature == 0
        and decode.num_beams == 1
        and "temperature" not in given
    ):
        decode = dataclasses.replace(decode, temperature=1.0)
    # Settings of the run that cannot act wait for others; those of the command line are refused.
    decode = acting(decode, given)
    if _DRAFT.value is None:
        decode = dataclasses.replace(decode, num_assistant_tokens=DecodeConfig.num_assistant_tokens)
    validate_decode(decode)
    if "seed" in given and decode.temperature == 0:
        raise ValueError(
            f"seed={decode.seed} is for what is drawn, and temperature=0 draws nothing; set temperature "
            "above 0 to sample, or leave seed out"
        )
    tokenizer = ShownSpecials(run.tokenizer) if _SHOW_SPECIAL.value else run.tokenizer
    ranking = functools.partial(_rank, stages=run.config.train.stages)
    if _PROMPTS.value:
        _answer_all(decoder, tokenizer, rows, decode, ranking)
        return
    answer = {"generative": _generate, "ranking": ranking, "fill": _fill}[_MODE.value]
    result = answer(decoder, tokenizer, rows[0]["prompt"], decode)
    if _JSON.value:
        print(_dump({"mode": _MODE.value, "step": run.step, "prompt": rows[0]["prompt"]} | result))


def _check_output() -> None:
    """Raises ValueError, before the model is loaded, where the answers to many prompts cannot be
    written."""
    if _OUTPUT.value is None:
        return
    if os.path.exists(_OUTPUT.value):
        raise ValueError(f"--output={_OUTPUT.value} exists; name another file, or remove it")
    folder = os.path.dirname(os.path.abspath(_OUTPUT.value))
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"--output={_OUTPUT.value} cannot be written, as {folder} is no folder to write to; make it, "
            "or name another file"
        )


def _answer_all(decoder, tokenizer, rows: list[dict], decode, ranking) -> None:
    """A JSON line for each row, written as soon as it is known."""
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.decode.results import check_context, encode_prompt

    for number, row in enumerate(rows, 1):
        with _named(number, len(rows), 0):
            check_context(decoder, len(encode_prompt(tokenizer, row["prompt"])))
    draft = _draft(tokenizer)
    output = sys.stdout if _OUTPUT.value is None else open(_OUTPUT.value, "x", encoding="utf-8")
    done = 0
    size = _BATCH.value if _MODE.value == "generative" else 1
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        with _named(start + 1, len(rows), done):
            if _MODE.value == "generative":
                answers = [{"sequences": []} for _ in part]
                results = generate(
                    decoder, tokenizer, [row["prompt"] for row in part], decode, draft=draft
                )
                for result in results:
                    sequence = dataclasses.asdict(result)
                    answers[sequence.pop("prompt")]["sequences"].append(sequence)
            elif _MODE.value == "ranking":
                answers = [
                    ranking(
                        decoder,
                        tokenizer,
                        part[0]["prompt"],
                        decode,
                        given=part[0].get("candidates"),
                    )
                ]
            else:
                answers = [_fill(decoder, tokenizer, part[0]["prompt"], decode)]
        for row, answer in zip(part, answers, strict=True):
            done += 1
            print(_dump(row | answer), file=output, flush=True)
    if output is not sys.stdout:
        output.close()
        print(f"{done:,} answers in {_OUTPUT.value}")


@contextlib.contextmanager
def _named(number: int, count: int, done: int):
    """Says which row an error is of, and how many answers are written."""
    try:
        yield
    except ValueError as error:
        written = f" ({done:,} answers are written)" if done else ""
        raise ValueError(f"prompt {number:,} of {count:,}: {error}{written}") from None


def _generate(decoder, tokenizer, prompt, decode) -> dict:
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.decode.results import encode_prompt

    draft = _draft(tokenizer)
    stream = sys.stdout.isatty() if _STREAM.value is None else _STREAM.value
    # Several texts cannot be written to one terminal at once.
    stream = stream and decode.num_return_sequences == 1 and not _JSON.value

    def show(_, text):
        print(text, end="", flush=True)

    if stream:
        show(0, prompt)
    begin = time.perf_counter()
    results = generate(
        decoder, tokenizer, [prompt], decode, on_text=show if stream else None, draft=draft
    )
    seconds = time.perf_counter() - begin
    for number, result in enumerate(results, 1):
        if stream:
            print()
        elif not _JSON.value:
            score = "" if result.score is None else f", score {result.score:.4f}"
            print(f"--- {number}{score} ---\n" * (len(results) > 1) + prompt + result.text)
        if (
            len(encode_prompt(tokenizer, prompt)) + len(result.tokens) == decoder.context
            and not _JSON.value
        ):
            print(f"(ended: the context of {decoder.context} tokens is full)", file=sys.stderr)
    answer = {"sequences": [dataclasses.asdict(result) for result in results]}
    if _STATS.value:
        # Once more, since the first call compiles.
        begin = time.perf_counter()
        results = generate(
            decoder, tokenizer, [prompt], dataclasses.replace(decode, max_time=None), draft=draft
        )
        answer["stats"] = _stats(
            decoder, tokenizer, prompt, results, decode, time.perf_counter() - begin
        ) | {"first_seconds": round(seconds, 3)}
        if not _JSON.value:
            print(
                "\n".join(f"{name}: {value}" for name, value in answer["stats"].items()),
                file=sys.stderr,
            )
    return answer


def _draft(tokenizer):
    from mtnlg_jax.decode.load import load_decoder

    if _DRAFT.value is None:
        return None
    run, draft = load_decoder(
        _DRAFT.value, _CHECKPOINT.value, _DTYPE.value, weights=_WEIGHTS.value, cache=_CACHE.value
    )
    if run.tokenizer.vocab_size != tokenizer.vocab_size or any(
        run.tokenizer.token_bytes(i) != tokenizer.token_bytes(i)
        for i in range(tokenizer.vocab_size)
    ):
        raise ValueError(
            f"--draft={_DRAFT.value} was trained with another tokenizer, of {run.tokenizer.vocab_size} "
            f"tokens where the model's has {tokenizer.vocab_size}; give a draft with the same one"
        )
    return draft


def _stats(decoder, tokenizer, prompt, results, decode, seconds) -> dict:
    from mtnlg_jax.decode.results import encode_prompt
    from mtnlg_jax.decode.roofline import copy_bandwidth, roofline

    tokens = sum(len(result.tokens) for result in results)
    guessed = sum(result.guessed for result in results)
    rows = max(decode.num_return_sequences, decode.num_beams)
    length = len(encode_prompt(tokenizer, prompt)) + decode.max_new_tokens
    stats = {"tokens_per_second": round(tokens / seconds, 2)} | roofline(
        decoder, rows, length, copy_bandwidth()
    )
    if guessed:
        accepted = sum(result.accepted for result in results)
        stats |= {
            "guessed": guessed,
            "accepted": accepted,
            "acceptance_rate": round(accepted / guessed, 3),
        }
    return stats


def _rank(decoder, tokenizer, prompt, decode, stages, given: list[str] | None = None) -> dict:
    from mtnlg_jax.decode.rank import rank
    from mtnlg_jax.decode.scorers import ScorerOptions

    values = {name: flag.value for name, flag in _SCORING.items() if flag.value is not None}
    if "reverse" in values:
        values["reverse"] = _unescape(values["reverse"])
    candidates = (_CANDIDATES.value or None) if given is None else given
    ranked = rank(
        decoder,
        tokenizer,
        prompt,
        candidates,
        decode=decode if candidates is None else None,
        scorers=_weights(),
        normalise=_NORMALISE.value,
        options=ScorerOptions(**values),
        stages=stages,
    )
    if not (_JSON.value or _PROMPTS.value):
        mixture = " + ".join(f"{weight:g} {name}" for name, weight in ranked.weights.items())
        print(
            f"{mixture}, {ranked.normalise}, natural logarithms; candidates: {ranked.size}, duplicates: "
            f"{ranked.duplicates}"
        )
        sums = ("sum", "per_token", "per_char", "per_byte")
        # The part logprob is the one of these that was asked for.
        parts = [name for name in ranked[0].parts if name != "logprob"]
        answers = ["answer"] * any(each.answer is not None for each in ranked)
        # Where a candidate joins the end of the prompt, or a stop ends it.
        scored = ["scored"] * any(each.scored != each.text for each in ranked)
        rows = [["rank", "score", *sums, *parts, "tokens", *answers, "text", *scored, "times"]]
        for each in ranked:
            numbers = [
                each.score,
                *(getattr(each, name) for name in sums),
                *(each.parts[name] for name in parts),
            ]
            rows.append(
                [
                    str(each.rank),
                    *(f"{number:.4f}" for number in numbers),
                    str(len(each.tokens)),
                    *([repr(each.answer)] * len(answers)),
                    repr(each.text),
                    *([repr(each.scored)] * len(scored)),
                    str(each.count),
                ]
            )
        _print_table(rows, {"answer", "text", "scored"})
    return dataclasses.asdict(ranked)


def _weights() -> dict[str, float]:
    weights = {}
    for entry in _SCORER.value:
        name, equals, weight = entry.partition("=")
        if name in weights:
            raise ValueError(f"--scorer={name} is given twice; keep one of them")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(
                f"--scorer={entry} is not of the form NAME or NAME=WEIGHT, as in --scorer=pmi=0.5"
            ) from None
    return weights


def _print_table(rows: list[list[str]], left: set[str]) -> None:
    """Columns as wide as a terminal shows them; those whose head is in ``left`` begin at their left
    edge."""

    def width(text):
        # A Chinese character takes two places, a mark upon the character before it takes none.
        return sum(
            0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
            for c in text
        )

    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for head, cell, wide in zip(rows[0], row, widths, strict=True):
            space = " " * (wide - width(cell))
            cells.append(cell + space if head in left else space + cell)
        print("  ".join(cells).rstrip())


def _fill(decoder, tokenizer, prompt, _) -> dict:
    from mtnlg_jax.decode.infill import fill

    filled = fill(decoder, tokenizer, prompt, _GUESSES.value)
    if not (_JSON.value or _PROMPTS.value):
        for number, guesses in enumerate(filled.masks, 1):
            print(f"mask {number}")
            for guess in guesses:
                print(f"  {guess.probability:6.1%}  {guess.text!r}")
        print(filled.text)
    return dataclasses.asdict(filled)


def run() -> None:
    """Parses the command line, does what it says and exits."""
    command.run(main)
