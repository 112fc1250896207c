"""Run command lines of a script with a random model in place of a trained run.

Training a run takes longer than all tests of a script, and importing JAX takes longer than
answering, so one process answers many command lines. The fixture `answering` runs it.
"""

import contextlib
import io
import json
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import flagsaver

from mtnlg_jax import command, compat
from mtnlg_jax.config import Config, DecodeConfig, ModelConfig
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.decode import load
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.train import adapter_file, checkpoint

script, folder, positions, new_tokens = sys.argv[1:]
tokenizer = load_tokenizer(folder)
rng = np.random.default_rng(0)
model = ModelConfig(
    num_layers=1,
    hidden_size=16,
    num_attention_heads=2,
    vocab_size=tokenizer.vocab_size,
    max_position_embeddings=int(positions),
)
params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_model(model)[1]
)
config = Config(model=model, decode=DecodeConfig(max_new_tokens=int(new_tokens)))


def load_decoder(workdir, which, dtype="float32", *, before=None, **held):
    run = load_run(workdir, which, before=before)
    return run, unstack(model, params, dtype, **held)


def load_run(workdir, which, mesh=None, *, before=None):
    if workdir != "RUN":
        raise FileNotFoundError(f"{workdir} holds no checkpoint")
    if before is not None:
        before(config, tokenizer)
    return checkpoint.Run(config, params, tokenizer, 7, {})


checkpoint.load_run = load_run
checkpoint.config_of = lambda workdir, which: load_run(workdir, which).config
load.load_decoder = load_decoder
adapter_file.weights_of = lambda *_: "random"
compat.configure_cache = lambda **_: None
names = runpy.run_path(script)
for line in sys.stdin:
    request = json.loads(line)
    out = io.StringIO()
    err = io.StringIO()
    stdin = io.TextIOWrapper(io.BytesIO(request["stdin"].encode("latin-1")))
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        real = sys.stdin
        sys.stdin = stdin
        try:
            sys.argv = [script, *request["arguments"]]
            command.run(names["main"])
        except SystemExit as stop:
            code = stop.code or 0
        sys.stdin = real
    print("answer", json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
