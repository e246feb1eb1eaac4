"""The command keys: what a recipe may say."""

from __future__ import annotations

from typing import Annotated

import typer

from efficientllm.cli.app import app, one_sentence
from efficientllm.errors import UsageError


@app.command()
@one_sentence()
def keys(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="One section, such as prune, or one key; default: all.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/recipe.md has it.")] = False,
) -> None:
    """List the keys of a recipe with their defaults and meanings."""
    from efficientllm.config import GONE
    from efficientllm.config.reference import recipe_keys
    from efficientllm.reporting.tables import keys_page, print_keys

    found = list(recipe_keys())
    if section is not None:
        known = sorted({key.name.split(".")[0] for key in found})
        found = [key for key in found if (key.name + ".").replace("[]", "").startswith(f"{section}.")]
        if not found:
            raise UsageError(f"{section} is neither a section nor a key of a recipe; sections are {', '.join(known)}")
    if markdown:
        print(keys_page(found, {key: gone.instead for key, gone in GONE.items()}), end="")
    else:
        print_keys(found)
