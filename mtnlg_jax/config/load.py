"""Read a config from a Python file or from JSON, and single values from the command line."""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterable

from mtnlg_jax import command, foreign
from mtnlg_jax.config import schema
from mtnlg_jax.config.coerce import base_of, coerce, hints_of, kind_name, plain
from mtnlg_jax.config.rules import validate
from mtnlg_jax.config.schema import Config

WAY_OUT = "give one of configs/*.py, or a Hugging Face folder or GGUF file that exists"


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Run ``get_config()`` of the Python file ``path``, apply ``overrides`` ("train.steps=10") and
    validate the result. "FILE.py:TEXT" calls ``get_config("TEXT")``. A model of another format
    (`foreign`) gives the config of a run with it. The vocabulary is padded for mesh.tensor. Raises
    FileNotFoundError or ValueError."""
    reader = foreign.reader_of(path)
    if reader is not None:
        config = map_paths(override(reader.config(path), *overrides), command.expand)
    else:
        config = load_object(path, Config, overrides)
    config = dataclasses.replace(config, model=config.model.padded(config.mesh.tensor))
    validate(config)
    return config


def load_object(path: str, kind: type, overrides: Iterable[str] = ()):
    """Load a dataclass of any ``kind`` in the same way, without validation. A ~ is expanded in
    fields marked with PATH. Errors in the file become a ValueError of one line that names the
    file's line."""
    given = path
    path, arguments = split_argument(path)
    if not os.path.isfile(path):
        root = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
        there = os.path.normpath(os.path.join(root, path))
        hint = f"did you mean {there}?" if os.path.isfile(there) else WAY_OUT
        found = "is a folder without config.json" if os.path.isdir(path) else "is not a file"
        raise FileNotFoundError(f"config {path!r} {found}; {hint}")
    spec = importlib.util.spec_from_file_location("mtnlg_config", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"config {path!r} is not a Python file; {WAY_OUT}")
    module = importlib.util.module_from_spec(spec)
    get_config = None
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if callable(get_config):
            _check_arguments(given, get_config, arguments)
            config = get_config(*arguments)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"config {path!r} does not load: {describe_failure(error, path, get_config)}"
        ) from error
    if not callable(get_config):
        raise ValueError(f"config {path!r} defines no get_config(); see configs/tiny.py")
    if not isinstance(config, kind):
        raise ValueError(
            f"get_config() of {path!r} returns a {type(config).__name__}; "
            f"it must return a {kind.__name__}"
        )
    try:
        config = coerce(plain(config, "config"), kind, "config")  # lists become tuples
    except ValueError as error:
        raise ValueError(f"config {path!r}: {error}") from None
    return map_paths(override(config, *overrides), command.expand)


def split_argument(path: str) -> tuple[str, list[str]]:
    """Split "FILE.py:TEXT" into ("FILE.py", ["TEXT"]). A path without TEXT gives (path, [])."""
    found = None if os.path.isfile(path) else re.fullmatch(r"(.+\.py):([^/]*)", path)
    return (found[1], [found[2]]) if found else (path, [])


def _check_arguments(given: str, get_config: Callable, arguments: list[str]) -> None:
    parameters = inspect.signature(get_config).parameters.values()
    needed = [each.name for each in parameters if each.default is each.empty]
    if len(needed) > len(arguments):
        raise ValueError(
            f"get_config() needs {needed[0]!r}; give it after a colon, as {given}:{needed[0]}"
        )
    if len(parameters) < len(arguments):
        raise ValueError(
            f"get_config() takes no argument, but {arguments[0]!r} follows the colon; leave it out"
        )


def describe_failure(error: BaseException, path: str, called: Callable | None = None) -> str:
    """Describe in one line what the Python file ``path`` raised and where: "line 7: TypeError:
    ...". If ``called`` could not even be entered, the line is that of its definition."""
    whole = os.path.abspath(path)
    numbers = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.abspath(frame.filename) == whole
    ]
    if isinstance(error, SyntaxError) and os.path.abspath(error.filename or "") == whole:
        numbers.append(error.lineno)
    code = getattr(called, "__code__", None)
    if not numbers and code is not None:
        numbers.append(code.co_firstlineno)
    line = f"line {numbers[-1]}: " if numbers else ""
    text = " ".join(str(error).split())
    return f"{line}{type(error).__name__}{f': {text}' if text else ''}{_nearest_field(text)}"


