"""Check muP on tiny models: coordinates that do not grow with the width, and a learning rate that
holds for all widths.

    python benchmarks/mup.py

draws docs/images/mup.png and writes benchmarks/results/mup.json, in about 6 minutes on 2 cores.
The text is a Markov chain of random tokens. Coordinates: RMS of the change of the residual stream
and of the logits after a few steps of AdamW (Yang 2022, appendix D.1, "coordinate check").
"""

import argparse
import datetime
import functools
import json
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mtnlg_jax import __version__
from mtnlg_jax.config import ModelConfig, OptimizerConfig
from mtnlg_jax.model.hooks import PLAIN
from mtnlg_jax.model.loss import cross_entropy
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.storage import write_file
from mtnlg_jax.train.metrics import environment
from mtnlg_jax.train.optimizer import make_optimizer

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/mup.json"
PICTURE = ROOT / "docs/images/mup.png"
WIDTHS = (32, 64, 128, 256)
VOCABULARY = 64
ROWS = 16
LENGTH = 32
RATES = tuple(2.0**power for power in range(-13, -3))


def model_of(width: int, mup: bool, base: int = WIDTHS[0]) -> ModelConfig:
    """Return a model of ``width`` with heads of 8."""
    return ModelConfig(
        num_layers=2,
        hidden_size=width,
        num_attention_heads=width // 8,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        mup_base_hidden_size=base if mup else None,
    )


@functools.cache
def chain() -> np.ndarray:
    """Return the probabilities of the next token, for each token."""
    random = np.random.default_rng(0)
    return random.dirichlet(np.full(VOCABULARY, 0.1), VOCABULARY)


def batch(step: int) -> np.ndarray:
    """Return the tokens of ``step``, int32 (ROWS, LENGTH + 1)."""
    random = np.random.default_rng([1, step])
    tokens = [random.integers(0, VOCABULARY, ROWS)]
    sums = chain().cumsum(1)
    for _ in range(LENGTH):
        drawn = random.random(ROWS)
        tokens.append((sums[tokens[-1]] < drawn[:, None]).sum(1).clip(max=VOCABULARY - 1))
    return np.stack(tokens, 1).astype(np.int32)


class Model:
    """A model of ``config`` on one device, with an optimizer and ``options`` of it."""

    def __init__(self, config: ModelConfig, optimizer: str = "adamw", **options: Any) -> None:
        graph = abstract_model(config)[0]
        settings = OptimizerConfig(name=optimizer, weight_decay=0.0, **options)
        self.optimizer = make_optimizer(settings, model=config)
        self.start = init_parameters(config, seed=0)

        def coordinates(params, tokens):
            model = nnx.merge(graph, params)
            places = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
            x = model.start(tokens, places, PLAIN)
            x = model.run_layers(nnx.state(model.blocks), 0, x, places)
            return {"residual stream": x, "logits": model.head().logits(model.finish(x))}

        def loss_of(params, tokens):
            model = nnx.merge(graph, params)
            hidden = model.hidden(tokens[:, :-1]).reshape(-1, config.hidden_size)
            weights = jnp.full(hidden.shape[:1], 1 / hidden.shape[0])
            return cross_entropy(hidden, model.head(), tokens[:, 1:].reshape(-1), weights)

        def step(params, state, tokens, rate):
            loss, grads = jax.value_and_grad(loss_of)(params, tokens)
            updates, state = self.optimizer.update(grads, state, params)
            updates = jax.tree.map(lambda update: -rate * update, updates)
            return optax.apply_updates(params, updates), state, loss

        self.coordinates = jax.jit(coordinates)
        self.step = jax.jit(step)

    def trained(self, rate: float, steps: int) -> tuple[nnx.State, list[float]]:
        """Return (parameters, losses) after ``steps`` at learning rate ``rate``."""
        params = self.start
        state = self.optimizer.init(params)
        losses = []
        for number in range(steps):
            params, state, loss = self.step(params, state, batch(number), rate)
            losses.append(float(loss))
        return params, losses

    def moved(self, rate: float, steps: int) -> dict[str, float]:
        """Return the RMS of the change of each coordinate after ``steps``."""
        tokens = batch(10**6)[:, :-1]
        before = self.coordinates(self.start, tokens)
        after = self.coordinates(self.trained(rate, steps)[0], tokens)
        return {
            name: float(jnp.sqrt(jnp.mean(jnp.square(after[name] - before[name]))))
            for name in before
        }


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent with which ``values`` grow with the width: least squares of the logs."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the learning rate of the lowest loss, by a parabola through it and its neighbors."""
    at = int(np.argmin(losses))
    if not 0 < at < len(rates) - 1:
        return rates[at]
    x = np.log2(rates[at - 1 : at + 2])
    a, b, _ = np.polyfit(x, losses[at - 1 : at + 2], 2)
    return float(2 ** (-b / (2 * a)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help="steps of the learning rates' runs")
    parser.add_argument("--output", default=str(RESULT), help="where the JSON result goes")
    parser.add_argument("--picture", default=str(PICTURE), help="where the plot goes")
    args = parser.parse_args(argv)
    result = {
        "version": __version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/mup.py", *(argv or sys.argv[1:])]),
        "device": platform.machine(),
        "versions": environment()["versions"],
        "widths": WIDTHS,
        "base": WIDTHS[0],
    }
    for name, mup in {"mup": True, "standard": False}.items():
        models = {width: Model(model_of(width, mup)) for width in WIDTHS}
        moved = {width: models[width].moved(2**-7, 5) for width in WIDTHS}
        found = {
            "moved": {key: [moved[width][key] for width in WIDTHS] for key in moved[WIDTHS[0]]}
        }
        found["slopes"] = {key: slope(WIDTHS, each) for key, each in found["moved"].items()}
        found["rates"] = RATES
        found["losses"] = {
            width: [_end(models[width].trained(rate, args.steps)[1]) for rate in RATES]
            for width in WIDTHS
        }
        found["best_rate"] = {
            width: best_rate(RATES, losses) for width, losses in found["losses"].items()
        }
        result[name] = found
    path = Path(args.output)
    write_file(str(path.parent), path.name, json.dumps(result, indent=1).encode() + b"\n")
    draw(result, args.picture)
    print(json.dumps(result, indent=1))


def _end(losses: list[float]) -> float:
    """Return the mean of the last tenth, at most 10; what diverged counts as the loss of chance."""
    mean = float(np.mean(losses[-max(1, len(losses) // 10) :]))
    return mean if math.isfinite(mean) else math.log(VOCABULARY)


def draw(result: dict, path: str) -> None:
    """Plot changes by width, and losses by learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7))
    for row, (name, title) in enumerate({"mup": "muP", "standard": "standard"}.items()):
        found = result[name]
        for key, values in found["moved"].items():
            axes[row, 0].plot(
                result["widths"], values, "o-", label=f"{key}: slope {found['slopes'][key]:.2f}"
            )
        axes[row, 0].set_xscale("log", base=2)
        axes[row, 0].set_yscale("log")
        axes[row, 0].set_title(f"{title}: change after 5 steps (RMS)")
        axes[row, 0].set_xlabel("width")
        for width, losses in found["losses"].items():
            axes[row, 1].plot(found["rates"], losses, "o-", label=f"width {width}")
        axes[row, 1].set_xscale("log", base=2)
        axes[row, 1].set_title(f"{title}: loss by learning rate")
        axes[row, 1].set_xlabel("learning rate")
        for each in axes[row]:
            each.grid(alpha=0.3)
            each.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
