"""Positions inside attention: rotary frequencies (RoPE) with their scalings, and ALiBi's slopes."""

# Shapes: B rows, S query positions, N heads, H head width, R dims that rotate

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.config import LayerSpec, ModelConfig, RopeScaling


def rope_frequencies(
    base: float, width: int, scaling: RopeScaling, context: int
) -> tuple[np.ndarray, float]:
    """Return the radians per position of each pair of dims, float32 (width / 2,), and the factor of
    cosines and sines.

    Without scaling, pair i turns by base^(-2 i / width) per position (Su 2021, equation 15).

    Args:
      width: dims that rotate, an even number.
      context: longest sequence; longrope chooses its factors by it.
    """
    frequency = base ** (-np.arange(0, width, 2) / width)
    magnitude = scaling.attention_factor
    original = scaling.original_max_position_embeddings
    if scaling.rope_type == "linear":
        frequency = frequency / scaling.factor
    elif scaling.rope_type == "llama3":
        frequency = _llama3(frequency, scaling)
    elif scaling.rope_type == "yarn":
        frequency = _yarn(frequency, base, width, scaling)
        if magnitude is None and scaling.factor > 1:
            magnitude = 0.1 * math.log(scaling.factor) + 1
    elif scaling.rope_type == "longrope":
        longer = context > original
        frequency = frequency / np.asarray(scaling.long_factor if longer else scaling.short_factor)
        if magnitude is None and longer:
            magnitude = math.sqrt(1 + math.log(context / original) / math.log(original))
    return frequency.astype(np.float32), 1.0 if magnitude is None else magnitude


def _llama3(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Stretch long wavelengths, keep short ones, and interpolate in between (Llama Team 2024)."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low = scaling.low_freq_factor
    kept = np.clip((turns - low) / (scaling.high_freq_factor - low), 0, 1)
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def _yarn(frequency: np.ndarray, base: float, width: int, scaling: RopeScaling) -> np.ndarray:
    """Stretch by a ramp over the dims, from those that turn beta_fast times over the original
    context to those that turn beta_slow times (Peng 2023, section 3.2)."""

    def dim_that_turns(times: float) -> float:
        length = scaling.original_max_position_embeddings
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))

    low = dim_that_turns(scaling.beta_fast)
    high = dim_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, width - 1)
    stretched = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
    return frequency / scaling.factor * stretched + frequency * (1 - stretched)


def layer_frequencies(config: ModelConfig, spec: LayerSpec) -> tuple[np.ndarray, float] | None:
    """Return `rope_frequencies` of a layer, or None for a layer that does not rotate."""
    if not config.rotary_width or not spec.rotary:
        return None
    return rope_frequencies(
        spec.rotary_base or config.rotary_base,
        config.rotary_width,
        config.rope_scaling if spec.rope_scaling else RopeScaling(),
        config.max_position_embeddings,
    )


def rotate(
    x_BSNH: jax.Array, positions_BS: jax.Array, frequencies: tuple[np.ndarray, float]
) -> jax.Array:
    """Apply rotary positions (Su 2021) in the halves layout to the first R dims of each head.

    The pair (i, i + R/2) turns by position x frequency i. The other dims stay as they are.
    """
    frequency, magnitude = frequencies
    half = len(frequency)
    angle = positions_BS[..., None].astype(jnp.float32) * frequency[None, None, :]
    cos = magnitude * jnp.cos(angle)[:, :, None]
    sin = magnitude * jnp.sin(angle)[:, :, None]
    left, right, rest = jnp.split(x_BSNH.astype(jnp.float32), (half, 2 * half), -1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin, rest], -1)
    return turned.astype(x_BSNH.dtype)


def alibi_slopes(heads: int) -> np.ndarray:
    """Return the slope of each head, float32 (N,): the geometric sequence of Press 2021, section 3,
    and for numbers that are not powers of two every second slope of the next power."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return np.asarray(slopes, np.float32)
