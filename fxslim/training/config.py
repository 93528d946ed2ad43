"""What pruning while training is asked to do: plain data, checked when it is made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fxslim.asked import Globs, globs, nearest
from fxslim.errors import RequestError
from fxslim.passes.choose import Request
from fxslim.training.patterns import pattern_of
from fxslim.training.schedule import SCHEDULES
from fxslim.training.scores import SCORES

T = TypeVar("T")
UNITS = ("ffn", "heads", "kv_groups", "value")
"""Fractions of units: what can be taken out of a model afterwards."""
SCOPES = ("local", "global")
KINDS = ("Linear", "Conv")


def keywords(kind: type[T]) -> type[T]:
    """Make a dataclass refuse keywords that it does not know by naming the nearest one."""
    names = tuple(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
    plain: Callable[..., None] = kind.__init__

    @functools.wraps(plain)
    def checked(self: object, *args: object, **given: object) -> None:
        for name in given:
            if name not in names:
                raise RequestError(f"{kind.__name__} has no {name}=.{nearest(name, names, '=')}")
        plain(self, *args, **given)

    kind.__init__ = checked  # type: ignore[method-assign]
    return kind


@keywords
@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Learn from the dense model beside the task: ``task·L + logits·T²·KL + hidden·MSE``.

    The divergence is that of Hinton et al. (2015): from the teacher's softmax at the temperature to the student's, mean
    over rows (over tokens that count), times the temperature squared. One number per row (regression) is compared by
    its square. Hidden states are compared layer by layer; they are of one width, since masks leave it alone.

    Attributes:
        temperature: T.
        task: weight of the model's own loss.
        logits: weight of the divergence.
        hidden: weight of the mean squared difference of hidden states; it tends to mislead gradient scores.
    """

    temperature: float = 2.0
    task: float = 1.0
    logits: float = 1.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)
        for name in ("task", "logits", "hidden"):
            value = getattr(self, name)
            if not _number(value) or not 0 <= value < float("inf"):
                raise RequestError(f"{name}={value!r}: give a weight of at least 0.")
        if not self.logits and not self.hidden:
            raise RequestError("distillation with logits=0 and hidden=0 learns nothing from the dense model.")


@keywords
@dataclass(frozen=True, kw_only=True)
class WeightMasks:
    """Mask single weights or blocks of them. The model stays as large and as slow as it is, but for sparse kernels.

    Attributes:
        fraction: of the weights that is masked; with ``N:M`` it is N/M and need not be said.
        pattern: ``1x1`` single weights, ``NxM`` blocks of N outputs by M inputs, ``N:M`` the N smallest of every M
            inputs, ``channelx1`` whole inputs, ``1xchannel`` whole outputs.
        kinds: kinds of layers: ``Linear`` (and Conv1D of transformers), ``Conv``.
        lock: mask what is zero at the start, and nothing else; start, end and schedule are of no account then.
        lasso: strength of a group lasso over the pattern's blocks: after every step until the schedule's end, their
            norms shrink by learning rate times strength times √size (a proximal step).
        reduce: what a block's score is of those of its weights: their ``mean``, ``sum`` or ``max``. A score that is the
            derivative by a block's mask is a sum in itself.
        portions: what an update takes out goes in so many parts, one a step, the smallest weights first.
    """

    fraction: float | None = None
    pattern: str = "1x1"
    kinds: tuple[str, ...] = KINDS
    lock: bool = False
    lasso: float = 0.0
    reduce: str = "mean"
    portions: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", _several("kinds", self.kinds, KINDS))
        pattern = pattern_of(self.pattern)
        fixed = pattern.fraction
        if self.lock:
            given = {"fraction": None, "lasso": 0.0, "reduce": "mean", "portions": 1}
            idle = ", ".join(f"{name}=" for name, plain in given.items() if getattr(self, name) != plain)
            if idle:
                raise RequestError(f"lock=True masks what is zero at the start, and nothing else: leave {idle} out.")
        elif self.fraction is None:
            if fixed is None:
                raise RequestError(f"pattern={self.pattern!r}: say how much is to go, such as fraction=0.8.")
            object.__setattr__(self, "fraction", fixed)
        else:
            _fraction("fraction", self.fraction)
            if fixed is not None and abs(self.fraction - fixed) > 1e-9:
                raise RequestError(f"pattern={self.pattern!r} masks {fixed:g} of the weights, not {self.fraction:g}.")
            object.__setattr__(self, "fraction", self.fraction if fixed is None else fixed)
        if not _number(self.lasso) or not 0 <= self.lasso < float("inf"):
            raise RequestError(f"lasso={self.lasso!r}: give a strength of at least 0.")
        _one_of("reduce", self.reduce, ("mean", "sum", "max"))
        _whole("portions", self.portions)


