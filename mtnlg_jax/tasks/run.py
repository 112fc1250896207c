"""Run a task with a model: answer rows, with a fine-tuned model or by prompting alone."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mtnlg_jax.config import DecodeConfig, StageConfig, validate_decode
from mtnlg_jax.decode.batched_settings import check_tokens
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.results import common_prefix, encode_prompt
from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.tasks.answers import NORMALIZATIONS, Answer
from mtnlg_jax.tasks.choosing import choose
from mtnlg_jax.tasks.passages import Retriever
from mtnlg_jax.tasks.profile import Profile, ShownProfile
from mtnlg_jax.tasks.prompts import Examples, Prompt, compose, work_of
from mtnlg_jax.tasks.rendering import Row, check_passages, check_task, seam, template_of
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.text import clean, normalize
from mtnlg_jax.tasks.work import Work

SCORERS = ("logprob", "pmi", "pseudo_log_likelihood")


def perform(
    decoder: Decoder,
    tokenizer,
    task: Task,
    rows: Sequence[Row | str],
    *,
    language: str | None = None,
    examples: Sequence[Row | tuple[str, str]] = (),
    shots: int | None = None,
    seed: int | None = None,
    retriever: Retriever | None = None,
    passages: int = 3,
    profile: Profile | None = None,
    decode: DecodeConfig | None = None,
    scorer: str = "logprob",
    normalise: str | None = None,
    last_word: bool = False,
    stages: Sequence[StageConfig] | None = None,
    batch: int = 8,
    on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
) -> list[Answer]:
    """Return the answer of each row. Labels and choices are ranked; other answers are generated.

    Args:
      rows: inputs, or `Row`s with choices or a context.
      language: language of the inputs, a key of the task's templates; None: detect it per input.
      examples: rows with references, or (input, answer), shown in this order before each input of
        their language. Examples that ask the row's own question (`prompts.same_question`) are
        skipped.
      shots: examples to show: the first ones or, with ``seed``, a random draw per row; None: all.
      retriever: source of up to ``passages`` passages for each input, as many as fit.
      profile: of a person; each prompt shows what fits its input, and the answer names it.
      decode: settings that replace the task's decoding. The length is limited to the context, and
        the task's stops are added.
      scorer: one of SCORERS, for rankings. "pmi" subtracts the score after a prompt without an
        input, which helps a model that was not fine-tuned (Zhao 2021, Holtzman 2021).
      normalise: one of `answers.NORMALIZATIONS`, the divisor of scores (see `answers.length_of`).
        None: "sum" for labels and for choices that fill a blank, which all score the same text
        after it; "per_byte" for other choices, because their lengths differ.
      last_word: score the reference of each row as the end of its text (LAMBADA), without labels
        or choices. The answer is the model's greedy continuation of the reference's token count;
        its ``log_prob`` is the reference's.
      stages: the training stages of the model, if known, for "pseudo_log_likelihood".
      batch: number of rows answered at once.
      on_answer: called with (index of the row, answer) as soon as the answer is available.

    Raises:
      ValueError: an argument or a row is invalid; raised before the model does any work.
    """
    asked = [row_of(row) for row in rows]
    pool = Examples(task, [row_of(each) for each in examples], language)
    decode = decode or task.decode
    if not asked:
        raise ValueError(f"task {task.name!r} has no rows to answer; give at least one")
    check_arguments(task, decoder, decode, scorer, normalise, last_word, batch, passages)
    task_here = dataclasses.replace(task, decode=decode)
    checked: set[str] = set()
    shown = ShownProfile(profile, tokenizer, decoder.context, language)

    def prompt_of(row: Row) -> Prompt:
        chosen, template = template_of(task, row.input, language)
        if chosen not in checked:
            check_task(task, template, tokenizer)
            checked.add(chosen)
        if retriever:
            check_passages(task, template)
        return compose(
            shown.task_of(task_here, row),
            row,
            tokenizer,
            decoder.context,
            language=language,
            passages=retriever.best(row.input, passages) if retriever else (),
            reserve=_last_word_reserve(tokenizer, row) if last_word else None,
            examples=pool.of(row, chosen, shots, seed),
        )

    prompts = _for_each_row(prompt_of, asked)
    _check_prompts(prompts, scorer, normalise)
    answers: dict[int, Answer] = {}

    def give(index: int, answer: Answer) -> None:
        answers[index] = dataclasses.replace(answer, profile=shown.entries[index])
        on_answer(index, answers[index])

    if last_word:
        _last_words(decoder, tokenizer, asked, prompts, batch, give)
    else:
        ranked = functools.partial(
            choose, decoder, tokenizer, scorer=scorer, normalise=normalise, stages=stages
        )
        write = functools.partial(
            _write, decoder, tokenizer, task, decode=decode, language=language
        )
        _in_batches(ranked, asked, prompts, True, batch, give)
        _in_batches(write, asked, prompts, False, batch, give)
    return [answers[index] for index in range(len(asked))]


def check_arguments(
    task: Task,
    decoder: Decoder,
    decode: DecodeConfig,
    scorer: str,
    normalise: str | None,
    last_word: bool,
    batch: int,
    passages: int,
) -> None:
    """Raise ValueError on invalid arguments of `perform`, whatever the rows are."""
    if batch < 1 or passages < 1:
        raise ValueError(f"batch={batch} and passages={passages}: give 1 or more of both")
    if scorer not in SCORERS:
        raise ValueError(f"unknown scorer {scorer!r}; choose from {', '.join(SCORERS)}")
    if normalise not in (None, *NORMALIZATIONS):
        raise ValueError(
            f"unknown normalise={normalise!r}; choose from {', '.join(NORMALIZATIONS)}"
        )
    if last_word and not task.joined:
        raise ValueError(
            f"last-word scoring requires a text to continue, and task {task.name!r} "
            "does not continue its input; use task 'continue'"
        )
    validate_decode(decode)
    check_tokens(decode, decoder.config.vocabulary)
    if decode.num_return_sequences != 1:
        raise ValueError(
            f"num_return_sequences={decode.num_return_sequences}, but a task gives one answer; "
            "set it to 1, or use launch/generate.py"
        )


def _check_prompts(prompts: Sequence[Prompt], scorer: str, normalise: str | None) -> None:
    check_ranking(any(prompt.candidates for prompt in prompts), scorer, normalise)
    if any(prompt.texts for prompt in prompts) and scorer != "logprob":
        raise ValueError(
            f"scorer={scorer} cannot compare choices that fill a blank, because all of them score "
            "the same text after the blank; use scorer=logprob, or leave the blank out"
        )


def check_ranking(ranked: bool, scorer: str, normalise: str | None) -> None:
    """Raise ValueError on settings of rankings if no row is ``ranked``."""
    if not ranked and (normalise or scorer != "logprob"):
        what = f"normalise={normalise}" if normalise else f"scorer={scorer}"
        raise ValueError(f"{what} ranks labels and choices, and these rows have none; leave it out")


def _last_word_reserve(tokenizer, row: Row) -> int:
    """Return the number of tokens that the last word of a row may take."""
    if row.choices:
        lack = "choices"
    elif not row.references:
        lack = "no reference"
    else:
        return len(tokenizer.encode(_target(row))) + 1
    raise ValueError(
        f"the row with input {row.input[:40]!r} has {lack}; a last word is compared with a "
        "reference"
    )


def _for_each_row(prompt_of: Callable[[Row], Prompt], rows: Sequence[Row]) -> list[Prompt]:
    """Compose the prompt of each row; errors name the row."""
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(prompt_of(row))
        except ValueError as error:
            where = f"row {number} of {len(rows)}: " if len(rows) > 1 else ""
            raise ValueError(f"{where}{error}") from None
    return prompts


def _in_batches(
    answer: Callable[[list[Row], list[Prompt]], Iterable[Answer]],
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    ranked: bool,
    batch: int,
    give: Callable[[int, Answer], None],
) -> None:
    """Answer all rows with candidates (``ranked``) or all others, ``batch`` of them at once."""
    # Prompts of similar lengths go together: a batch costs as much as its longest.
    indices = [index for index, prompt in enumerate(prompts) if bool(prompt.candidates) == ranked]
    indices.sort(key=lambda index: len(prompts[index].text))
    for start in range(0, len(indices), batch):
        group = indices[start : start + batch]
        answers = answer([rows[i] for i in group], [prompts[i] for i in group])
        for index, given in zip(group, answers, strict=True):
            give(index, given)


def row_of(row) -> Row:
    """Return a text, or an example (input, answer), as a row."""
    if isinstance(row, Row):
        return row
    if isinstance(row, str):
        return Row(row)
    if (
        isinstance(row, tuple | list)
        and len(row) == 2
        and all(isinstance(part, str) for part in row)
    ):
        return Row(row[0], (row[1],))
    raise ValueError(
        f"{str(row)[:60]!r} is not a row; give a text, a Row, or for an example (input, answer)"
    )


def _target(row: Row) -> str:
    """Return the reference of a row as the end of its text."""
    reference = row.references[0].rstrip()
    return seam(row.input.rstrip(), reference) + reference


def _last_words(
    decoder, tokenizer, rows: Sequence[Row], prompts: Sequence[Prompt], batch: int, give
) -> None:
    whole = [
        encode_prompt(tokenizer, prompt.text + _target(row))
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    # Score from the first token that differs from those of the prompt alone.
    starts = [
        max(1, common_prefix(encode_prompt(tokenizer, prompt.text), tokens))
        for prompt, tokens in zip(prompts, whole, strict=True)
    ]
    sums = [float(np.sum(each, dtype=np.float64)) for each in score_rows(decoder, whole, starts)]
    order = sorted(range(len(rows)), key=lambda i: len(whole[i]))
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        configs = [DecodeConfig(max_new_tokens=len(whole[i]) - starts[i]) for i in group]
        written = generate(decoder, tokenizer, [prompts[i].text for i in group], configs)
        for i, result in zip(group, written, strict=True):
            right = result.text.strip() == _target(rows[i]).strip()
            text = rows[i].references[0] if right else normalize(result.text)
            prompt = prompts[i]
            give(
                i,
                Answer(
                    text,
                    result.text,
                    prompt.language,
                    "last word",
                    (),
                    prompt.passages,
                    prompt.examples,
                    prompt.shortened,
                    prompt.context_shortened,
                    prompt.text,
                    log_prob=sums[i],
                    work=work_of(tokenizer, prompt, len(result.tokens)),
                ),
            )


def _write(
    decoder, tokenizer, task: Task, rows, prompts: Sequence[Prompt], decode: DecodeConfig, language
) -> list[Answer]:
    stops = [template_of(task, row.input, language)[1].stops for row in rows]
    tokens = [encode_prompt(tokenizer, prompt.text) for prompt in prompts]
    configs = [
        settings_of(decoder, tokenizer, decode, len(each), stop)
        for each, stop in zip(tokens, stops, strict=True)
    ]
    results = generate(decoder, tokenizer, tokens, configs)
    return [
        Answer(
            clean(result.text, prompt.language, stop, task.joined),
            result.text,
            prompt.language,
            result.finish_reason,
            (),
            prompt.passages,
            prompt.examples,
            prompt.shortened,
            prompt.context_shortened,
            prompt.text,
            work=Work("whole", 1, 1, len(each), len(result.tokens)),
        )
        for result, prompt, stop, each in zip(results, prompts, stops, tokens, strict=True)
    ]


def settings_of(
    decoder: Decoder, tokenizer, decode: DecodeConfig, read: int, stops: Sequence[str]
) -> DecodeConfig:
    """Return ``decode`` with the length limited to the context behind a prompt of ``read`` tokens,
    and the stops of a template."""
    # Beam search cannot match strings, so every token that may begin a stop ends a beam.
    stop = (
        {"eos_token_id": _ends(decoder, tokenizer, decode, stops)}
        if decode.num_beams > 1
        else {"stop_strings": tuple(dict.fromkeys([*decode.stop_strings, *stops]))}
    )
    longest = min(decode.max_new_tokens, decoder.context - read)
    return dataclasses.replace(
        decode,
        max_new_tokens=longest,
        min_new_tokens=min(decode.min_new_tokens, longest),
        **stop,
    )


def _ends(decoder, tokenizer, decode: DecodeConfig, stops: Sequence[str]) -> tuple[int, ...]:
    """Return the token ids that end a beam.

    These are its end tokens and, for stops of one character, all tokens that begin with one. Longer
    stops are cut off after decoding.
    """
    begins = tuple(stop.encode() for stop in stops if len(stop) == 1)
    size = min(tokenizer.vocab_size, decoder.config.vocab_size)
    tokens = _tokens_beginning(tokenizer, size, begins) if begins else ()
    return tuple(dict.fromkeys([*(decode.eos_token_id or tokenizer.eos_ids), *tokens]))


@functools.lru_cache(16)
def _tokens_beginning(tokenizer, size: int, begins: tuple[bytes, ...]) -> tuple[int, ...]:
    """Return the token ids below ``size`` whose bytes begin with one of ``begins``."""
    return tuple(token for token in range(size) if tokenizer.token_bytes(token).startswith(begins))
