"""The held-out loss of a run while it trains."""

# Shapes: M micro-batches of a batch, G of them that one pipeline stage embeds, B rows, S positions,
# D width

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config
from mtnlg_jax.data.batches import HeldOut
from mtnlg_jax.data.held_out_sources import HeldOutSources
from mtnlg_jax.model.params import split_params
from mtnlg_jax.parallel.collectives import axis_index, axis_size, vary
from mtnlg_jax.parallel.mesh import BATCH, ROWS, specs_of
from mtnlg_jax.parallel.pipeline import circular, to_rounds
from mtnlg_jax.train import lora
from mtnlg_jax.train.batch import micro_batch_shape, put_batch
from mtnlg_jax.train.gradients import batch_specs, chunk_of, over_mesh, sum_shared
from mtnlg_jax.train.inputs import Data
from mtnlg_jax.train.micro_batches import MicroBatches
from mtnlg_jax.train.objectives import causal_batch, masked_batch, with_prefix
from mtnlg_jax.train.weights import make_weights

EVALUATION_ROWS = 16  # held-out sequences in one of train.eval_batches


class Evaluator:
    """Held-out loss, perplexity and bits per byte of the objectives that the run trains.

    The rows are always the same (`HeldOut`). The loss of several sources is the mean of their
    losses, weighted by their shares of the run's samples. Where there are several, each source's
    own loss is a result as well.
    """

    def __init__(self, config: Config, mesh: Mesh, data: Data):
        self.config = config
        self.mesh = mesh
        self.data = data
        stages = config.train.stages
        self.objectives = []
        # A stage with a mix trains both objectives.
        if any(stage.masked < 1 for stage in stages):
            self.objectives.append("causal")
        if any(stage.masked > 0 for stage in stages):
            self.objectives.append("masked")
        self.held_out = HeldOut(
            data.held_out, config.sequence_length, EVALUATION_ROWS * config.train.eval_batches
        )
        self.sources = HeldOutSources(self.held_out, config.sequence_length)
        # Behind the rows of the mean come those of sources that it would leave out.
        self._part = np.concatenate([self.held_out.source, self.sources.part])
        self._window = np.concatenate([self.held_out.window, self.sources.window])
        self._steps = {
            name: make_eval(
                config,
                mesh,
                causal=name == "causal",
                sparse=data.has_answers,
                sources=len(self.sources) if self._several else 0,
            )
            for name in self.objectives
        }

    @property
    def _several(self) -> bool:
        # The loss of a single source is the mean.
        return len(self.sources) > 1

    def __call__(self, params: nnx.State) -> dict[str, float]:
        """Evaluate ``state.params``; {} when nothing is held out.

        The keys are causal_loss, perplexity, bits_per_byte and masked_loss, and the size of the
        causal text: scored_tokens and scored_bytes. With several sources also causal_loss/NAME and
        masked_loss/NAME of each, the mean over its predicted tokens.
        """
        result: dict[str, float] = {}
        # Once for all batches and objectives.
        params = lora.computed(params, self.config)
        for name in self.objectives if len(self.held_out) else ():
            total = 0.0
            weight = 0.0
            nats_of_sources = np.zeros(len(self.sources))
            for batch, in_mean in self._batches(name):
                nats, tokens, *by_source = self._steps[name](params, batch)
                # Added on the host in float64: float32 would lose digits over many batches.
                if in_mean:
                    total += float(nats)
                    weight += float(tokens)
                for each in by_source:
                    nats_of_sources += np.asarray(each, np.float64)
            # No row has a token to predict, for example no answer.
            if not weight:
                continue
            loss = total / weight
            result[f"{name}_loss"] = loss
            if self._several:
                tokens_of = self._counts[name].of_sources
                each = zip(self.sources.names, nats_of_sources, tokens_of, strict=True)
                result |= {f"{name}_loss/{one}": float(nats / n) for one, nats, n in each if n}
            if name == "causal":
                result["perplexity"] = math.exp(min(loss, 700.0))  # exp(710) overflows
                if size := self._sizes["bytes"]:
                    result["bits_per_byte"] = loss / math.log(2) / size
                result |= {
                    "scored_tokens": self._sizes["tokens"],
                    "scored_bytes": self._sizes["all_bytes"],
                }
        return result

    def _rows(self, objective: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        part = self._part[numbers]
        window = self._window[numbers]
        raw = self.held_out.read(part, window)
        # Of every token that is predicted: causal labels are one token ahead.
        source = self.sources.of_rows(part, window) if self._several else None
        if objective == "causal":
            made = causal_batch(raw)
            source = None if source is None else source[:, 1:]
        else:
            # Seed 0 and the window's number, not train.seed: the same masks in every run and at
            # every step.
            made = masked_batch(raw, window, 0, self.config.data.masking, self.data.tokenizer)
            source = None if source is None else source[:, :-1]
        made = with_prefix(made, raw, self.config.model.prefix)
        return made if source is None else made | {"source": source}

    @functools.cached_property
    def _scales(self) -> dict[str, np.ndarray]:
        """By objective: the weight of a token of each source [sources].

        With these weights every source counts by its share of the run, not by its held-out size.
        """
        scales = {}
        for name in self.objectives:
            tokens = np.zeros(len(self.held_out.sources))
            np.add.at(tokens, self.held_out.source, self._counts[name].tokens)
            # A source without predicted tokens cannot count; the others take over its share.
            shares = np.where(tokens > 0, self.held_out.shares, 0.0)
            # The weights of all tokens add up to their number, so that a loss stays in nats per
            # token.
            scales[name] = shares / max(shares.sum(), 1e-300) * tokens.sum() / np.maximum(tokens, 1)
        return scales

    @functools.cached_property
    def _counts(self) -> "dict[str, Counts]":
        """By objective: sizes of what is predicted."""
        tokenizer = self.data.tokenizer
        counts = {}
        sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
        for name in self.objectives:
            tokens = []
            sizes_of_text = []
            of_sources = np.zeros(len(self.sources), np.int64)
            # 64 rows at a time, since the held-out text may be large.
            for first in range(0, len(self._part), 64):
                rows = self._rows(name, np.arange(first, min(first + 64, len(self._part))))
                scored = rows["weights"] > 0
                if self._several:
                    of_sources += np.bincount(rows["source"][scored], minlength=len(of_sources))
                tokens.append(scored.sum(1))
                # Bytes of the labels: the text that is predicted, not the one that is read.
                sizes_of_text.append((sizes[rows["labels"]] * scored).sum(1))
            counts[name] = Counts(
                np.concatenate(tokens)[: len(self.held_out)],
                np.concatenate(sizes_of_text)[: len(self.held_out)],
                of_sources,
            )
        return counts

    @functools.cached_property
    def _sizes(self) -> dict[str, float]:
        """Sizes of causal rows: mean bytes per token, sources by share; all tokens and bytes."""
        tokens, sizes, _ = self._counts["causal"]
        scales = self._scales["causal"][self.held_out.source]
        return {
            "bytes": float((sizes * scales).sum() / max(tokens.sum(), 1)),
            "tokens": int(tokens.sum()),
            "all_bytes": int(sizes.sum()),
        }

    def _batches(self, objective: str) -> Iterator[tuple[dict[str, jax.Array], bool]]:
        """Yield (batch of held-out rows, whether the mean counts it).

        Missing rows of a last batch have weight 0.
        """
        pipe = self.mesh.shape["pipe"]
        micro_batches, rows = micro_batch_shape(self.config, self.mesh)
        # No more micro-batches than there are rows for, in groups of the size of the pipeline.
        micro_batches = -(-min(micro_batches, -(-len(self.held_out) // rows)) // pipe) * pipe
        scales = self._scales[objective][self._part].astype(np.float32)
        shape = (micro_batches, rows, self.config.sequence_length)
        more = ("source",) if self._several else ()
        ends = (0, len(self.held_out), len(self._part))
        for begin, end in itertools.pairwise(ends):
            for first in range(begin, end, micro_batches * rows):

                def rows_of(numbers, first=first, end=end):
                    # Row 0 stands in for missing rows; its weight becomes 0.
                    used = first + numbers < end
                    chosen = np.where(used, first + numbers, 0)
                    made = self._rows(objective, chosen)
                    return made | {"weights": made["weights"] * (scales[chosen] * used)[:, None]}

                batch = put_batch(rows_of, shape, self.mesh, self.config.model, more)
                yield batch, end == len(self.held_out)


class Counts(NamedTuple):
    """Sizes of what an objective predicts."""

    tokens: np.ndarray  # of each row of the mean
    bytes: np.ndarray  # of the text of these tokens
    of_sources: np.ndarray  # tokens of each source, in all rows


def make_eval(
    config: Config, mesh: Mesh, causal: bool, sparse: bool = False, sources: int = 0
) -> Callable:
    """Return (params, batch) -> (sum of weight x -log p, sum of weights) of a batch (M, B, S).

    ``sparse`` is as in `cross_entropy`. With ``sources`` above 0 there is a third result, float32
    [sources]: the sum of -log p over the tokens of each, by the numbers in batch["source"].
    """
    # The plain loss: neither dropout nor label smoothing.
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout_rate=0.0),
        train=dataclasses.replace(config.train, label_smoothing=0.0),
    )
    weights = make_weights(config)

    def sums(losses, batch):
        def over_all(x):
            return sum_shared(x.sum(0), ("pipe", *ROWS, "context"))

        tokens = sum_shared(batch["weights"].sum(), (*ROWS, "context"))
        if not sources:
            return over_all(losses), tokens
        nats, by_source = losses
        return over_all(nats), tokens, over_all(by_source)

    def evaluate(params, batch):
        # No gradient is taken here, but the loss is written for varying values, as in training.
        params, batch = vary((params, batch))
        params = weights.at_start(params)
        # A total of 1: sums and not means leave the device, since batches have different weights.
        micro_batches = MicroBatches(config, causal, batch, 1.0, sparse=sparse, sources=sources)
        numbers = jnp.arange(len(micro_batches))
        return sums(lax.map(lambda m: micro_batches.whole(params, m), numbers), batch)

    def pipelined_evaluate(params, batch):
        params, batch = vary((split_params(params), batch))
        # As in the train step, layers move to their stages as shards, before the gather.
        blocks = to_rounds(params.blocks, config.mesh.virtual_pipe)
        rest, blocks = weights.at_start(params._replace(blocks=blocks))
        micro_batches = MicroBatches(config, causal, batch, 1.0, sparse=sparse, sources=sources)
        size = axis_size("pipe")
        # The micro-batches that this stage embeds and whose loss it computes, as in `circular`.
        mine = jnp.arange(len(micro_batches) // size) * size + axis_index("pipe")
        x_GBSD = vary(micro_batches.embed(rest, mine))
        y_GBSD = circular(
            lambda round, m, x: micro_batches.layers(rest, *chunk_of(blocks, round), m, x),
            x_GBSD,
            config.mesh.virtual_pipe,
        )
        losses = lax.map(lambda args: micro_batches.loss(rest, *args), (mine, y_GBSD))
        return sums(losses, batch)

    function = pipelined_evaluate if mesh.shape["pipe"] > 1 else evaluate
    abstract = lora.abstract_computed(config)
    specs = specs_of(abstract, config.mesh.zero, mesh.shape["tensor"])
    of_batch = batch_specs(config.model) | ({"source": BATCH} if sources else {})
    results = (P(),) * (3 if sources else 2)
    return jax.jit(over_mesh(function, mesh, (specs, of_batch), results))
