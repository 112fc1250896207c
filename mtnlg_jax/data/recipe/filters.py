"""Tasks that remove text for its content: test sets, and what a classifier rejects."""

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
    """Return the files of the test sets, each once; ``report`` counts the files left out.

    Raises FileNotFoundError, or ValueError if a test set has no file that can be read.
    """
    files: dict[str, File] = {}
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
    """Write NAME.keys: the n-grams of the test sets, a line each.

    "fields" in the result counts, by field, texts that were used, were too short for an n-gram, or
    were left out: numbers, and fields that ``test_keys`` does not name.
    """
    fields: dict[str, dict[str, int]] = {}

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
    """Describe which fields of the test sets were used, and why others were not."""
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
            parts.append(f"Texts not used, {why}: {', '.join(named)}.")
    return " ".join(parts)


def leaks(
    folder: Folder, name: str, shard: Shard, tests: str, key: str, config: DecontaminationConfig
) -> dict:
    """Count each n-gram of the test sets in the shard."""
    counts: Counter[str] = Counter()
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
    """Write NAME.keys: the n-grams found less often than the threshold in the whole corpus."""
    counts: Counter[str] = Counter()
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
    """Write the shard with the n-grams of the test sets, and the text around them, cut out."""
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
    """Write NAME.quality.*: a classifier trained on good and bad files."""
    good_texts, bad_texts = (
        [
            document.text
            for file in files
            for document in read_file(file, text_key, encoding=encoding)
        ]
        for files in (good, bad)
    )
    trained = train(good_texts, bad_texts, config.classifier)
    for file, content in trained.files().items():
        folder.write(f"{name}.{file}", content)
    return trained.result


def good_rows(
    folder: Folder,
    name: str,
    shard: Shard,
    trained: str,
    key: str,
    seed: int,
    config: QualityConfig,
) -> dict:
    """Write the shard without most documents that the classifier ``trained`` finds bad."""
    tally = Tally()
    left = []
    rows = folder.rows(shard)
    texts = [row.text for row in rows]
    scores = _classifier(folder.root, trained, key).scores(texts)
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
    """Return the readable files of ``paths``; ``report`` counts those left out."""
    return [file for path in paths for file in list_files(path, report)]


def _save(folder: Folder, name: str, found: NGrams) -> None:
    folder.write(name + ".keys", "\n".join(sorted(found.keys)).encode())


@lru_cache(maxsize=2)  # kept by a process from task to task
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
