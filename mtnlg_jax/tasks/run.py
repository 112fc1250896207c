"""Run a task with a model: answer rows, with a fine-tuned model or by prompting alone."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from mtnlg_jax.config import DecodeConfig, StageConfig, validate_decode
from mtnlg_jax.decode.batched_settings import check_tokens
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.decode.scorers import ScorerOptions
from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.tasks.answers import NORMALIZATIONS, Answer, Choice, length_of
from mtnlg_jax.tasks.passages import Retriever
from mtnlg_jax.tasks.prompts import Examples, Prompt, compose
from mtnlg_jax.tasks.rendering import Row, check_passages, check_task, seam, template_of
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.text import clean, normalize

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
      shots: number of examples to show: the first ones or, with ``seed``, a random draw per row;
        None: all.
      retriever: source of up to ``passages`` passages for each input, as many as fit.
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
      batch: number of rows generated at once.
      on_answer: called with (index of the row, answer) as soon as the answer is available.

    Raises:
      ValueError: an argument or a row is invalid; raised before the model does any work.
    """
    asked = [_row(row) for row in rows]
    pool = Examples(task, [_row(each) for each in examples], language)
    decode = decode or task.decode
    if not asked:
        raise ValueError(f"task {task.name!r} has no rows to answer; give at least one")
    if batch < 1 or passages < 1:
        raise ValueError(f"batch={batch} and passages={passages}: give 1 or more of both")
    _check_ranking(task, scorer, normalise, last_word)
    _check_decode(decode, decoder)
    task_here = dataclasses.replace(task, decode=decode)
    checked: set[str] = set()

    def prompt_of(row: Row) -> Prompt:
        chosen, template = template_of(task, row.input, language)
        if chosen not in checked:
            check_task(task, template, tokenizer)
            checked.add(chosen)
        if retriever:
            check_passages(task, template)
        return compose(
            task_here,
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
        answers[index] = answer
        on_answer(index, answer)

    if last_word:
        _last_words(decoder, tokenizer, asked, prompts, batch, give)
    else:
        for index, (row, prompt) in enumerate(zip(asked, prompts, strict=True)):
            if prompt.candidates:
                give(index, _choose(decoder, tokenizer, row, prompt, scorer, normalise, stages))
        write = functools.partial(
            _write, decoder, tokenizer, task, decode=decode, language=language
        )
        _write_batches(write, asked, prompts, batch, give)
    return [answers[index] for index in range(len(asked))]


def _check_ranking(task: Task, scorer: str, normalise: str | None, last_word: bool) -> None:
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


def _check_decode(decode: DecodeConfig, decoder: Decoder) -> None:
    validate_decode(decode)
    check_tokens(decode, decoder.config.vocabulary)
    if decode.num_return_sequences != 1:
        raise ValueError(
            f"num_return_sequences={decode.num_return_sequences}, but a task gives one answer; "
            "set it to 1, or use launch/generate.py"
        )


def _check_prompts(prompts: Sequence[Prompt], scorer: str, normalise: str | None) -> None:
    if not any(prompt.candidates for prompt in prompts) and (normalise or scorer != "logprob"):
        what = f"normalise={normalise}" if normalise else f"scorer={scorer}"
        raise ValueError(f"{what} ranks labels and choices, and these rows have none; leave it out")
    if any(prompt.texts for prompt in prompts) and scorer != "logprob":
        raise ValueError(
            f"scorer={scorer} cannot compare choices that fill a blank, because all of them score "
            "the same text after the blank; use scorer=logprob, or leave the blank out"
        )


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


def _write_batches(
    write: Callable[[list[Row], list[Prompt]], list[Answer]],
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    batch: int,
    give: Callable[[int, Answer], None],
) -> None:
    """Write the answers of all rows without candidates, ``batch`` of them at once."""
    # Prompts of similar lengths go together: a batch costs as much as its longest.
    indices = [index for index, prompt in enumerate(prompts) if not prompt.candidates]
    indices.sort(key=lambda index: len(prompts[index].text))
    for start in range(0, len(indices), batch):
        group = indices[start : start + batch]
        answers = write([rows[i] for i in group], [prompts[i] for i in group])
        for index, answer in zip(group, answers, strict=True):
            give(index, answer)


def _row(row) -> Row:
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


def _choose(
    decoder, tokenizer, row: Row, prompt: Prompt, scorer: str, normalization: str | None, stages
) -> Answer:
    labels, texts = zip(*prompt.candidates, strict=True)
    if prompt.texts:
        # Each choice has its own prompt, and all of them score the same text after the blank.
        ranked = [
            (
                i,
                rank(
                    decoder,
                    tokenizer,
                    before,
                    [behind],
                    scorers=scorer,
                    stages=stages,
                    normalise="sum",
                )[0],
            )
            for i, (before, behind) in enumerate(zip(prompt.texts, texts, strict=True))
        ]
    else:
        options = ScorerOptions(neutral=prompt.neutral) if scorer == "pmi" else None
        ranking = rank(
            decoder,
            tokenizer,
            prompt.text,
            texts,
            scorers=scorer,
            options=options,
            stages=stages,
            normalise="sum",
        )
        ranked = sorted(((each.index, each) for each in ranking), key=lambda pair: pair[0])
    normalization = normalization or ("per_byte" if row.choices and not prompt.texts else "sum")
    scores = np.array([each.score / length_of(normalization, each.scored) for _, each in ranked])
    sums = np.array([each.sum for _, each in ranked])
    probabilities = np.exp(sums - sums.max())
    probabilities /= probabilities.sum()
    choices = []
    for i in np.argsort(-scores, kind="stable").tolist():
        index, each = ranked[i]
        choices.append(
            Choice(labels[index], each.scored, float(scores[i]), each.sum, float(probabilities[i]))
        )
    best = labels.index(choices[0].label)
    return Answer(
        choices[0].label,
        texts[best],
        prompt.language,
        "ranked",
        tuple(choices),
        prompt.passages,
        prompt.examples,
        prompt.shortened,
        prompt.context_shortened,
        prompt.texts[best] if prompt.texts else prompt.text,
        f"{scorer} {normalization}",
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
        max(1, _common(encode_prompt(tokenizer, prompt.text), tokens))
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
                ),
            )


