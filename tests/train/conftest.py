"""Let the runs of a file share their compiled programs."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.train import evaluate, loop, statistics

# The folder of the tests is not in the import path, but test_step.py is there.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def prepared_words(tmp_path_factory):
    """Return a function that prepares lines of random words, and returns the folder."""

    def make(words, lines=400):
        folder = tmp_path_factory.mktemp("words")
        rng = np.random.default_rng(0)
        text = "\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(lines))
        (folder / "book.txt").write_text(text)
        prepare(folder / "book.txt", folder / "data", vocab_size=300, heldout=0.1, progress=False)
        return str(folder / "data")

    return make


class Kept:
    """A jitted step that is lowered and compiled once, for arguments of the same shapes."""

    def __init__(self, step):
        self.step = step

    def lower(self, *args):
        if not hasattr(self, "lowered"):
            self.lowered = self.step.lower(*args)
            self.compiled = self.lowered.compile()
        return self

    def as_text(self):
        return self.lowered.as_text()

    def compile(self):
        return self.compiled


@pytest.fixture(scope="module")
def compiled_once():
    """Give runs of the same config the same compiled programs."""

    def kept(make):
        return functools.cache(lambda *args, **options: Kept(make(*args, **options)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", kept(loop.make_train_step))
        for name in ("make_half_gradients", "make_norms", "make_activation_figures"):
            patch.setattr(statistics, name, kept(getattr(statistics, name)))
        patch.setattr(evaluate, "make_eval", functools.cache(evaluate.make_eval))
        yield