@keywords
@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """What goes while a model trains, how fast, and by which score.

    Attributes:
        ffn: fraction of the channels of feed-forward sites that goes.
        heads: fraction of the query heads, equally many per key/value group.
        kv_groups: fraction of whole key/value groups.
        value: fraction of value channels; see `fxslim.asked.Asked`.
        weights: weights that are masked beside: `WeightMasks`, or a fraction of single ones.
        schedule: ``one_shot``, ``linear``, ``cubic``, ``cube``, ``cos`` or ``exp``; see `fxslim.training.schedule`.
        start: when it starts: a whole number of optimizer steps, or a fraction (a float) of all.
        end: when the target is reached; what is left of training recovers.
        every: steps between two updates of masks.
        score: by what units and weights go; see `fxslim.training.scores`.
        decay: how much of a score with memory stays from one step to the next; None for the score's own.
        scope: ``local``, the same fraction everywhere; ``global``, one threshold over all sites of a kind.
        limits: with ``global``, the least and the largest fraction of one site or layer.
        round_to: round the kept number of rows in each consumer up to a multiple.
        include: globs over module paths and site names (``*:attention`` is a kind): only there; task heads only where
            included.
        skip: globs over module paths and site names: not there.
        distill: learn from the dense model beside the task; True for the defaults of `Distillation`.
    """

    ffn: float = 0.0
    heads: float = 0.0
    kv_groups: float = 0.0
    value: float = 0.0
    weights: WeightMasks | float | None = None
    schedule: str = "cubic"
    start: float = 0.1
    end: float = 0.7
    every: int = 10
    score: str = "fisher"
    decay: float | None = None
    scope: str = "local"
    limits: tuple[float, float] = (0.0, 1.0)
    round_to: int = 1
    include: Globs = ()
    skip: Globs = ()
    distill: Distillation | bool | None = None

    def __post_init__(self) -> None:
        own: dict[str, Any] = {"include": globs(self.include), "skip": globs(self.skip)}
        if _number(self.weights):
            own["weights"] = WeightMasks(fraction=self.weights)  # type: ignore[arg-type]
        elif self.weights is not None and not isinstance(self.weights, WeightMasks):
            raise RequestError(
                f"weights={self.weights!r}: give fxslim.WeightMasks(…), or a fraction of single weights."
            )
        if isinstance(self.distill, bool):
            own["distill"] = Distillation() if self.distill else None
        elif self.distill is not None and not isinstance(self.distill, Distillation):
            raise RequestError(f"distill={self.distill!r}: give fxslim.Distillation(…), or True.")
        for name, value in own.items():
            object.__setattr__(self, name, value)
        self.request()  # checks fractions and round_to
        if not self.units and self.weights is None:
            raise RequestError("say what is to go: ffn=0.8, heads=0.6, or weights=fxslim.WeightMasks(…).")
        _one_of("schedule", self.schedule, tuple(SCHEDULES))
        _one_of("score", self.score, tuple(SCORES))
        _one_of("scope", self.scope, SCOPES)
        for name in ("start", "end"):
            _moment(name, getattr(self, name))
        _whole("every", self.every)
        if self.decay is not None and (not _number(self.decay) or not 0 <= self.decay < 1):
            raise RequestError(f"decay={self.decay!r}: give a number from 0 up to 1.")
        if self.decay is not None and not SCORES[self.score].memory:
            raise RequestError(f"decay= does nothing with score={self.score!r}, which has no memory.")
        object.__setattr__(self, "limits", _limits(self.limits, self.scope))
        if self.masks is not None and self.masks.reduce != "mean" and SCORES[self.score].of == "mask":
            raise RequestError(f"reduce= does nothing with score={self.score!r}, which is a sum in itself.")
        if self.scope == "global" and self.kv_groups:
            raise RequestError("kv_groups= goes with scope='local': whole groups of other sites do not compare.")

    @property
    def masks(self) -> WeightMasks | None:
        """Return what is masked of the weights."""
        assert self.weights is None or isinstance(self.weights, WeightMasks)
        return self.weights

    @property
    def teaching(self) -> Distillation | None:
        """Return how to learn from the dense model."""
        assert self.distill is None or isinstance(self.distill, Distillation)
        return self.distill

    @property
    def units(self) -> bool:
        """Tell whether units of sites are masked."""
        return any(getattr(self, name) for name in UNITS)

    @property
    def grows(self) -> bool:
        """Tell whether more is masked as training goes on; what is locked is masked from the start."""
        return self.units or (self.masks is not None and not self.masks.lock)

    def check_limits(self, name: str, fraction: float, each: str) -> None:
        """Raise RequestError where so much of all cannot go, because it may not go of each."""
        low, high = self.limits
        if self.scope == "global" and not low <= fraction <= high:
            raise RequestError(f"{name}={fraction} cannot go in all where limits={low, high} hold for every {each}.")

    def request(self, change: Callable[[float], float] | None = None) -> Request:
        """Return what is asked of sites.

        Args:
            change: what is asked of them at the end -> what is asked now; None for the end.
        """
        fractions = {name: getattr(self, name) for name in UNITS}
        if change is not None:
            fractions = {name: change(value) if value else value for name, value in fractions.items()}
        return Request(**fractions, round_to=self.round_to, include=globs(self.include), skip=globs(self.skip))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PruningConfig:
        """Read it from plain data; raise RequestError for what it does not know."""
        own = dict(data)
        for name, kind in (("weights", WeightMasks), ("distill", Distillation)):
            if isinstance(own.get(name), Mapping):
                own[name] = kind(**own[name])
        return PruningConfig(**own)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(name: str, value: Any) -> None:
    if not _number(value) or not 0 < value < float("inf"):
        raise RequestError(f"{name}={value!r}: give a number above 0.")


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(f"{name}={value!r}: give a whole number of at least 1.")


