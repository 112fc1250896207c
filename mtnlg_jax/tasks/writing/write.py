"""Write a text of any length: an outline, then section by section in ranked pieces.

A piece is at most half of the model's context. Its candidates are one batch behind one prompt
(`prompts`), and their score is a weighted sum of parts (`scores`). After each piece the model
refreshes its summary of the text. Every decision can be kept in a `record.Record`.
"""

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.batched_settings import check_tokens
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.results import Generated
from mtnlg_jax.tasks.text import clean
from mtnlg_jax.tasks.writing.facts import find_facts
from mtnlg_jax.tasks.writing.kinds import kind_of
from mtnlg_jax.tasks.writing.outline import sections_for, write_outline
from mtnlg_jax.tasks.writing.prompts import Composer, Memory
from mtnlg_jax.tasks.writing.record import Record
from mtnlg_jax.tasks.writing.request import (
    Document,
    Request,
    Section,
    check_request,
    composer_of,
)
from mtnlg_jax.tasks.writing.scores import History, Scorer, Target, as_record, best_of
from mtnlg_jax.tasks.writing.text import (
    begins_sentence,
    count_words,
    end_near,
    ends_sentence,
    sentence_ends,
    settled,
    tidy,
    whole_words,
)

# The last piece of a section may have this many times the words asked for, to end at a sentence.
REACH = 1.3
# A section ends when this part of its words or less is left.
LEFT = 0.1


def write(
    decoder: Decoder,
    tokenizer,
    request: Request,
    *,
    record: Record | None = None,
    on_text: Callable[[str], None] | None = None,
    on_words: Callable[[int], None] = lambda words: None,
) -> Document:
    """Write a text, and return it with what was done.

    Args:
      record: decisions made before, which are not made again, and where new ones go.
      on_text: called with each part of the text, in order: tokens of a single candidate as they
        are written, otherwise pieces when they are chosen.
      on_words: called with the number of words so far after each piece.

    Raises:
      ValueError: the request does not fit the model; raised before the model does any work, except
        for a heading that the model wrote.
    """
    check_request(request)
    check_tokens(request.decode, decoder.config.vocabulary)
    composer = composer_of(request, tokenizer, decoder.context)
    return _Writer(decoder, composer, request, record or Record([]), on_text, on_words).run()


