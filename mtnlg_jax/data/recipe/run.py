"""The recipe from end to end: each stage's tasks, what is decided between them, and the report."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mtnlg_jax import storage
from mtnlg_jax.data.filter import dedup
from mtnlg_jax.data.filter.decontaminate import check_hits
from mtnlg_jax.data.read.documents import ReadReport, list_files, note_lines
from mtnlg_jax.data.read.open_files import READ_ALREADY, File, find
from mtnlg_jax.data.recipe import arrays, filters, texts
from mtnlg_jax.data.recipe.report import render
from mtnlg_jax.data.recipe.settings import Recipe, clean_config, validate, with_sources
from mtnlg_jax.data.recipe.stages import Runner, Shard, Task, in_processes, shards_of
from mtnlg_jax.data.tokenizer import load_tokenizer

_KEYS_AT_ONCE = 1 << 24  # keys and hashes that are sorted at once: 128 MB


def make(
    recipe: Recipe,
    root: str | None,
    output: str,
    *,
    engine=None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Runs ``recipe`` over the text below ``root`` into ``output``, a folder or a URL, and returns
    what report.json holds. A run that was stopped goes on with the same call; each result depends
    on the text and the recipe alone.

    ``output`` holds at the end: prepared.json (what ``data.path`` of a run wants), tokenizer/,
    sources/NAME/train, heldout/, report.html, report.json, and stages/ with what each stage left,
    Parquet files of text and place. Without the stage "tokens" the texts of the last stage are the
    result.

    ``engine``: `in_processes` (default: one for each core) or `on_ray`. Memory: some times
    ``recipe.shard_bytes`` a process, and 40 bytes for each document and 80 for each pair of
    possible duplicates here.

    Raises ValueError or FileNotFoundError before any work where that can be known, FileExistsError
    where ``output`` was made of other settings or other input and not ``overwrite``.
    """
    validate(recipe)
    output = str(output).rstrip("/")
    _refuse_place(None if root is None else str(root), output)
    recipe = with_sources(recipe, None if root is None else str(root))
    files, left_out = _input_files(recipe)
    reports = {"test sets": ReadReport(), "samples of quality": ReadReport()}
    tests = []
    if "decontaminate" in recipe.stages:
        tests = filters.test_files(recipe.decontamination, reports["test sets"])
    samples = [
        filters.files_of(paths, reports["samples of quality"])
        for paths in (recipe.quality.good, recipe.quality.bad)
    ]
    left_out += [texts.named_after(name, report.notes) for name, report in reports.items()]
    left_out += [_beside(recipe, str(root))] if root is not None else []
    stamps = {f"{name}/{file.name}": file.stamp for name, group in files.items() for file in group}
    stamps |= {file.path: file.stamp for file in (*tests, *samples[0], *samples[1])}
    if recipe.tokenizer not in ("bpe", "unigram"):
        brought = load_tokenizer(recipe.tokenizer)
        brought.check_end()
        stamps[recipe.tokenizer] = brought.fingerprint
    with _locked(output):
        _check_output(recipe, output, stamps, overwrite)
        kept = "what is done is kept, and the same command goes on from there"
        with storage.disk_errors(output, kept), engine or in_processes(os.cpu_count() or 1) as do:
            runner = Runner(output, do, progress)
            info = _run(runner, recipe, files, tests, samples, left_out)
        runner.prune("stages")
    return info


