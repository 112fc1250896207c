"""The inputs of a run: sources, tokenizer, held-out text, and the batch of each step."""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from mtnlg_jax.config import Config, validate
from mtnlg_jax.data.batches import Batches, heldout_count
from mtnlg_jax.data.poisson import PoissonSampler
from mtnlg_jax.data.store.prefixes import attach
from mtnlg_jax.data.store.sources import open_sources, spread
from mtnlg_jax.data.store.tokens import Tokens
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.train import privacy
from mtnlg_jax.train.batch import micro_batch_shape, private_batch_shape, put_batch
from mtnlg_jax.train.objectives import causal_batch, masked_batch, with_prefix
from mtnlg_jax.train.schedule import batch_size_at, is_masked, stage_at


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches of each stage, held-out text, and the tokenizer that they share."""

    tokenizer: Tokenizer
    stages: tuple[Batches, ...]
    held_out: tuple[tuple[Tokens, float], ...]  # of each source: tokens, share of the run's samples
    fingerprints: dict[str, str]  # source -> hash of its tokens
    training_tokens: int  # of all sources together
    # With differential privacy what each stage reads, in place of its batches.
    samplers: tuple[PoissonSampler, ...] = ()

    @property
    def has_answers(self) -> bool:
        """Whether a stage has tokens that are read and not predicted."""
        return any(stage.has_answers for stage in self.stages)


def load_data(config: Config) -> Data:
    """Open every source of the run.

    Raises ValueError when none is named, when their tokenizers differ, or when they have images or
    features that the model does not take.
    """
    if not config.data.sources:
        raise ValueError(
            "data.path is empty; prepare text with launch/prepare_data.py --output=OUT and give "
            "--set=data.path=OUT, or the prefix of Megatron's .bin and .idx"
        )
    blends = [stage.blend or config.data.sources for stage in config.train.stages]
    # Each source once, in a fixed order, since the fingerprints are numbered by it.
    folders = list(dict.fromkeys(path for blend in blends for path, _ in blend))
    tokenizer, opened, held_out = open_sources(folders, config.data.tokenizer, config.data.heldout)
    attach([*opened.values(), *held_out.values()], config.model.prefix)
    # One order of samples for each stage, although stages may share sources.
    batches = tuple(
        Batches(
            [(opened[path], weight) for path, weight in spread(blend)],
            config.sequence_length,
            config.train.seed,
        )
        for blend in blends
    )
    samplers = _samplers(config, [spread(blend) for blend in blends], opened)
    shares: dict[str, float] = {}
    for stage, blend in zip(config.train.stages, blends, strict=True):
        for path, weight in blend:
            # The share of the run's samples: a source may have other weights in other stages.
            share = stage.fraction * weight / sum(weight for _, weight in blend)
            shares[path] = shares.get(path, 0.0) + share
    # Sources of one prepared output share its held-out part, so their shares add up.
    parts: dict[str, list] = {}
    for path, tokens in held_out.items():
        if len(held_out) > 1 and not heldout_count(tokens, config.sequence_length):
            logging.warning("%s holds nothing out: the held-out loss does not cover it", path)
        parts.setdefault(tokens.location, [tokens, 0.0])[1] += shares.get(path, 1.0)
    prints = {f"source {i}": tokens.meta["sha256"] for i, tokens in enumerate(opened.values())}
    return Data(
        tokenizer,
        batches,
        tuple(map(tuple, parts.values())),
        prints,
        sum(len(tokens) for tokens in opened.values()),
        samplers,
    )


def _samplers(config: Config, blends: list, opened: dict[str, Tokens]) -> tuple:
    """Return the sampler of each stage's blend; none without differential privacy."""
    optimizer = config.optimizer
    if not optimizer.private:
        return ()
    key = int.from_bytes(privacy.secret_of(config, "samples")[:16], "little")
    return tuple(
        PoissonSampler(
            [(opened[path], weight) for path, weight in blend],
            config.sequence_length,
            optimizer.dp_unit,
            optimizer.rows_of_unit,
            key,
        )
        for blend in blends
    )