class _Writer:
    """The state of a text that is being written. It follows from the decisions alone."""

    def __init__(self, decoder, composer, request, record, on_text, on_words) -> None:
        self.decoder: Decoder = decoder
        self.composer: Composer = composer
        self.request: Request = request
        self.record: Record = record
        self.on_text: Callable[[str], None] | None = on_text
        self.on_words: Callable[[int], None] = on_words
        self.scorer = Scorer(decoder, composer.tokenizer, request.weights)
        self.history = History()
        self.headings: tuple[str, ...] = ()
        self.texts: list[str] = []  # of the sections begun
        self.pieces: list[int] = []  # of each section
        self.summary = ""
        self.facts = find_facts(request.topic, request.language)
        self.kept = [0, 0]  # tokens and words of the pieces chosen
        self.calls = 0
        self.written = 0
        self.scored = 0
        self.shown = ""
        self.checked = False

    def run(self) -> Document:
        begin = time.monotonic()
        self.headings = self.request.headings or tuple(
            self.decide("outline", self.new_outline)["headings"]
        )
        self.composer.check(self.headings)
        for number in range(1, len(self.headings) + 1):
            self.section(number)
        self.show(self.render())
        self.check_shown()
        sections = tuple(
            Section(heading, count_words(text), pieces, text)
            for heading, text, pieces in zip(self.headings, self.texts, self.pieces, strict=True)
        )
        document = Document(
            self.render() + "\n",
            self.headings,
            sections,
            self.words,
            self.calls,
            self.written,
            self.scored,
            self.summary,
            self.facts,
            round(time.monotonic() - begin, 3),
        )
        self.record.show(document.text)
        self.record.add({"type": "end", "words": document.words})
        return document

    @property
    def words(self) -> int:
        return sum(map(count_words, self.texts))

    def section(self, number: int) -> None:
        """Write section ``number``: its share of the words that are left, in pieces of one size."""
        self.texts.append("")
        self.pieces.append(0)
        target = max(1, (self.request.words - self.words) / (len(self.headings) - number + 1))
        while True:
            left = target - count_words(self.texts[-1])
            if self.pieces[-1] and left <= LEFT * target:
                return
            piece = self.decide("piece", functools.partial(self.new_piece, number, left))
            if piece["chosen"] is None:
                return
            self.add(piece["candidates"][piece["chosen"]])
            left = target - count_words(self.texts[-1])
            # The last piece of all needs no memory.
            if number < len(self.headings) or left > LEFT * target:
                memory = self.decide("memory", self.new_memory)
                self.summary = memory["summary"]
                self.facts = tuple(memory["facts"])

    def add(self, candidate: dict) -> None:
        """Append the chosen candidate of a piece to the text."""
        text = candidate["text"]
        self.texts[-1] += text
        self.pieces[-1] += 1
        self.history.add(text)
        self.kept[0] += candidate["tokens"]
        self.kept[1] += count_words(text)
        self.show(self.render())
        if not self.record.replays:
            self.check_shown()
            self.record.show(self.render() + "\n")
        self.on_words(self.words)

    def decide(self, kind: str, make: Callable[[], dict]) -> dict:
        """Return the next decision: the one of the record, or a new one."""
        if self.record.replays:
            decision = self.record.next(kind)
        else:
            self.check_shown()
            decision = {"type": kind, **make()}
            self.record.add(decision)
        self.calls += decision["calls"]
        self.written += decision["written"]
        self.scored += decision["scored"]
        return decision

    def check_shown(self) -> None:
        """Once, before anything is added: see whether the file is what the record says."""
        if not self.checked:
            self.record.check_text(self.render())
            self.checked = True

    def new_outline(self) -> dict:
        return self.counted(
            lambda: write_outline(
                self.decoder,
                self.composer,
                self.scorer,
                sections_for(self.request.words),
                self.request.candidates,
                self.request.decode,
            )
        )

    def new_piece(self, number: int, left: float) -> dict:
        """Write and rank the candidates of a piece of section ``number``, which lacks ``left``
        words."""
        return self.counted(lambda: self.rank_piece(number, max(1, math.ceil(left))))

    def counted(self, make: Callable[[], dict]) -> dict:
        """Return a decision with what ranking read for it."""
        calls = self.scorer.calls
        read = self.scorer.read
        decision = make()
        decision["calls"] += self.scorer.calls - calls
        return decision | {"scored": self.scorer.read - read}

    def rank_piece(self, number: int, left: int) -> dict:
        composer = self.composer
        opens = not self.texts[-1]
        # Pieces of one size, so that no section ends with a piece too short for a sentence.
        most = max(1, int(composer.piece / (self.tokens_per_word() * REACH)))
        last = left <= most
        aim = math.ceil(left / math.ceil(left / most))
        prompt = composer.of_piece(self.headings, number, self.memory())
        room = self.decoder.context - composer.count(prompt)
        wanted = 4 + math.ceil(aim * self.tokens_per_word() * (REACH if last else 1))
        config = self.config_of(number, min(composer.piece, room, wanted))
        results = generate(
            self.decoder,
            composer.tokenizer,
            [prompt],
            config,
            on_text=self.streamed(aim, last, opens),
        )
        kept = [self.kept_of(each, aim, last, opens) for each in results if each.tokens]
        allowed = [count_words(each.text) > 0 for each in kept]
        ends = [may and ends_sentence(each.text) for may, each in zip(allowed, kept, strict=True)]
        if last and any(ends):
            allowed = ends
        if opens:
            starts = [may and begins_sentence(e.text) for may, e in zip(allowed, kept, strict=True)]
            allowed = starts if any(starts) else allowed
        frame = composer.frame
        scored = []
        if any(allowed):
            scored = self.scorer.score(
                kept,
                self.scorer.likelihoods(prompt, kept),
                allowed,
                self.history,
                Target(frame.space + self.headings[number - 1], frame.heading),
            )
        return {
            "section": number,
            "piece": self.pieces[-1] + 1,
            "prompt_tokens": composer.count(prompt),
            "chosen": best_of(scored) if scored else None,
            "candidates": as_record(scored),
            "calls": 1,
            "written": sum(len(each.tokens) for each in results),
        }

    def config_of(self, number: int, tokens: int) -> DecodeConfig:
        """Return the decoding of a piece of at most ``tokens`` tokens."""
        decode = self.request.decode
        name = f"{decode.seed} piece {number} {self.pieces[-1]}"
        stops = (*decode.stop_strings, *self.composer.frame.stops)
        return dataclasses.replace(
            decode,
            num_return_sequences=self.request.candidates,
            max_new_tokens=tokens,
            # A model that ends its text at once would never fill its section.
            min_new_tokens=min(tokens, max(8, decode.min_new_tokens)),
            stop_strings=tuple(dict.fromkeys(stops)),
            # Equal for a writer that was killed and for one that was not.
            seed=zlib.crc32(name.encode()),
        )

    def tokens_per_word(self) -> float:
        """Return the tokens that a word takes: of the text so far, or else of the topic."""
        tokens = self.kept[0]
        words = self.kept[1]
        if words < 20:
            text = "\n".join([self.composer.topic, *self.headings])
            tokens += len(self.composer.tokenizer.encode(text))
            words += count_words(text)
        return max(0.1, tokens / max(1, words))

    def memory(self) -> Memory:
        """Return what the next prompt says of the text so far."""
        if self.texts[-1]:
            return Memory(self.summary, self.facts, self.texts[-1])
        before = self.texts[-2].rpartition("\n\n")[2] if len(self.texts) > 1 else ""
        return Memory(self.summary, self.facts, before + "\n\n" if before else "")

    def kept_of(self, result: Generated, aim: int, last: bool, opens: bool) -> Generated:
        """Return the part of a result that its piece keeps, with the tokens of that part."""
        raw = result.text
        if last:
            raw = end_near(raw, aim)
        cut_off = result.finish_reason == "length" and raw == result.text
        if cut_off and not (last and ends_sentence(raw)):
            raw = whole_words(raw)
        low = 1
        high = len(result.tokens)
        # The fewest tokens whose text is as long as what is kept.
        while low < high:
            middle = (low + high) // 2
            if len(self.composer.tokenizer.decode(result.tokens[:middle])) >= len(raw):
                high = middle
            else:
                low = middle + 1
        return dataclasses.replace(
            result,
            text=tidy(raw, opens),
            tokens=result.tokens[:low],
            logprobs=result.logprobs[:low],
        )

    def streamed(self, aim: int, last: bool, opens: bool) -> Callable[[int, str], None] | None:
        """Return a function that shows a single candidate while it is written."""
        if self.on_text is None or self.request.candidates > 1:
            return None
        before = self.texts[-1]
        parts: list[str] = []

        def push(_: int, part: str) -> None:
            parts.append(part)
            raw = "".join(parts)
            raw = settled(raw, aim) if last else whole_words(raw)
            self.texts[-1] = before + tidy(raw, opens)
            self.show(self.render())
            self.texts[-1] = before

        return push

    def show(self, text: str) -> None:
        """Give ``on_text`` what is new in the whole text."""
        if self.on_text is not None and len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text

    def new_memory(self) -> dict:
        """Let the model summarize the text so far, and look for names and facts in it."""
        composer = self.composer
        recent = self.texts[-1][-16 * composer.context :]
        prompt = composer.of_summary(self.summary, recent)
        longest = min(composer.summary_tokens, self.decoder.context - composer.count(prompt))
        config = DecodeConfig(max_new_tokens=longest, min_new_tokens=1, stop_strings=("\n\n",))
        result = generate(self.decoder, composer.tokenizer, [prompt], config)[0]
        summary = clean(result.text, self.request.language, composer.frame.stops)
        summary = summary.lstrip(".,;:!?，。；：！？、 ")
        ends = sentence_ends(summary)
        summary = summary[: ends[-1][0]] if ends else summary
        whole = "\n".join([self.request.topic, *self.texts])
        return {
            "summary": summary or self.summary,
            "facts": list(find_facts(whole, self.request.language)),
            "calls": 1,
            "written": len(result.tokens),
            "scored": 0,
        }

    def render(self) -> str:
        """Return the text so far, with its headings if the kind shows them."""
        shows = kind_of(self.request.kind).headings
        parts = [
            (f"## {heading}\n\n" if shows else "") + text
            for heading, text in zip(self.headings, self.texts, strict=False)
        ]
        return "\n\n".join(parts)
