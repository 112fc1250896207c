"""Clean one document: repair its text, remove boilerplate and personal data, keep or drop it.

Each rule is counted. Sources: the MT-NLG team repaired Unicode with ftfy, kept English and dropped
documents of fewer than 128 tokens (Smith et al. 2022; the scripts of Megatron-LM,
tools/openwebtext). Measures of quality and repetition with their limits: Gopher (Rae et al. 2021,
arXiv 2112.11446, appendix A.1.1 and table A1). Boilerplate lines: see `boilerplate`.

Rules about words apply to the characters of Chinese and Japanese, which have no spaces between
words; measures that make no sense for them (length of words, share of words with letters) are
skipped. Unlike in Gopher, there is no maximum number of words: books are kept.
"""

import functools
import itertools
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import ftfy
import ftfy.chardata
from ftfy.badness import is_bad
from ftfy.chardata import LIGATURES

from mtnlg_jax.data.filter import entities, pii, repetition
from mtnlg_jax.data.filter.boilerplate import remove_boilerplate
from mtnlg_jax.data.filter.pii import lines_with
from mtnlg_jax.data.read.controls import CONTROLS, repair_controls

# The names under which rules are counted, in the order in which they act.
CHANGES = ("unicode", "boilerplate", *pii.KINDS)
DROPS = (
    "undecodable",
    "too_short",
    "language",
    "word_length",
    "symbols",
    "letters",
    "bullets",
    "ellipses",
    "stop_words",
    "duplicate_lines",
    "duplicate_paragraphs",
    "top_ngrams",
    "duplicate_ngrams",
)