def _run(
    runner: Runner,
    recipe: Recipe,
    files: dict[str, list[File]],
    tests: list[File],
    samples: list[list[File]],
    left_out: list[dict],
) -> dict:
    priority = {source.name: source.priority for source in recipe.sources}
    tasks = _read_tasks(recipe, files)
    results = runner.run("reading", tasks)
    inputs = {name: entry for result in results for name, entry in result["inputs"].items()}
    stages = [texts.merged("read", results)]
    texts.with_notes(stages[0], [*left_out, *(result["notes"] for result in results)])
    shards = _left(tasks, results, stages, [])
    skipping = {source.name: source.skip_stages for source in recipe.sources}
    for stage in recipe.stages:
        passing = [shard for shard in shards if stage in skipping[shard.source]]
        treated = [shard for shard in shards if stage not in skipping[shard.source]]
        if not treated:
            continue
        if stage == "clean":
            configs = {shard.source: clean_config(recipe, shard.source) for shard in treated}
            tasks = [
                _task("clean", texts.cleaned, shard, configs[shard.source]) for shard in treated
            ]
            results = runner.run("cleaning", tasks)
            stages.append(texts.merged("clean", results))
        elif stage == "duplicates":
            tasks, results, counts = _duplicates(runner, recipe, treated, priority)
            stages.append(counts)
        elif stage == "paragraphs":
            tasks, results = _paragraphs(runner, recipe, treated, priority)
            stages.append(texts.merged("repeated paragraphs", results))
        elif stage == "decontaminate" and tests:
            tasks, results, counts = _decontaminated(runner, recipe, treated, tests)
            stages.append(counts)
        elif stage == "quality" and recipe.quality.good:
            tasks, results, counts = _quality(runner, recipe, treated, samples)
            stages.append(counts)
        else:
            continue
        if passing:
            names = ", ".join(sorted({shard.source for shard in passing}))
            words = (
                f"Not run over {names}: {sum(shard.documents for shard in passing):,} documents."
            )
            stages[-1]["note"] = " ".join(filter(None, [stages[-1].get("note"), words]))
        shards = _left(tasks, results, stages, passing)
    info = {
        "name": recipe.name,
        "settings": _flat(dataclasses.asdict(recipe)),
        "stages": stages,
        "inputs": inputs,
        "outputs": {},
    }
    if "tokens" not in recipe.stages:  # what a run before made, with other stages
        storage.remove_file(runner.root, "prepared.json")
        for name in [
            name
            for folder in ("sources", "heldout", "tokenizer")
            for name in storage.list_files(runner.root, folder)
        ]:
            storage.remove_file(runner.root, name)
    else:
        info |= _arrays(runner, recipe, shards)
    info = json.loads(json.dumps(info))  # as it will be read: tuples are lists
    storage.write_file(
        runner.root, "report.json", json.dumps(info, indent=1, ensure_ascii=False).encode()
    )
    storage.write_file(runner.root, "report.html", render(info).encode())
    if "prepared" in info:  # last: without it nothing opens the data
        prepared = json.dumps(info.pop("prepared"), indent=1, ensure_ascii=False).encode()
        storage.write_file(runner.root, "prepared.json", prepared)
    return info


