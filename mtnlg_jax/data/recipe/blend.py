"""The stage "tokens": tokenizer, token arrays of each source, and the blend to train on."""

from mtnlg_jax import storage
from mtnlg_jax.data.canaries import summary
from mtnlg_jax.data.recipe import arrays, planting
from mtnlg_jax.data.recipe.settings import Recipe
from mtnlg_jax.data.recipe.stages import Runner, Shard
from mtnlg_jax.data.store.prepared import PREPARED, prepared_sources, tokenizer_info
from mtnlg_jax.data.tokenizer import load_tokenizer


def make_tokens(runner: Runner, recipe: Recipe, shards: list[Shard]) -> dict:
    """Write tokenizer/, sources/NAME/train and heldout/; return their part of report.json.

    "prepared" in it is the content of prepared.json, which the caller writes last.
    """
    common = (recipe.heldout, recipe.seed)
    training = arrays.tokenizer_task(shards, recipe.tokenizer, recipe.vocab_size, *common)
    if not runner.is_done(training):
        storage.remove_file(runner.root, PREPARED)  # the data it describes is about to change
    made = planting.draw(runner, recipe, shards)
    runner.run(f"training {recipe.tokenizer}", [training])
    folder = storage.join(runner.root, "tokenizer")
    tokenizer = load_tokenizer(folder)
    planting.record(runner.root, made, recipe.seed)
    planted = planting.by_shard(made, shards, recipe.seed)
    encoding = arrays.encode_tasks(shards, folder, tokenizer.fingerprint, *common, planted)
    results = runner.run("encoding", encoding)

    names = sorted({shard.source for shard in shards})
    numbers = {
        name: [number for number, shard in enumerate(shards) if shard.source == name]
        for name in names
    }
    places = [("heldout", "heldout", list(range(len(shards))))]
    places += [("train", f"sources/{name}/train", numbers[name]) for name in names]
    frames = []
    filling = []
    for part, place, chosen in places:
        frame, fill = arrays.array_tasks(
            [encoding[number] for number in chosen],
            [results[number] for number in chosen],
            place,
            part,
            recipe.seed,
            tokenizer,
        )
        frames.append(frame)
        filling += fill
    if not all(runner.is_done(task) for task in frames + filling):
        storage.remove_file(runner.root, PREPARED)
    heldout, *metas = runner.run("making arrays", frames)
    runner.run("writing tokens", filling)
    for name in storage.list_files(runner.root, "sources"):
        if name.split("/")[1] not in names:
            storage.remove_file(runner.root, name)
    report = _report(
        recipe, tokenizer_info(tokenizer), dict(zip(names, metas, strict=True)), heldout
    )
    if made:
        report["canaries"] = summary(made)
        report["prepared"]["canaries"] = report["canaries"]
    return report


def _report(recipe: Recipe, tokenizer: dict, trained: dict[str, dict], heldout: dict) -> dict:
    """``trained`` and ``heldout`` hold the meta.json of the training tokens by source and of the
    held-out tokens."""
    weights = _weights(recipe, trained)
    total = sum(meta["tokens"] for meta in trained.values())
    seen = recipe.train_tokens or total
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
    prepared = prepared_sources(tokenizer, trained, heldout, weights)
    return {
        "blend": blend,
        "train_tokens": seen,
        "tokenizer": tokenizer,
        "outputs": {
            "all": prepared["fingerprint"],
            "tokenizer": tokenizer["fingerprint"],
            "heldout": heldout["sha256"],
            **{name: meta["sha256"] for name, meta in trained.items()},
        },
        "prepared": prepared,
        "tokens": {"train": total, "heldout": heldout["tokens"]},
    }


def _weights(recipe: Recipe, trained: dict[str, dict]) -> dict[str, float]:
    """Return the share of the samples of each source that has tokens; they add up to 1."""
    given = {source.name: source.weight for source in recipe.sources}
    empty = [
        name for name, weight in given.items() if weight and not trained.get(name, {}).get("tokens")
    ]
    if empty:
        raise ValueError(
            f"source {empty[0]!r} has the weight {given[empty[0]]}, and no text of it is left to "
            "train on; loosen the rule that dropped it, or leave the source out (--skip_sources)"
        )
    weights: dict[str, float] = {}
    for name, meta in trained.items():
        weight = given[name]
        weights[name] = meta["tokens"] if weight is None else weight
    total = sum(weights.values())
    if not total:
        raise ValueError(
            f"heldout={recipe.heldout} leaves nothing to train on; give more text, or hold less out"
        )
    return {name: weight / total for name, weight in weights.items()}
