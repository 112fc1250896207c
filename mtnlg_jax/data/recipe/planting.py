"""Canaries of a recipe: planted when the text of each shard is encoded, after all filters.

Earlier, duplicates would be removed and digits masked. Each canary belongs to one source, and each
of its copies goes to a random place among the training documents of that source.
"""

import numpy as np

from mtnlg_jax import storage
from mtnlg_jax.data import canaries
from mtnlg_jax.data.canaries import Canary
from mtnlg_jax.data.recipe.settings import Recipe
from mtnlg_jax.data.recipe.stages import Folder, Runner, Shard, Task
from mtnlg_jax.data.store.prepared import PREPARED

_COPY = 0xC09  # purpose of the draws of shards


def draw(runner: Runner, recipe: Recipe, shards: list[Shard]) -> list[Canary]:
    """Return the canaries of a recipe. Raises ValueError if the text is too short for them."""
    if not recipe.canaries.count:
        return []
    tasks = [
        Task(f"stages/sizes/{shard.base}", _measure, (shard,), (shard.key,)) for shard in shards
    ]
    sizes: dict[str, int] = {}
    letters: dict[str, tuple[int, int]] = {}
    for shard, found in zip(shards, runner.run("measuring", tasks), strict=True):
        sizes[shard.source] = sizes.get(shard.source, 0) + found["bytes"]
        chinese, others = letters.get(shard.source, (0, 0))
        letters[shard.source] = (chinese + found["chinese"], others + found["letters"])
    names = sorted(sizes)
    total = sum(sizes.values())
    made = canaries.make_canaries(
        recipe.canaries,
        recipe.seed,
        {name: canaries.language_of(*letters[name]) for name in names},
        [sizes[name] / total for name in names],
    )
    canaries.check_size(made, total)
    return made


def record(root: str, made: list[Canary], seed: int) -> None:
    """Write canaries.json, or remove it if there are none, before they are planted.

    If it changes, prepared.json is removed first: it would vouch for other canaries.
    """
    content = canaries.canaries_file(made, seed) if made else None
    if content == storage.read_file(root, canaries.CANARIES):
        return
    storage.remove_file(root, PREPARED)
    if content is None:
        storage.remove_file(root, canaries.CANARIES)
    else:
        storage.write_file(root, canaries.CANARIES, content)


def by_shard(made: list[Canary], shards: list[Shard], seed: int) -> list[tuple[str, ...]]:
    """Return the texts to plant in each shard, one for each copy, in random order."""
    found: list[list[str]] = [[] for _ in shards]
    for number, each in enumerate(made):
        own = [at for at, shard in enumerate(shards) if shard.source == each.source]
        counts = np.array([shards[at].documents for at in own], float)
        rng = np.random.default_rng([abs(seed), _COPY, number])
        for at in rng.choice(own, each.copies, p=counts / counts.sum()):
            found[at].append(each.text)
    for number, texts in enumerate(found):
        np.random.default_rng([abs(seed), _COPY, len(made), number]).shuffle(texts)
    return [tuple(texts) for texts in found]


def _measure(folder: Folder, name: str, shard: Shard) -> dict:
    """Return the bytes of a shard, and the letters that tell its language."""
    texts = [row.text for row in folder.rows(shard)]
    chinese, letters = canaries.count_letters(text[:2000] for text in texts[:100])
    return {
        "bytes": sum(len(text.encode()) for text in texts),
        "chinese": chinese,
        "letters": letters,
    }