def summary(info: dict) -> str:
    """A few lines for a person: what each stage took, and how often training sees each source."""
    lines = []
    for stage in info["stages"]:
        before, after = stage["documents"]
        size, left = stage["bytes"]
        took = sorted(stage["dropped"].items(), key=lambda item: -item[1])[:3]
        why = "; dropped: " + ", ".join(f"{count:,} {rule}" for rule, count in took) if took else ""
        kept = (
            f"{after:,} of {before:,} documents, {left / size:.2%} of the text"
            if size
            else f"{after:,} documents, {left:,} bytes"
        )
        lines.append((stage["name"], kept + why))
        lines += [("", line) for line in note_lines(stage.get("notes", {}))]
    for row in info.get("blend", ()):
        lines.append(
            (
                row["name"],
                f"{row['tokens']:,} tokens, weight {row['weight']:.5f}, {row['epochs']:.2f} epochs "
                f"in {info['train_tokens']:,} tokens",
            )
        )
    if "tokens" in info:
        lines.append(
            (
                "tokens",
                f"{info['tokens']['train']:,} to train on, {info['tokens']['heldout']:,} held out; "
                f"{info['tokenizer']['kind']}, {info['tokenizer']['vocab_size']:,} pieces",
            )
        )
        if losses := info["tokenizer"].get("losses"):
            lines.append(("tokenizer", f"it is not lossless; a text loses {', '.join(losses)}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {words}" for name, words in lines)


def _left(
    tasks: list[Task], results: list[dict], stages: list[dict], passing: list[Shard]
) -> list[Shard]:
    """What a stage left and what it did not touch, in the order of the shards that were read."""
    shards = sorted([*shards_of(tasks, results), *passing], key=lambda shard: shard.base)
    if not shards:
        last = stages[-1]
        raise ValueError(
            f"nothing is left after the stage {last['name']!r}, to which {last['documents'][0]} documents "
            f"came: {last['dropped'] or last['tables']}; loosen the rule that took most"
        )
    return shards


def _task(stage: str, function: Callable, shard: Shard, *given) -> Task:
    """One that makes of ``shard`` another of the same name."""
    return Task(f"stages/{stage}/{shard.base}", function, (shard, *given), (shard.key, *given))


def _read_tasks(recipe: Recipe, files: dict[str, list[File]]) -> list[Task]:
    tasks = []
    for source in recipe.sources:
        groups = [[]]
        size = 0
        for file in files[source.name]:
            if size and size + file.size > recipe.shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(file)
            size += file.size
        for number, group in enumerate(groups):
            given = (
                source.text_key,
                recipe.on_error,
                recipe.max_document_bytes,
                recipe.shard_bytes,
                recipe.encoding,
            )
            tasks.append(
                Task(
                    f"stages/read/{source.name}-{number:06d}",
                    texts.read,
                    (group, source.name, *given),
                    ([(file.name, file.stamp) for file in group], source.name, *given),
                )
            )
    return tasks


def _ranks(shards: list[Shard], priority: dict[str, int]) -> np.ndarray:
    """int64 [shards]: of each shard's first document, its place in the order in which duplicates
    are kept."""
    counts = np.array([shard.documents for shard in shards])
    order = np.argsort([-priority[shard.source] for shard in shards], kind="stable")
    ranks = np.empty(len(shards), np.int64)
    ranks[order] = np.cumsum(counts[order]) - counts[order]
    return ranks


def _duplicates(runner: Runner, recipe: Recipe, shards: list[Shard], priority: dict[str, int]):
    config = recipe.duplicates
    ranks = _ranks(shards, priority)
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
        f"Pairs that share a band of {config.hashes // config.bands} hashes: {len(pairs):,}; of these "
        f"with a Jaccard similarity of {config.threshold} or more: {similar.sum():,}."
    )
    examples = sorted(tuple(example) for result in compared for example in result["examples"])[:5]
    if examples:
        merged["examples"]["pairs that are alike"] = [example[1:] for example in examples]
    return tasks, results, merged


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _paragraphs(runner: Runner, recipe: Recipe, shards: list[Shard], priority: dict[str, int]):
    config = recipe.paragraphs
    ranks = _ranks(shards, priority)
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
    return tasks, runner.run("dropping repeated paragraphs", tasks)


def _decontaminated(runner: Runner, recipe: Recipe, shards: list[Shard], tests: list[File]):
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
    merged["note"] = (
        f"{about['ngrams']:,} n-grams of {len(tests)} files of test sets; {about['found']:,} are in the "
        f"text, and {about['common']:,} of them so often ({config.algorithm.key_threshold} times) that "
        f"they stay. {filters.fields_note(made['fields'], config)}"
    )
    return tasks, results, merged


def _quality(runner: Runner, recipe: Recipe, shards: list[Shard], samples: list[list[File]]):
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
    (about,) = runner.run("learning good from bad", [learning])
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
        f"Learnt from {about['good']:,} good and {about['bad']:,} bad documents; of those held out "
        f"{about['accuracy']:.1%} are told apart."
    )
    nearest = sorted(tuple(entry) for result in results for entry in result["nearest"])[:5]
    merged["examples"]["near the border"] = [entry[1:] for entry in nearest]
    return tasks, results, merged


