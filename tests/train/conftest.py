"""Let the runs of a file share their compiled programs."""

import functools
import sys
from pathlib import Path

import pytest

from mtnlg_jax.train import evaluate, loop

# The folder of the tests is not in the import path, but test_step.py is there.
sys.path.append(str(Path(__file__).parent))


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
    make_step = loop.make_train_step

    @functools.cache
    def kept(*args, **options):
        return Kept(make_step(*args, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", kept)
        patch.setattr(evaluate, "make_eval", functools.cache(evaluate.make_eval))
        yield
