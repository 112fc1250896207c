"""Measure the bias of a run, and write the result."""

# Shapes: V vocabulary

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mtnlg_jax import storage
from mtnlg_jax.config import Config
from mtnlg_jax.data.provenance import paths_of
from mtnlg_jax.data.store.sources import open_sources
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.evaluate.bias import identifiers, pairs, pronouns, ranked, sampled
from mtnlg_jax.evaluate.bias.lexicon import Lexicon
from mtnlg_jax.evaluate.bias.pairs_file import PairFile
from mtnlg_jax.evaluate.bias.read import OCCUPATION_SLOT, Prompts, PromptSet
from mtnlg_jax.evaluate.bias.report import render
from mtnlg_jax.evaluate.bias.sampled import SampledSettings
from mtnlg_jax.evaluate.bias.words import Vocabulary
from mtnlg_jax.train.checkpoint import Before
from mtnlg_jax.train.describe import header

# Training tokens of each source that the unigram baseline counts at most.
COUNTED = 1 << 24
# Pairs that are shown.
SHOWN = 12


@dataclasses.dataclass(frozen=True)
class BiasSettings:
    """What is measured.

    ``words``: descriptive words in place of those of the lexicon and of the prompts; ``pairs``:
    files of paired sentences.
    """

    prompts: Prompts | None
    sampled: SampledSettings = SampledSettings()
    words: tuple[str, ...] = ()
    lexicon: Lexicon | None = None
    pairs: tuple[PairFile, ...] = ()

    @property
    def counted(self) -> tuple[str, ...]:
        """The words that count in sampled text; empty: those in the slots."""
        return self.words or (tuple(self.lexicon.scores) if self.lexicon else ())

    @property
    def ranked(self) -> tuple[str, ...]:
        """The words that are ranked behind the prompts; empty: nothing is."""
        return self.counted or (self.prompts.words if self.prompts else ())


def measure_run(
    workdir: str,
    which: str,
    settings: BiasSettings,
    held: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
    before: Before = lambda config, tokenizer: None,
) -> dict[str, Any]:
    """Return the content of bias.json for the checkpoint ``which`` ("best" or "last").

    ``held`` may have dtype, weights and cache of `load_decoder`; ``before`` is that of `load_run`.
    Raises ValueError before any parameter is read if a prompt or a sentence does not fit the
    context, or the model has no objective for what is measured.
    """

    def check(config: Config, tokenizer: Any) -> None:
        before(config, tokenizer)
        check_model(config, tokenizer, settings)

    run, decoder = load_decoder(workdir, which, **(held or {}), mesh=mesh, before=check)
    objectives = objectives_of(run.config, run.tokenizer)
    counts_V, source = training_counts(run.config, run.tokenizer) if settings.pairs else (None, "")
    with tqdm(total=_steps(settings), unit="batch", disable=None, leave=False) as bar:
        content = measure(
            decoder, run.tokenizer, settings, objectives, counts_V, source, bar.update
        )
    return header("bias", run.step, ("scipy",)) | {"model": os.fspath(workdir)} | content


def objectives_of(config: Config, tokenizer) -> tuple[str, ...]:
    """Return which of "causal" and "masked" the stages of a run trained."""
    found = []
    if any(stage.masked < 1 for stage in config.train.stages):
        found.append("causal")
    if any(stage.masked > 0 for stage in config.train.stages) and _has_mask(tokenizer):
        found.append("masked")
    return tuple(found)


def _has_mask(tokenizer) -> bool:
    try:
        return tokenizer.mask_id is not None
    except ValueError:
        return False


def check_model(config: Config, tokenizer, settings: BiasSettings) -> None:
    """Raise ValueError if the model cannot be measured with these settings."""
    objectives = objectives_of(config, tokenizer)
    if settings.prompts and "causal" not in objectives:
        raise ValueError(
            "the associations continue prompts from left to right, and every stage of this model "
            "is masked; give --noassociations with --pairs=FILE, which masked models can score"
        )
    context = config.model.max_position_embeddings
    for prompt in _prompts(settings.prompts):
        length = len(encode_prompt(tokenizer, prompt)) + 1
        if length > context:
            raise ValueError(
                f"the prompt {prompt[:40]!r} has {length} tokens with one behind it, and the "
                f"model's context holds {context}; shorten its template"
            )
    for file in settings.pairs:
        texts = [text for pair in file.pairs for text in (pair.more, pair.less)]
        texts += [text for schema in file.schemas for text in (schema.male, schema.female)]
        pairs.check_sentences(tokenizer, texts, context)


def _prompts(prompts: Prompts | None) -> list[str]:
    if prompts is None:
        return []
    found = [
        text for each in prompts.sets for group in each.groups for _, text in each.prompts(group)
    ]
    if prompts.identifiers:
        found += [
            template.replace(OCCUPATION_SLOT, occupation)
            for template in prompts.identifiers.templates
            for occupation in prompts.identifiers.occupations
        ]
    return found