def _arrays(runner: Runner, recipe: Recipe, shards: list[Shard]) -> dict:
    common = (recipe.heldout, recipe.seed)
    making = arrays.tokenizer_task(shards, recipe.tokenizer, recipe.vocab_size, *common)
    if not runner.is_done(making):
        storage.remove_file(runner.root, "prepared.json")  # what it stands for is about to change
    (about,) = runner.run(f"training {recipe.tokenizer}", [making])
    tokenizer = load_tokenizer(storage.join(runner.root, "tokenizer"))
    about = about | {"losses": tokenizer.losses()}
    encoding = arrays.encode_tasks(
        shards, storage.join(runner.root, "tokenizer"), tokenizer.fingerprint, *common
    )
    results = runner.run("encoding", encoding)
    names = sorted({shard.source for shard in shards})
    places = {("heldout", "heldout"): list(range(len(shards)))}
    places |= {
        ("train", f"sources/{name}/train"): [
            number for number, shard in enumerate(shards) if shard.source == name
        ]
        for name in names
    }
    frames = []
    filling = []
    for (part, place), numbers in places.items():
        frame, fill = arrays.array_tasks(
            [encoding[number] for number in numbers],
            [results[number] for number in numbers],
            place,
            part,
            recipe.seed,
            tokenizer,
        )
        frames.append(frame)
        filling += fill
    if not all(runner.is_done(task) for task in frames + filling):
        storage.remove_file(runner.root, "prepared.json")
    metas = runner.run("making arrays", frames)
    runner.run("writing tokens", filling)
    for name in storage.list_files(runner.root, "sources"):
        if name.split("/")[1] not in names:
            storage.remove_file(runner.root, name)
    heldout = metas[0]
    trained = dict(zip(names, metas[1:], strict=True))
    weights = _weights(recipe, trained)
    seen = recipe.train_tokens or sum(meta["tokens"] for meta in trained.values())
    blend = [
        {
            "name": name,
            "documents": meta["documents"],
            "tokens": meta["tokens"],
            "bytes_per_token": meta["bytes"] / max(1, meta["tokens"]),
            "weight": weights[name],
            "epochs": seen * weights[name] / max(1, meta["tokens"]),
        }
        for name, meta in trained.items()
    ]
    content = [
        tokenizer.fingerprint,
        heldout["sha256"],
        *(meta["sha256"] for meta in trained.values()),
    ]
    fingerprint = hashlib.sha256(json.dumps([content, weights]).encode()).hexdigest()
    prepared = {
        "fingerprint": fingerprint,
        "tokenizer": about,
        "train": _total(trained),
        "heldout": heldout,
        "sources": [[f"sources/{name}", weights[name]] for name in names],
    }
    outputs = {
        "all": fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "heldout": heldout["sha256"],
        **{name: meta["sha256"] for name, meta in trained.items()},
    }
    return {
        "blend": blend,
        "train_tokens": seen,
        "tokenizer": about,
        "outputs": outputs,
        "prepared": prepared,
        "tokens": {
            "train": sum(meta["tokens"] for meta in trained.values()),
            "heldout": heldout["tokens"],
        },
    }


def _weights(recipe: Recipe, trained: dict[str, dict]) -> dict[str, float]:
    """Of each source that has tokens, its share of the samples."""
    given = {source.name: source.weight for source in recipe.sources}
    empty = [
        name for name, weight in given.items() if weight and not trained.get(name, {}).get("tokens")
    ]
    if empty:
        raise ValueError(
            f"source {empty[0]!r} has the weight {given[empty[0]]}, and no text of it is left to train "
            "on; loosen the rule that took it, or leave the source out (--skip_sources)"
        )
    weights = {
        name: meta["tokens"] if given[name] is None else given[name]
        for name, meta in trained.items()
    }
    total = sum(weights.values())
    if not total:
        raise ValueError(
            f"heldout={recipe.heldout} leaves nothing to train on; give more text, or hold less out"
        )
    return {name: weight / total for name, weight in weights.items()}


def _total(trained: dict[str, dict]) -> dict:
    first = next(iter(trained.values()))
    counts = {
        key: sum(meta[key] for meta in trained.values()) for key in ("tokens", "documents", "bytes")
    }
    digest = hashlib.sha256(
        json.dumps([meta["sha256"] for meta in trained.values()]).encode()
    ).hexdigest()
    return {**first, **counts, "sha256": digest}


def _refuse_place(root: str | None, output: str) -> None:
    """Before anything is written: an output that would be read as input, or holds something
    else."""
    if (
        root
        and not storage.is_remote(root)
        and not storage.is_remote(output)
        and Path(output).absolute().is_relative_to(Path(root).absolute())
    ):
        raise ValueError(
            f"output {output} lies inside the input {root} and would be read as text; put it elsewhere"
        )
    if storage.read_file(output, "recipe.json") is None and any(
        not name.startswith(".") for name in storage.list_files(output, "")
    ):
        raise FileExistsError(
            f"{output} exists and is no output of a recipe (no recipe.json); choose another --output"
        )


