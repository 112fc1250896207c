"""The settings of a recipe: frozen dataclasses, which a file of configs/data returns."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtnlg_jax import storage
from mtnlg_jax.config import PATH, load_object, override
from mtnlg_jax.data.canaries import CanaryConfig
from mtnlg_jax.data.canaries import check as check_canaries
from mtnlg_jax.data.filter.clean import CleanConfig
from mtnlg_jax.data.filter.decontaminate import Decontamination
from mtnlg_jax.data.filter.dedup import MinHashConfig
from mtnlg_jax.data.filter.quality import ClassifierConfig
from mtnlg_jax.data.read import charsets
from mtnlg_jax.data.read.documents import READABLE, list_files
from mtnlg_jax.data.read.open_files import find

# In this order; a recipe may skip some. "read" is always first.
STAGES = ("clean", "duplicates", "paragraphs", "decontaminate", "quality", "tokens")


@dataclass(frozen=True)
class Source:
    """Text with a weight of its own: files and folders (paths, gs://, s3://); relative ones are
    below --input."""

    name: str = ""
    paths: tuple[str, ...] = field(default=(), metadata=PATH)
    # Relative share of the training samples. None in all sources: by their tokens.
    weight: float | None = None
    # Of duplicates the one in the source of the highest priority is kept.
    priority: int = 0
    # Key or column of the text in JSON and Parquet; of "a|b" the first that exists.
    text_key: str = "text"
    # Settings of "clean" for this source alone: ("clean.min_tokens=16",).
    settings: tuple[str, ...] = ()
    # Stages (of STAGES[:-1]) that leave the text of this source unchanged.
    skip_stages: tuple[str, ...] = ()


# For a source of code or mathematics: `Source(name, paths, **TECHNICAL_TEXT)`. Its documents are
# dropped only for their length, and changed only to mask personal data and to cut out test sets.
# Code repeats itself, so blocks that also occur in other files are kept; near-duplicate files are
# not.
TECHNICAL_TEXT = {
    "settings": (
        "clean.prose_rules=false",
        "clean.languages=()",
        "clean.repair=false",
        "clean.normalization=none",
        "clean.boilerplate=false",
    ),
    "skip_stages": ("paragraphs", "quality"),
}


@dataclass(frozen=True)
class ParagraphConfig:
    """Removal of paragraphs already seen in the corpus, ignoring case and white space."""

    min_length: int = 80  # characters; shorter ones may repeat
    min_left: int = 200  # characters that a document must keep


@dataclass(frozen=True)
class DecontaminationConfig:
    """Removal of test sets from the text."""

    # Files and folders of .jsonl, .json, .txt, .csv, .tsv, .parquet, also compressed.
    test_sets: tuple[str, ...] = field(default=(), metadata=PATH)
    # Fields of their rows to search for; empty: all, nested ones included.
    test_keys: tuple[str, ...] = ()
    algorithm: Decontamination = field(default_factory=Decontamination)


@dataclass(frozen=True)
class QualityConfig:
    """Selection of documents similar to given good text, by the Pareto rule of GPT-3 (Brown 2020,
    appendix A)."""

    # Files and folders of text.
    good: tuple[str, ...] = field(default=(), metadata=PATH)
    bad: tuple[str, ...] = field(default=(), metadata=PATH)
    # Of the Pareto distribution: a higher alpha keeps fewer bad documents.
    alpha: float = 9.0
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)


@dataclass(frozen=True)
class Recipe:
    """All settings, from text to tokens. Without ``sources`` each folder of --input is one."""

    name: str = "data"
    sources: tuple[Source, ...] = ()
    stages: tuple[str, ...] = STAGES
    clean: CleanConfig = field(default_factory=CleanConfig)
    duplicates: MinHashConfig = field(default_factory=MinHashConfig)
    paragraphs: ParagraphConfig = field(default_factory=ParagraphConfig)
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    # bpe or unigram, trained on the result; or the path of an existing one.
    tokenizer: str = field(default="bpe", metadata=PATH)
    vocab_size: int = 8000  # of a tokenizer to train
    heldout: float = 0.02  # share of the text, 0 to 0.5
    # Secrets to plant in the training text after all other stages, for a later audit.
    canaries: CanaryConfig = field(default_factory=CanaryConfig)
    train_tokens: int | None = None  # token budget used to report epochs; None: one epoch
    seed: int = 0
    on_error: str = "raise"  # raise | skip: damaged input
    encoding: str = ""  # of text that is not UTF-8 and does not declare one: cp1252, gb18030
    max_document_bytes: int = 256 << 20
    text_key: str = "text"  # `Source.text_key` if the recipe names no sources
    shard_bytes: int = 64 << 20  # text held by a task


def load_recipe(path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Load ``get_config()`` of a file and apply "section.key=value". Raises FileNotFoundError or
    ValueError."""
    recipe = load_object(path, Recipe, overrides)
    validate(recipe)
    return recipe


def with_flags(
    recipe: Recipe,
    stages: Sequence[str] | None = None,
    test_sets: Sequence[str] = (),
    skip_sources: Sequence[str] = (),
    **settings: Any,
) -> Recipe:
    """Return ``recipe`` with what the command line changes.

    ``settings`` replace those of the recipe. A ``text_key`` among them also replaces the default of
    its sources, but not one that a source has of its own. Raises ValueError if ``skip_sources``
    names a source that does not exist.
    """
    known = [source.name for source in recipe.sources]
    for name in skip_sources:
        if name not in known:
            raise ValueError(
                f"--skip_sources={name} is not a source of the recipe: "
                f"{', '.join(known) or 'it names none'}"
            )
    sources = [source for source in recipe.sources if source.name not in skip_sources]
    if "text_key" in settings:
        sources = [
            dataclasses.replace(source, text_key=settings["text_key"])
            if source.text_key == "text"
            else source
            for source in sources
        ]
    if stages is not None:
        settings["stages"] = tuple(stages)
    if test_sets:
        settings["decontamination"] = dataclasses.replace(
            recipe.decontamination, test_sets=tuple(test_sets)
        )
    return dataclasses.replace(recipe, sources=tuple(sources), **settings)


def validate(recipe: Recipe) -> None:
    """Check a recipe. Raises ValueError in one line with the value, the limit and a remedy."""
    for stage in recipe.stages:
        if stage not in STAGES:
            raise ValueError(f"unknown stage {stage!r}; choose among {', '.join(STAGES)}")
    ordered = tuple(stage for stage in STAGES if stage in recipe.stages)
    if recipe.stages != ordered:
        raise ValueError(
            f"stages={','.join(recipe.stages)} must each come once and in this order: "
            f"{','.join(ordered)}"
        )
    if not 0 <= recipe.heldout <= 0.5:
        raise ValueError(f"heldout={recipe.heldout} must be in 0 to 0.5")
    if recipe.on_error not in ("raise", "skip"):
        raise ValueError(f"unknown on_error={recipe.on_error!r}; use 'raise' or 'skip'")
    charsets.check(recipe.encoding)
    for name in ("shard_bytes", "max_document_bytes", "vocab_size"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name}={getattr(recipe, name)} must be at least 1")
    names = [source.name for source in recipe.sources]
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise ValueError(
                f"source {name!r}: a name consists of letters, digits, '_', '-' and '.'"
            )
        if names.count(name) > 1:
            raise ValueError(f"two sources have the name {name!r}; give each its own")
    weights = [source.weight for source in recipe.sources if source.weight is not None]
    for source in recipe.sources:
        clean_config(recipe, source.name)
        for stage in source.skip_stages:
            if stage not in STAGES[:-1]:
                raise ValueError(
                    f"source {source.name!r}: skip_stages holds {stage!r}; choose among "
                    f"{', '.join(STAGES[:-1])}"
                )
        if not source.paths:
            raise ValueError(f"source {source.name!r} has no paths; name its files or folders")
        if source.weight is not None and not 0 <= source.weight < float("inf"):
            raise ValueError(
                f"source {source.name!r}: weight={source.weight} must be 0 or more, and finite"
            )
    if weights and len(weights) < len(names):
        lacking = next(source.name for source in recipe.sources if source.weight is None)
        raise ValueError(
            f"source {lacking!r} has no weight while others have one; give all of them one, or none"
        )
    if weights and not any(weights):
        raise ValueError("the weights of all sources are 0; raise at least one")
    check_canaries(recipe.canaries)
    if recipe.canaries.count and "tokens" not in recipe.stages:
        raise ValueError(
            f"canaries={recipe.canaries.count} are planted by the stage tokens, which is not among "
            f"the stages {','.join(recipe.stages)}; add it, or leave the canaries out"
        )
    quality = recipe.quality
    if bool(quality.good) != bool(quality.bad):
        raise ValueError(
            "quality.good and quality.bad go together: a classifier is trained on both"
        )
    if not quality.alpha > 0:
        raise ValueError(f"quality.alpha={quality.alpha} must be above 0")


def clean_config(recipe: Recipe, name: str) -> CleanConfig:
    """Return the settings of "clean" for the source ``name``: the recipe's with its own applied.

    Raises ValueError if a setting does not exist or does not take its value.
    """
    source = next(source for source in recipe.sources if source.name == name)
    for setting in source.settings:
        if not setting.startswith("clean."):
            raise ValueError(
                f"source {name!r}: settings holds {setting!r}; only those of clean differ by "
                "source, as 'clean.min_tokens=16'"
            )
    try:
        return override(recipe, *source.settings).clean
    except ValueError as error:
        raise ValueError(f"source {name!r}: {error}") from None


def with_sources(recipe: Recipe, root: str | None) -> Recipe:
    """Return ``recipe`` with the paths of its sources below ``root``.

    A recipe without sources gets one for each entry of ``root``. Sources of weight 0 are removed.
    Raises FileNotFoundError or ValueError.
    """
    if not recipe.sources:
        if root is None:
            raise ValueError("the recipe names no sources; give a folder of text with --input")
        sources = tuple(
            dataclasses.replace(source, text_key=recipe.text_key) for source in _entries(root)
        )
    else:
        sources = tuple(
            dataclasses.replace(source, paths=tuple(_below(root, path) for path in source.paths))
            for source in recipe.sources
            if source.weight != 0
        )
    return dataclasses.replace(
        recipe, sources=tuple(sorted(sources, key=lambda source: source.name))
    )


def _below(root: str | None, path: str) -> str:
    if root is None or storage.is_remote(path) or Path(path).is_absolute():
        return path
    return storage.join(root, path)


def _entries(root: str) -> tuple[Source, ...]:
    files = list_files(root)
    if not files:
        raise ValueError(f"{root} holds nothing to read; give a folder with any of {READABLE}")
    found = find(root)
    if len(files) == 1 and found is not None and not found.is_folder:
        return (Source("input", (root,)),)
    entries = sorted({file.name.split("/")[0] if "/" in file.name else "" for file in files})
    if "" in entries:
        if len(entries) > 1:
            raise ValueError(
                f"{root} holds both files and folders; move the files to a folder of their own, or "
                "name the sources in the recipe"
            )
        return (Source("files", (root,)),)
    names = [re.sub(r"[^\w.-]", "_", entry) for entry in entries]
    for name, entry in zip(names, entries, strict=True):
        if names.count(name) > 1:
            raise ValueError(
                f"{root}: two folders, {entry!r} among them, would be the source {name!r}; rename "
                "one, or name the sources in the recipe"
            )
    return tuple(
        Source(name, (storage.join(root, entry),))
        for name, entry in zip(names, entries, strict=True)
    )
