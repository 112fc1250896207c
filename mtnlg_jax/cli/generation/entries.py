"""Parsers of flag values: escaped texts, token ids, biases."""

import re

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescape(text: str) -> str:
    r"""Replace \n, \t, \r and \\ by the characters that they stand for."""
    return re.sub(r"\\([ntr\\])", lambda match: ESCAPES[match[1]], text)


def read_ids(text: str) -> tuple[int, ...]:
    """Read ID,ID."""
    return tuple(int(token) for token in text.split(","))


def read_biased(text: str) -> tuple[tuple[int, ...], float]:
    """Read ID,ID:BIAS."""
    tokens, _, bias = text.rpartition(":")
    return read_ids(tokens), float(bias)


def read_forced(text: str) -> tuple[int, int]:
    """Read POSITION:ID."""
    position, token = text.split(":")
    return int(position), int(token)