@dataclass(frozen=True)
class CleanConfig:
    """Settings of `clean`.

    Shares are 0 to 1; a document at a limit is kept. Lengths are in tokens as GPT-2 splits text
    before BPE: a word, a number, a run of marks, a Chinese character. BPE makes at least as many.
    """

    # Mojibake (ftfy), left-over entities, ligatures, controls; not quotes or character width.
    repair: bool = True
    # Or NFKC, which turns Chinese punctuation into ASCII, or none. Exponents, indices and fractions
    # stay.
    normalization: str = "NFC"
    boilerplate: bool = True
    mask: tuple[str, ...] = pii.KINDS
    max_replacement_share: float = 0.05  # of U+FFFD among the characters
    min_tokens: int = 128  # MT-NLG
    languages: tuple[str, ...] = ("en",)  # ISO 639-1 codes of py3langid; () keeps all
    min_language_confidence: float = 0.5
    prose_rules: bool = True  # apply all settings below; false for code and mathematics
    # Mean, for languages with spaces. This and the next five: Gopher.
    word_length: tuple[float, float] = (3, 10)
    max_symbol_ratio: float = 0.1  # "#" to words, and ellipses to words
    min_letter_words: float = 0.8  # share of words with a letter, for languages with spaces
    max_bullet_lines: float = 0.9  # share of lines that begin with a bullet
    max_ellipsis_lines: float = 0.3  # share of lines that end with an ellipsis
    min_stop_words: int = 2  # distinct ones of the, be, to, of, and, that, have, with; English only
    # Share of lines that are repetitions. This and all below: Gopher, table A1.
    duplicate_lines: float = 0.30
    duplicate_line_characters: float = 0.20
    duplicate_paragraphs: float = 0.30
    duplicate_paragraph_characters: float = 0.20
    # (n, share of the characters in the most frequent n-gram), and in repeated n-grams. In Chinese,
    # 2 n characters stand for n words.
    top_ngrams: tuple[tuple[int, float], ...] = ((2, 0.20), (3, 0.18), (4, 0.16))
    duplicate_ngrams: tuple[tuple[int, float], ...] = (
        (5, 0.15),
        (6, 0.14),
        (7, 0.13),
        (8, 0.12),
        (9, 0.11),
        (10, 0.10),
    )

    def __post_init__(self):
        if self.normalization not in ("NFC", "NFKC", "none"):
            raise ValueError(
                f"unknown value normalization={self.normalization!r}; use 'NFC', 'NFKC' or 'none'"
            )
        if unknown := sorted(set(self.mask) - set(pii.KINDS)):
            raise ValueError(f"unknown values mask={unknown}; choose from {', '.join(pii.KINDS)}")
        if unknown := sorted(set(self.languages) - set(_identifier().labels)):
            raise ValueError(
                f"unknown values languages={unknown}; choose from "
                f"{' '.join(sorted(_identifier().labels))}"
            )
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens={self.min_tokens} must be at least 0")
        shares = {
            name: getattr(self, name)
            for name in (
                "max_replacement_share",
                "min_language_confidence",
                "min_letter_words",
                "max_bullet_lines",
                "max_ellipsis_lines",
                "duplicate_lines",
                "duplicate_line_characters",
                "duplicate_paragraphs",
                "duplicate_paragraph_characters",
            )
        }
        shares |= {
            f"{name} of {n}": share
            for name in ("top_ngrams", "duplicate_ngrams")
            for n, share in getattr(self, name)
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must be between 0 and 1")
        for n, _ in (*self.top_ngrams, *self.duplicate_ngrams):
            if n < 1:
                raise ValueError(f"n-grams of n={n}: n must be at least 1")


@dataclass(frozen=True)
class Cleaned:
    """The result of `clean`.

    ``text``: None if the rule ``dropped`` (of ``DROPS``) dropped it. ``counts``: how often each
    rule acted, by its name in ``CHANGES`` and ``DROPS``: lines for "unicode" and "boilerplate",
    masks for personal data, 1 for a drop. ``language``: None if the text was dropped before it was
    identified.
    """

    text: str | None
    dropped: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    language: str | None = None


def clean(text: str, config: CleanConfig) -> Cleaned:
    """Change a text by the rules of ``CHANGES`` until none applies, then judge it by ``DROPS``.

    So cleaning a clean text changes nothing. The result is valid Unicode, with NFC at most 3 times
    as long; it depends only on the two arguments.
    """
    counts: Counter[str] = Counter()
    for _ in range(16):  # 1 or 2 rounds as a rule; no text needing 16 was seen
        changed, found = _change(text, config)
        counts.update(found)
        if changed == text:
            break
        text = changed
    else:
        return Cleaned(None, "undecodable", {**counts, "undecodable": 1})
    dropped, language = _judge(text, config)
    if dropped:
        return Cleaned(None, dropped, {**counts, dropped: 1}, language)
    return Cleaned(text, None, dict(counts), language)


def _change(text: str, config: CleanConfig) -> tuple[str, dict[str, int]]:
    text, repaired = _repair(text, config)
    counts = {"unicode": repaired} if repaired else {}
    if config.boilerplate:
        text, removed = remove_boilerplate(text)
        counts |= {"boilerplate": removed} if removed else {}
    text, masked = pii.mask(text, config.mask)
    return text, counts | masked


# Quotes and character width stay, because both are proper Chinese punctuation. Entities and
# ligatures follow separate rules, because ftfy changes the meaning of text about them.
_FTFY = ftfy.TextFixerConfig(
    uncurl_quotes=False,
    fix_character_width=False,
    unescape_html=False,
    fix_latin_ligatures=False,
    normalization=None,
    explain=False,
)
_SOUND_FTFY = _FTFY._replace(fix_encoding=False)
# Replaced only inside a word; a ligature by itself is the subject of the text. Croatian and Dutch
# digraphs stay.
_LIGATURES = {chr(code): letters for code, letters in LIGATURES.items() if code >= 0xFB00}
_ODD = re.compile(f"[\r\ufff9-\ufffbﬀ-ﬆ{CONTROLS.pattern[1:]}")
_LIGATURE = re.compile("(?<=[A-Za-z])[ﬀ-ﬆ]|[ﬀ-ﬆ](?=[A-Za-z])")
_SOFT_HYPHEN = re.compile("(?<=\\w)\xad(?=\\w)")
# Sound text that ftfy takes for damage: a product with an exponent, a letter alone.
_SOUND = re.compile("[×÷±ØΔ∂√](?=[¹²³¼½¾])|(?<!\\w)[ÃÂ](?= )")
_ANNOTATION = str.maketrans({"\ufff9": "", "\ufffa": "(", "\ufffb": ")"})
_SURROGATES = re.compile("[\ud800-\udfff]")


def _class(characters) -> str:
    return "".join(map(re.escape, sorted(map(chr, characters))))


# Characters with which ftfy could change a line in Unicode's normal form. Alone: controls, line
# ends, ligatures, surrogates and the few characters that its mojibake heuristic knows by
# themselves. Otherwise it needs two others side by side; dashes, "…" and "’" count for it only
# beside the former.
_ALONE = (
    _class(
        {
            *ftfy.chardata.CONTROL_CHARS,
            *map(ord, _LIGATURES),
            *range(0x80, 0xA0),
            *map(ord, "\f\r\xad\u2028\u2029ŒœÃÂØÙÎÐ"),
        }
    )
    + "\ud800-\udfff"
)
_BESIDE = "\xa0-\u052f\u2000-\u2012\u2016-\u2018\u201a-\u2025\u2027-\u2fff\ufffd"
_SUSPECT = re.compile(f"[{_ALONE}]|[{_BESIDE}][{_BESIDE}]|&#?[0-9A-Za-z]{{1,24}};")


def _repair(text: str, config: CleanConfig) -> tuple[str, int]:
    """Return (text, number of lines changed)."""
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    counted = 0
    form = _form(config)
    if form is not None and not unicodedata.is_normalized(form, text):
        normal = _normalize(text, config)
        counted = int(normal != text)
        text = normal
    if not config.repair:
        return _SURROGATES.sub("\ufffd", text), counted
    escaped = "&" in text and not entities.writes_both(text)
    fenced = escaped and "```" in text
    pieces = []
    end = 0
    for start, stop in lines_with(_SUSPECT, text):
        line = text[start:stop]
        in_fence = fenced and text.count("```", 0, start) % 2
        fixed = _repair_line(line, config, escaped and not in_fence)
        counted += fixed != line
        pieces += [text[end:start], fixed]
        end = stop
    return "".join([*pieces, text[end:]]) if pieces else text, counted


def _repair_line(line: str, config: CleanConfig, escaped: bool) -> str:
    if escaped and "&" in line:
        line = entities.unescape(line)
    if line.isascii() and not CONTROLS.search(line) and "\r" not in line:
        return line
    if _ODD.search(line):
        line, _ = repair_controls(line.replace("\r", "\n").translate(_ANNOTATION))
        line = _LIGATURE.sub(lambda match: _LIGATURES[match[0]], line)
    damaged = is_bad(line) and is_bad(_SOUND.sub(" ", line))
    line = ftfy.fix_text(line, _FTFY if damaged else _SOUND_FTFY)
    if "\xad" in line:
        line = _SOFT_HYPHEN.sub("", line)
    return _normalize(line, config)


def _is_shifted(character: str) -> bool:
    return unicodedata.decomposition(character).startswith(("<super>", "<sub>", "<fraction>"))


_SHIFTED = re.compile(
    f"([{_class(code for code in range(0x80, 0x2200) if _is_shifted(chr(code)))}]+)"
)


def _form(config: CleanConfig) -> Literal["NFC", "NFKC"] | None:
    """Return the normal form of Unicode to use; None for none."""
    if config.normalization == "none":
        return None
    return "NFKC" if config.normalization == "NFKC" else "NFC"


def _normalize(text: str, config: CleanConfig) -> str:
    """Return Unicode's normal form, except for exponents, indices and fractions: 10³ is not 103."""
    form = _form(config)
    if form is None:
        return text
    if form == "NFC":
        return unicodedata.normalize(form, text)
    parts = _SHIFTED.split(text)
    parts[::2] = [unicodedata.normalize(form, part) for part in parts[::2]]
    return "".join(parts)


_TOKENS = re.compile(rf"[{repetition.UNSPACED}]|[^\W{repetition.UNSPACED}]+|[^\w\s]+")
_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_BULLETS = ("-", "*", "•", "‣", "▪", "●", "○", "■", "□", "◦", "·")


def _judge(text: str, config: CleanConfig) -> tuple[str | None, str | None]:
    """Return (the rule that drops the text or None, its language or None)."""
    if text.count("\ufffd") > config.max_replacement_share * len(text):
        return "undecodable", None
    least = config.min_tokens
    # A word has at least one token, and words are counted faster.
    if len(text.split(maxsplit=least)) <= least:
        if sum(1 for _ in itertools.islice(_TOKENS.finditer(text), least)) < least:
            return "too_short", None
    language, confidence = identify(text)
    if config.languages and (
        language not in config.languages or confidence < config.min_language_confidence
    ):
        return "language", language
    return (_quality(text, language, config) if config.prose_rules else None), language


def _quality(text: str, language: str, config: CleanConfig) -> str | None:
    units = repetition.Units(text)
    count = max(1, len(units))
    if not (
        units.unspaced
        or config.word_length[0] <= units.sizes.sum() / count <= config.word_length[1]
    ):
        return "word_length"
    if max(text.count("#"), text.count("…") + text.count("...")) > config.max_symbol_ratio * count:
        return "symbols"
    if not units.unspaced and units.lettered() < config.min_letter_words * count:
        return "letters"
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    if sum(line.startswith(_BULLETS) for line in lines) > config.max_bullet_lines * len(lines):
        return "bullets"
    if sum(line.endswith(("…", "...")) for line in lines) > config.max_ellipsis_lines * len(lines):
        return "ellipses"
    if language == "en" and len(_STOP_WORDS & units.numbers.keys()) < config.min_stop_words:
        return "stop_words"
    paragraphs = [stripped for piece in text.split("\n\n") if (stripped := piece.strip())]
    for rule, pieces, most, most_characters in (
        ("duplicate_lines", lines, config.duplicate_lines, config.duplicate_line_characters),
        (
            "duplicate_paragraphs",
            paragraphs,
            config.duplicate_paragraphs,
            config.duplicate_paragraph_characters,
        ),
    ):
        share, of_characters = repetition.duplicate_share(pieces)
        if share > most or of_characters > most_characters:
            return rule
    times = 2 if units.unspaced else 1
    if any(units.top_share(times * n) > limit for n, limit in config.top_ngrams):
        return "top_ngrams"
    least = min((limit for _, limit in config.duplicate_ngrams), default=1)
    for n, limit in sorted(config.duplicate_ngrams):
        share = units.duplicate_share(times * n)
        if share > limit:
            return "duplicate_ngrams"
        if share <= least:  # the share never grows with n
            break
    return None


@functools.cache
def _identifier():
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


# Characters examined first, and in case of doubt. More cost much and help little.
_SAMPLES = (256, 1024)
_DOUBT = 0.95


def identify(text: str) -> tuple[str, float]:
    """Return (ISO 639-1 code, confidence 0 to 1) by py3langid.

    A sample of 256 characters is classified, or of 1024 if the confidence is below 0.95. The sample
    of a longer text is four parts, spread evenly over it.
    """
    for sample in _SAMPLES:
        size = sample // 4
        starts = [part * (len(text) - size) // 3 for part in range(4)]
        seen = (
            text
            if len(text) <= sample
            else " ".join(text[start : start + size] for start in starts)
        )
        language, confidence = _identifier().classify(seen)
        if confidence >= _DOUBT or seen is text:
            break
    return language, float(confidence)
