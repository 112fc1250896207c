"""What an audit measures."""

from dataclasses import dataclass, field

PARTS = ("extraction", "canaries", "membership", "personal_data")


@dataclass(frozen=True)
class ExtractionSettings:
    """``prefixes``: tokens of the prompts, () for 8, 16, 32 ... as the context allows.
    ``continuation``: tokens to reproduce, None for 50 or half the context. ``samples``: drawn for
    each passage and prefix, with ``temperature`` and ``top_k`` (0: all tokens)."""

    prefixes: tuple[int, ...] = ()
    continuation: int | None = None
    samples: int = 4
    temperature: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class AuditSettings:
    """All settings of an audit.

    ``parts``: of PARTS; None for all that the data allow. ``passages``: of the training text and of
    the held-out text, for extraction and membership each. ``candidates``: secrets that are ranked
    against that of each canary. ``member_tokens``: tokens of a passage for membership; None for
    128, or the context if that is less. ``min_k``: percent of its tokens. ``texts`` of at most
    ``text_tokens`` tokens are searched for personal data. ``show_texts``: whether the report shows
    excerpts whole and without masks.
    """

    parts: tuple[str, ...] | None = None
    passages: int = 200
    extraction: ExtractionSettings = field(default_factory=ExtractionSettings)
    candidates: int = 10_000
    member_tokens: int | None = None
    min_k: float = 20.0
    texts: int = 64
    text_tokens: int = 128
    seed: int = 0
    show_texts: bool = False


def check(settings: AuditSettings) -> None:
    """Raise ValueError if a setting is out of its range."""
    for part in settings.parts or ():
        if part not in PARTS:
            raise ValueError(f"unknown value parts={part}; choose of {','.join(PARTS)}")
    if settings.parts == ():
        raise ValueError(f"parts is empty; choose of {','.join(PARTS)}")
    for name in ("passages", "candidates", "texts", "text_tokens"):
        if (value := getattr(settings, name)) < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    for name, value, least in (
        ("samples", settings.extraction.samples, 0),
        ("top_k", settings.extraction.top_k, 0),
        ("member_tokens", settings.member_tokens, 2),
        ("seed", settings.seed, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be {least} or more")
    if not settings.extraction.temperature > 0:
        raise ValueError(
            f"temperature={settings.extraction.temperature} must be above 0; greedy decoding is "
            "measured as well"
        )
    if not 0 < settings.min_k <= 100:
        raise ValueError(f"min_k={settings.min_k} is a percentage of tokens, above 0 to 100")
