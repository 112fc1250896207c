"""What lm-evaluation-harness asks for, as settings of this package: generation, devices, memory."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mtnlg_jax import compat
from mtnlg_jax.config import Config, DecodeConfig, ModelConfig, override, validate_decode
from mtnlg_jax.config.checks import check_fields
from mtnlg_jax.config.decode_rules import acting
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.forest import USUAL
from mtnlg_jax.decode.group_scoring import CHUNK, QUERIES
from mtnlg_jax.decode.memory import Choices, Plan, caches_of, check_fits
from mtnlg_jax.parallel.memory import Room, room
from mtnlg_jax.parallel.mesh import AXES, make_mesh, row_shards

logger = logging.getLogger(__name__)

# The names by which tasks ask for the number of new tokens, the first that is given wins; and the
# number where none is, as in the harness.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
NEW_TOKENS = 256
# Settings of other libraries that change nothing here, with the values for which that is so.
IDLE = {"use_cache": None, "pad_token_id": None, "return_dict_in_generate": False}
# Rows that are written at once, if memory allows.
MOST_ROWS = 64
# Tokens that a call scores on a CPU: with more, activations leave its caches.
CPU_TOKENS = 2048
# The share of free memory that activations may take.
SHARE = 0.5


def mesh_of(sizes: Mapping[str, int | None]) -> Mesh | None:
    """Return the mesh of ``sizes``, by the names of AXES; None if none of them is given.

    Several processes have a mesh in any case: with ``data`` over all devices.
    """
    given = {axis: size for axis, size in sizes.items() if size is not None}
    if not given and jax.process_count() == 1:
        return None
    config = Config()
    for axis, size in given.items():
        try:
            config = override(config, f"mesh.{axis}={size}")
            check_fields(config.mesh, "mesh.")
        except ValueError as error:
            raise ValueError(f"{axis}={size}: {error}") from None
    return make_mesh(config.mesh)


def join_processes() -> None:
    """Join the processes that SLURM, a TPU pod or GKE started, unless that was done; see
    `train.processes.start`."""
    from mtnlg_jax.train import processes

    if compat.cluster_processes() > 1 and not jax.distributed.is_initialized():
        processes.start(None, None, None, heartbeat_seconds=100)


def check_memory(name: str, config: ModelConfig, mesh: Mesh | None, **held: Any) -> None:
    """Raise ValueError, with ways out, if a model does not fit, before it is loaded.

    ``held``: dtype and weights, as for `unstack`.
    """
    plan = Plan(config, mesh=mesh, **held)
    free = room(mesh)
    if free is not None:
        choices = Choices(cache=False)
        check_fits(name, [plan], free, choices, "or give memory_check=False in --model_args")


def block_tokens(config: ModelConfig, mesh: Mesh | None, most: int) -> int:
    """Return how many tokens a call of the model should score: ``most``, or fewer on a CPU and if
    memory is short, a power of two from 256.

    Counted are the hidden states of a block and the scores of its attention, with twice their size
    for what XLA holds beside them, and the logits of a part of the tokens.
    """
    if compat.platform() == "cpu":
        most = min(most, CPU_TOKENS)
    free: Room | None = room(mesh)
    if free is None:
        return most
    sizes = dict.fromkeys(AXES, 1) if mesh is None else dict(mesh.shape)
    parts = row_shards(sizes) * sizes["tensor"] if mesh is not None else 1
    hidden = 6 * config.hidden_size + 3 * config.mlp_width
    scores = 3 * config.num_attention_heads * max(USUAL, QUERIES)
    token = 4 * 2 * (hidden + scores) / parts
    logits = 4 * 3 * CHUNK * config.vocabulary
    fits = max(0.0, free.bytes * SHARE - logits) / token
    while most > USUAL and most > fits:
        most //= 2
    return most


def rows_at_once(decoder: Decoder, longest: int, decode: DecodeConfig, most: int) -> int:
    """Return how many prompts of ``longest`` tokens are continued at once: ``most``, or fewer if
    their caches do not fit the free memory."""
    free = room(decoder.mesh)
    if free is None:
        return most
    dtype = str(jax.tree.leaves(decoder.params[0])[0].dtype)
    dtype = dtype if dtype in ("float32", "bfloat16") else "float32"
    while most > 1:
        caches = caches_of(decoder.config, most, longest, decode)
        plan = Plan(
            decoder.config,
            dtype,
            cache="int8" if decoder.int8_cache else None,
            mesh=decoder.mesh,
            caches=caches,
        )
        if plan.cache_bytes <= SHARE * free.bytes:
            break
        most //= 2
    return most


@dataclasses.dataclass(frozen=True)
class Generation:
    """How a request is to be continued: where to stop, which the harness cuts off, and the rest."""

    decode: DecodeConfig
    until: tuple[str, ...]


def generation_of(given: Mapping[str, Any], new_tokens: int = NEW_TOKENS, seed: int = 0):
    """Return the `Generation` that the ``generation_kwargs`` of a task ask for.

    Names and meanings are those of the harness: ``until``, ``max_gen_toks`` or its other names,
    ``do_sample``, ``temperature``, and the keys of `DecodeConfig`, most of which Hugging Face has
    as well. Without do_sample, a temperature above 0 samples.

    Raises ValueError on a key that nothing here follows, and on values out of range.
    """
    given = dict(given)
    until = given.pop("until", None)
    until = [] if until is None else [until] if isinstance(until, str) else list(until)
    wrong = next((each for each in until if not isinstance(each, str)), None)
    if wrong is not None:
        raise ValueError(f"until={until!r} must be text or a list of texts; {wrong!r} is neither")
    lengths = [given.pop(name, None) for name in LENGTHS]
    length = next((each for each in lengths if each is not None), new_tokens)
    sample = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", None) or 0.0)
    if sample is False:
        temperature = 0.0
    elif sample and not temperature:
        # Hugging Face's own default; the harness's tasks that sample name one.
        temperature = 1.0
    for name, idle in IDLE.items():
        if name in given and (idle is None or given[name] == idle):
            del given[name]
    known = {each.name for each in dataclasses.fields(DecodeConfig)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"generation_kwargs has {', '.join(unknown)}, which nothing here follows; remove it "
            f"from the task or from --gen_kwargs, or give some of until, {', '.join(LENGTHS)}, "
            f"do_sample, {', '.join(sorted(known))}"
        )
    if given.get("num_return_sequences", 1) != 1:
        raise ValueError(
            f"num_return_sequences={given['num_return_sequences']}, but the harness takes one text "
            "for each request; set `repeats` in the task instead"
        )
    stops = tuple(dict.fromkeys(each for each in until if each))
    settings = {
        "seed": seed,
        **given,
        "max_new_tokens": int(length),
        "temperature": temperature,
        "stop_strings": (*given.get("stop_strings", ()), *stops),
    }
    # As in transformers, settings that cannot act are left out, such as top_p without sampling.
    decode = acting(DecodeConfig(**settings))
    validate_decode(decode)
    return Generation(decode, tuple(until))


def cut_at(text: str, until: Sequence[str]) -> str:
    """Return ``text`` up to the first of each of ``until``."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


def parameters_of(decoder: Decoder) -> int:
    """Return the number of parameters that a decoder holds."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(decoder.params))
