"""The main figures of a file of measures, whatever its form: lists, and tables of rows alike.

Only numbers are taken, and texts under a few known keys: others may hold what the model wrote, or
what it was tested for, such as personal data and secrets. Details stay in the file.
"""

from collections.abc import Iterator
from typing import Any

from mtnlg_jax.evaluate.card.facts import Facts, pointer
from mtnlg_jax.evaluate.card.page import Cell, Section, escaped
from mtnlg_jax.evaluate.card.run_files import RunFiles, without_folders

# Keys whose texts name a row or say how it was made.
_NAMES = (
    "name kind task category group rule method metric format unit axis type decoding scorer "
    "accountant lexicon language"
).split()
# Keys of numbers that name a row of a list.
_NUMBERS = ("copies", "prefix", "prefix_tokens", "length", "noise")
# Keys below which texts of the data or of the model may stand, also as numbers and as tokens.
_HIDDEN = "secret secrets text texts continuations token_ids examples example matches match".split()
# Keys of details: how it was measured, and tables of single words.
_DETAILS = (
    "settings seconds cooccurrence tables outputs outputs_without_words differences occupations "
    "templates groups_of_terms per_row prefixes"
).split()
# What each file says of itself.
_HEAD = ("kind", "step", "commit", "versions", "created")
_ROWS = 12  # of a table
_BLOCKS = 60  # of a section
_DEPTH = 7
_FLAT = 2  # levels of dicts that become one row
_INTERVAL = 3  # numbers in a list that is shown; longer ones may be tokens
_PATH = tuple[str | int, ...]


def measured(facts: Facts, run: RunFiles, file: str, section: Section) -> Section:
    """Add the main figures of ``file`` to ``section``, and return it."""
    content = {key: value for key, value in run.content[file].items() if key not in _HEAD}
    before = len(section.blocks)
    _nested(facts, file, (), content, section, before + _BLOCKS)
    if len(section.blocks) > before:
        section.blocks.append(f"Details and texts are in `{file}` alone.")
    return section


def _nested(facts: Facts, file: str, path: _PATH, value: Any, section: Section, most: int) -> None:
    """Add what is below ``path``, up to ``most`` blocks of the section."""
    if len(path) > _DEPTH or len(section.blocks) >= most:
        return
    entries = list(_entries(value))
    words = _words(path)
    scalars = [
        facts.read(file, pointer(*path, key), ": ".join(filter(None, (words, _word(key)))))
        for key, inside in entries
        if _is_shown(key, inside)
    ]
    inner = [(key, inside) for key, inside in entries if isinstance(inside, dict | list)]
    section.listing(scalars[:_ROWS], head=(words, ""))
    if (len(inner) > 1 or isinstance(value, list)) and _are_alike(inner):
        _rows(facts, file, path, inner, section)
        return
    for key, inside in inner:
        _nested(facts, file, (*path, key), inside, section, most)


def _are_alike(inner: list) -> bool:
    """Return whether the entries of a dict or list are rows of one table."""
    if any(_levels(inside) > _FLAT for _, inside in inner):
        return False
    rows = sorted(({place for place, _ in _leaves(inside)} for _, inside in inner), key=len)
    # Otherwise the longest row stands for a table of its own, beside something else.
    longest = rows.pop() if rows else set()
    return not rows or any(2 * len(longest & row) >= len(longest) for row in rows)


def _rows(facts: Facts, file: str, path: _PATH, inner: list, section: Section) -> None:
    """Add a table of dicts of numbers, one a row."""
    words = _words(path)
    leaves = [(key, dict(_leaves(row))) for key, row in inner]
    found = [(key, row) for key, row in leaves if row]
    columns = list(dict.fromkeys(column for _, row in found for column in row))
    listed = isinstance(inner[0][0], int) if inner else False
    named = any(column[-1] in (*_NAMES, *_NUMBERS) for column in columns)
    # Rows of a list that nothing names say little, and long lists belong into the file.
    if not columns or (listed and (not named or len(found) > _ROWS)):
        return
    rows: list[list[Cell]] = []
    for key, row in found[:_ROWS]:
        cells: list[Cell] = [] if listed else [_word(key)]
        for column in columns:
            label = ": ".join(filter(None, (words, _word(key), _words(column))))
            place = pointer(*path, key, *column)
            cells.append(facts.read(file, place, label) if column in row else "")
        rows.append(cells)
    if listed and words:
        section.blocks.append(f"{escaped(words[:1].upper() + words[1:])}:")
    head = [] if listed else [words]
    section.table((*head, *map(_words, columns)), rows)


def _entries(value: Any) -> Iterator[tuple[str | int, Any]]:
    """Yield the entries of a dict or list that may be shown."""
    if isinstance(value, dict):
        for key, inside in value.items():
            if key not in _HIDDEN and key not in _DETAILS:
                yield key, inside
    elif len(value) <= _INTERVAL or not any(isinstance(one, int | float) for one in value):
        for number, inside in enumerate(value):
            yield number, inside


def _leaves(value: Any, path: _PATH = ()) -> Iterator[tuple[_PATH, Any]]:
    """Yield (path, value) of what may be shown of nested dicts and intervals."""
    for key, inside in _entries(value):
        if isinstance(inside, dict | list):
            yield from _leaves(inside, (*path, key))
        elif _is_shown(key, inside):
            yield (*path, key), inside


def _levels(value: Any) -> int:
    """Return how many dicts lie within each other; lists of them count as too many for a row."""
    inside = [one for _, one in _entries(value) if isinstance(one, dict | list)]
    if isinstance(value, list):
        return 1 + _FLAT if inside else 0
    return 1 + max(map(_levels, inside), default=0)


def _is_shown(key: str | int, value: Any) -> bool:
    if isinstance(value, str):
        return key in _NAMES and len(value) <= 60 and not value.startswith(("/", "~"))
    return isinstance(value, bool | int | float)


def _words(path: _PATH) -> str:
    return ", ".join(map(_word, path))


def _word(key: str | int) -> str:
    # Files of pairs name a part of a report, and nobody needs their folders.
    return f"entry {key}" if isinstance(key, int) else without_folders(key).replace("_", " ")
