"""What a command shows while it works, and at its end."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def working(stages: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show on stderr which of ``stages`` stages is running; give a function to call when the next one begins.

    Whatever libraries print meanwhile goes to stderr too: stdout is for results.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    hidden = quiet or not console.is_terminal
    with (
        redirect_stdout(sys.stderr),
        warnings.catch_warnings(),
        Progress(*columns, console=console, transient=True, disable=hidden) as progress,
    ):
        task = progress.add_task("loading libraries", total=stages)
        progress.refresh()
        calm(warn=not quiet)
        begun = -1

        def stage(text: str) -> None:
            nonlocal begun
            begun += 1
            progress.update(task, completed=begun, description=text)

        yield stage


def calm(*, warn: bool) -> None:
    """Keep transformers' own progress bars out of ours, and its warnings to those who want them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not warn:
        logging.set_verbosity_error()
        warnings.simplefilter("ignore")


def show(data: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result."""
    typer.echo(json.dumps(data, indent=2) if as_json else text)
