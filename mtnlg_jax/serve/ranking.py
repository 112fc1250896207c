"""/v1/rank and /v1/rerank: candidates or documents in, scores out, best first."""

import dataclasses
import functools
import secrets
from collections.abc import Sequence
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.pool import ScorerOptions
from mtnlg_jax.decode.rank import Ranking, rank
from mtnlg_jax.decode.results import Generated
from mtnlg_jax.decode.scorers import check_request, weights_of
from mtnlg_jax.serve.answers import answer, unless_gone
from mtnlg_jax.serve.following import Following, Watch, result_of
from mtnlg_jax.serve.models import Model
from mtnlg_jax.serve.patterns import check_time
from mtnlg_jax.serve.refusals import Refused
from mtnlg_jax.serve.requests import Job
from mtnlg_jax.serve.schema import Document, Rank, Rerank, Sampling
from mtnlg_jax.serve.settings import seed_of, settings_of, within
from mtnlg_jax.serve.slices import in_slices, mean_slices
from mtnlg_jax.serve.writing import Call, Choice, Count, gather, generations

MOST_CANDIDATES = 256
MOST_WRITTEN = 64
# mbr compares every pair.
MOST_PAIRED = 64
MOST_PATTERN = 200


async def rank_texts(
    request: Request, query: Rank, model: Model, call: Call, watch: Watch
) -> Response:
    """Answer a request of /v1/rank: the `Ranking`, with every part of every score."""
    return await unless_gone(request, _rank(query, model, call, watch))


async def _rank(query: Rank, model: Model, call: Call, watch: Watch) -> Response:
    options, weights = _checked(query, model)
    seed = None
    written: list[Generated] | None = None
    count = Count(len(model.encode(query.prompt)))
    if query.candidates is None:
        seed = seed_of(query.seed)
        written = await _write(query, model, call, watch, seed, count)

    if isinstance(options.answer, str):
        texts = query.candidates or [each.text for each in written or ()]
        # A function is for Python alone.
        await check_time("answer", cast(str, options.answer), texts)

    work = functools.partial(
        _ranked,
        model,
        query.prompt,
        query.candidates,
        written=written,
        scorers=weights,
        normalise=query.normalise,
        options=options,
    )
    job = Job(in_slices(work), call.key, call.deadline)
    ranking = await result_of(model.engine, job, watch)
    if isinstance(ranking, Refused):
        raise ranking
    told = dataclasses.asdict(ranking)
    candidates = told.pop("candidates")
    return answer(
        {
            "id": "rank-" + secrets.token_hex(12),
            "object": "ranking",
            "model": model.name,
            "seed": seed,
            **told,
            "candidates": candidates,
            "usage": count.usage(),
        }
    )


def _ranked(
    model: Model, prompt: str, candidates: Sequence[str] | None, decoder: Decoder, **settings
) -> Ranking | Refused:
    try:
        return rank(decoder, model.tokenizer, prompt, candidates, stages=model.stages, **settings)
    except ValueError as error:  # what only the candidates show, such as no answer in any
        return Refused(str(error), "candidates")


def _checked(query: Rank, model: Model) -> tuple[ScorerOptions, dict[str, float]]:
    """Return the options and weights of a ranking. Raise Refused on what cannot be ranked."""
    if (query.candidates is None) == (query.n is None):
        raise Refused("give candidates to rank, or n of them to write, and not both", "candidates")
    if query.n is not None:
        within("n", query.n, 1, MOST_WRITTEN)
    number = (query.n if query.candidates is None else len(query.candidates)) or 0
    if not 1 <= number <= MOST_CANDIDATES:
        raise Refused(f"candidates has {number} texts; give 1 to {MOST_CANDIDATES}", "candidates")
    known = {each.name for each in dataclasses.fields(ScorerOptions)}
    for name in query.options:
        if name not in known:
            raise Refused(
                f"options has {name[:60]!r}; choose from {', '.join(sorted(known))}", "options"
            )
    try:
        options = ScorerOptions(**_typed(query.options))
        weights = weights_of(query.scorers)
        check_request(
            weights, query.normalise, options, model.tokenizer, query.prompt, model.stages
        )
    except (ValueError, TypeError) as error:
        raise Refused(str(error), "scorers") from None
    if "mbr" in weights and number > MOST_PAIRED:
        raise Refused(
            f"mbr compares each of {number} candidates with each other, and {MOST_PAIRED} "
            "are the most; give fewer, or another scorer",
            "candidates",
        )
    for text in query.candidates or ():
        # All checks of texts come before the queue.
        if not text:
            raise Refused("one of the candidates is empty; leave it out", "candidates")
        model.check_room(model.encode(query.prompt + text), 0, "prompt with a candidate")
    model.check_room(model.encode(query.prompt), 1, "prompt")
    return options, weights


