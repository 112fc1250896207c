"""lm-evaluation-harness over a model of this package (extra ``eval``).

    lm_eval --model mtnlg --model_args workdir=RUN --tasks lambada_openai
    python -m mtnlg_jax.evaluate.lm_eval --model mtnlg --model_args workdir=RUN --tasks piqa

In Python: ``lm_eval.simple_evaluate(model=MtnlgLM.of(decoder, tokenizer), tasks=[...])``.

Requests become tokens as the harness's class ``hf`` makes them, and cost less: each context is read
once for all of its continuations, and logits are computed of continuations alone
(`decode.group_scoring`).
"""

import collections
import copy
import logging
from collections.abc import Sequence
from typing import Any, Self

# First, since the harness looks for its own models only where none is known yet.
import lm_eval.models  # noqa: F401
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from mtnlg_jax import compat
from mtnlg_jax.command import CHECKPOINTS
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.data.tokenizer.chat import Chat
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.group_scoring import score_groups
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.evaluate import harness_options as options
from mtnlg_jax.interop import registry
from mtnlg_jax.parallel.mesh import AXES

logger = logging.getLogger(__name__)

# (log-probability of a continuation, whether it is what greedy decoding would write)
Answer = tuple[float, bool]
# (context and continuation as texts or None, their tokens)
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("mtnlg")
class MtnlgLM(TemplateLM):
    """A run, a Hugging Face folder or a GGUF file as a model of lm-evaluation-harness."""

    def __init__(self, workdir: str = "", checkpoint: str = "best", **given: Any) -> None:
        """Load a model.

        Args:
          workdir: a run, a folder of Hugging Face, or a GGUF file.
          checkpoint: "best" or "last", of a run.
          given: of --model_args: dtype ("float32", "bfloat16"), weights ("int8"), data, tensor,
            context, expert, pipe (sizes of the mesh), memory_check (False: load a model although
            it does not fit); and the options of `of`.

        Raises ValueError on an argument that does not exist or cannot be, before weights are read.
        """
        registry.register()
        compat.configure_cache()
        asked = {name: given.pop(name, None) for name in _LOADING}
        loading = {name: value for name, value in asked.items() if value is not None}
        _check(given)
        if not workdir:
            raise ValueError("--model_args names no model; give workdir=RUN")
        if checkpoint not in CHECKPOINTS:
            raise ValueError(
                f"checkpoint={checkpoint} in --model_args is none of {', '.join(CHECKPOINTS)}"
            )
        options.join_processes()
        check = loading.pop("memory_check", True)
        mesh = options.mesh_of({axis: loading.pop(axis, None) for axis in AXES})

        def before(config, tokenizer) -> None:
            if check:
                options.check_memory(workdir, config.model, mesh, **loading)

        run, decoder = load_decoder(workdir, checkpoint, mesh=mesh, before=before, **loading)
        self.step: int | None = run.step
        self._begin(decoder, run.tokenizer, **given)

    @classmethod
    def of(cls, decoder: Decoder, tokenizer: Tokenizer, **given: Any) -> Self:
        """Return the class over a model in memory.

        Args:
          given: max_length (at most the model's positions), max_gen_toks (new tokens where a task
            names no number), add_bos_token (whether texts begin with <bos>; default: what the
            tokenizer says), prefix_token_id (what stands before a text without context), seed (of
            sampling), chat_template (the text of one, in place of the tokenizer's), batch_size
            and max_batch_size (texts written at once; "auto": by the free memory), block_tokens
            (tokens scored at once; default: by the free memory).
        """
        _check(given)
        model = cls.__new__(cls)
        model.step = None
        model._begin(decoder, tokenizer, **given)
        return model

    def _begin(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        max_gen_toks: int = options.NEW_TOKENS,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        chat_template: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        block_tokens: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if max_length is not None and not 2 <= max_length <= decoder.context:
            raise ValueError(
                f"max_length={max_length} is outside [2, {decoder.context}], the model's positions"
            )
        vocabulary = decoder.config.vocabulary
        if prefix_token_id is not None and prefix_token_id >= vocabulary:
            raise ValueError(
                f"prefix_token_id={prefix_token_id} is outside the model's vocabulary, 0 to "
                f"{vocabulary - 1}"
            )
        if block_tokens is None:
            block_tokens = options.block_tokens(decoder.config, decoder.mesh, decoder.block_tokens)
        self.decoder = decoder._replace(block_tokens=block_tokens)
        # As in transformers, a text that spells a special token has that token. Chat templates need
        # it.
        self.tok = copy.copy(tokenizer)
        self.tok.parse_special = True
        self._max_length = max_length or decoder.context
        self._max_gen_toks = max_gen_toks
        self._bos = tokenizer.prompt_bos if add_bos_token is None else add_bos_token
        self._given_prefix = prefix_token_id
        self._seed = seed
        self._template = chat_template
        self._most_rows = _rows(batch_size, max_batch_size)
        # The harness's command always names one; JAX chooses, by JAX_PLATFORMS.
        del device

    # --- tokens

    @property
    def eot_token_id(self) -> int:
        return self.tok.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context: <bos>, or else the end of a text."""
        if self._given_prefix is not None:
            return self._given_prefix
        known = self.decoder.config.vocabulary
        return self.tok.bos_id if 0 <= self.tok.bos_id < known else self.tok.eos_id

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """What requests are cached by: tokenizers of the same fingerprint make the same tokens."""
        return f"mtnlg-{self.tok.fingerprint[:16]}-{'bos' if self._bos else 'plain'}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text, behind <bos> where the tokenizer adds one.

        ``add_special_tokens`` False leaves <bos> out, and so does None for a text that begins with
        its spelling.
        """
        return self._encode_all([string], add_special_tokens)[0]

    def _encode_all(
        self, texts: Sequence[str], add_special_tokens: bool | None = None
    ) -> list[list[int]]:
        spelled = self.tok.special_names.get(self.prefix_token_id)
        found = []
        for text, tokens in zip(texts, self.tok.encode_batch(texts), strict=True):
            begins = spelled is not None and text.startswith(spelled)
            adds = not begins if add_special_tokens is None else add_special_tokens
            found.append([self.tok.bos_id, *tokens] if adds and self._bos else tokens)
        return found

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tok.decode(tokens, skip_special_tokens)

    # --- log-probabilities

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[Answer]:
        """Return the log-probability of each continuation after its context, and whether greedy
        decoding would write it.

        The texts are encoded together and cut apart by the number of tokens of the context alone.
        Spaces at the end of a context belong to its continuation.
        """
        for request in requests:
            if not request.args[1]:
                raise ValueError(self._no_tokens(request.args))
        return super().loglikelihood(requests, disable_tqdm)

    @staticmethod
    def _no_tokens(texts: tuple[str, str] | None) -> str:
        return (
            f"the continuation{_named(texts)} has no tokens, so it has no probability; give every "
            "choice of the task a text"
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **unused: Any
    ) -> list[Answer]:
        """Return the answer to each request.

        Raises ValueError on a continuation that is empty, or that is longer than the model reads.
        """
        groups: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
        cut = 0
        for number, request in enumerate(requests):
            self._check_continuation(request)
            _, context, continuation = request
            # The last token is predicted and not read.
            kept = self.max_length + 1 - len(continuation)
            cut += len(context) > kept
            groups[tuple(context[-kept:])].append(number)
        if cut:
            logger.warning(
                "%d of %d contexts are longer than the model reads (%d tokens with their "
                "continuation); their beginnings were cut off",
                cut,
                len(requests),
                self.max_length,
            )
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            found = score_groups(
                self.decoder,
                [
                    (context, [requests[number][2] for number in numbers])
                    for context, numbers in groups.items()
                ],
                bar.update,
            )
        answers: list[Answer] = [(0.0, False)] * len(requests)
        for numbers, scored in zip(groups.values(), found, strict=True):
            for number, each in zip(numbers, scored, strict=True):
                answers[number] = float(each.logprobs.sum(dtype="float64")), bool(each.best.all())
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _check_continuation(self, request: Request) -> None:
        texts, context, continuation = request
        said = _named(texts)
        if not continuation:
            raise ValueError(self._no_tokens(texts))
        if len(continuation) > self.max_length:
            raise ValueError(
                f"the continuation{said} has {len(continuation)} tokens, and the model reads "
                f"{self.max_length}; shorten it, or take a model with more positions"
            )
        if not context:
            raise ValueError(f"the context of the continuation{said} has no tokens")

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text: every token once, in windows of the context."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, tokens in enumerate(self._encode_all([each.args[0] for each in requests])):
            for window in utils.get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (value, _) in zip(owners, answers, strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- texts

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to the first of its stops.

        Raises ValueError on settings that nothing here follows, before any text is written.
        """
        tokens = self._encode_all([each.args[0] for each in requests])
        wanted = [
            options.generation_of(each.args[1], self.max_gen_toks, self._seed + number)
            for number, each in enumerate(requests)
        ]
        prompts = []
        for given, each in zip(tokens, wanted, strict=True):
            room = self.max_length - each.decode.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={each.decode.max_new_tokens} leaves no room for a context: the "
                    f"model reads {self.max_length} tokens; lower it with --gen_kwargs"
                )
            prompts.append(given[-room:] or [self.prefix_token_id])
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for part in self._batches(prompts, wanted):
                results = generate(
                    self.decoder,
                    self.tok,
                    [prompts[number] for number in part],
                    [wanted[number].decode for number in part],
                )
                for number, result in zip(part, results, strict=True):
                    # Decoded as a text of their own: some tokenizers take off its first space.
                    text = options.cut_at(self.tok.decode(result.tokens), wanted[number].until)
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(part))
        return texts

    def _batches(self, prompts, wanted):
        """Yield the numbers of prompts that are continued together, the longest first."""
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        while order:
            first = order[0]
            rows = options.rows_at_once(
                self.decoder, len(prompts[first]), wanted[first].decode, self._most_rows
            )
            yield order[:rows]
            order = order[rows:]

    # --- conversations

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the chat template, by which the harness caches; None without one."""
        if not chat_template:
            return None
        return self._chat().source

    def _chat(self) -> Chat:
        return Chat(self.tok, self._template)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the text of a prompt.

        Without ``add_generation_prompt`` the last turn is one that the model continues. A template
        that refuses the system's turn gets the others.
        """
        chat = self._chat()
        try:
            return self._prompt(chat, chat_history, add_generation_prompt)
        except ValueError:
            others = [each for each in chat_history if each["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            logger.warning("the chat template refuses the system's turn, which is left out")
            return self._prompt(chat, others, add_generation_prompt)

    @staticmethod
    def _prompt(chat: Chat, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text = chat.text(messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = str(messages[-1]["content"]).strip()
        return text[: text.rindex(last) + len(last)]

    # --- about the model

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside the results."""
        return {
            "model_num_parameters": options.parameters_of(self.decoder),
            "model_step": self.step,
            "model_tokenizer": self.tok.fingerprint,
        }


_LOADING = ("dtype", "weights", "memory_check", *AXES)
_OF = tuple(MtnlgLM._begin.__kwdefaults__ or ())
# The smallest values of the options that are whole numbers.
_LEAST = {
    "max_length": 2,
    "max_gen_toks": 1,
    "prefix_token_id": 0,
    "seed": 0,
    "max_batch_size": 1,
    "block_tokens": 1,
}


def _named(texts: tuple[str, str] | None) -> str:
    return "" if texts is None else f" {texts[1]!r} after {texts[0][-40:]!r}"


def _check(given: dict[str, Any]) -> None:
    """Raise ValueError if ``given`` has a name that no option has, or a value that none can be."""
    unknown = sorted(set(given) - set(_OF))
    if unknown:
        known = ("workdir", "checkpoint", *_LOADING, *_OF)
        raise ValueError(
            f"unknown {', '.join(unknown)} in --model_args; there are {', '.join(known)}"
        )
    for name, least in _LEAST.items():
        value = given.get(name)
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name}={value} must be a whole number of at least {least}")
    adds = given.get("add_bos_token")
    if not isinstance(adds, bool | None):
        raise ValueError(f"add_bos_token={adds} must be True or False")


def _rows(batch_size: int | str, most: int | None) -> int:
    """Return the maximum number of texts that are written at once.

    The harness gives 1 where its user gives nothing; one at a time would be slow.
    """
    if str(batch_size).startswith("auto") or int(batch_size) == 1:
        return most or options.MOST_ROWS
    return int(batch_size)