def _common(first, second) -> int:
    """Return the length of the common prefix of two token sequences."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def _write(
    decoder, tokenizer, task: Task, rows, prompts: Sequence[Prompt], decode: DecodeConfig, language
) -> list[Answer]:
    configs = []
    stops = []
    for row, prompt in zip(rows, prompts, strict=True):
        template = template_of(task, row.input, language)[1]
        # Beam search cannot match strings, so every token that may begin a stop ends a beam.
        stop = (
            {"eos_token_id": _ends(decoder, tokenizer, decode, template.stops)}
            if decode.num_beams > 1
            else {"stop_strings": tuple(dict.fromkeys([*decode.stop_strings, *template.stops]))}
        )
        left = decoder.context - len(encode_prompt(tokenizer, prompt.text))
        longest = min(decode.max_new_tokens, left)
        stops.append(template.stops)
        configs.append(
            dataclasses.replace(
                decode,
                max_new_tokens=longest,
                min_new_tokens=min(decode.min_new_tokens, longest),
                **stop,
            )
        )
    results = generate(decoder, tokenizer, [prompt.text for prompt in prompts], configs)
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
        )
        for result, prompt, stop in zip(results, prompts, stops, strict=True)
    ]


def _ends(decoder, tokenizer, decode: DecodeConfig, stops: Sequence[str]) -> tuple[int, ...]:
    """Return the token ids that end a beam.

    These are its end tokens and, for stops of one character, all tokens that begin with one. Longer
    stops are cut off after decoding.
    """
    begins = tuple(stop.encode() for stop in stops if len(stop) == 1)
    tokens = [
        token
        for token in range(min(tokenizer.vocab_size, decoder.config.vocab_size))
        if begins and tokenizer.token_bytes(token).startswith(begins)
    ]
    return tuple(dict.fromkeys([*(decode.eos_token_id or tokenizer.eos_ids), *tokens]))
