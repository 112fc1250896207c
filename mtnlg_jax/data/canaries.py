"""Canaries: random secrets planted in training text, whose exposure a later audit measures.

A canary is a document of its own, such as "The access code of Ada Turner is 4821 7730." Its name
and digits are drawn at random, so a model knows them only from the text it was trained on (Carlini
2019, "The Secret Sharer", section 4). Canaries with 0 copies are controls: recorded, not planted.
canaries.json beside prepared.json records them all.
"""

import json
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mtnlg_jax import storage

CANARIES = "canaries.json"
DIGIT = "#"  # in a format: a random digit
FORMATS = {
    "en": "The access code of {name} is #### ####.",
    "zh": "{name}的门禁密码是#### ####。",
}
# More than this share of the training text would change what the model learns from the rest.
MOST_SHARE = 0.1
# Purposes of draws: each has random numbers of its own. A generator takes [seed, purpose] and
# [seed, purpose, 0] for the same seed.
_DRAW = 0x5EC
_PLACE = 0x91A
_ORDER = 0x0DE

_GIVEN = """
Ada Alan Amos Anna Boris Carla Cesar Clara Daria David Diego Edith Elena Emil Erik Esther Fiona
Flora Frank Greta Hanna Hector Helen Hugo Ingrid Irene Isaac Ivan Jonas Judith Julia Karl Laura
Leo Linus Louis Lydia Marco Maria Martin Milan Nadia Nina Nora Oliver Oscar Paula Peter Petra
Robert Rosa Ruth Samuel Sarah Simon Sofia Stella Thomas Vera Victor
""".split()
_FAMILY = """
Abbott Ackroyd Baker Barlow Bishop Brandt Carver Castle Cooper Dalton Dawson Draper Eaton Ellis
Fisher Foster Garner Gibson Grant Hadley Harper Hunter Irving Jensen Keller Kendall Lambert Lawson
Marsh Mercer Miller Morton Nash Newman Norris Osborn Palmer Parker Porter Quinn Ramsey Reyes
Rhodes Sawyer Shaw Slater Spencer Sutton Tanner Thorne Turner Vance Vaughn Wagner Walker Warner
Weaver Webster Winter Wright
""".split()
_SURNAMES = "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕"
_FIRST = "安柏晨丹恩帆光浩嘉静凯岚明宁培清瑞诗婷文"
_SECOND = "波川东芳国华杰康琳敏楠平琪然生涛伟希远哲"


@dataclass(frozen=True)
class CanaryConfig:
    """Which canaries to plant."""

    # Canaries for each number of copies; 0 plants none.
    count: int = 0
    # Numbers of copies. 0: controls, which are recorded and not planted.
    copies: tuple[int, ...] = (0, 1, 4, 16, 64)
    # Text with {name} for a random name and # for each random digit. Empty: the format of FORMATS
    # in the language of the text.
    format: str = ""


class Canary(NamedTuple):
    """A canary: ``text`` begins with ``prefix`` and ``secret``, and stands ``copies`` times in the
    training text. ``space``: the number of secrets that were equally likely."""

    prefix: str
    secret: str
    text: str
    copies: int
    format: str
    space: int
    source: str = ""  # of a recipe's sources, the one that has it


def check(config: CanaryConfig) -> None:
    """Raise ValueError if the settings make no canaries."""
    if config.count < 0:
        raise ValueError(f"canaries={config.count} must be 0 or more for each number of copies")
    if not config.copies or any(number < 0 for number in config.copies):
        raise ValueError(
            f"canary_copies={_listed(config.copies)} must hold numbers of 0 or more, such as "
            "0,1,4,16,64"
        )
    if len(set(config.copies)) < len(config.copies):
        raise ValueError(
            f"canary_copies={_listed(config.copies)} holds a number twice; give each once"
        )
    if config.format:
        check_format(config.format)
    for form in [config.format] if config.format else FORMATS.values():
        most = len(_names(form))
        if (wanted := config.count * len(config.copies)) > most:
            raise ValueError(
                f"canaries={config.count} makes {wanted:,} canaries for "
                f"{len(config.copies)} numbers of copies, and there are {most:,} names; lower "
                "--canaries, or give fewer --canary_copies"
            )


def check_format(form: str) -> None:
    """Raise ValueError if ``form`` is not a format of canaries."""
    why = None
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(form) if name is not None]
    except ValueError as error:
        fields = []
        why = str(error)
    if fields != ["name"]:
        why = why or "it must hold {name} once, so that each canary has a prefix of its own"
    elif DIGIT not in form:
        why = "it holds no #, the place of a random digit"
    elif form.index(DIGIT) < form.index("{name}"):
        why = "its digits must follow {name}, the prefix behind which they are ranked"
    if why:
        raise ValueError(
            f"canary_format={form!r}: {why}; write it like 'The access code of {{name}} is "
            "#### ####.'"
        )


def language_of(chinese: int, letters: int) -> str:
    """Return "zh" or "en" for a text with that many Chinese characters among its letters."""
    return "zh" if chinese > 0.3 * letters else "en"


def count_letters(texts: Iterable[str]) -> tuple[int, int]:
    """Return the number of Chinese characters and of all letters, for `language_of`."""
    chinese = 0
    letters = 0
    for text in texts:
        chinese += len(re.findall("[\u4e00-\u9fff]", text))
        letters += sum(map(str.isalpha, text))
    return chinese, letters