def _input_files(recipe: Recipe) -> tuple[dict[str, list[File]], list[dict]]:
    """(the files of each source, in the order of their names; what was left out, as notes of
    `ReadReport`). A file to which links lead from two sources, or a link from one and its own name
    in another, belongs to one of them."""
    found = {}
    reports = {source.name: ReadReport() for source in recipe.sources}
    for source in recipe.sources:
        report = reports[source.name]
        listed = [list_files(path, report) for path in source.paths]
        files = [file for part in listed for file in part]
        if not files:
            raise ValueError(
                "; ".join(
                    [
                        f"source {source.name!r} has nothing to read: {', '.join(source.paths)} "
                        f"({report.skipped_files} files of unknown suffix)",
                        *note_lines(report.notes)[:3],
                    ]
                )
            )
        if len({file.name for file in files}) < len(
            files
        ):  # of two folders: told apart by the folders
            files = [
                dataclasses.replace(file, name=f"{number}/{file.name}")
                for number, part in enumerate(listed)
                for file in part
            ]
        paths = [file.path for file in files]
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise ValueError(f"source {source.name!r} would read {twice} twice; name it once")
        found[source.name] = sorted(files, key=lambda file: file.name)
    if any(file.linked for files in found.values() for file in files):
        own = {file.real for files in found.values() for file in files if not file.linked}
        for name, files in found.items():
            kept = []
            for file in files:
                if file.linked and file.real in own:
                    reports[name].note(f"left out, {READ_ALREADY}", file.name)
                else:
                    kept.append(file)
                    own.add(file.real)
            found[name] = kept
    left_out = [texts.named_after(name, report.notes) for name, report in reports.items()]
    return found, left_out


def _beside(recipe: Recipe, root: str) -> dict[str, dict]:
    """Notes of what lies in ``root`` itself, beside the sources."""
    if storage.is_remote(root):
        found = find(root)
        names = {
            name.split("/")[0]
            for name in (
                *(file.name for file in found.files),
                *(name for _, name in found.left_out),
            )
        }
    else:
        names = os.listdir(root) if os.path.isdir(root) else []
    paths = [path.rstrip("/") + "/" for source in recipe.sources for path in source.paths]
    report = ReadReport()
    for name in sorted(names):
        place = storage.join(root, name) + "/"
        if not any(place.startswith(path) or path.startswith(place) for path in paths):
            report.note("left out, in no source", name)
    return report.notes


def _check_output(recipe: Recipe, output: str, stamps: dict[str, str], overwrite: bool) -> None:
    """Compares with recipe.json, which says what the output is being made of, and writes it."""
    settings = _flat(dataclasses.asdict(dataclasses.replace(recipe, sources=())))
    sources = {}
    for source in recipe.sources:
        own = filter(None, (source.settings, source.skip_stages))
        sources[source.name] = [source.weight, source.priority, source.text_key, *own]
    wanted = json.loads(json.dumps({"settings": settings, "sources": sources, "inputs": stamps}))
    content = storage.read_file(output, "recipe.json")
    if content is not None and not overwrite:
        begun = json.loads(content)
        if begun["settings"].keys() != wanted["settings"].keys():
            raise FileExistsError(
                f"{output} was begun by another version, which has other settings; choose another "
                "--output, or --overwrite: then all of it is made again"
            )
        for what, way in (("settings", "settings"), ("sources", "sources"), ("inputs", "input")):
            changed = sorted(
                key
                for key in begun[what].keys() | wanted[what].keys()
                if begun[what].get(key) != wanted[what].get(key)
            )
            if changed:
                key = changed[0]
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                raise FileExistsError(
                    f"{output} was begun with other {way}: {key} was {begun[what].get(key)} and is "
                    f"{wanted[what].get(key)}{more}; choose another --output, or --overwrite: then "
                    "all that depends on it is made again"
                )
    storage.write_file(
        output, "recipe.json", json.dumps(wanted, indent=1, ensure_ascii=False).encode()
    )


@contextlib.contextmanager
def _locked(output: str):
    """One run at a time in a local folder."""
    if storage.is_remote(output):
        yield
        return
    os.makedirs(output, exist_ok=True)
    with open(f"{output}/.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"another run is at work in {output}; wait for it, or choose another --output"
            ) from None
        yield


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
