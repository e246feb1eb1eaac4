"""The application object, arguments that commands share, and how errors become sentences and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from efficientllm.errors import SharedError, UsageError

USAGE_ERROR = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a good language model into a better small one: pretraining, architecture design and pruning in one run.",
    epilog="Results go to stdout, everything else to stderr. Exit codes: 0 done; 2 something you can mend; 75 a rank "
    "hung; 130 and 143 stopped by Ctrl-C and SIGTERM (a run has saved everything).",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe; see recipes/ for commented ones.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Replaces keys of the recipe, e.g. train.lr=1e-3"),
]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns what the user can mend, or has asked for, into a sentence and an exit code.

    Of several processes that meet it together one has the words, and all leave with the code.
    """
    from efficientllm.jobs.interruption import Interrupted

    rank = int(os.environ.get("RANK", "0"))
    try:
        yield
    except SharedError:  # said already (distributed.launch)
        raise SystemExit(USAGE_ERROR) from None
    except UsageError as error:
        say(f"error: rank {rank}: {error}" if rank else f"error: {error}")
        raise SystemExit(USAGE_ERROR) from None
    except Interrupted as stop:
        if not rank:
            say(str(stop))
        raise SystemExit(128 + stop.signum) from None
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last checkpoint")
        raise SystemExit(130) from None
