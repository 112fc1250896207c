"""Pictures of shapes with captions, drawn here: data for a captioner that needs no download.

A combination is (color, form, place). Combinations that training never sees show whether a model
has learned the three apart.
"""

import itertools
import json
import os

import numpy as np

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 240),
    "yellow": (230, 210, 50),
    "purple": (170, 60, 200),
    "white": (235, 235, 235),
}
FORMS = ("circle", "square", "triangle", "cross", "ring")
PLACES = (
    *("at the top left", "at the top", "at the top right"),
    *("at the left", "in the center", "at the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
# Columns of a grid of cells; PLACES are its cells, row by row.
_CELLS = 3

Combination = tuple[str, str, str]


def combinations() -> list[Combination]:
    """Return all 270 combinations of color, form and place."""
    return list(itertools.product(COLORS, FORMS, PLACES))


def split(held_out: float = 0.2, seed: int = 0) -> tuple[list[Combination], list[Combination]]:
    """Return (combinations to train on, combinations to hold out, a share of ``held_out``)."""
    every = combinations()
    order = np.random.default_rng(seed).permutation(len(every))
    count = round(held_out * len(every))
    held = {int(number) for number in order[:count]}
    return (
        [each for number, each in enumerate(every) if number not in held],
        [each for number, each in enumerate(every) if number in held],
    )


def caption_of(combination: Combination) -> str:
    """Return the caption, such as "a red circle at the top left"."""
    return "a {} {} {}".format(*combination)


def draw(combination: Combination, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a picture as uint8 (size, size, 3).

    The place in the cell, the radius, the shade and the background vary by ``rng``, and every pixel
    has noise.
    """
    color, form, place = combination
    cell = size / _CELLS
    row, column = divmod(PLACES.index(place), _CELLS)
    y, x = (np.array([row, column]) + 0.5 + rng.uniform(-0.05, 0.05, 2)) * cell
    radius = rng.uniform(0.38, 0.44) * cell
    pixels = np.arange(size) + 0.5
    inside = _inside(form, (pixels[None] - x) / radius, (pixels[:, None] - y) / radius)
    background = rng.uniform(0, 50, 3)
    shade = np.array(COLORS[color]) * rng.uniform(0.85, 1.0)
    picture = np.where(inside[..., None], shade[None, None], background[None, None])
    return np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)


def _inside(form: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return which points belong to a form of radius 1; ``v`` points down."""
    distance = np.hypot(u, v)
    if form == "circle":
        return distance <= 1
    if form == "ring":
        return (distance <= 1) & (distance >= 0.55)
    if form == "square":
        return np.maximum(abs(u), abs(v)) <= 0.85
    if form == "triangle":
        return (v <= 0.8) & (abs(u) <= (v + 1) / 1.8)
    return (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 1)


def write(
    folder: str | os.PathLike,
    chosen: list[Combination],
    each: int,
    size: int = 24,
    seed: int = 0,
    name: str = "pairs.jsonl",
) -> str:
    """Write ``each`` pictures of every combination of ``chosen`` as PNG below ``folder``, and
    their captions as JSON lines {"image": path, "caption": text}. Return the path of the lines."""
    import PIL.Image

    rng = np.random.default_rng(seed)
    stem = name.removesuffix(".jsonl")
    os.makedirs(os.path.join(folder, stem), exist_ok=True)
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as lines:
        for number, combination in enumerate(chosen * each):
            image = f"{stem}/{number:05}.png"
            PIL.Image.fromarray(draw(combination, size, rng)).save(os.path.join(folder, image))
            row = {"image": image, "caption": caption_of(combination)}
            lines.write(json.dumps(row) + "\n")
    return path
