"""/v1/fill, /tokenize, /detokenize and /tokenizer_info."""

import dataclasses
import functools
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.infill import Filled, fill, has_mask
from mtnlg_jax.serve.answers import answer, unless_gone
from mtnlg_jax.serve.chat import prompt_of
from mtnlg_jax.serve.following import Watch, result_of
from mtnlg_jax.serve.models import Model
from mtnlg_jax.serve.refusals import Refused
from mtnlg_jax.serve.requests import Job
from mtnlg_jax.serve.schema import Detokenize, Fill, Tokenize
from mtnlg_jax.serve.settings import within
from mtnlg_jax.serve.slices import in_slices
from mtnlg_jax.serve.writing import Call

MOST_GUESSES = 100


async def fill_masks(
    request: Request, query: Fill, model: Model, call: Call, watch: Watch
) -> Response:
    """Answer a request of /v1/fill: the best tokens of each <mask>."""
    within("top_k", query.top_k, 1, MOST_GUESSES)
    if not has_mask(query.text):
        raise Refused(
            "text has no mask to fill; write <mask> or [MASK] where a word is missing", "text"
        )
    if model.stages is not None and not any(stage.masked for stage in model.stages):
        raise Refused(
            f"the model {model.name} was not trained to fill masks; use /v1/completions, or serve "
            "a model with a masked stage",
            "model",
        )
    try:
        model.tokenizer.mask_id  # noqa: B018
    except ValueError as error:
        raise Refused(str(error), "model") from None
    # An upper bound of its tokens, before the queue.
    model.check_room(model.tokenizer.encode(query.text), 0, "text")

    work = functools.partial(_filled, model, query.text, query.top_k)
    job = Job(in_slices(work), call.key, call.deadline)
    filled = await unless_gone(request, result_of(model.engine, job, watch))
    if isinstance(filled, Refused):
        raise filled
    return answer({"object": "fill", "model": model.name, **dataclasses.asdict(filled)})


def _filled(model: Model, text: str, top_k: int, decoder: Decoder) -> Filled | Refused:
    try:
        return fill(decoder, model.tokenizer, text, top_k)
    except ValueError as error:
        return Refused(str(error), "text")


async def tokenize(
    request: Request, query: Tokenize, model: Model, call: Call, watch: Watch
) -> Response:
    """Answer a request of /tokenize, in vLLM's shape.

    A text that is the name of a special token is that token: harnesses ask so for its id.
    """
    if (query.prompt is None) == (query.messages is None):
        raise Refused("give prompt or messages, and not both", "prompt")
    if query.messages is not None:
        tokens = list(await prompt_of(query.messages, model, {}))
    elif query.prompt in model.special_ids:
        tokens = [model.special_ids[query.prompt]]
    else:
        assert query.prompt is not None
        tokens = model.tokenizer.encode(query.prompt)
        if query.add_special_tokens and model.tokenizer.prompt_bos:
            tokens = [model.tokenizer.bos_id, *tokens]
    told: dict[str, Any] = {
        "tokens": tokens,
        "count": len(tokens),
        "max_model_len": model.decoder.context,
    }
    if query.return_token_strs:
        told["token_strs"] = list(map(model.piece, tokens))
    return answer(told)


async def detokenize(
    request: Request, query: Detokenize, model: Model, call: Call, watch: Watch
) -> Response:
    """Answer a request of /detokenize, in vLLM's shape."""
    return answer({"prompt": model.tokenizer.decode(model.check_ids(query.tokens, "tokens"))})


def tokenizer_info(model: Model) -> Response:
    """Return what lm-evaluation-harness asks a server for."""
    tokenizer = model.tokenizer
    names = tokenizer.special_names
    roles = ("bos", "eos", "pad", "sep")
    told = {f"{role}_token": names.get(getattr(tokenizer, f"{role}_id")) for role in roles}
    return answer(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": model.decoder.context,
            "add_bos_token": tokenizer.prompt_bos,
            "chat_template": model.chat_template,
            **told,
        }
    )
