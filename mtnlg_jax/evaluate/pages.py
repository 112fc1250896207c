"""Pages of results: HTML that is readable without a network and without scripts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def load_template(
    path: Path,
    filters: Mapping[str, Any] | None = None,
    tests: Mapping[str, Any] | None = None,
) -> Any:
    """Return the jinja2 template of a file. What it shows is escaped, and a name that it is not
    given is an error."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters or {}
    environment.tests |= tests or {}
    return environment.from_string(path.read_text(encoding="utf-8"))
