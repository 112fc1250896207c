"""Pages of results: HTML that is readable without a network and without scripts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What all pages begin with.
_SHARED = Path(__file__).with_name("page")


def render(
    path: Path,
    launch: str,
    *,
    filters: Mapping[str, Any] | None = None,
    tests: Mapping[str, Any] | None = None,
    **shown: Any,
) -> str:
    """Return the page of a jinja2 template, a file that extends page/base.html.

    What it shows is escaped, and a name that it is not given is an error. ``launch`` is the script
    that writes the page: see `generator`.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path.parent, _SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    environment.tests |= tests or {}
    return environment.get_template(path.name).render(generator=Markup(generator(launch)), **shown)


def generator(launch: str) -> str:
    """Return the mark of the pages that ``launch`` writes; it stands near their beginning."""
    return f'<meta name="generator" content="mtnlg_jax, {launch}">'
