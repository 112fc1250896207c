"""The cache of a running batch, and the compiled programs that change it.

Each slot holds the keys and values of one row. All else that a step needs, tokens, lengths and
settings, is small and comes from the host, so that rows join and leave without a program of their
own, and so that other processes of a mesh can repeat every call of `Slots`.
"""

# Shapes: B rows of a turn (the first slots), S positions, V vocabulary, W words of 32 ids,
# U steps of a turn at most, A alternatives, C tokens of a chunk, I ids of a word

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.batched_settings import Settings
from mtnlg_jax.decode.cache import Decoder, prefill_rows, read, step, to_int8
from mtnlg_jax.decode.rolling import keeps_positions
from mtnlg_jax.decode.sampling import Limits, State, append
from mtnlg_jax.parallel.auto import fetch, over_its_mesh, split, spread, whole

STEPS = 32  # of a turn at most
ALTERNATIVES = 20


class Rows(NamedTuple):
    """The rows of a turn, from the host."""

    tokens_BS: np.ndarray
    lengths_B: np.ndarray
    active_B: np.ndarray  # others change nothing
    prompts_B: np.ndarray
    longest_B: np.ndarray
    seeds_B: np.ndarray
    mu_B: np.ndarray  # the limits of mirostat


class Extras(NamedTuple):
    """What the widest tier of settings takes beside `Settings`."""

    allowed_BW: np.ndarray  # uint32: which ids each row's constraint allows, a bit each
    alternatives_B: np.ndarray  # how many alternatives each row tells


class Written(NamedTuple):
    """The tokens of a turn. Row b wrote the first ``lengths_B[b] - (its length before)`` of U."""

    tokens_UB: jax.Array
    logprobs_UB: jax.Array
    lengths_B: jax.Array
    done_B: jax.Array
    mu_B: jax.Array
    top_tokens_UBA: jax.Array | None
    top_logprobs_UBA: jax.Array | None


class Slots:
    """A cache of ``slots`` rows on the devices of ``decoder``. All arguments are of the host.

    Args:
      limit: positions of a row at most. Layers keep only their windows where it is longer.
      length: positions that the cache has room for at first.

    Raises ValueError if the decoder's mesh splits rows, positions or stages.
    """

    def __init__(self, decoder: Decoder, slots: int, limit: int, length: int):
        check_mesh(decoder.mesh)
        self.decoder = decoder
        self.mesh = decoder.mesh
        self.slots = slots
        like = self._like(limit)
        # Positions of each layer at most.
        self._limits = [jax.tree.leaves(layer)[0].shape[2] for layer in like]
        self._settings: Settings | None = None
        self.cache: tuple[Any, ...] = self._empty(like, length)

    def _like(self, limit: int) -> tuple[Any, ...]:
        """Return the shapes of the cache of one row."""

        def begin(params):
            one_11 = jnp.zeros((1, 1), jnp.int32)
            one_1 = jnp.ones(1, jnp.int32)
            config = self.decoder.config
            cache = prefill_rows(params, one_11, one_1, config=config, size=limit, rolling=True)
            return to_int8(cache.cache) if self.decoder.int8_cache else cache.cache

        return jax.eval_shape(begin, self.decoder.params)

    @over_its_mesh
    def _empty(self, like, length: int) -> tuple[Any, ...]:
        def zeros():
            return jax.tree.map(
                lambda x: jnp.zeros(
                    (self.slots, x.shape[1], min(x.shape[2], length), *x.shape[3:]), x.dtype
                ),
                like,
            )

        return jax.jit(lambda: _split(zeros()))()

    @property
    def whole(self) -> bool:
        """Whether all layers keep all positions."""
        return keeps_positions(self.cache)

    @property
    def nbytes(self) -> int:
        """The memory of the cache now, of all devices; it doubles for a moment in `resize`."""
        return sum(x.nbytes for x in jax.tree.leaves(self.cache))

    @over_its_mesh
    def fill(self, tokens_C: np.ndarray, slot: int, start: int, count: int) -> None:
        """Read ``count`` of ``tokens_C`` into ``slot``, from position ``start`` on."""
        numbers = map(np.int32, (slot, start, count))
        config = self.decoder.config
        self.cache = fill(self.decoder.params, self.cache, tokens_C, *numbers, config=config)

    @over_its_mesh
    def swap(self, one: int, other: int) -> None:
        """Exchange two slots."""
        self.cache = swap(self.cache, np.int32(one), np.int32(other))

    @over_its_mesh
    def copy(self, source: int, target: int) -> None:
        """Copy a slot over another one."""
        self.cache = copy(self.cache, np.int32(source), np.int32(target))

    @over_its_mesh
    def resize(self, length: int) -> None:
        """Cut or pad the cache to ``length`` positions, windows to theirs."""
        lengths = tuple(min(length, limit) for limit in self._limits)
        self.cache = resize(self.cache, lengths=lengths)

    def hold(self, settings: Settings) -> None:
        """Hold the settings of the next turns on the devices: they change only with the rows."""
        if self.mesh is None:
            self._settings = jax.device_put(settings)
        else:
            everywhere = NamedSharding(self.mesh, P())
            self._settings = jax.tree.map(lambda x: spread(np.asarray(x), everywhere), settings)

    @over_its_mesh
    def advance(self, rows: Rows, extras: Extras | None, steps: int) -> Written:
        """Write at most ``steps`` tokens of the first B slots. Return them on the host."""
        self.cache, written = advance(
            self.decoder.params,
            self.cache,
            rows,
            self._settings,
            extras,
            np.int32(steps),
            config=self.decoder.config,
        )
        if self.mesh is None or not self.mesh.is_multi_process:
            return jax.device_get(written)
        return jax.tree.map(fetch, written)


