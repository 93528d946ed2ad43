"""Options that several commands share, and what they mean in Python."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from fxslim.errors import RequestError

Asked: TypeAlias = dict[str, Any]
"""Keywords of `fxslim.plan` and of what else takes `fxslim.asked.Asked`."""


class Dtype(str, Enum):
    """What weights are loaded, narrowed and saved as."""

    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


class Method(str, Enum):
    """How units are chosen (`fxslim.passes.methods`)."""

    obs = "obs"
    wanda = "wanda"
    flap = "flap"
    fisher = "fisher"
    taylor = "taylor"
    magnitude = "magnitude"
    random = "random"


class Repair(str, Enum):
    """What is fitted of what stays."""

    refit = "refit"
    scale = "scale"
    bias = "bias"
    none = "none"


GOES, HOW = "What goes", "How it is chosen"
"""Panels of the help."""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Local folder or hub name.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings on stderr; errors only.")]
Cast = Annotated[Dtype, typer.Option("--dtype", help="Load weights as this; what is written has it as well.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it is a checkpoint already.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write.", metavar="OUT", show_default=False)
]  # fmt: skip
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="Plan to follow, from 'fxslim plan'; instead of a request.", metavar="FILE"),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        help="Glob over module paths: narrow only there. May be repeated.", metavar="GLOB", rich_help_panel=GOES
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        help="Glob over module paths: leave these alone. May be repeated.", metavar="GLOB", rich_help_panel=GOES
    ),
]


def _fraction(what: str) -> Any:
    return typer.Option(min=0.0, max=1.0, help=f"Fraction of the {what}.", metavar="FRACTION", rich_help_panel=GOES)


def fractions(
    ffn: Annotated[float, _fraction("FFN channels")] = 0.0,
    heads: Annotated[float, _fraction("query heads")] = 0.0,
    kv_groups: Annotated[float, _fraction("key/value groups")] = 0.0,
    experts: Annotated[float, _fraction("experts that routers select from")] = 0.0,
    value: Annotated[float, _fraction("value channels that all heads share, and of those whose heads cannot go")] = 0.0,
    round_to: Annotated[
        int, typer.Option(min=1, help="Round the number kept up to a multiple.", rich_help_panel=GOES)
    ] = 1,
    include: Include = None,
    skip: Skip = None,
) -> Asked:
    """Return what was asked as fractions."""
    given = {"ffn": ffn, "heads": heads, "kv_groups": kv_groups, "experts": experts, "value": value}
    rest = {"round_to": round_to if round_to > 1 else 0, "include": include, "skip": skip}
    return {name: asked for name, asked in {**given, **rest}.items() if asked}


def choosing(
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Budget in the place of fractions: macs=0.5, params=0.6 (the part to keep), memory=400MB, speedup=2. "
            "May be repeated: all must hold.",
            metavar="WHAT=HOW_MUCH",
            rich_help_panel=GOES,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text to choose by, one sequence a line, tokenized as the model does it.",
            metavar="FILE",
            rich_help_panel=HOW,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Use no more of the text than this.", rich_help_panel=HOW)
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="By default obs with text, magnitude without.", rich_help_panel=HOW)
    ] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Within a target, keep sizes equal over layers.", rich_help_panel=HOW)
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="For what is drawn.", rich_help_panel=HOW)] = 0,
) -> Asked:
    """Return how to choose."""
    given = {
        "target": [as_target(text) for text in target or ()],
        "calibration": calibration,
        "max_tokens": max_tokens,
        "method": None if method is None else method.value,
        "uniform": uniform,
        "seed": seed,
    }
    return {name: asked for name, asked in given.items() if asked}


def as_target(text: str) -> Any:
    """Return the budget that a text such as ``macs=0.5`` stands for.

    Raises:
        RequestError: it stands for none.
    """
    name, _, amount = text.partition("=")
    if name not in ("macs", "params", "memory", "speedup"):
        raise RequestError(f"--target {text}: give macs=0.5, params=0.6, memory=400MB or speedup=2.")
    import fxslim

    try:
        number = amount if name == "memory" else float(amount)
    except ValueError as error:
        raise RequestError(f"--target {text}: {amount!r} is no number.") from error
    return {"macs": fxslim.macs, "params": fxslim.params, "memory": fxslim.memory, "speedup": fxslim.speedup}[name](
        number  # type: ignore[arg-type]
    )


def asking(*groups: Callable[..., Asked]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of some groups; it takes what they return together as ``asked``."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = dict(inspect.signature(command, eval_str=True).parameters)
        del own["asked"]
        options = [dict(inspect.signature(group, eval_str=True).parameters) for group in groups]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            asked: Asked = {}
            for group, names in zip(groups, options, strict=True):
                asked |= group(**{name: given.pop(name) for name in names})
            command(**given, asked=asked)

        every = [*own.values(), *(option for group in options for option in group.values())]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in every]
        run.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return wrap
