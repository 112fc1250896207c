"""The stages between reading and tokens: each plans and runs its tasks over all shards.

A stage that compares documents (duplicates, paragraphs, test sets) runs several rounds of tasks,
and plans each round from the results of the one before.
"""

import hashlib
from collections.abc import Callable

import numpy as np

from mtnlg_jax.data.filter import dedup
from mtnlg_jax.data.filter.decontaminate import check_hits
from mtnlg_jax.data.read.open_files import File
from mtnlg_jax.data.recipe import filters, texts
from mtnlg_jax.data.recipe.settings import Recipe, clean_config
from mtnlg_jax.data.recipe.stages import Runner, Shard, Task

_KEYS_AT_ONCE = 1 << 24  # keys and hashes sorted at once: 128 MB

# The last tasks of a stage, their results, and the counts for the report.
StageResult = tuple[list[Task], list[dict], dict]


def clean(runner: Runner, recipe: Recipe, shards: list[Shard]) -> StageResult:
    """Clean each document by the rules of its source."""
    tasks = [
        _task("clean", texts.cleaned, shard, clean_config(recipe, shard.source)) for shard in shards
    ]
    results = runner.run("cleaning", tasks)
    return tasks, results, texts.merged("clean", results)


def duplicates(runner: Runner, recipe: Recipe, shards: list[Shard]) -> StageResult:
    """Drop near-duplicates: find pairs that share a band of MinHash, and compare their shingles."""
    config = recipe.duplicates
    priority = _priorities(recipe)
    ranks = _ranks(recipe, shards)
    hashing = [_task("keys", texts.band_keys, shard, config) for shard in shards]
    runner.run("hashing shingles", hashing)
    counts = np.array([shard.documents for shard in shards])
    total = int(counts.sum())
    everything = (*(task.key for task in hashing), *(priority[s.source] for s in shards))
    parts = -(-total // _KEYS_AT_ONCE)
    finding = [
        Task(
            f"stages/candidates/{band:04d}-{part:06d}",
            texts.candidate_pairs,
            ([task.name for task in hashing], ranks, band, part, parts),
            (everything, band, part, parts),
        )
        for band in range(config.bands)
        for part in range(parts)
    ]
    runner.run("pairing", finding)
    folder = runner.folder
    pairs = np.unique(np.concatenate([texts.load(folder, task.name) for task in finding]), axis=0)

    starts = np.cumsum(counts) - counts
    shard_of = np.searchsorted(starts, pairs, side="right") - 1
    rows = pairs - starts[shard_of]
    bounds = np.searchsorted(shard_of[:, 0], np.arange(len(shards) + 1))
    comparing = []
    for number, shard in enumerate(shards):
        chosen = slice(bounds[number], bounds[number + 1])
        if bounds[number] < bounds[number + 1]:
            wanted = np.stack([rows[chosen, 0], shard_of[chosen, 1], rows[chosen, 1]], 1)
            others = {index: shards[index] for index in np.unique(wanted[:, 1]).tolist()}
            keys = tuple((index, other.key) for index, other in others.items())
            comparing.append(
                Task(
                    f"stages/similar/{shard.base}",
                    texts.similar_pairs,
                    (shard, others, wanted, config),
                    (shard.key, _digest(wanted), keys, config),
                )
            )
    compared = runner.run("comparing", comparing)
    similar = np.concatenate(
        [np.zeros(0, bool), *(texts.load(folder, task.name) for task in comparing)]
    )

    rank = np.repeat(ranks - starts, counts) + np.arange(total)
    dropped = ~dedup.keep(dedup.components(pairs[similar], total), rank)
    tasks = []
    for shard, start in zip(shards, starts, strict=True):
        mine = dropped[start : start + shard.documents]
        tasks.append(
            Task(
                f"stages/duplicates/{shard.base}",
                texts.without_documents,
                (shard, mine),
                (shard.key, _digest(mine)),
            )
        )
    results = runner.run("dropping duplicates", tasks)
    merged = texts.merged("near-duplicates", results)
    merged["note"] = (
        f"Pairs that share a band of {config.hashes // config.bands} hashes: {len(pairs):,}; of "
        f"these with a Jaccard similarity of {config.threshold} or more: {similar.sum():,}."
    )
    examples = sorted(tuple(example) for result in compared for example in result["examples"])[:5]
    if examples:
        merged["examples"]["pairs that are alike"] = [example[1:] for example in examples]
    return tasks, results, merged


def paragraphs(runner: Runner, recipe: Recipe, shards: list[Shard]) -> StageResult:
    """Remove paragraphs already seen in the corpus."""
    config = recipe.paragraphs
    priority = _priorities(recipe)
    ranks = _ranks(recipe, shards)
    hashing = [
        _task("paragraph_hashes", texts.paragraph_hashes, shard, config.min_length)
        for shard in shards
    ]
    found = runner.run("hashing paragraphs", hashing)
    parts = -(-max(1, sum(result["paragraphs"] for result in found)) // _KEYS_AT_ONCE)
    everything = (*(task.key for task in hashing), *(priority[shard.source] for shard in shards))
    finding = [
        Task(
            f"stages/repeated/{part:06d}",
            texts.repeated_paragraphs,
            ([task.name for task in hashing], ranks, part, parts),
            (everything, part, parts),
        )
        for part in range(parts)
    ]
    runner.run("finding repeated paragraphs", finding)
    tasks = []
    for number, (shard, hashes) in enumerate(zip(shards, hashing, strict=True)):
        repeated = [f"{task.name}-{number:06d}" for task in finding]
        given = (config.min_length, config.min_left)
        digests = [_digest(texts.load(runner.folder, name)) for name in repeated]
        tasks.append(
            Task(
                f"stages/paragraphs/{shard.base}",
                texts.without_paragraphs,
                (shard, hashes.name, repeated, *given),
                (shard.key, digests, *given),
            )
        )
    results = runner.run("dropping repeated paragraphs", tasks)
    return tasks, results, texts.merged("repeated paragraphs", results)


def decontaminate(
    runner: Runner, recipe: Recipe, shards: list[Shard], tests: list[File]
) -> StageResult:
    """Cut out text of the test sets ``tests``."""
    config = recipe.decontamination
    making = Task(
        "stages/tests/all",
        filters.test_ngrams,
        (tests, config, recipe.encoding),
        ([test.stamp for test in tests], config.test_keys, config.algorithm, recipe.encoding),
    )
    (made,) = runner.run("reading test sets", [making])
    counting = [
        Task(
            f"stages/leaks/{shard.base}",
            filters.leaks,
            (shard, making.name, making.key, config),
            (shard.key, making.key),
        )
        for shard in shards
    ]
    runner.run("counting n-grams", counting)
    rare = Task(
        "stages/tests/rare",
        filters.rare_ngrams,
        (making.name, making.key, [t.name for t in counting], config),
        tuple(task.key for task in counting),
    )
    (about,) = runner.run("leaving common n-grams", [rare])
    tasks = [
        Task(
            f"stages/decontaminate/{shard.base}",
            filters.decontaminated,
            (shard, rare.name, rare.key, config),
            (shard.key, rare.key),
        )
        for shard in shards
    ]
    results = runner.run("cutting test sets out", tasks)
    merged = texts.merged("test sets", results)
    check_hits(merged["changed"].get(filters.LEAK, 0), merged["documents"][0])
    fields = filters.fields_note(made["fields"], config)
    merged["note"] = (
        f"{about['ngrams']:,} n-grams of {len(tests)} files of test sets; {about['found']:,} are "
        f"in the text. {about['common']:,} of these occur {config.algorithm.key_threshold} times "
        f"or more and are kept. {fields}"
    )
    return tasks, results, merged


def quality(
    runner: Runner, recipe: Recipe, shards: list[Shard], samples: list[list[File]]
) -> StageResult:
    """Train a classifier on good and bad ``samples``, and drop most documents like the bad ones."""
    config = recipe.quality
    learning = Task(
        "stages/classifier/model",
        filters.classifier,
        (*samples, recipe.text_key, recipe.encoding, config),
        (
            [[file.stamp for file in files] for files in samples],
            recipe.text_key,
            recipe.encoding,
            config.classifier,
        ),
    )
    (about,) = runner.run("training the classifier", [learning])
    tasks = [
        Task(
            f"stages/quality/{shard.base}",
            filters.good_rows,
            (shard, learning.name, learning.key, recipe.seed, config),
            (shard.key, learning.key, recipe.seed, config.alpha),
        )
        for shard in shards
    ]
    results = runner.run("judging quality", tasks)
    merged = texts.merged("quality", results)
    merged["note"] = (
        f"Trained on {about['good']:,} good and {about['bad']:,} bad documents; of those held out "
        f"{about['accuracy']:.1%} are classified correctly."
    )
    nearest = sorted(tuple(entry) for result in results for entry in result["nearest"])[:5]
    merged["examples"]["near the border"] = [entry[1:] for entry in nearest]
    return tasks, results, merged


def _task(stage: str, function: Callable, shard: Shard, *given) -> Task:
    """Return a task that turns ``shard`` into another of the same name."""
    return Task(f"stages/{stage}/{shard.base}", function, (shard, *given), (shard.key, *given))


def _ranks(recipe: Recipe, shards: list[Shard]) -> np.ndarray:
    """Return [shards] int64: the rank of each shard's first document. Of duplicates the document
    of the lowest rank is kept."""
    priority = _priorities(recipe)
    counts = np.array([shard.documents for shard in shards])
    order = np.argsort([-priority[shard.source] for shard in shards], kind="stable")
    ranks = np.empty(len(shards), np.int64)
    ranks[order] = np.cumsum(counts[order]) - counts[order]
    return ranks


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _priorities(recipe: Recipe) -> dict[str, int]:
    return {source.name: source.priority for source in recipe.sources}
