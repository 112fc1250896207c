"""Draw docs/images/schedules.png: the curves of docs/schedules.md.

python benchmarks/schedules.py
python benchmarks/schedules.py --output=FILE.png
"""

import argparse
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mtnlg_jax.config import Config, OptimizerConfig, TrainConfig
from mtnlg_jax.train.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[1]
STEPS = 1000
WSD = {"lr_decay_style": "wsd", "wsd_decay_fraction": 0.3}
PANELS = {
    "optimizer.lr_decay_style": {
        style: {"lr_decay_style": style}
        for style in ("constant", "inverse_square_root", "linear", "cosine")
    }
    | {"wsd": WSD},
    "wsd, optimizer.wsd_decay_style": {
        style: WSD | {"wsd_decay_style": style}
        for style in ("exponential", "linear", "cosine", "minus_sqrt")
    },
    "optimizer.lr_cycles=3": {
        "linear": {"lr_decay_style": "linear", "lr_cycles": 3},
        "cosine": {"lr_cycles": 3},
        "wsd": WSD | {"lr_cycles": 3},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=os.fspath(ROOT / "docs/images/schedules.png"))
    output = parser.parse_args().output
    figure = Figure(figsize=(11, 3), layout="constrained")
    samples = np.arange(STEPS + 1)
    for axes, (title, curves) in zip(
        figure.subplots(1, 3, sharey=True), PANELS.items(), strict=True
    ):
        for name, settings in curves.items():
            optimizer = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.08, **settings)
            train = TrainConfig(steps=STEPS, global_batch_size=1)
            rates = learning_rate(Config(optimizer=optimizer, train=train), samples)
            axes.plot(samples / STEPS, rates, label=name, linewidth=1.2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("share of the run's samples", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7, loc="lower left")
    figure.axes[0].set_ylabel("share of the peak", fontsize=8)
    figure.savefig(output, dpi=110, metadata={"Software": None})
    print(output)


if __name__ == "__main__":
    main()