def check_mesh(mesh: Mesh | None) -> None:
    """Raise ValueError if a running batch cannot be split as ``mesh`` says."""
    if mesh is None:
        return
    for axis in ("data", "pipe", "context"):
        if mesh.shape[axis] > 1:
            raise ValueError(
                f"mesh.{axis}={mesh.shape[axis]}, but rows that come and go are written over "
                f"mesh.tensor and mesh.expert; set mesh.{axis}=1, or start one server for each "
                "part of the devices"
            )


def _split(cache):
    """Return a cache split over the mesh in context: heads, but not slots."""
    return jax.tree.map(lambda x: split(x, "ILTH"[: x.ndim]), cache)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def advance(
    params, cache, rows: Rows, settings: Settings, extras, count, *, config: ModelConfig
) -> tuple[tuple[Any, ...], Written]:
    """Write ``count`` tokens of the first B slots, or fewer: it ends with the first row that ends.

    ``extras``: `Extras`, or None where no row has a constraint or tells alternatives.
    """
    batch = rows.lengths_B.shape[0]
    vocabulary = settings.allowed_V.shape[0]
    if extras is not None:
        settings = _constrained(settings, extras.allowed_BW, vocabulary)
    keys_B = jax.vmap(jax.random.key)(rows.seeds_B)
    limits = Limits(jnp.asarray(rows.prompts_B), jnp.asarray(rows.longest_B), keys_B)
    # Sliced once a turn, not in every step; where B is all slots this copies nothing.
    state = State(
        jax.tree.map(lambda x: x[:batch], cache),
        jnp.asarray(rows.tokens_BS),
        jnp.zeros(rows.tokens_BS.shape),
        jnp.asarray(rows.lengths_B),
        ~jnp.asarray(rows.active_B),
        jnp.asarray(rows.mu_B),
    )
    idle_B = state.done_B
    tops = None if extras is None else _no_tops(batch)
    written_UB = jnp.zeros((STEPS, batch), jnp.int32)

    def more(carry):
        number, state, *_ = carry
        return (number < count) & ~(state.done_B & ~idle_B).any()

    def one(carry):
        number, state, tokens_UB, logprobs_UB, tops = carry
        last_B = state.lengths_B - 1
        tokens_B = jnp.take_along_axis(state.tokens_BS, last_B[:, None], 1)[:, 0]
        # A row that does not write may hold the keys of a prompt that is read in its slot.
        logits_BV, kept = step(config, params, state.cache, tokens_B, last_B, ~state.done_B)
        state = append(logits_BV, state._replace(cache=kept), limits, settings)
        at_B1 = state.lengths_B[:, None] - 1
        token_B = jnp.take_along_axis(state.tokens_BS, at_B1, 1)[:, 0]
        logprob_B = jnp.take_along_axis(state.logprobs_BS, at_B1, 1)[:, 0]
        if tops is not None:
            tops = _told(logits_BV, extras.alternatives_B, tops, number)
        return (
            number + 1,
            state,
            tokens_UB.at[number].set(token_B),
            logprobs_UB.at[number].set(logprob_B),
            tops,
        )

    start = jnp.int32(0), state, written_UB, jnp.zeros((STEPS, batch)), tops
    _, state, tokens_UB, logprobs_UB, tops = lax.while_loop(more, one, start)
    cache = jax.tree.map(
        lambda all, x: lax.dynamic_update_slice_in_dim(all, x, 0, 0), cache, state.cache
    )
    told = tops or (None, None)
    written = Written(tokens_UB, logprobs_UB, state.lengths_B, state.done_B, state.mu_B, *told)
    return _split(cache), whole(written)


