"""Write a card, and never over what somebody else wrote.

A card carries a mark with the SHA-256 of all that was generated. The authors' notes stand between
two marks of their own: a rewrite keeps them, and they are not part of the digest.
"""

import hashlib
import os
import re

from mtnlg_jax import command
from mtnlg_jax.evaluate.card.card import Card
from mtnlg_jax.storage import write_file

_BEGIN = "<!-- authors' notes begin: they are kept when the card is written again -->"
_END = "<!-- authors' notes end -->"
_NO_NOTES = "The authors have added no notes."
_MARK = re.compile(r"<!-- written by mtnlg_jax, launch/model_card\.py; sha256 ([0-9a-f]{64}) -->\n")
_NOTES = re.compile(re.escape(_BEGIN) + r"(.*?)" + re.escape(_END), re.DOTALL)


def check_output(path: str, overwrite: bool) -> None:
    """Check that a card may be written to ``path``, before any work.

    Raises OSError where its folder is missing, and FileExistsError where a file is there that this
    package did not write, or that was edited outside the authors' notes, unless ``overwrite``.
    """
    command.check_file(path, "output")
    if not os.path.exists(path) or overwrite:
        return
    text = _text_of(path)
    mark = _MARK.search(text)
    way_out = "choose another --output, or replace it with --overwrite"
    if mark is None:
        raise FileExistsError(f"{path} was not written by launch/model_card.py; {way_out}")
    if _digest(text) != mark[1]:
        raise FileExistsError(
            f"{path} was edited outside the authors' notes; move the text between the two marks "
            f"of the notes, {way_out}"
        )


def write_card(card: Card, path: str) -> str:
    """Write the card to ``path`` and return its text; the authors' notes there are kept."""
    notes = f"\n{_NO_NOTES}\n"
    if os.path.exists(path):
        found = _NOTES.search(_text_of(path))
        notes = found[1] if found else notes
    text = render(card, notes)
    folder, name = os.path.split(path)
    write_file(folder or ".", name, text.encode())
    return text


def render(card: Card, notes: str = f"\n{_NO_NOTES}\n") -> str:
    """Return the whole text of the card."""
    head = f"---\n{card.data.to_yaml()}\n---\n"
    body = f"\n{card.above}\n## Authors' notes\n\n{_BEGIN}{notes}{_END}\n\n{card.below}"
    digest = _digest(head + body)
    mark = f"<!-- written by mtnlg_jax, launch/model_card.py; sha256 {digest} -->\n"
    return head + mark + body


def _digest(text: str) -> str:
    """Return the SHA-256 of a card without its mark and its notes."""
    text = _NOTES.sub(lambda found: _BEGIN + _END, _MARK.sub("", text))
    return hashlib.sha256(text.encode()).hexdigest()


def _text_of(path: str) -> str:
    with open(path, "rb") as file:
        return file.read().decode("utf-8", "replace")
