"""The measures of an audit, over passages that they share."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mtnlg_jax.data.canaries import Canary
from mtnlg_jax.data.filter import pii
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.evaluate.audit import exposure, extraction, membership, personal_data
from mtnlg_jax.evaluate.audit.counting import count_sequences
from mtnlg_jax.evaluate.audit.extraction import Lengths
from mtnlg_jax.evaluate.audit.planted import check_planted
from mtnlg_jax.evaluate.audit.scoring import TokenScores, score_tokens
from mtnlg_jax.evaluate.audit.settings import PARTS, AuditSettings
from mtnlg_jax.evaluate.audit.sources import Passage, Source, draw_passages, held_out_of

# Passages are counted for each that is measured, so that some stand more than once.
_POOL = 20
# Draws of passages, each with random numbers of its own.
_PURPOSES = ("train", "heldout", "members", "personal_data")
_EXAMPLES = 10
_SHOWN = 60  # characters of an excerpt that is not shown whole
_PROMPT = 16  # tokens of training text before half of the texts that are searched
_LEAST_PASSAGES = 10  # of the training and of the held-out text of a source, for membership


class Inputs(NamedTuple):
    """What is known before parameters are read."""

    tokenizer: Tokenizer
    sources: list[Source]
    canaries: list[Canary]
    lengths: Lengths
    member_tokens: int
    skipped: dict[str, str]  # part -> why it is left out


class Measures:
    """The measures of one model, with passages that they share."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        decoder: Decoder,
        settings: AuditSettings,
        found: Inputs,
        progress: bool,
    ):
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._settings = settings
        self._found = found
        self._silent = None if progress else True  # None: a bar on a terminal only
        # Each once: a run may name an output of a recipe and one of its sources as well.
        parts = {part.location: part for source in found.sources for part in source.train}
        self.parts = list(parts.values())
        self._pool: list[Passage] = []
        self._counts = np.zeros(0, np.int64)
        self._heldout: list[Passage] = []
        # source -> passages of its training text, and of its held-out text
        self._groups: dict[str, tuple[list[Passage], list[Passage]]] = {}
        self.notes: list[str] = []
        self.counting = 0.0

    def draw(self) -> None:
        """Draw passages, and count them and the canaries in the training text in one pass.

        A part that the text is too short for goes to ``skipped``. Raises ValueError for it if the
        settings name it, and if canaries are missing from the text.
        """
        began = time.monotonic()
        canaries = self._found.canaries
        if self._measured("extraction"):
            self._pool = self._drawn("train", _POOL * self._settings.passages)
            self._heldout = self._drawn("heldout", self._settings.passages)
            if not self._pool:
                self._skip(
                    "extraction",
                    f"no document of {self._found.sources[0].path} has "
                    f"{self._found.lengths.passage} tokens; give shorter --prefixes or a shorter "
                    "--continuation",
                )
        if self._measured("membership"):
            self._draw_members()
        held = [self._heldout, *(others for _, others in self._groups.values())]
        wanted = [self._tokenizer.encode(each.text) for each in canaries]
        wanted += [each.tokens.tolist() for group in (self._pool, *held) for each in group]
        # Nothing to count: nothing is read.
        parts = self.parts if wanted else []
        with self._bar("counting passages", sum(map(len, parts)), " tokens") as bar:
            counts = count_sequences(parts, wanted, bar.update)
        first = len(canaries) + len(self._pool)
        check_planted(canaries, counts[: len(canaries)], self._found.sources)
        self._counts = counts[len(canaries) : first]
        self._drop_copies(counts[first:])
        if self._measured("membership"):
            self._check_groups()
        self.counting = time.monotonic() - began

    def _drop_copies(self, counts: np.ndarray) -> None:
        """Leave out held-out passages that stand in the training text, whose ``counts`` are given:
        those for extraction, then those for membership."""
        if not (total := len(counts)):
            return
        new = iter((counts == 0).tolist())
        self._heldout = [each for each in self._heldout if next(new)]
        for name, (members, others) in self._groups.items():
            self._groups[name] = (members, [each for each in others if next(new)])
        if copies := int((counts > 0).sum()):
            self.notes.append(
                f"{copies:,} of {total:,} held-out passages also stand in the training text and "
                "are left out"
            )

    def _measured(self, part: str) -> bool:
        return part in (self._settings.parts or PARTS) and part not in self._found.skipped

    def _skip(self, part: str, why: str) -> None:
        if self._settings.parts is not None:
            raise ValueError(f"{why}, or leave {part} out of --parts")
        self._found.skipped[part] = why

    def _drawn(self, which: str, count: int) -> list[Passage]:
        """Return passages for extraction, of all sources by their size."""
        rng = np.random.default_rng([self._settings.seed, _PURPOSES.index(which)])
        sources = self._found.sources
        parts = self.parts
        if which == "heldout":
            parts = [*{source.heldout.location: source.heldout for source in sources}.values()]
        length = self._found.lengths.passage
        return draw_passages("", parts, self._tokenizer, length, count, rng)

    def _draw_members(self) -> None:
        """Draw passages of the training and of the held-out text of each source, as many of each,
        none of which overlap."""
        for number, source in enumerate(self._found.sources):
            rng = np.random.default_rng([self._settings.seed, _PURPOSES.index("members"), number])
            common = (self._tokenizer, self._found.member_tokens)
            most = self._settings.passages
            own = held_out_of(source)
            others = draw_passages(source.path, [source.heldout], *common, most, rng, True, own)
            members = draw_passages(source.path, source.train, *common, len(others), rng, True)
            self._groups[source.path] = (members, others)

    def _check_groups(self) -> None:
        """Leave out sources with too few passages to compare, and the part if none has enough."""
        groups = self._groups
        self._groups = {
            name: pair for name, pair in groups.items() if min(map(len, pair)) >= _LEAST_PASSAGES
        }
        if not self._groups:
            tokens = self._found.member_tokens
            members, others = (max(len(pair[half]) for pair in groups.values()) for half in (0, 1))
            self._skip(
                "membership",
                f"the training text has {members} passages and the held-out text {others} of "
                f"{tokens} tokens that do not overlap and are not in both, and membership needs "
                f"{_LEAST_PASSAGES} of each; give fewer --member_tokens, or hold more text out "
                "(--heldout of launch/prepare_data.py)",
            )

    @contextlib.contextmanager
    def _bar(self, what: str, total: int, unit: str) -> Iterator[tqdm]:
        with tqdm(desc=what, total=total, unit=unit, disable=self._silent, leave=False) as bar:
            yield bar

    def measure_extraction(self) -> dict[str, Any]:
        settings = self._settings
        lengths = self._found.lengths
        most = settings.passages
        groups = extraction.by_copies(self._counts, most)
        # The first of the pool are a random sample of the text, whatever their copies.
        random = np.arange(min(most, len(self._pool)))
        used = np.unique(np.concatenate([random, *groups.values()]))
        passages = [*(self._pool[number] for number in used), *self._heldout]
        samples = settings.extraction.samples
        rows = extraction.rows_to_read(len(passages), lengths, samples)
        with self._bar("extraction", rows, " rows") as bar:
            found = extraction.extract(
                self._decoder,
                self._tokenizer,
                passages,
                lengths,
                settings.extraction,
                settings.seed,
                bar.update,
            )
        heldout = np.arange(len(used), len(passages))
        return {
            "prefixes": list(lengths.prefixes),
            "continuation": lengths.continuation,
            "samples": samples,
            "training": extraction.summarize(found, np.searchsorted(used, random), samples),
            "heldout": extraction.summarize(found, heldout, samples),
            "by_copies": {
                name: extraction.summarize(found, np.searchsorted(used, chosen), samples)
                for name, chosen in groups.items()
            },
            "examples": self._extracted(found, used),
        }

    def _extracted(self, found: list[extraction.Extracted], used: np.ndarray) -> list[dict]:
        """Return passages that greedy decoding reproduces, those with the fewest copies first."""
        greedy = np.stack([each.greedy[: len(used)] for each in found])
        hits = np.flatnonzero(greedy.any(0))
        hits = hits[np.argsort(self._counts[used[hits]], kind="stable")][:_EXAMPLES]
        lengths = self._found.lengths
        rows = []
        for at in hits.tolist():
            prefix = found[int(greedy[:, at].argmax())].prefix
            tokens = self._pool[used[at]].tokens.tolist()
            start = lengths.passage - lengths.continuation
            rows.append(
                {
                    "prefix": prefix,
                    "copies": int(self._counts[used[at]]),
                    "prompt": self._excerpt(self._tokenizer.decode(tokens[start - prefix : start])),
                    "written": self._excerpt(self._tokenizer.decode(tokens[start:])),
                }
            )
        return rows

    def _excerpt(self, text: str) -> str:
        """Return what the report shows of a text: masked and cut, unless texts are shown."""
        if self._settings.show_texts:
            return text
        text = pii.mask(text)[0]
        return text if len(text) <= _SHOWN else text[:_SHOWN].rstrip() + " …"

    def measure_canaries(self) -> dict[str, Any]:
        canaries = self._found.canaries
        most = self._settings.candidates
        with self._bar("canaries", len(canaries), " canaries") as bar:
            found = exposure.measure_canaries(
                self._decoder, self._tokenizer, canaries, most, self._settings.seed, bar.update
            )
        rows = [
            {
                "prefix": canary.prefix,
                "secret": canary.secret if self._settings.show_texts else None,
                "copies": canary.copies,
                "space": canary.space,
                **found_._asdict(),
            }
            for canary, found_ in zip(canaries, found, strict=True)
        ]
        return {
            "candidates": most,
            "chance": exposure.chance(max(each.ranked for each in found)),
            "most": float(np.log2(max(each.space for each in canaries))),
            "by_copies": exposure.summarize(canaries, found),
            "canaries": rows,
        }

    def measure_membership(self, reference: str | None) -> dict[str, Any]:
        groups = self._groups
        passages = [each for pair in groups.values() for half in pair for each in half]
        scored = self._scored(self._decoder, passages, "membership")
        other = None
        if reference is not None:
            other = self._scored(
                load_decoder(reference, mesh=self._decoder.mesh)[1], passages, "reference model"
            )
        scores = membership.scores_of(
            passages, scored, self._tokenizer, self._settings.min_k, other
        )
        labels = [half for pair in groups.values() for half in (0, 1) for _ in pair[half]]
        names = [name for name, pair in groups.items() for half in pair for _ in half]
        heldout = np.array(labels, bool)
        own = np.array(names)

        def compared(chosen: np.ndarray) -> dict[str, Any]:
            members = [passages[i] for i in np.flatnonzero(chosen & ~heldout)]
            others = [passages[i] for i in np.flatnonzero(chosen & heldout)]
            return {
                "members": len(members),
                "others": len(others),
                "scores": membership.compare(
                    {name: each[chosen & ~heldout] for name, each in scores.items()},
                    {name: each[chosen & heldout] for name, each in scores.items()},
                ),
                "baseline": membership.baseline(members, others, self._settings.seed),
            }

        result = {
            "tokens": self._found.member_tokens,
            "min_k": self._settings.min_k,
            "reference": reference,
            **compared(np.ones(len(own), bool)),
        }
        if len(groups) > 1:
            result["by_source"] = {name: compared(own == name) for name in groups}
        return result

    def _scored(
        self, decoder: Decoder, passages: Sequence[Passage], what: str
    ) -> list[TokenScores]:
        rows = [each.tokens.tolist() for each in passages]
        with self._bar(what, len(rows), " passages") as bar:
            return score_tokens(decoder, rows, [1] * len(rows), on_rows=bar.update)

    def measure_personal_data(self) -> dict[str, Any]:
        settings = self._settings
        rng = np.random.default_rng([settings.seed, _PURPOSES.index("personal_data")])
        prompted = draw_passages("", self.parts, self._tokenizer, _PROMPT, settings.texts // 2, rng)
        prompts: list[list[int]] = [each.tokens.tolist() for each in prompted]
        # Those without a prompt begin a document.
        prompts = [[self._tokenizer.bos_id]] * (settings.texts - len(prompts)) + prompts
        with self._bar("personal data", len(prompts), " texts") as bar:
            texts = personal_data.write_texts(
                self._decoder,
                self._tokenizer,
                prompts,
                settings.text_tokens,
                settings.extraction.temperature,
                settings.seed,
                bar.update,
            )
        found = personal_data.find(texts)
        with self._bar("searching", sum(map(len, self.parts)), " tokens") as bar:
            total, known = personal_data.summarize(
                texts, found, self.parts, self._tokenizer, bar.update
            )
        total["prompted"] = len(prompted)
        total["examples"] = [
            {
                "kind": each.kind,
                "line": self._excerpt(each.line),
                "in_training": known[each.string],
            }
            for each in found[: 2 * _EXAMPLES]
        ]
        return total
