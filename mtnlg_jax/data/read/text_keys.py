"""The text of a JSON value or table row, found by its key.

A key is "text", alternatives are "text|content", and "data.paragraphs.context" leads into objects
and lists.
"""

from collections.abc import Iterable

from mtnlg_jax.data.read.open_files import Damaged


def text_of(value: object, text_key: str) -> str | None:
    """Return the text of a value: a string, or what an object holds under the key."""
    if isinstance(value, dict):
        key = find_key(text_key, value)
        if key is None:
            return no_text(text_key, value)
        value = value[key]
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if value is None or isinstance(value, str):
        return value
    return Damaged(f"{text_key!r} holds {type(value).__name__}, not text")


def documents_inside(value: object, text_key: str, in_lists: bool) -> list | None:
    """Return the documents deeper inside an object that lacks the key itself, or None.

    With ``in_lists`` also the only list whose items all have the key.
    """
    if not isinstance(value, dict) or find_key(text_key, value) is not None:
        return None
    for key in text_key.split("|"):
        parts = key.split(".")
        if len(parts) > 1 and (found := _follow(value, parts)):
            return found
    if not in_lists:
        return None
    lists = [
        each
        for each in value.values()
        if isinstance(each, list)
        and each
        and all(isinstance(item, dict) and find_key(text_key, item) for item in each)
    ]
    return lists[0] if len(lists) == 1 else None


def _follow(value: object, parts: list[str]) -> list:
    """Return the values at the end of a path of keys, through lists on the way."""
    if not parts:
        return [] if value is None else [value]
    if isinstance(value, list):
        return [found for each in value for found in _follow(each, parts)]
    if isinstance(value, dict) and parts[0] in value:
        return _follow(value[parts[0]], parts[1:])
    return []


def find_key(text_key: str, names: Iterable[str]) -> str | None:
    """Return the first alternative of a key that is among ``names``, or None."""
    return next((key for key in text_key.split("|") if key in names), None)


def no_text(text_key: str, names: Iterable[str]) -> Damaged:
    """Return the damage of a row without the key."""
    return Damaged(
        f"no {text_key!r} among {', '.join(list(names)[:8])}; name the right one with text_key"
    )
