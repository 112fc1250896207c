"""Stages that take text for what it says: test sets cut out, and what a classifier learnt to leave out."""

import json
from collections import Counter
from functools import lru_cache

from mtnlg_jax.data.decontaminate import NGrams, below, frequencies, ngrams, pieces, read_test_texts
from mtnlg_jax.data.documents import list_files, read_file
from mtnlg_jax.data.files import File, find
from mtnlg_jax.data.quality import Classifier, border, kept, train
from mtnlg_jax.data.recipe.settings import DecontaminationConfig, QualityConfig
from mtnlg_jax.data.recipe.stages import Folder, Row, Shard
from mtnlg_jax.data.recipe.texts import Tally, excerpt

LEAK = "holds text of a test set"


def test_files(config: DecontaminationConfig) -> list[File]:
    """The files of the test sets. Raises FileNotFoundError, or ValueError where one has none that can be read."""
    files = []
    for path in config.test_sets:
        found = find(path)
        if found is None:
            raise FileNotFoundError(f"test set {path} does not exist; give a file or a folder with --test_sets")
        readable = [file for file in found[2] if file.name.lower().removesuffix(".gz").endswith(
            (".jsonl", ".json", ".tsv"))]
        if not readable:
            raise ValueError(f"test set {path} has no .jsonl, .json or .tsv (also with .gz)")
        files += readable
    return files


def test_ngrams(folder: Folder, name: str, files: list[File], config: DecontaminationConfig) -> dict:
    """NAME.keys: the n-grams of the test sets, a line each."""
    found = ngrams((text for file in files for text in read_test_texts(file.path, config.test_keys)),
                   config.algorithm)
    _save(folder, name, found)
    return {"ngrams": len(found.keys)}


def leaks(folder: Folder, name: str, shard: Shard, tests: str, key: str, config: DecontaminationConfig) -> dict:
    """How often each n-gram occurs in the shard."""
    counts, found = Counter(), _ngrams(folder.root, tests, key, config)
    for row in folder.rows(shard):
        counts.update(frequencies(row.text, found))
    return {"counts": dict(sorted(counts.items()))}


def rare_ngrams(folder: Folder, name: str, tests: str, key: str, counted: list[str],
                config: DecontaminationConfig) -> dict:
    """NAME.keys: those that are found less often than the threshold in all of the corpus."""
    counts = Counter()
    for task in counted:
        counts.update(json.loads(folder.read(task + ".json"))["result"]["counts"])
    every = _ngrams(folder.root, tests, key, config)
    rare = below(every, counts)
    _save(folder, name, rare)
    return {"ngrams": len(every.keys), "found": len(counts), "common": len(every.keys) - len(rare.keys)}


def decontaminated(folder: Folder, name: str, shard: Shard, rare: str, key: str, config: DecontaminationConfig) -> dict:
    tally, kept, found = Tally(), [], _ngrams(folder.root, rare, key, config)
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


def classifier(folder: Folder, name: str, good: list[File], bad: list[File], text_key: str,
               config: QualityConfig) -> dict:
    """NAME.quality.*: what was learnt from the two."""
    texts = [[document.text for file in files for document in read_file(file, text_key)]
             for files in (good, bad)]
    learnt = train(*texts, config.classifier)
    for file, content in learnt.files().items():
        folder.write(f"{name}.{file}", content)
    return learnt.result


def good_rows(folder: Folder, name: str, shard: Shard, learnt: str, key: str, seed: int, config: QualityConfig) -> dict:
    tally, left, rows = Tally(), [], folder.rows(shard)
    texts = [row.text for row in rows]
    scores = _classifier(folder.root, learnt, key).scores(texts)
    for row, score, keep in zip(rows, scores, kept(scores, texts, seed, config.alpha), strict=True):
        tally.came(row)
        if keep:
            left.append(row)
            tally.stays(row)
        else:
            tally.took("dropped", "by its score, and by chance", row.place, f"score {score:.3f}: {row.text}")
    nearest = [[abs(score - 0.5), f"score {score:.3f}", excerpt(text)] for score, text in border(scores, texts, 5)]
    return tally.result([folder.write_rows(name, shard.source, left)], nearest=nearest)


def files_of(paths: tuple[str, ...]) -> list[File]:
    return [file for path in paths for file in list_files(path)]


def _save(folder: Folder, name: str, found: NGrams) -> None:
    folder.write(name + ".keys", "\n".join(sorted(found.keys)).encode())


@lru_cache(maxsize=2)  # one a process, not one a task
def _ngrams(root: str, name: str, key: str, config: DecontaminationConfig) -> NGrams:
    return NGrams(frozenset(Folder(root).read(name + ".keys").decode().split("\n")) - {""}, config.algorithm)


@lru_cache(maxsize=1)
def _classifier(root: str, name: str, key: str) -> Classifier:
    folder = Folder(root)
    return Classifier.of({file: folder.read(f"{name}.{file}") for file in ("quality.json", "quality.npz")})
