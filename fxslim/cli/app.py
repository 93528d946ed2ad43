"""The command itself: its help, its version, and how it ends when something fails."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import fxslim
from fxslim.errors import FxslimError


class _Group(TyperGroup):
    """Turn what fxslim and the file system refuse into one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (FxslimError, OSError) as error:
            typer.echo(f"fxslim: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("fxslim: interrupted; what was there is as it was", err=True)
            raise typer.Exit(130) from error

    def list_commands(self, ctx: Any) -> list[str]:
        """List commands in the order in which they are used."""
        order = ("inspect", "plan", "compile", "slim-checkpoint", "verify", "export", "bench", "demo")
        return sorted(super().list_commands(ctx), key=order.index)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make trained transformers physically smaller: remove FFN channels and attention heads, and prove that the "
    "narrowed model computes what the masked one does.",
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"fxslim {fxslim.__version__}")
        raise typer.Exit


def examples(*lines: str, note: str = "") -> str:
    """Return the end of a command's help."""
    head = "[bold]Example:[/bold]" if len(lines) == 1 else "[bold]Examples:[/bold]"
    return "\n\n".join([head, *lines, *([note] if note else [])])


def main() -> None:
    """Run the command line."""
    app(prog_name="fxslim")