def _typed(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of scorers. Raise ValueError on one of another type than its default."""
    for name, value in given.items():
        default = getattr(ScorerOptions, name)
        wanted = str if default is None else type(default)
        right = isinstance(value, wanted) and not (wanted is float and isinstance(value, bool))
        if not right and not (wanted is float and type(value) is int):
            raise ValueError(f"{name}={str(value)[:40]!r} is not a {wanted.__name__}; correct it")
    pattern = given.get("answer")
    if pattern is not None:
        if len(pattern) > MOST_PATTERN:
            raise ValueError(
                f"answer has {len(pattern)} characters, and {MOST_PATTERN} are the most; write a "
                "shorter pattern"
            )
    return given


async def _write(
    query: Rank, model: Model, call: Call, watch: Watch, seed: int, count: Count
) -> list[Generated]:
    """Return the candidates that the model writes, in its slots, as other requests are."""
    assert query.n is not None
    sampling = Sampling(
        temperature=query.temperature,
        top_p=query.top_p,
        top_k=query.top_k,
        min_p=query.min_p,
        stop=query.stop,
        # A candidate needs a token to score.
        min_tokens=1,
    )
    if query.temperature == 0 and query.n > 1:
        raise Refused(
            f"n={query.n} at temperature=0 would write the same text {query.n} times; set "
            "temperature above 0, or n=1",
            "n",
        )
    within("max_tokens", query.max_tokens, 1, 2**31 - 1)
    settings: DecodeConfig = settings_of(sampling, model, query.max_tokens)
    prompt = model.encode(query.prompt)
    rows = generations(model, [prompt], settings, query.n, seed, call)
    choices: list[Choice] = await gather(Following(model.engine, rows, watch), len(rows), count)
    return [
        Generated(
            0,
            tuple(token.token for token in each.tokens),
            each.text,
            each.reason,
            tuple(token.logprob for token in each.tokens),
        )
        for each in choices
    ]


async def rerank(
    request: Request, query: Rerank, model: Model, call: Call, watch: Watch
) -> Response:
    """Answer a request of /v1/rerank, in Cohere's and Jina's shape.

    relevance_score is exp(mean log p(token of the query | document)), in (0, 1): the query
    likelihood of Ponte 1998, with the model in place of the document's counts.
    """
    texts = [each.text if isinstance(each, Document) else each for each in query.documents]
    if not 1 <= len(texts) <= MOST_CANDIDATES:
        raise Refused(
            f"documents has {len(texts)} texts; give 1 to {MOST_CANDIDATES} in a request",
            "documents",
        )
    if not query.query.strip():
        raise Refused("query is empty; give the words to look for", "query")
    if query.top_n is not None:
        within("top_n", query.top_n, 1, 2**31 - 1)
    words = tuple(model.tokenizer.encode(" " + query.query.strip()))
    rows = []
    starts = []
    for number, text in enumerate(texts, 1):
        document = model.encode(text + "\n")
        room = model.decoder.context - len(words)
        if query.max_tokens_per_doc is not None:
            within("max_tokens_per_doc", query.max_tokens_per_doc, 1, 2**31 - 1)
            document = document[: query.max_tokens_per_doc]
        if query.truncation:
            document = document[: max(room, 1)]
        row = document + words
        model.check_room(row, 0, f"document {number} with the query")
        rows.append(row)
        starts.append(len(document))
    job = Job(mean_slices(rows, starts), call.key, call.deadline)
    scores = await unless_gone(request, result_of(model.engine, job, watch))
    order = sorted(range(len(texts)), key=lambda index: -scores[index])[: query.top_n]
    results = []
    for index in order:
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if query.return_documents:
            result["document"] = {"text": texts[index]}
        results.append(result)
    total = sum(map(len, rows))
    return answer(
        {
            "id": "rerank-" + secrets.token_hex(12),
            "model": model.name,
            "results": results,
            "usage": {"prompt_tokens": total, "total_tokens": total},
            "meta": {"billed_units": {"search_units": 1}},
        }
    )
