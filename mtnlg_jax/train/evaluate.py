"""The held-out loss of a run while it trains."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config
from mtnlg_jax.data.batches import HeldOut
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.collectives import axis_index, axis_size, vary
from mtnlg_jax.parallel.pipeline import circular, to_rounds
from mtnlg_jax.train import lora
from mtnlg_jax.train.batch import micro_batch_shape, put_batch
from mtnlg_jax.train.gradients import (
    Parts,
    chunk_of,
    gather_of,
    over_mesh,
    sum_apart,
    with_blocks,
    without_blocks,
)
from mtnlg_jax.train.inputs import Data
from mtnlg_jax.train.objectives import causal_batch, masked_batch

EVALUATION_ROWS = 16  # held-out sequences in one of train.eval_batches


class Evaluator:
    """Held-out loss, perplexity and bits per byte, for the objectives that the run trains, always
    of the same rows (`HeldOut`). The loss of several sources is the mean of theirs, each by its
    share of the run's samples."""

    def __init__(self, config: Config, mesh, data: Data):
        self.config = config
        self.mesh = mesh
        self.data = data
        stages = config.train.stages
        self.objectives = [
            name
            for name, used in (
                ("causal", any(s.masked < 1 for s in stages)),
                ("masked", any(s.masked > 0 for s in stages)),
            )
            if used
        ]
        self.held_out = HeldOut(
            data.held_out, config.sequence_length, EVALUATION_ROWS * config.train.eval_batches
        )
        self._steps = {
            name: make_eval(config, mesh, causal=name == "causal") for name in self.objectives
        }

    def __call__(self, params) -> dict[str, float]:
        """causal_loss, perplexity, bits_per_byte, masked_loss, and of how many tokens and bytes the
        causal ones are; {} where nothing is held out."""
        result = {}
        params = lora.merge(params, self.config)
        for name in self.objectives if len(self.held_out) else ():
            total = np.float64(0)
            weight = np.float64(0)
            for batch in self._batches(name):
                nats, tokens = self._steps[name](params, batch)
                total = total + float(nats)
                weight = weight + float(tokens)
            if not weight:
                continue
            result[f"{name}_loss"] = loss = float(total / weight)
            if name == "causal":
                result["perplexity"] = math.exp(min(loss, 700.0))
                if size := self._sizes["bytes"]:
                    result["bits_per_byte"] = loss / math.log(2) / size
                result |= {
                    "scored_tokens": self._sizes["tokens"],
                    "scored_bytes": self._sizes["all_bytes"],
                }
        return result

    def _rows(self, objective: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        raw = self.held_out.rows(numbers)
        if objective == "causal":
            return causal_batch(raw)
        return masked_batch(
            raw, self.held_out.window[numbers], 0, self.config.data.masking, self.data.tokenizer
        )

    @functools.cached_property
    def _scales(self) -> dict[str, np.ndarray]:
        """By objective: what a token of each source weighs [sources], so that the sources count by
        their shares."""
        scales = {}
        for name in self.objectives:
            tokens = np.zeros(len(self.held_out.sources))
            np.add.at(tokens, self.held_out.source, self._counts[name][0])
            shares = np.where(tokens > 0, self.held_out.shares, 0.0)
            scales[name] = shares / max(shares.sum(), 1e-300) * tokens.sum() / np.maximum(tokens, 1)
        return scales

    @functools.cached_property
    def _counts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By objective: tokens that each row predicts [rows], and the bytes of their text."""
        tokenizer = self.data.tokenizer
        counts = {}
        sizes = np.array(
            [len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)]
        )
        for name in self.objectives:
            parts = []
            for first in range(0, len(self.held_out), 64):
                rows = self._rows(name, np.arange(first, min(first + 64, len(self.held_out))))
                parts.append(
                    [
                        (rows["weights"] > 0).sum(1),
                        (sizes[rows["labels"]] * (rows["weights"] > 0)).sum(1),
                    ]
                )
            counts[name] = tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        return counts

    @functools.cached_property
    def _sizes(self) -> dict[str, float]:
        """Of causal rows: bytes of a token, sources by their shares; all tokens and bytes."""
        tokens, sizes = self._counts["causal"]
        scales = self._scales["causal"][self.held_out.source]
        return {
            "bytes": float((sizes * scales).sum() / max(tokens.sum(), 1)),
            "tokens": int(tokens.sum()),
            "all_bytes": int(sizes.sum()),
        }

    def _batches(self, objective: str):
        pipe = self.mesh.shape["pipe"]
        micro_batches, rows = micro_batch_shape(self.config, self.mesh)
        # No more micro-batches than there are rows for, and as many as a pipeline is fed at a time.
        micro_batches = -(-min(micro_batches, -(-len(self.held_out) // rows)) // pipe) * pipe
        scales = self._scales[objective][self.held_out.source].astype(np.float32)
        for first in range(0, len(self.held_out), micro_batches * rows):

            def rows_of(numbers, first=first):
                used = first + numbers < len(self.held_out)
                chosen = np.where(used, first + numbers, 0)
                made = self._rows(objective, chosen)
                return made | {"weights": made["weights"] * (scales[chosen] * used)[:, None]}

            yield put_batch(rows_of, (micro_batches, rows, self.config.sequence_length), self.mesh)


def make_eval(config: Config, mesh: Mesh, causal: bool) -> Callable:
    """(params, batch) -> (sum of weight x -log p, sum of weights) of a batch (M, B, S)."""
    params = abstract_model(config.model)[1]
    zero = config.mesh.zero
    piped = mesh.shape["pipe"] > 1
    rounds = config.mesh.virtual_pipe
    undropped = dataclasses.replace(
        config, model=dataclasses.replace(config.model, dropout_rate=0.0)
    )

    def local(params, batch, count, key):
        params, batch = vary((params, batch))
        if piped:
            params = with_blocks(params, to_rounds(params["blocks"], rounds))
        weights = params if zero == 3 else gather_of(config)(params)
        parts = Parts(undropped, causal, weights, batch, 1.0, None)
        rest = without_blocks(weights)
        blocks = weights["blocks"]
        micro_batches = batch["tokens"].shape[0]
        if piped:
            mine = jnp.arange(micro_batches // axis_size("pipe")) * axis_size("pipe") + axis_index(
                "pipe"
            )
            ys = circular(
                lambda round, m, x: parts.stage(rest, *chunk_of(parts, blocks, round), m, x),
                vary(parts.start(rest, mine)),
                rounds,
            )
            losses = lax.map(lambda args: parts.finish(rest, *args, smoothing=0.0), (mine, ys))
        else:

            def one(m):
                x_BSD = parts.stage(rest, blocks, 0, m, parts.start(rest, m[None])[0])
                return parts.finish(rest, m, x_BSD, smoothing=0.0)

            losses = lax.map(one, jnp.arange(micro_batches))
        total = sum_apart(losses.sum(), ("pipe", "data", "context"))
        return total, sum_apart(batch["weights"].sum(), ("data", "context"))

    return jax.jit(over_mesh(local, mesh, params, zero, (P(), P())))