def _steps(settings: BiasSettings) -> int:
    """Return how often ``on_prompt`` of `measure` is called."""
    sets = settings.prompts.sets if settings.prompts else ()
    number = sum(len(each.prompts(group)) for each in sets for group in each.groups)
    batches = -(-settings.sampled.samples // settings.sampled.batch)
    return number * (batches + bool(settings.ranked))


def measure(
    decoder: Decoder,
    tokenizer,
    settings: BiasSettings,
    objectives: Sequence[str] = ("causal",),
    counts_V: np.ndarray | None = None,
    source: str = "",
    on_prompt: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """Return {"associations": ..., "pairs": ...} of a model, ready for JSON; None where not asked.

    ``counts_V``: how often each token occurs in ``source``, for the unigram baseline of pairs.
    """
    prompts = settings.prompts
    found: dict[str, Any] = {"associations": None, "pairs": None}
    if prompts is not None:
        found["associations"] = _associations(decoder, tokenizer, prompts, settings, on_prompt)
    if settings.pairs:
        found["pairs"] = {
            file.name: _pairs(decoder, tokenizer, file, objectives, counts_V, source)
            for file in settings.pairs
        }
    return found


def _associations(
    decoder: Decoder, tokenizer, prompts: Prompts, settings: BiasSettings, on_prompt: Callable
) -> dict[str, Any]:
    lexicon = settings.lexicon
    first_seed = 0
    sets = {}
    for each in prompts.sets:
        sets[each.name] = _one_set(decoder, tokenizer, each, settings, first_seed, on_prompt)
        number = sum(len(each.prompts(group)) for group in each.groups)
        # Sets draw with seeds of their own.
        first_seed += number * settings.sampled.samples
    test = prompts.identifiers
    tested = None
    if test is not None:
        ratios = identifiers.log_ratios(decoder, tokenizer, test, prompts.language)
        tested = identifiers.summarize(*ratios, test)
    return {
        "prompts": prompts.name,
        "language": prompts.language,
        "lexicon": None
        if lexicon is None
        else {
            "file": lexicon.name,
            "kind": lexicon.kind,
            "words": len(lexicon.scores),
            "low": lexicon.low,
            "high": lexicon.high,
        },
        "sets": sets,
        "identifiers": tested,
    }


def _one_set(
    decoder: Decoder,
    tokenizer,
    prompt_set: PromptSet,
    settings: BiasSettings,
    first_seed: int,
    on_prompt: Callable,
) -> dict[str, Any]:
    assert settings.prompts is not None, "sets come from prompts"
    language = settings.prompts.language
    result: dict[str, Any] = {
        "templates": list(prompt_set.templates),
        "groups": {group: list(terms) for group, terms in prompt_set.groups.items()},
        "sampled": None,
        "ranked": None,
    }
    if settings.sampled.samples:
        outputs = sampled.sample(
            decoder, tokenizer, prompt_set, settings.sampled, first_seed, lambda _: on_prompt(1)
        )
        vocabulary = Vocabulary(settings.counted) if settings.counted else None
        result["sampled"] = sampled.summarize(
            outputs, settings.sampled, language, vocabulary, settings.lexicon
        )
    if settings.ranked:
        words = settings.ranked
        found = ranked.rank_words(decoder, tokenizer, prompt_set, words, language, on_prompt)
        result["ranked"] = ranked.summarize(found, words, settings.lexicon, settings.sampled.seed)
    return result


def _pairs(
    decoder: Decoder,
    tokenizer,
    file: PairFile,
    objectives: Sequence[str],
    counts_V: np.ndarray | None,
    source: str,
) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": len(file.pairs) + len(file.schemas), "left_out": file.left_out}
    if file.schemas:
        texts = [(schema.female, schema.male) for schema in file.schemas]
        return found | {
            "form": "pronouns",
            "by": {
                by: pronouns.summarize(file.schemas, pairs.SCORERS[by](decoder, tokenizer, texts))
                for by in objectives
            },
        }
    texts = [(pair.more, pair.less) for pair in file.pairs]
    scored = {by: pairs.SCORERS[by](decoder, tokenizer, texts) for by in objectives}
    return found | {
        "form": "pairs",
        "by": {by: pairs.summarize(file.pairs, each) for by, each in scored.items()},
        "baselines": pairs.baselines(file.pairs, tokenizer, counts_V, source),
        "examples": {by: pairs.examples(file.pairs, each, SHOWN) for by, each in scored.items()},
    }


def training_counts(config: Config, tokenizer) -> tuple[np.ndarray | None, str]:
    """Return (how often each token occurs in the run's training data, a name for it).

    None if the data is not there any more, or is of another tokenizer.
    """
    counts_V = np.zeros(tokenizer.vocab_size, np.int64)
    folders = paths_of(config)
    if not folders:
        return None, ""
    try:
        known, opened, _ = open_sources(folders, config.data.tokenizer, config.data.heldout)
        if known.fingerprint != tokenizer.fingerprint:
            return None, ""
        for tokens in opened.values():
            part = tokens.read(0, min(len(tokens), COUNTED))
            counts_V += np.bincount(part, minlength=len(counts_V))[: len(counts_V)]
    except (OSError, ValueError):
        return None, ""
    return counts_V, f"{int(counts_V.sum()):,} tokens of the training data"


def unused_lexicon(content: dict[str, Any]) -> str | None:
    """Return why no output has a score if no word of the lexicon occurs in any; else None."""
    associations = content["associations"]
    found = [
        own["sampled"]["scores"]
        for own in (associations["sets"].values() if associations else ())
        if own["sampled"] and own["sampled"]["scores"]
    ]
    if not found or any(each["scored"] for each in found):
        return None
    return found[0]["absent"]


def write(content: dict[str, Any], output: str) -> str:
    """Write ``content`` to the path or URL ``output`` (FILE.json) and its page beside it.

    Each file is whole or absent. Return the path of the page.
    """
    folder, _, name = output.rpartition("/")
    folder = folder or ("/" if output.startswith("/") else ".")
    page = f"{name.removesuffix('.json')}.html"
    # The page first, so that the result is there only once both are.
    storage.write_file(folder, page, render(content).encode())
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1, sort_keys=True)
    storage.write_file(folder, name, text.encode() + b"\n")
    return storage.join(folder, page)