def _nearest_field(text: str) -> str:
    """Suggest a field if ``text`` reports that a dataclass of `schema` lacks it, or return ""."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    kind = getattr(schema, found[1], None) if found else None
    if found is None or not dataclasses.is_dataclass(kind):
        return ""
    names = [each.name for each in dataclasses.fields(kind)]
    close = difflib.get_close_matches(found[2], names, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(names)}"


def map_paths(config, change: Callable[[str], str], prefix: str = ""):
    """Return the dataclass ``config`` with ``change`` applied to each text that names a file or
    folder."""
    changed: dict[str, typing.Any] = {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if each.metadata.get("path"):
            try:
                changed[each.name] = _map_texts(value, change)
            except ValueError as error:
                raise ValueError(f"{prefix}{each.name}: {error}") from None
        elif dataclasses.is_dataclass(value):
            changed[each.name] = map_paths(value, change, f"{prefix}{each.name}.")
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            inner = f"{prefix}{each.name}."
            changed[each.name] = tuple(
                map_paths(one, change, inner) if dataclasses.is_dataclass(one) else one
                for one in value
            )
    return dataclasses.replace(config, **changed) if changed else config


def _map_texts(value, change: Callable[[str], str]):
    if isinstance(value, str):
        return change(value) if value else value
    if isinstance(value, list | tuple):
        return tuple(_map_texts(each, change) for each in value)
    return value


def override[Settings](config: Settings, *assignments: str) -> Settings:
    """Return a copy of ``config`` with each "section.key=value" applied. The value is read as the
    type of the field. ``config`` may be any dataclass of settings.

    data.path and data.blend exclude each other: the one that is given here clears the other one of
    the file."""
    given: dict[str, str] = {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        given[key.strip()] = text.strip()
    empty: dict[str, typing.Any] = {"path": "", "blend": ()}
    for key, other in (("path", "blend"), ("blend", "path")):
        filled = given.get(f"data.{key}", "") not in ("", "()", "[]")
        if isinstance(config, Config) and filled and f"data.{other}" not in given:
            data = dataclasses.replace(config.data, **{other: empty[other]})
            config = dataclasses.replace(config, data=data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set={assignment!r} has no '='; write it as --set=train.steps=10")
        config = _replace(config, path.strip().split("."), text.strip(), path.strip())
    return config


def _replace(node, keys: list[str], text: str, path: str):
    names = [f.name for f in dataclasses.fields(node)]
    if keys[0] not in names:
        close = difflib.get_close_matches(keys[0], names, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"{path}: {type(node).__name__} has no {keys[0]!r}; {hint}it has {', '.join(names)}"
        )
    value = getattr(node, keys[0])
    if dataclasses.is_dataclass(value):
        if len(keys) == 1:
            inner = ", ".join(f.name for f in dataclasses.fields(value))
            raise ValueError(f"{path} is a section; set one of its keys: {inner}")
        return dataclasses.replace(node, **{keys[0]: _replace(value, keys[1:], text, path)})
    if len(keys) > 1:
        raise ValueError(f"{path}: {keys[0]} is a value, not a section; it has no keys")
    section: typing.Any = type(node)
    kind = hints_of(section)[keys[0]]
    return dataclasses.replace(node, **{keys[0]: _parse(text, kind, path)})


def _parse(text: str, kind, path: str):
    if typing.get_origin(kind) is typing.Literal:
        kind = base_of(kind)
    if kind is str:
        return text
    text = {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all it raises
        if isinstance(kind, types.UnionType) and str in kind.__args__:
            return text
        way_out = f"; give {(text,)!r}" if kind == tuple[str, ...] else ""
        raise ValueError(
            f"{path}={text!r} is not a value of type {kind_name(kind)}{way_out}"
        ) from None
    return coerce(value, kind, path)


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(text: str) -> Config:
    return coerce(json.loads(text), Config, "config")
