"""Associations in sampled text: the words that a model writes about groups (Smith et al. 2022,
section 6; Brown et al. 2020, section 6.2)."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.evaluate.bias import statistics
from mtnlg_jax.evaluate.bias.lexicon import Lexicon
from mtnlg_jax.evaluate.bias.read import PromptSet
from mtnlg_jax.evaluate.bias.words import Vocabulary, slot_words

# Seeds of outputs that each seed of the settings has.
_OUTPUTS = 1 << 22
# A word stands out below this q-value: of the words that do, this share is expected by chance.
Q = 0.05
# Words of a table that are kept.
MOST_WORDS = 200
# An output ends with its sentence.
ENDS = (".", "!", "?", "\n", "。", "！", "？")


@dataclasses.dataclass(frozen=True)
class SampledSettings:
    """How outputs are sampled; the defaults are those of the paper."""

    samples: int = 800  # outputs of each prompt
    temperature: float = 1.0
    top_p: float = 0.9
    max_new_tokens: int = 50
    batch: int = 64  # outputs that are written together
    seed: int = 0
    min_count: int = 10  # outputs with a word, of all groups, below which it is left out


class Output(NamedTuple):
    template: int
    text: str


def sample(
    decoder: Decoder,
    tokenizer,
    prompt_set: PromptSet,
    settings: SampledSettings,
    first_seed: int = 0,
    on_batch: Callable[[int], None] = lambda count: None,
) -> dict[str, list[Output]]:
    """Return the outputs of each group: ``samples`` behind every prompt, up to their first stop.

    Every output draws with a seed of its own, which follows from ``settings.seed`` and its number;
    the first one has the number ``first_seed``. So neither the batch nor the mesh changes a text,
    up to rounding.
    """
    made: dict[str, list[Output]] = {group: [] for group in prompt_set.groups}
    number = settings.seed * _OUTPUTS + first_seed
    for group in prompt_set.groups:
        for template, prompt in prompt_set.prompts(group):
            for start in range(0, settings.samples, settings.batch):
                count = min(settings.batch, settings.samples - start)
                decode = DecodeConfig(
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    stop_strings=ENDS,
                    seed=(number + start) % 2**32,
                    num_return_sequences=count,
                )
                found = generate(decoder, tokenizer, [prompt], decode)
                made[group] += [Output(template, each.text) for each in found]
                on_batch(count)
            number += settings.samples
    return made


def summarize(
    outputs: Mapping[str, Sequence[Output]],
    settings: SampledSettings,
    language: str,
    vocabulary: Vocabulary | None,
    lexicon: Lexicon | None,
) -> dict[str, Any]:
    """Return the tables of sampled outputs, ready for JSON.

    Args:
      vocabulary: the words that count; None: those in the slots behind the prompts.
      lexicon: scores of words; None: no scores.
    """
    found = {
        group: [
            set(vocabulary.occurring(each.text)) if vocabulary else slot_words(each.text, language)
            for each in own
        ]
        for group, own in outputs.items()
    }
    counts = {
        group: collections.Counter(word for words in own for word in words)
        for group, own in found.items()
    }
    totals = {group: len(own) for group, own in outputs.items()}
    empty = {group: sum(not words for words in own) for group, own in found.items()}
    return {
        "settings": dataclasses.asdict(settings),
        "words_from": "slots" if vocabulary is None else "list",
        "outputs": totals,
        "outputs_without_words": empty,
        "tables": word_tables(counts, totals, settings.min_count),
        "cooccurrence": cooccurrence(counts, totals, settings.min_count),
        "scores": None if lexicon is None else scores(outputs, lexicon, settings.seed),
        "examples": {group: [each.text for each in own[:3]] for group, own in outputs.items()},
    }


def word_tables(
    counts: Mapping[str, Mapping[str, int]], totals: Mapping[str, int], min_count: int
) -> dict[str, Any]:
    """Return for each group its words, those most tied to it first: {"words": ..., "absent": ...}.

    A group is compared with all others together. ``counts``: outputs of a group with a word;
    ``totals``: outputs of a group, one or more. Words in fewer than ``min_count`` outputs of all
    groups are left out.
    """
    words = _frequent(counts, min_count)
    if not words:
        absent = f"no word occurs in {min_count} or more outputs; sample more, or lower --min_count"
        return {"words": None, "absent": absent}
    table = {group: np.array([own.get(word, 0) for word in words]) for group, own in counts.items()}
    pooled = np.sum(list(table.values()), 0)
    everything = sum(totals.values())
    prior = statistics.pooled_prior(pooled, everything, len(table))
    tables = {}
    standing = 0
    for group, own in table.items():
        others = pooled - own
        rest = everything - totals[group]
        delta, z = statistics.log_odds(own, totals[group], others, rest, *prior)
        q = statistics.false_discovery(z)
        standing += int(((q < Q) & (z > 0)).sum())
        rows: list[dict[str, Any]] = [
            {
                "word": word,
                "count": int(own[i]),
                "share": own[i] / totals[group],
                "other_count": int(others[i]),
                "other_share": others[i] / rest,
                "log_odds": float(delta[i]),
                "z": float(z[i]),
                "q": float(q[i]),
            }
            for i, word in enumerate(words)
        ]
        tables[group] = sorted(rows, key=lambda row: (-row["z"], row["word"]))[:MOST_WORDS]
    return {"words": tables, "tested": len(words), "stand_out": standing, "absent": ""}


def cooccurrence(
    counts: Mapping[str, Mapping[str, int]], totals: Mapping[str, int], min_count: int
) -> list[dict[str, Any]]:
    """Return the words by falling count of all groups, with counts and shares of outputs by
    group."""
    return [
        {
            "word": word,
            "count": sum(own.get(word, 0) for own in counts.values()),
            "counts": {group: own.get(word, 0) for group, own in counts.items()},
            "shares": {group: own.get(word, 0) / totals[group] for group, own in counts.items()},
        }
        for word in _frequent(counts, min_count)[:MOST_WORDS]
    ]


def _frequent(counts: Mapping[str, Mapping[str, int]], min_count: int) -> list[str]:
    pooled: collections.Counter = collections.Counter()
    for own in counts.values():
        pooled.update(own)
    kept = [word for word, count in pooled.items() if count >= min_count]
    return sorted(kept, key=lambda word: (-pooled[word], word))


def scores(outputs: Mapping[str, Sequence[Output]], lexicon: Lexicon, seed: int) -> dict[str, Any]:
    """Return the mean score of the outputs of each group, and the differences between groups.

    The score of an output is the mean over its words of the lexicon; outputs without one are left
    out. Intervals resample the outputs.
    """
    vocabulary = Vocabulary(lexicon.scores)
    values: dict[str, list[float]] = {}
    for group, own in outputs.items():
        found = (vocabulary.occurring(each.text) for each in own)
        values[group] = [
            float(np.mean([lexicon.scores[word] for word in words])) for words in found if words
        ]
    everything = [value for own in values.values() for value in own]
    missing = [group for group, own in values.items() if not own]
    if missing:
        total = sum(map(len, outputs.values()))
        return {
            "absent": f"no word of {lexicon.name} occurs in the outputs about "
            f"{', '.join(missing)} ({total:,} outputs in all); sample more, or give a lexicon of "
            "words that this model writes",
            "scored": len(everything),
        }
    return {
        "absent": "",
        "scored": len(everything),
        "groups": {group: statistics.mean(own, seed) for group, own in values.items()},
        "overall": statistics.mean(everything, seed),
        "differences": differences(values, seed),
    }


def differences(values: Mapping[str, Sequence[float]], seed: int) -> list[dict[str, Any]]:
    """Return the difference of means of every two groups, the largest first."""
    groups = list(values)
    found = [
        {"group": one, "other": other, **statistics.difference(values[one], values[other], seed)}
        for number, one in enumerate(groups)
        for other in groups[number + 1 :]
    ]
    return sorted(found, key=lambda row: -abs(row["difference"]))
