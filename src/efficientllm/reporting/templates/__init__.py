"""Texts with places for facts, in jinja2's language: the report's page and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def rendered(name: str, **facts: Any) -> str:
    """The template of that name with these facts in it; in HTML whatever is no jinja2 Markup is escaped."""
    return _TEMPLATES.get_template(name).render(facts)