def _constrained(settings: Settings, allowed_BW, vocabulary: int) -> Settings:
    """Return ``settings`` with the constraint that the bits ``allowed_BW`` spell."""
    bits_BWI = (allowed_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & 1
    allowed_BV = bits_BWI.reshape(allowed_BW.shape[0], -1)[:, :vocabulary] > 0
    options = settings.static_options._replace(constraint=lambda *_: allowed_BV)
    return dataclasses.replace(settings, static_options=options)


def _no_tops(batch: int) -> tuple[jax.Array, jax.Array]:
    shape = (STEPS, batch, ALTERNATIVES)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape)


def _told(logits_BV, alternatives_B, tops, number) -> tuple[jax.Array, jax.Array]:
    """Return ``tops`` with the best ids of step ``number`` and their log-probabilities."""
    # As `append` computes it, so that the number of the chosen token is the same bit for bit.
    total_B1 = jax.nn.logsumexp(logits_BV, -1)[:, None]

    def find(logits_BV):
        best_BA, ids_BA = lax.top_k(logits_BV, min(ALTERNATIVES, logits_BV.shape[1]))
        more = ((0, 0), (0, ALTERNATIVES - ids_BA.shape[1]))
        return jnp.pad(ids_BA, more), jnp.pad(best_BA, more)

    def none(logits_BV):
        return tuple(x[0] for x in _no_tops(logits_BV.shape[0]))

    ids_BA, best_BA = lax.cond((alternatives_B > 0).any(), find, none, logits_BV)
    tokens_UBA, logprobs_UBA = tops
    return tokens_UBA.at[number].set(ids_BA), logprobs_UBA.at[number].set(best_BA - total_B1)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def fill(params, cache, tokens_C, slot, start, count, *, config: ModelConfig) -> tuple[Any, ...]:
    """Read ``count`` of ``tokens_C`` into ``slot``, from position ``start`` on.

    The head is not computed: the first step reads the prompt's last token and so gives the first
    new one, with the row's own settings.
    """
    row = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, slot, 1, 0), cache)
    _, row = read(config, params, row, tokens_C[None], start[None], count[None])
    return _split(
        jax.tree.map(lambda all, x: lax.dynamic_update_slice_in_dim(all, x, slot, 0), cache, row)
    )


@functools.partial(jax.jit, donate_argnames="cache")
def swap(cache, one, other) -> tuple[Any, ...]:
    """Exchange two slots."""

    def exchange(x):
        first = lax.dynamic_slice_in_dim(x, one, 1, 0)
        second = lax.dynamic_slice_in_dim(x, other, 1, 0)
        x = lax.dynamic_update_slice_in_dim(x, second, one, 0)
        return lax.dynamic_update_slice_in_dim(x, first, other, 0)

    return _split(jax.tree.map(exchange, cache))


@functools.partial(jax.jit, donate_argnames="cache")
def copy(cache, source, target) -> tuple[Any, ...]:
    """Copy the slot ``source`` over ``target``."""

    def over(x):
        row = lax.dynamic_slice_in_dim(x, source, 1, 0)
        return lax.dynamic_update_slice_in_dim(x, row, target, 0)

    return _split(jax.tree.map(over, cache))


@functools.partial(jax.jit, static_argnames="lengths")
def resize(cache, *, lengths: tuple[int, ...]) -> tuple[Any, ...]:
    """Return the cache with each layer's arrays cut or padded to ``lengths`` positions."""

    def to(x, length):
        if length <= x.shape[2]:
            return x[:, :, :length]
        more = [(0, 0)] * x.ndim
        more[2] = (0, length - x.shape[2])
        return jnp.pad(x, more)

    pairs = zip(cache, lengths, strict=True)
    return _split(tuple(jax.tree.map(lambda x, n=length: to(x, n), held) for held, length in pairs))


# Any: the size of a jitted function's cache is not in its type.
PROGRAMS: tuple[Any, ...] = (advance, fill, swap, copy, resize)


def programs() -> int:
    """Return the number of compiled programs that batches of this process hold."""
    return sum(program._cache_size() for program in PROGRAMS)