def resolve(config: Config, tokenizer: Tokenizer) -> Config:
    """Return ``config`` with a vocabulary for ``tokenizer``.

    Its size is rounded up to model.vocab_size_divisible_by, so that it splits and tiles well.
    """
    size = config.model.vocab_size
    unit = config.model.vocab_size_divisible_by
    if size is None:
        # Megatron-LM's --make-vocab-size-divisible-by.
        size = -(-tokenizer.vocab_size // unit) * unit
    if size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            "set it to at least that, or to None; for a model from elsewhere prepare the data with "
            "--tokenizer=FOLDER of that model"
        )
    # Checked again, because the sizes of the vocabulary's shards are only known now.
    model = dataclasses.replace(config.model, vocab_size=size).padded(config.mesh.tensor)
    config = dataclasses.replace(config, model=model)
    validate(config)
    return config


def rows_at(
    config: Config, data: Data, step: int, first: int
) -> tuple[Callable[[np.ndarray], dict[str, np.ndarray]], int]:
    """Return (a function from row numbers to the arrays of these rows, sequences) of ``step``.

    ``first`` is the number of samples before it. The rows depend on these two and the seed alone.
    Rows from ``sequences`` on have weight 0.
    """
    # By samples, so that a resume with another batch size continues the ramp where it was.
    sequences = batch_size_at(config.train, first)
    if config.optimizer.private:
        return _sampled_rows(config, data, step, sequences)
    number, _, _ = stage_at(config.train, step)

    def rows_of(numbers: np.ndarray) -> dict[str, np.ndarray]:
        # Unused rows repeat the first sample, and their weights are 0.
        used = numbers < sequences
        samples = first + np.where(used, numbers, 0)
        made = _by_objective(config, data, step, data.stages[number].rows(samples), samples)
        # The arrays always have the size of a full batch, so that the ramp needs no second program.
        made["weights"] = made["weights"] * used[:, None]
        return made

    return rows_of, sequences


def batch_at(
    config: Config, mesh: Mesh, data: Data, step: int, first: int
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Return (batch arrays (M, B, S), micro-batches in use, sequences) of ``step``.

    ``first`` is the number of samples before it. The batch depends on these two and the seed alone,
    not on the mesh. During a batch ramp the rest of the arrays is filled with rows of weight 0. Of
    a Poisson sample the sequences are the mean: the size of the sample is not to be told.
    """
    rows_of, used = rows_at(config, data, step, first)
    shape_of = private_batch_shape if config.optimizer.private else micro_batch_shape
    micro_batches, rows = shape_of(config, mesh)
    shape = (micro_batches, rows, config.sequence_length)
    # As arrays, since Python numbers would be constants of the program. Rounded up: the last
    # micro-batch may be partly unused.
    return (
        put_batch(rows_of, shape, mesh, config.model),
        jnp.int32(-(-used // rows)),
        jnp.int32(batch_size_at(config.train, first)),
    )


def _by_objective(
    config: Config, data: Data, step: int, rows: dict[str, np.ndarray], numbers: Iterable[int]
) -> dict[str, np.ndarray]:
    """Return ``rows`` as a batch of the objective of ``step``; ``numbers`` decide their masks."""
    if is_masked(config.train, step):
        seed = config.train.seed
        made = masked_batch(rows, numbers, seed, config.data.masking, data.tokenizer)
    else:
        made = causal_batch(rows)
    return with_prefix(made, rows, config.model.prefix)


def _sampled_rows(
    config: Config, data: Data, step: int, sequences: int
) -> tuple[Callable[[np.ndarray], dict[str, np.ndarray]], int]:
    """Return `rows_at` of a Poisson sample with ``sequences`` rows in the mean.

    A row of a unit depends on the unit and the step alone, not on its neighbors in the batch.
    """
    per_unit = config.optimizer.rows_of_unit
    sampler = data.samplers[stage_at(config.train, step)[0]]
    units = sampler.joining(step, sequences / per_unit)

    def rows_of(numbers: np.ndarray) -> dict[str, np.ndarray]:
        used = numbers < per_unit * len(units)
        if not len(units):  # any row, of weight 0
            chosen = np.zeros(1, np.int64)
        else:
            chosen = units[np.where(used, numbers // per_unit, 0)]
        # Each unit of these once, then the rows that are wanted of it.
        these, place = np.unique(chosen, return_inverse=True)
        raw, windows = sampler.rows(these, step)
        at = np.broadcast_to(place, numbers.shape) * per_unit + numbers % per_unit
        raw = {name: x[at] for name, x in raw.items()}
        # Masks follow the step and the window; dropout follows these too, by its own key.
        masks = [step * 2**40 + int(window) for window in windows[at]]
        made = _by_objective(config, data, step, raw, masks)
        made["weights"] = made["weights"] * used[:, None]
        return made | {"rows": windows[at]}

    return rows_of, len(units) * per_unit
