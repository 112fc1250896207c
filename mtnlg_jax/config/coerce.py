"""Convert values to the types that the fields of a config have; JSON, NumPy and literals lose some
of them."""

import dataclasses
import functools
import operator
import os
import types
import typing


def plain(value, path: str):
    """Convert ``value`` to what JSON can hold: NumPy scalars and arrays to Python's, paths to text.
    Raises ValueError, naming ``path``, for any other object."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            each.name: plain(getattr(value, each.name), f"{path}.{each.name}")
            for each in dataclasses.fields(value)
        }
    if isinstance(value, list | tuple):
        return [plain(each, path) for each in value]
    if isinstance(value, dict):
        return {str(key): plain(each, f"{path}.{key}") for key, each in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy, JAX
        return value.tolist()
    raise ValueError(
        f"{path}={value!r} is a {type(value).__name__}; write a number, a string, a list or None"
    )


def coerce(value, kind, path: str):
    """Convert ``value`` to an instance of the annotation ``kind``. Raises ValueError, naming
    ``path``, where it is not one."""
    if typing.get_origin(kind) is typing.Literal:
        return coerce(value, base_of(kind), path)  # `checks.check_fields` checks the choice
    if isinstance(kind, types.UnionType):
        if value is None and type(None) in kind.__args__:
            return None
        kinds = [k for k in kind.__args__ if k is not type(None)]
        kind = type(value) if type(value) in kinds else kinds[0]
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, list | tuple):
        members = typing.get_args(kind)
        if members[-1] is Ellipsis:
            return tuple(coerce(v, members[0], path) for v in value)
        if len(members) == len(value):
            return tuple(coerce(v, k, path) for v, k in zip(value, members, strict=True))
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _from_dict(kind, value, path)
    elif origin is None and not dataclasses.is_dataclass(kind):
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(str(value))  # float(value) raises above 1e308; this gives inf
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    raise ValueError(f"{path}={value!r} is {type(value).__name__}; it must be {kind_name(kind)}")


@functools.cache  # a search validates thousands of configs
def hints_of(kind: type, limits: bool = False) -> dict[str, typing.Any]:
    """Return {field: annotation} of a dataclass, with the metadata of `Annotated` if ``limits``."""
    return typing.get_type_hints(kind, include_extras=limits)


def base_of(kind):
    """Return the type of a Literal's choices: str for Literal["a", "b"], bool | str for
    Literal[False, "never"]."""
    kinds = list(dict.fromkeys(map(type, typing.get_args(kind))))
    return functools.reduce(operator.or_, kinds)


def kind_name(kind) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _from_dict(kind, tree: dict, path: str):
    hints = hints_of(kind)
    unknown = sorted(map(str, set(tree) - set(hints)))
    if unknown:
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; it has {', '.join(hints)}")
    return kind(**{key: coerce(value, hints[key], f"{path}.{key}") for key, value in tree.items()})