def _fraction(name: str, value: Any) -> None:
    if not _number(value) or not 0 <= value < 1:
        raise RequestError(f"{name}={value!r}: give a fraction, a number from 0 up to (but not) 1.")


def _moment(name: str, value: Any) -> None:
    fine = _number(value) and value >= 0 and (isinstance(value, int) or value <= 1)
    if not fine:
        raise RequestError(
            f"{name}={value!r}: give a whole number of steps, or a fraction of training from 0.0 to 1.0."
        )


def _limits(value: Any, scope: str) -> tuple[float, float]:
    pair = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if len(pair) != 2 or not all(_number(x) for x in pair) or not 0 <= pair[0] <= pair[1] <= 1:
        raise RequestError(
            f"limits={value!r}: give the least and the largest fraction of one site, such as (0.2, 0.9)."
        )
    if scope == "local" and pair != (0, 1):
        raise RequestError("limits= goes with scope='global': with 'local' the fraction is the same everywhere.")
    return float(pair[0]), float(pair[1])


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RequestError(f"{name}={value!r} is none of {', '.join(known)}.{nearest(str(value), known)}")


def _several(name: str, value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    several = (value,) if isinstance(value, str) else tuple(value)
    if not several:
        raise RequestError(f"{name}= is empty; give some of {', '.join(known)}.")
    for one in several:
        _one_of(name, one, known)
    return several
