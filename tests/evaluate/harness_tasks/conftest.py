"""A model of the harness whose log-likelihoods are known, and rows in files."""

import json

import pytest


@pytest.fixture(scope="session")
def known():
    """Return a factory of models from a function of (context, continuation) to a log-likelihood.

    A continuation is what the model would write where the function returns (value, True).
    ``model.seen`` lists the requests. ``words``: the model counts tokens as words, and reads so
    many.
    """
    from mtnlg_jax.evaluate.harness_tasks import offline

    offline.enter()
    from lm_eval.api.model import LM

    class Known(LM):
        def __init__(self, function, words=None):
            super().__init__()
            self.function = function
            self.seen = []
            if words is not None:
                self.max_length = words
                self.tok_encode = lambda text, **_: text.split()

        def loglikelihood(self, requests):
            self.seen += [request.args for request in requests]
            answers = [self.function(*request.args) for request in requests]
            return [each if isinstance(each, tuple) else (each, False) for each in answers]

        def loglikelihood_rolling(self, requests):
            return [self.function("", request.args[0]) for request in requests]

        def generate_until(self, requests):
            return [self.function(*request.args) for request in requests]

    return Known


@pytest.fixture
def rows_of(tmp_path):
    """Return a function that writes rows to FILE below a folder, and returns the folder."""

    def write(name, rows):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "data")

    return write
