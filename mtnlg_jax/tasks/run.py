"""Tasks done by a model: rows in, answers out, whether it was fine-tuned for the task or only told what to do."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mtnlg_jax.config import DecodeConfig, StageConfig, validate_decode
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import encode_prompt, generate
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.decode.rows import check_tokens
from mtnlg_jax.decode.scorers import ScorerOptions
from mtnlg_jax.tasks.metrics import Score, baseline, measure
from mtnlg_jax.tasks.passages import Passage, Retriever
from mtnlg_jax.tasks.prompts import Prompt, Row, answer_of, check_passages, check_task, compose, template_of
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.text import clean

SCORERS = ("logprob", "pmi", "pseudo_log_likelihood")


@dataclass(frozen=True)
class Choice:
    label: str
    score: float  # what it was ranked by
    share: float  # exp(score) over the sum of all; of logprob of labels the probability that it is this one of them


@dataclass(frozen=True)
class Answer:
    text: str  # after post-processing; of a ranking the best label or choice
    raw: str  # as the model wrote it, or the text that was ranked
    language: str  # of the answer
    finish_reason: str  # "stop", "length" or "timeout" of what was written, "ranked" of what was chosen
    choices: tuple[Choice, ...]  # best first; empty where the answer was written
    citations: tuple[Passage, ...]  # the passages in the prompt: the first is [1]
    examples: int  # in the prompt
    shortened: bool  # part of the input was left out
    prompt: str


@dataclass(frozen=True)
class Evaluation:
    rows: int
    scores: dict[str, Score]  # of the model; the first is the task's own
    baseline: str  # what was done without a model
    baseline_scores: dict[str, Score]


def perform(decoder: Decoder, tokenizer, task: Task, rows: Sequence[Row | str], *, language: str | None = None,
            examples: Sequence[Row | tuple[str, str]] = (), retriever: Retriever | None = None, passages: int = 3,
            decode: DecodeConfig | None = None, scorer: str = "logprob", stages: Sequence[StageConfig] | None = None,
            batch: int = 8, on_row: Callable[[int], None] = lambda done: None) -> list[Answer]:
    """The answer of each row. Labels and choices are ranked, all else is written.

    Args:
      rows: inputs, or `Row`s with choices or a context.
      language: of the inputs, a key of the task's templates; None: seen from each.
      examples: rows with references, or (input, answer), shown in this order before each input of their language.
      retriever: where ``passages`` of them, as many as fit, are looked up for each input.
      decode: in place of the task's decoding; its length is held to the context, and the task's stops are added.
      scorer: of SCORERS, for rankings. Of labels whole log-probabilities are compared, of choices those per byte,
        since choices are of different lengths. "pmi" takes off what the prompt without an input would say, which
        helps a model that was not fine-tuned (Zhao 2021, Holtzman 2021).
      stages: those that trained the model, where known, for "pseudo_log_likelihood".
      batch: rows written at once.
    Raises ValueError before the model does any work.
    """
    rows, examples = [_row(row) for row in rows], [_row(each) for each in examples]
    decode = decode or task.decode
    if not rows:
        raise ValueError(f"task {task.name!r} has no rows to do; give one at least")
    if scorer not in SCORERS:
        raise ValueError(f"scorer {scorer!r} is not known; choose from {', '.join(SCORERS)}")
    if batch < 1 or passages < 1:
        raise ValueError(f"batch={batch} and passages={passages}: give 1 or more of both")
    validate_decode(decode)
    check_tokens(decode, decoder.config.vocab_size)
    if decode.num_return_sequences != 1:
        raise ValueError(f"num_return_sequences={decode.num_return_sequences}, but a task gives one answer; set it to "
                         "1, or use launch/generate.py")
    task_here, asked, checked = dataclasses.replace(task, decode=decode), [], set()
    for number, row in enumerate(rows, 1):
        try:
            chosen, template = template_of(task, row.input, language)
            if chosen not in checked:
                check_task(task, template, tokenizer)
                checked.add(chosen)
            if retriever:
                check_passages(task, template)
            found = retriever.best(row.input, passages) if retriever else ()
            same = [each for each in examples if template_of(task, each.input, language)[0] == chosen]
            asked.append(compose(task_here, row, tokenizer, decoder.context, language=language, examples=same,
                                 passages=found))
        except ValueError as error:
            raise ValueError(f"row {number} of {len(rows)}: {error}" if len(rows) > 1 else str(error)) from None
    answers: list[Answer | None] = [None] * len(rows)
    for index, (row, prompt) in enumerate(zip(rows, asked, strict=True)):
        if prompt.candidates:
            answers[index] = _choose(decoder, tokenizer, row, prompt, scorer, stages)
            on_row(1)
    # Prompts of like lengths together: a batch costs as much as its longest.
    written = sorted((i for i, prompt in enumerate(asked) if not prompt.candidates), key=lambda i: len(asked[i].text))
    for start in range(0, len(written), batch):
        group = written[start : start + batch]
        for index, answer in zip(group, _write(decoder, tokenizer, task, [rows[i] for i in group],
                                               [asked[i] for i in group], decode, language), strict=True):
            answers[index] = answer
        on_row(len(group))
    return answers


def evaluate(task: Task, rows: Sequence[Row], answers: Sequence[Answer], seed: int = 0) -> Evaluation:
    """The metrics of answers, and of those of the trivial baseline, against the rows' references. Raises ValueError
    where a row has none."""
    check_references(task, rows)
    ranked = [bool(answer.choices) for answer in answers]
    if any(ranked) != all(ranked):
        raise ValueError(f"{sum(ranked)} of {len(rows)} rows have choices and the others have none; score the two "
                         "apart")
    names = ("accuracy",) if all(ranked) else task.metrics
    languages, references = [answer.language for answer in answers], [row.references for row in rows]
    name, trivial = baseline(task, rows)
    return Evaluation(len(rows), measure(names, [answer.text for answer in answers], references, languages, seed), name,
                      measure(names, trivial, references, languages, seed))


def check_references(task: Task, rows: Sequence[Row], language: str | None = None) -> None:
    """Raises ValueError where a row lacks a reference, or has one that is none of its labels or choices."""
    for number, row in enumerate(rows, 1):
        try:
            answer_of(task, template_of(task, row.input, language)[1], row)
        except ValueError as error:
            raise ValueError(f"row {number} of {len(rows)}: {error}") from None


def _row(row) -> Row:
    if isinstance(row, Row):
        return row
    if isinstance(row, str):
        return Row(row)
    if isinstance(row, tuple | list) and len(row) == 2 and all(isinstance(part, str) for part in row):
        return Row(row[0], (row[1],))
    raise ValueError(f"{str(row)[:60]!r} is no row; give a text, a Row, or for an example (input, answer)")


def _choose(decoder, tokenizer, row: Row, prompt: Prompt, scorer: str, stages) -> Answer:
    labels, texts = zip(*prompt.candidates, strict=True)
    options = ScorerOptions(neutral=prompt.neutral) if scorer == "pmi" else None
    ranking = rank(decoder, tokenizer, prompt.text, texts, scorers=scorer, options=options, stages=stages,
                   normalise="per_byte" if row.choices else "sum")
    scores = np.array([each.score for each in ranking])
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    choices = tuple(Choice(labels[each.index], each.score, float(share))
                    for each, share in zip(ranking, shares, strict=True))
    return Answer(choices[0].label, ranking[0].text, prompt.language, "ranked", choices, prompt.passages,
                  prompt.examples, prompt.shortened, prompt.text)


def _write(decoder, tokenizer, task: Task, rows, prompts: Sequence[Prompt], decode: DecodeConfig,
           language) -> list[Answer]:
    configs, stops = [], []
    for row, prompt in zip(rows, prompts, strict=True):
        template = template_of(task, row.input, language)[1]
        # Beams know no strings while they are chosen, but every token that may begin one ends them.
        stop = ({"eos_token_id": _ends(decoder, tokenizer, decode, template.stops)} if decode.num_beams > 1 else
                {"stop_strings": tuple(dict.fromkeys([*decode.stop_strings, *template.stops]))})
        left = decoder.context - len(encode_prompt(tokenizer, prompt.text))
        longest = min(decode.max_new_tokens, left)
        stops.append(template.stops)
        configs.append(dataclasses.replace(
            decode, max_new_tokens=longest, min_new_tokens=min(decode.min_new_tokens, longest), **stop))
    results = generate(decoder, tokenizer, [prompt.text for prompt in prompts], configs)
    return [Answer(clean(result.text, prompt.language, stop, task.joined), result.text, prompt.language,
                   result.finish_reason, (), prompt.passages, prompt.examples, prompt.shortened, prompt.text)
            for result, prompt, stop in zip(results, prompts, stops, strict=True)]


def _ends(decoder, tokenizer, decode: DecodeConfig, stops: Sequence[str]) -> tuple[int, ...]:
    """The ids that end a beam: its ends, and for stops of one character all tokens that begin with one. Longer stops
    are cut off when the text is known."""
    begins = tuple(stop.encode() for stop in stops if len(stop) == 1)
    tokens = [token for token in range(min(tokenizer.vocab_size, decoder.config.vocab_size))
              if begins and tokenizer.token_bytes(token).startswith(begins)]
    return tuple(dict.fromkeys([*(decode.eos_token_id or (tokenizer.eos_id,)), *tokens]))
