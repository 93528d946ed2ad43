"""What can be asked of plan, slim and compile: fractions or budgets, and how to choose and repair."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import nn

from fxslim.calibration import Calibration, calibration
from fxslim.errors import RequestError
from fxslim.passes.choose import Request
from fxslim.passes.fitting.fit import Recipe
from fxslim.passes.fitting.refit import Repair
from fxslim.passes.methods import METHODS, WEIGHTS
from fxslim.targets import Target, targets

Globs = str | Iterable[str] | None


class Fractions(TypedDict, total=False):
    """Keywords that say what goes, as fractions.

    Without any of the fractions (and without a target), what does nothing is taken out and nothing else.

    Attributes:
        ffn: fraction of the channels of every feed-forward site that goes.
        heads: fraction of the query heads of every attention site, equally many per key/value group.
        kv_groups: fraction of whole key/value groups.
        experts: fraction of the experts that every router selects from, equally many per routing group.
        value: fraction of the value channels that all heads of an attention share, and of those of every attention
            whose heads do not go, equally many per head.
        round_to: round the kept number of rows in each consumer up to a multiple.
        include: globs over module paths and site names (``*:attention`` is a kind): only there; task heads only where
            included.
        skip: globs over module paths and site names: not there.
    """

    ffn: float
    heads: float
    kv_groups: float
    experts: float
    value: float
    round_to: int
    include: Globs
    skip: Globs


class Asked(Fractions, total=False):
    """Keywords of `fxslim.plan`, `fxslim.slim` and `fxslim.compile`: fractions or a target, and how to choose.

    Attributes:
        calibration: an iterable of batches (dicts of keyword inputs, tuples, tensors; a DataLoader, a dataset): units
            are chosen by what flows through them, and what is left is fitted to what the dense model computes.
            ``attention_mask`` says what is padding; labels are optional.
        max_tokens: use no more of it than this.
        target: a budget in the place of fractions, over all sites: `fxslim.macs`, `fxslim.params`, `fxslim.memory`,
            `fxslim.speedup`, or a list of them that must all hold.
        method: ``obs`` (with calibration data, the default), ``wanda``, ``flap``, ``fisher``, ``taylor``,
            ``magnitude`` (without, the default) or ``random``.
        repair: what is fitted of what stays: ``"refit"`` (or True, the default) the consumers' weights and biases,
            ``"scale"`` one factor for each unit, ``"bias"`` the biases alone; False for nothing.
        uniform: keep the same number at every site of a kind and size, within a target.
        propagate: fit every part to what the narrowed model feeds it, so that later ones make up for earlier ones (the
            default); False fits each to the dense model by itself.
        swaps: with ``obs`` and repair, try to swap units that stay with units that go (the default).
        seed: for what is drawn.
    """

    calibration: Any
    max_tokens: int | None
    target: Target | Iterable[Target] | None
    method: str | None
    repair: bool | Repair
    uniform: bool
    propagate: bool
    swaps: bool
    seed: int


@dataclass(frozen=True)
class Wanted:
    """What was asked, checked.

    Attributes:
        request: fractions and globs.
        recipe: how to choose and repair; None for the plain choice by magnitude.
        data: calibration data, as given.
        max_tokens: how much of it.
        seed: for what is drawn.
    """

    request: Request
    recipe: Recipe | None
    data: Any = None
    max_tokens: int | None = None
    seed: int = 0

    def read(self, model: nn.Module) -> Calibration | None:
        """Read the calibration data for a model."""
        if self.data is None:
            return None
        return calibration(model, self.data, max_tokens=self.max_tokens, seed=self.seed)


def request_of(asked: Fractions, kind: type[Fractions] = Fractions) -> Request:
    """Check the keywords that say what goes, and return them as a request.

    Args:
        asked: the keywords.
        kind: which others are known beside them.

    Raises:
        RequestError: a keyword or value that means nothing.
    """
    known = tuple(kind.__annotations__)
    for name in asked:
        if name not in known:
            hint = nearest(name, known, "=") or f" There are {', '.join(known)}."
            raise RequestError(f"{name}= means nothing here.{hint}")
    fractions = {name: asked[name] for name in ("ffn", "heads", "kv_groups", "experts", "value") if name in asked}
    return Request(
        **fractions,
        round_to=asked.get("round_to", 1),
        include=globs(asked.get("include")),
        skip=globs(asked.get("skip")),
    )


def wanted(asked: Asked, *, planned: bool = False) -> Wanted:
    """Check what was asked.

    Args:
        asked: the keywords.
        planned: whether a plan was given, so that the data repairs and chooses nothing.

    Raises:
        RequestError: a keyword or value that means nothing, or several that contradict each other.
    """
    request = request_of(asked, Asked)
    budget = targets(asked.get("target"))
    if budget and not request.lossless:
        raise RequestError("give fractions or a target, not both: a target decides how much goes where.")
    return _with_data(asked, request, budget, planned=planned)


SAME = {"exclude": "skip", "excluded": "skip", "frequency": "every", "pruning_frequency": "every", "criterion": "score"}
"""What others call some keywords."""


def nearest(name: str, known: Sequence[str], mark: str = "") -> str:
    """Return a question after the nearest known name, to end an error with; nothing where none is near."""
    near = [SAME[name]] if SAME.get(name) in known else difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}{mark}?" if near else ""


def _with_data(asked: Asked, request: Request, budget: tuple[Target, ...], *, planned: bool) -> Wanted:
    data, method, seed = asked.get("calibration"), asked.get("method"), asked.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise RequestError(f"seed={seed!r}: give a whole number of at least 0.")
    if method is not None and method not in METHODS:
        raise RequestError(f"method={method!r} is none of {', '.join(METHODS)}.{nearest(str(method), tuple(METHODS))}")
    for name in ("uniform", "propagate", "swaps"):
        if not isinstance(asked.get(name, True), bool):
            raise RequestError(f"{name}={asked.get(name)!r}: give True or False.")
    if data is None:
        idle = [name for name in ("max_tokens", "repair") if asked.get(name) not in (None, False)]
        idle += [name for name in ("propagate", "swaps") if name in asked]
        if idle:
            raise RequestError(f"{idle[0]}= does nothing without calibration=.")
        if method is not None and method not in WEIGHTS:
            raise RequestError(f"method={method!r} looks at what flows through the model: give calibration=.")
    if request.lossless and not budget and not planned and (data is not None or method is not None):
        raise RequestError("say how much is to go: ffn=0.5, heads=0.5, or target=fxslim.macs(0.5).")
    if asked.get("uniform") and not budget:
        raise RequestError("uniform= is about a target; fractions are the same everywhere anyway.")
    if data is None and method is None and not budget:
        return Wanted(request, None, seed=seed)
    recipe = Recipe(
        method=method or ("magnitude" if data is None else "obs"),
        repair=_repair(asked.get("repair", True)) if data is not None else None,
        uniform=asked.get("uniform", False),
        propagate=asked.get("propagate", True),
        swaps=asked.get("swaps", True),
        targets=budget,
        round_to=request.round_to,
        seed=seed,
    )
    return Wanted(request, recipe, data, asked.get("max_tokens"), seed)


def _repair(given: object) -> Repair | None:
    if isinstance(given, bool):
        return "refit" if given else None
    if given not in ("refit", "scale", "bias"):
        raise RequestError(f"repair={given!r}: give 'refit' (or True), 'scale', 'bias' or False.")
    return given


def globs(given: Globs) -> tuple[str, ...]:
    """Return globs over module paths as a tuple."""
    if given is None:
        return ()
    several = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if not all(isinstance(glob, str) for glob in several):
        raise RequestError(f"include= and skip= take globs over module paths, not {given!r}.")
    return several
