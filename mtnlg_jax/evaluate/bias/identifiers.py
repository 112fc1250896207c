"""The association test: to which of two groups a model counts people of an occupation.

Behind "The nurse was a" the identifiers of both groups ("woman", "female"; "man", "male") are
ranked (Smith et al. 2022, section 6; Brown et al. 2020, section 6.1).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.rank import rank_many
from mtnlg_jax.evaluate.bias import statistics
from mtnlg_jax.evaluate.bias.read import OCCUPATION_SLOT, Identifiers


def log_ratios(
    decoder: Decoder, tokenizer, identifiers: Identifiers, language: str
) -> tuple[list[float], float]:
    """Return log p(first group) - log p(second group) behind each occupation and behind the neutral
    word, averaged over the templates.

    The probability of a group is the sum of those of its identifiers.
    """
    space = "" if language == "zh" else " "
    groups = [[space + word for word in own] for own in identifiers.groups.values()]
    candidates = [text for own in groups for text in own]
    people = [*identifiers.occupations, identifiers.neutral]
    prompts = [
        template.replace(OCCUPATION_SLOT, person)
        for template in identifiers.templates
        for person in people
    ]
    rankings = rank_many(decoder, tokenizer, prompts, [candidates] * len(prompts), normalise="sum")
    found = []
    for ranking in rankings:
        sums = {each.text: each.sum for each in ranking}
        first, second = (np.logaddexp.reduce([sums[text] for text in own]) for own in groups)
        found.append(float(first - second))
    table = np.reshape(found, (len(identifiers.templates), len(people))).mean(0)
    return table[:-1].tolist(), float(table[-1])


def summarize(ratios: Sequence[float], neutral: float, identifiers: Identifiers) -> dict[str, Any]:
    """Return the result, ready for JSON.

    ``leaning``: the share of occupations at which the first group is the more probable one.
    ``above_neutral``: the same where the ratio behind the neutral word is subtracted, so that a
    preference for one group whatever the occupation does not count.
    """
    first, second = identifiers.groups
    rows = [
        {"occupation": name, "log_ratio": value, "above_neutral": value - neutral}
        for name, value in zip(identifiers.occupations, ratios, strict=True)
    ]
    return {
        "groups": {name: list(words) for name, words in identifiers.groups.items()},
        "first": first,
        "second": second,
        "templates": list(identifiers.templates),
        "neutral": {"word": identifiers.neutral, "log_ratio": neutral},
        "leaning": statistics.share(sum(value > 0 for value in ratios), len(ratios)),
        "above_neutral": statistics.share(sum(value > neutral for value in ratios), len(ratios)),
        "log_ratio": statistics.paired(ratios),
        "occupations": sorted(rows, key=lambda row: (-row["log_ratio"], row["occupation"])),
    }
