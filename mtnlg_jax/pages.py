"""Pages of results: HTML that is readable without a network and without scripts."""

import functools
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
    from markupsafe import Markup

    environment = _environment(path.parent)
    environment.filters |= filters or {}
    environment.tests |= tests or {}
    return environment.get_template(path.name).render(generator=Markup(generator(launch)), **shown)


@functools.cache
def _environment(folder: Path) -> Any:
    """Return what keeps the templates of ``folder`` compiled: that takes longer than to fill them
    in."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def generator(launch: str) -> str:
    """Return the mark of the pages that ``launch`` writes; it stands near their beginning."""
    return f'<meta name="generator" content="mtnlg_jax, {launch}">'
