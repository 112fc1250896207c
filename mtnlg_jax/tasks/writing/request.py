"""What the writer is asked for, and what it gives back."""

from dataclasses import dataclass, field

from mtnlg_jax.config import DecodeConfig, validate_decode
from mtnlg_jax.tasks.profile import SHARE, Entry, Profile
from mtnlg_jax.tasks.writing.kinds import frame_of, kind_of
from mtnlg_jax.tasks.writing.prompts import PIECE, Composer
from mtnlg_jax.tasks.writing.scores import WEIGHTS, check_weights

# Sampled like --task=continue: the likeliest text of an open end repeats itself (Holtzman 2020).
DECODE = DecodeConfig(temperature=0.8, top_p=0.95)


@dataclass(frozen=True)
class Request:
    """What to write, and how."""

    kind: str
    topic: str
    words: int  # of the text without headings; in Chinese, characters
    language: str  # a key of `kinds.FRAMES`
    headings: tuple[str, ...] = ()  # empty: the model writes an outline
    candidates: int = 4  # of each piece, and of the outline
    weights: dict[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    decode: DecodeConfig = DECODE  # of pieces and headings; its lengths and stops are added to
    piece: int | None = None  # most tokens of a piece; None: half of the context, at most PIECE
    profile: tuple[Entry, ...] = ()  # of a person; every prompt shows what fits the topic
    profile_share: float = SHARE  # of a prompt that the profile may take


@dataclass(frozen=True)
class Section:
    heading: str
    words: int
    pieces: int
    text: str


@dataclass(frozen=True)
class Document:
    """What was written."""

    text: str
    headings: tuple[str, ...]
    sections: tuple[Section, ...]
    words: int
    calls: int  # of the model: batches that were generated or scored
    tokens_written: int  # of all candidates, outlines and summaries
    tokens_scored: int  # of the rows that ranking read
    summary: str  # the last one
    facts: tuple[str, ...]
    seconds: float  # of this call, which may have continued a record


def check_request(request: Request) -> None:
    """Raise ValueError on a request that is wrong whatever the model is."""
    kind_of(request.kind)
    frame_of(request.language)
    check_weights(request.weights)
    if not request.topic.strip():
        raise ValueError("the topic is empty; say what to write about, as with --input=FILE")
    for name in ("words", "candidates"):
        if getattr(request, name) < 1:
            raise ValueError(f"{name}={getattr(request, name)}; give 1 or more")
    decode = request.decode
    validate_decode(decode)
    if decode.num_beams > 1:
        raise ValueError(
            f"num_beams={decode.num_beams}, but the candidates of a piece are drawn one by one; "
            "set num_beams=1"
        )
    if decode.num_return_sequences > 1:
        raise ValueError(
            f"num_return_sequences={decode.num_return_sequences}; give the number of candidates "
            "of a piece with --candidates"
        )
    if decode.temperature == 0 and request.candidates > 1:
        raise ValueError(
            f"temperature=0 makes all {request.candidates} candidates of a piece the same; give "
            "--candidates=1, or a temperature above 0"
        )


def composer_of(request: Request, tokenizer, context: int) -> Composer:
    """Return what makes the prompts of a request for a model of ``context`` positions.

    Raises ValueError if a heading, or any heading, leaves a prompt no room, or if an entry of the
    profile exceeds its share.
    """
    topic = request.topic.strip()
    piece = request.piece or min(PIECE, context // 2)
    composer = Composer(
        tokenizer,
        context,
        kind_of(request.kind),
        request.language,
        topic,
        piece,
        _profile_text(request, tokenizer, context - piece),
    )
    composer.check(request.headings)
    return composer


def _profile_text(request: Request, tokenizer, room: int) -> str:
    """Return what prompts of ``room`` tokens show of the profile."""
    if not request.profile:
        return ""
    profile = Profile(request.profile, request.profile_share)
    profile.check(tokenizer, room, request.language, "what a piece leaves of the context,")
    limit = int(profile.share * room)
    shown = profile.choose(request.topic, request.language, tokenizer, limit)
    return profile.text(shown, request.language)
