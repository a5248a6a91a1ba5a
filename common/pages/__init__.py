"""What the HTML pages of both sides share: style, numbers as text, and the way of a figure into a page.

Lives here: the templates' environment. Does not live here: any page (server/report_page, client/audit/page).
"""

from __future__ import annotations

from functools import cache

import jinja2

from consilience.common.pages import numbers

__all__ = ["page_templates"]

FILTERS = ("percent", "count", "number_of", "size", "duration", "decimal", "small", "shorten")
"""Functions of `numbers` that templates use."""


@cache
def page_templates(package: str) -> jinja2.Environment:
    """Return the environment of the templates in a package's folder `templates`, which may include `style.css.j2`.

    Everything that a template prints is escaped, except `Markup`. The same one each time: it keeps what it compiled.
    """
    loaders = [jinja2.PackageLoader(name, "templates") for name in (package, "consilience.common.pages")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in FILTERS:
        environment.filters[name] = getattr(numbers, name)
    return environment
