"""Continuations of a run's prompts while it trains, on its devices and parameters.

    config = load_config("configs/small.py", ["data.path=OUT", "train.sample_prompts=('Once',)"])
    train(config, "RUN", samples=RunSamples(config))

They are greedy: two runs, or two steps of one, differ by their parameters alone.
"""

from flax import nnx
from jax.sharding import Mesh

from mtnlg_jax.config import Config, DecodeConfig
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.decode.from_training import FromTraining
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.results import encode_prompt


class RunSamples:
    """The train.sample_prompts of ``config``."""

    def __init__(self, config: Config):
        self._train = config.train

    def start(self, config: Config, mesh: Mesh, tokenizer: Tokenizer) -> "Writer":
        """Return what continues the prompts with the parameters of a run ``config`` on ``mesh``.

        All processes call it together. Raises ValueError if the model cannot be decoded on these
        devices, and for a prompt that leaves no room for its continuation.
        """
        room = config.model.max_position_embeddings - self._train.sample_tokens
        for prompt in self._train.sample_prompts:
            length = len(encode_prompt(tokenizer, prompt))
            if length > room:
                raise ValueError(
                    f"train.sample_prompts: {prompt[:40]!r} has {length} tokens, and the model "
                    f"reads {config.model.max_position_embeddings}, of which "
                    f"train.sample_tokens={self._train.sample_tokens} are for the continuation; "
                    "shorten it, or lower train.sample_tokens"
                )
        decode = DecodeConfig(max_new_tokens=self._train.sample_tokens)
        return Writer(self._train.sample_prompts, decode, FromTraining(config, mesh), tokenizer)


class Writer:
    """Continue the prompts: a function of ``state.params``, from `RunSamples.start`."""

    def __init__(
        self,
        prompts: tuple[str, ...],
        decode: DecodeConfig,
        make_decoder: FromTraining,
        tokenizer: Tokenizer,
    ):
        self._prompts = prompts
        self._decode = decode
        self._make_decoder = make_decoder
        self._tokenizer = tokenizer

    def __call__(self, params: nnx.State) -> list[str]:
        """Return the continuation of each prompt."""
        # The decoder does not stay in memory beside the steps that follow.
        decoder = self._make_decoder(params)
        found = generate(decoder, self._tokenizer, self._prompts, self._decode)
        return [each.text for each in found]