def make_canaries(
    config: CanaryConfig, seed: int, languages: dict[str, str], shares: Sequence[float] = (1.0,)
) -> list[Canary]:
    """Draw ``config.count`` canaries for each number of copies.

    Args:
      languages: "en" or "zh" of each source, by name; the name is "" where there is one source.
      shares: of each source, the share of the canaries that it gets.
    """
    rng = np.random.default_rng([abs(seed), _DRAW])
    weights = np.asarray(shares, float)
    sources = rng.choice(len(languages), config.count * len(config.copies), p=weights)
    named = list(languages.items())
    orders = {form: iter(rng.permutation(_names(form))) for form in _formats(config, languages)}
    found = []
    for number, at in enumerate(sources):
        source, language = named[at]
        form = config.format or FORMATS[language]
        pattern = pattern_of(form)
        prefix, _, rest = form.format(name=next(orders[form])).partition(pattern)
        (secret,) = secrets(pattern, 1, rng)
        copies = config.copies[number // config.count]
        text = prefix + secret + rest
        found.append(Canary(prefix, secret, text, copies, form, 10 ** pattern.count(DIGIT), source))
    return found


def _formats(config: CanaryConfig, languages: dict[str, str]) -> list[str]:
    found = [config.format or FORMATS[language] for language in languages.values()]
    return list(dict.fromkeys(found))


def pattern_of(form: str) -> str:
    """Return the part of a format that is random: from its first # to its last."""
    return form[form.index(DIGIT) : form.rindex(DIGIT) + 1]


def secrets(pattern: str, count: int, rng: np.random.Generator) -> list[str]:
    """Return ``count`` independent random secrets of ``pattern``."""
    digits = rng.integers(0, 10, (count, pattern.count(DIGIT)))
    parts = pattern.split(DIGIT)
    return [
        "".join(part + str(digit) for part, digit in zip(parts, row, strict=False)) + parts[-1]
        for row in digits.tolist()
    ]


def all_secrets(pattern: str) -> list[str]:
    """Return every secret of ``pattern``."""
    width = pattern.count(DIGIT)
    parts = pattern.split(DIGIT)
    return [
        "".join(part + digit for part, digit in zip(parts, f"{n:0{width}d}", strict=False))
        + parts[-1]
        for n in range(10**width)
    ]


def _names(form: str) -> list[str]:
    """Return the names for a format: Chinese ones if it has Chinese characters."""
    if re.search("[\u4e00-\u9fff]", form):
        return [a + b + c for a in _SURNAMES for b in _FIRST for c in _SECOND]
    return [f"{given} {family}" for given in _GIVEN for family in _FAMILY]


def check_size(canaries: Sequence[Canary], size: int) -> None:
    """Raise ValueError if the copies are more than MOST_SHARE of ``size`` bytes of training
    text."""
    documents, planted = planted_size(canaries)
    if planted > MOST_SHARE * size:
        raise ValueError(
            f"canaries: {documents:,} copies of {planted:,} bytes are {planted / max(1, size):.0%} "
            f"of {size:,} bytes of text, and at most {MOST_SHARE:.0%} may be planted; lower "
            "--canaries or --canary_copies, or give more text"
        )


def planted_size(canaries: Iterable[Canary]) -> tuple[int, int]:
    """Return the number of documents that are planted, and their bytes."""
    sizes = [(each.copies, each.copies * len(each.text.encode())) for each in canaries]
    return sum(count for count, _ in sizes), sum(size for _, size in sizes)


def places(count: int, documents: int, seed: int, part: int = 0) -> list[int]:
    """Return, in ascending order, before which of ``documents`` documents each copy goes;
    ``documents`` itself stands for the end. ``part`` draws other places."""
    rng = np.random.default_rng([abs(seed), _PLACE, part])
    return np.sort(rng.integers(0, documents + 1, count)).tolist()


def interleaved[T](items: Iterable[T], more: Iterable[T], places: Sequence[int]) -> Iterator[T]:
    """Yield ``items`` with each of ``more`` before the item at its place; ``places`` ascend."""
    waiting = iter(zip(more, places, strict=True))
    each = next(waiting, None)
    for number, item in enumerate(items):
        while each is not None and each[1] <= number:
            yield each[0]
            each = next(waiting, None)
        yield item
    if each is not None:
        yield each[0]
    yield from (item for item, _ in waiting)


def shuffled_copies(canaries: Iterable[Canary], seed: int) -> list[str]:
    """Return the text of every copy, in random order."""
    texts = [each.text for each in canaries for _ in range(each.copies)]
    rng = np.random.default_rng([abs(seed), _ORDER])
    return [texts[at] for at in rng.permutation(len(texts))]


def summary(canaries: Sequence[Canary]) -> dict[str, Any]:
    """Return what prepared.json and report.json record of the canaries."""
    documents, size = planted_size(canaries)
    copies = sorted({each.copies for each in canaries})
    return {
        "canaries": {str(n): sum(each.copies == n for each in canaries) for n in copies},
        "documents": documents,
        "bytes": size,
        "formats": sorted({each.format for each in canaries}),
    }


def canaries_file(canaries: Iterable[Canary], seed: int) -> bytes:
    """Return the content of canaries.json."""
    rows = []
    for each in canaries:
        row = each._asdict()
        if not each.source:
            del row["source"]
        rows.append(row)
    content = {"canaries": rows, "seed": seed}
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def read_canaries(location: str, name: str = CANARIES) -> list[Canary] | None:
    """Return the canaries of a prepared folder; None if it has none. Raise ValueError if the file
    is damaged."""
    content = storage.read_file(location, name)
    if content is None:
        return None
    try:
        found = [Canary(**row) for row in json.loads(content)["canaries"]]
        for each in found:
            check_format(each.format)
            if not each.text.startswith(each.prefix + each.secret) or each.copies < 0:
                raise ValueError(f"the canary {each.text!r} does not hold its secret")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{storage.join(location, name)} is damaged: {error}; prepare the data again with "
            "--canaries"
        ) from None
    return found


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))
