"""Stages that take text for what it says: test sets cut out, and what a classifier learnt to leave
out."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from mtnlg_jax.data.filter.decontaminate import (
    TEST_KINDS,
    NGrams,
    below,
    frequencies,
    ngrams,
    pieces,
    read_test_texts,
    words_of,
)
from mtnlg_jax.data.filter.quality import Classifier, border, kept, train
from mtnlg_jax.data.read.documents import ReadReport, list_files, read_file
from mtnlg_jax.data.read.open_files import File, find
from mtnlg_jax.data.recipe.settings import DecontaminationConfig, QualityConfig
from mtnlg_jax.data.recipe.stages import Folder, Row, Shard
from mtnlg_jax.data.recipe.texts import Tally, excerpt

LEAK = "holds text of a test set"


def test_files(config: DecontaminationConfig, report: ReadReport | None = None) -> list[File]:
    """The files of the test sets, each once; what of their folders is left out is counted in
    ``report``. Raises FileNotFoundError, or ValueError where a test set has none that can be
    read."""
    files = {}
    for path in config.test_sets:
        if find(path) is None:
            raise FileNotFoundError(
                f"test set {path} does not exist; give a file or a folder with --test_sets"
            )
        readable = list_files(path, report, kinds=TEST_KINDS)
        if not readable:
            raise ValueError(
                f"test set {path} holds none of {' '.join(TEST_KINDS)} (also compressed); convert "
                "it"
            )
        for file in readable:
            files.setdefault(file.real or file.path, file)
    return list(files.values())


def test_ngrams(
    folder: Folder, name: str, files: list[File], config: DecontaminationConfig, encoding: str
) -> dict:
    """NAME.keys: the n-grams of the test sets, a line each. "fields": by field, how many texts
    counted, were too short to make an n-gram, or did not count: numbers, and fields that
    ``test_keys`` does not name."""
    fields = {}

    def texts() -> Iterator[str]:
        for file in files:
            for field, text in read_test_texts(file, config.test_keys, encoding):
                counts = fields.setdefault(field, {"counted": 0, "too short": 0, "left out": 0})
                if text is None:
                    counts["left out"] += 1
                elif words_of(text, config.algorithm) < config.algorithm.min_words:
                    counts["too short"] += 1
                    yield text
                else:
                    counts["counted"] += 1
                    yield text

    found = ngrams(texts(), config.algorithm)
    _save(folder, name, found)
    return {"ngrams": len(found.keys), "fields": dict(sorted(fields.items()))}


def fields_note(fields: dict[str, dict[str, int]], config: DecontaminationConfig) -> str:
    """Which fields of the test sets counted, and which did not and why."""
    reasons = {
        "too short": f"under {config.algorithm.min_words} words",
        "left out": "not named by test_keys, or not text"
        if config.test_keys
        else "numbers, not text",
    }
    used = [
        f"{field} ({counts['counted']:,})" for field, counts in fields.items() if counts["counted"]
    ]
    parts = [f"Fields searched for: {', '.join(used)}."]
    for what, why in reasons.items():
        named = [f"{field} ({counts[what]:,})" for field, counts in fields.items() if counts[what]]
        if named:
            parts.append(f"Texts that did not count, {why}: {', '.join(named)}.")
    return " ".join(parts)


def leaks(
    folder: Folder, name: str, shard: Shard, tests: str, key: str, config: DecontaminationConfig
) -> dict:
    """How often each n-gram occurs in the shard."""
    counts = Counter()
    found = _ngrams(folder.root, tests, key, config)
    for row in folder.rows(shard):
        counts.update(frequencies(row.text, found))
    return {"counts": dict(sorted(counts.items()))}


def rare_ngrams(
    folder: Folder,
    name: str,
    tests: str,
    key: str,
    counted: list[str],
    config: DecontaminationConfig,
) -> dict:
    """NAME.keys: those that are found less often than the threshold in all of the corpus."""
    counts = Counter()
    for task in counted:
        counts.update(json.loads(folder.read(task + ".json"))["result"]["counts"])
    every = _ngrams(folder.root, tests, key, config)
    rare = below(every, counts)
    _save(folder, name, rare)
    return {
        "ngrams": len(every.keys),
        "found": len(counts),
        "common": len(every.keys) - len(rare.keys),
    }


def decontaminated(
    folder: Folder, name: str, shard: Shard, rare: str, key: str, config: DecontaminationConfig
) -> dict:
    tally = Tally()
    kept = []
    found = _ngrams(folder.root, rare, key, config)
    for row in folder.rows(shard):
        tally.came(row)
        parts, matched = pieces(row.text, found)
        if not matched:
            kept.append(row)
            tally.stays(row)
            continue
        tally.took("changed", LEAK, row.place, " | ".join(dict.fromkeys(matched)))
        if not parts:
            tally.took("dropped", "too little or too many pieces left", row.place, row.text)
        for number, part in enumerate(parts):
            kept.append(Row(part, f"{row.place}#{number}"))
            tally.stays(kept[-1])
    return tally.result([folder.write_rows(name, shard.source, kept)])


def classifier(
    folder: Folder,
    name: str,
    good: list[File],
    bad: list[File],
    text_key: str,
    encoding: str,
    config: QualityConfig,
) -> dict:
    """NAME.quality.*: what was learnt from the two."""
    texts = [
        [
            document.text
            for file in files
            for document in read_file(file, text_key, encoding=encoding)
        ]
        for files in (good, bad)
    ]
    learnt = train(*texts, config.classifier)
    for file, content in learnt.files().items():
        folder.write(f"{name}.{file}", content)
    return learnt.result


def good_rows(
    folder: Folder, name: str, shard: Shard, learnt: str, key: str, seed: int, config: QualityConfig
) -> dict:
    tally = Tally()
    left = []
    rows = folder.rows(shard)
    texts = [row.text for row in rows]
    scores = _classifier(folder.root, learnt, key).scores(texts)
    for row, score, keep in zip(rows, scores, kept(scores, texts, seed, config.alpha), strict=True):
        tally.came(row)
        if keep:
            left.append(row)
            tally.stays(row)
        else:
            tally.took(
                "dropped",
                "by its score, and by chance",
                row.place,
                f"score {score:.3f}: {row.text}",
            )
    nearest = [
        [abs(score - 0.5), f"score {score:.3f}", excerpt(text)]
        for score, text in border(scores, texts, 5)
    ]
    return tally.result([folder.write_rows(name, shard.source, left)], nearest=nearest)


def files_of(paths: tuple[str, ...], report: ReadReport | None = None) -> list[File]:
    return [file for path in paths for file in list_files(path, report)]


def _save(folder: Folder, name: str, found: NGrams) -> None:
    folder.write(name + ".keys", "\n".join(sorted(found.keys)).encode())


@lru_cache(maxsize=2)  # one a process, not one a task
def _ngrams(root: str, name: str, key: str, config: DecontaminationConfig) -> NGrams:
    return NGrams(
        frozenset(Folder(root).read(name + ".keys").decode().split("\n")) - {""}, config.algorithm
    )


@lru_cache(maxsize=1)
def _classifier(root: str, name: str, key: str) -> Classifier:
    folder = Folder(root)
    return Classifier.of(
        {file: folder.read(f"{name}.{file}") for file in ("quality.json", "quality.npz")}
    )
