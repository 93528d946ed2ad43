"""What the old tool was asked with: keywords, and a dict for each pruner whose keys win over them."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fxslim.asked import nearest
from fxslim.errors import RequestError
from fxslim.training.patterns import pattern_of
from fxslim.training.scores import SCORES

_OPEN: list[str] = []
_ALL: list[dict[str, Any]] = [{}]
_KINDS: list[str] = ["Conv", "Linear"]
# Defaults of the old signature. They are copied, never changed.

LAYERS = ("Conv", "Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")
"""Types of layers; ``Conv1D`` is the linear layer of that name in transformers."""
WITH_DATA = ("sparse_gpt", "wanda", "retrain_free")
"""Types that prune in one go, on batches."""
CRITERIA = ("magnitude", "gradient", "snip", "snip_momentum", "block_mask")
TYPES = (*CRITERIA, "pattern_lock", "group_lasso", *WITH_DATA)
DECAYS = ("exp", "linear", "cube", "cos")
PROGRESSIVE = "_progressive"
PORTIONS = 4
"""In how many steps a progressive pruner takes out what an update takes out."""
MORE: Mapping[str, Any] = MappingProxyType(
    {
        "criterion_type": None,
        "criterion_reduce_type": "mean",
        "reg_type": None,
        "reg_coeff": 0.0,
        "parameters": None,
        "resume_from_pruned_checkpoint": False,
    }
)
"""Keys that are no keywords of the signature, and what they are where they are not given."""


@dataclass(frozen=True)
class Wish:
    """What one pruner is asked to do, checked.

    Attributes:
        kind: its type, without ``_progressive``.
        criterion: by which score: one of `CRITERIA`.
        pattern: ``mha``, or a pattern of `fxslim.WeightMasks`.
        fraction: what goes, the largest fraction of a layer being no less.
        names: regular expressions over module paths, or paths of layers; none for all layers.
        without: the same, for what is left alone.
        start: optimizer steps before the first update.
        end: optimizer steps before the last one.
        every: steps between updates.
        scope: ``global`` or ``local``.
        limits: the least and the largest fraction of a layer.
        decay: how the fraction grows.
        types: types of layers.
        reduce: what a block's score is of its weights'.
        lasso: strength of the group lasso.
        portions: in how many steps an update takes effect.
    """

    kind: str
    criterion: str
    pattern: str
    fraction: float
    names: tuple[str, ...]
    without: tuple[str, ...]
    start: int
    end: int
    every: int
    scope: str
    limits: tuple[float, float]
    decay: str
    types: tuple[str, ...]
    reduce: str
    lasso: float
    portions: int

    @property
    def on_data(self) -> bool:
        """Tell whether it prunes in one go, on batches."""
        return self.kind in WITH_DATA

    @property
    def locks(self) -> bool:
        """Tell whether it masks what is zero already, and nothing else."""
        return self.kind == "pattern_lock"

    def check_end(self) -> None:
        """Raise RequestError where the target is reached before there is anything to go by."""
        if self.end or self.on_data or self.locks:
            return
        if SCORES[self.criterion].gradients:
            raise RequestError(
                f"pruning_type={self.criterion!r} reads gradients, and end_step=0 is before the first one: say at "
                "which optimizer step the target is reached, end_step=…, or take pruning_type='magnitude'."
            )
        if self.lasso:
            raise RequestError("a group lasso acts until end_step, and end_step=0: say when the target is reached.")


class WeightPruningConfig:
    """What goes of which layers, how fast, and by which score.

    Every keyword is the default of a key of the same name in the dicts of ``pruning_configs``. Nothing that is given
    is changed, and nothing is shared between configs.

    Args:
        pruning_configs: a dict for each pruner; see `fxslim.inc.parse_auto_slim_config`.
        target_sparsity: fraction that goes, from 0 up to 1; of ``N:M`` it is N/M, for which 0.9, the default, stands.
        pruning_type: ``snip_momentum``, ``snip``, ``magnitude``, ``gradient``, ``block_mask`` (each also with
            ``_progressive``), ``pattern_lock``, ``group_lasso``; on data ``sparse_gpt``, ``wanda``, ``retrain_free``.
        pattern: ``NxM`` blocks of N outputs by M inputs, ``1x1``, ``channelx1``, ``1xchannel``, ``N:M``, ``mha``.
        op_names: regular expressions, searched for in module paths; the path of a layer names it alone.
        excluded_op_names: the same, for what is left alone.
        start_step: number of optimizer steps before the first update.
        end_step: number of optimizer steps before the last one.
        pruning_scope: ``global``, one threshold over all layers, or ``local``, one for each.
        pruning_frequency: optimizer steps between updates.
        min_sparsity_ratio_per_op: with ``global``, the least fraction of a layer.
        max_sparsity_ratio_per_op: the largest fraction of a layer.
        sparsity_decay_type: ``exp``, ``linear``, ``cube`` or ``cos``.
        pruning_op_types: types of layers.
        low_memory_usage: has no effect: scores are kept for each block, in float32, as it is.
        **kwargs: ``criterion_type``, ``criterion_reduce_type`` (``mean``, ``sum``, ``max``), ``reg_type``
            (``group_lasso``), ``reg_coeff`` or ``parameters={"reg_coeff": …}``, ``resume_from_pruned_checkpoint``.

    Raises:
        RequestError: a key is unknown, or a value means nothing.
    """

    def __init__(
        self,
        pruning_configs: Sequence[Mapping[str, Any]] = _ALL,
        target_sparsity: float | None = 0.9,
        pruning_type: str = "snip_momentum",
        pattern: str = "4x1",
        op_names: Sequence[str] = _OPEN,
        excluded_op_names: Sequence[str] = _OPEN,
        start_step: int = 0,
        end_step: int = 0,
        pruning_scope: str = "global",
        pruning_frequency: int = 1,
        min_sparsity_ratio_per_op: float = 0.0,
        max_sparsity_ratio_per_op: float = 0.98,
        sparsity_decay_type: str = "exp",
        pruning_op_types: Sequence[str] = _KINDS,
        low_memory_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "pruning_configs", "kwargs")}
        known_keys(kwargs, "WeightPruningConfig")
        self.pruning_configs: list[dict[str, Any]] = [dict(copy.deepcopy(own)) for own in _dicts(pruning_configs)]
        self.weight_compression: dict[str, Any] = copy.deepcopy({**given, **kwargs})
        self.wishes()

    def wishes(self) -> tuple[Wish, ...]:
        """Return what every pruner is asked to do; raise RequestError for what means nothing."""
        known_keys(self.weight_compression, "WeightPruningConfig")
        shared = {name: value for name, value in self.weight_compression.items() if value is not None}
        if shared.get("target_sparsity") == DEFAULTS["target_sparsity"]:
            del shared["target_sparsity"]
        made = []
        for number, own in enumerate(self.pruning_configs):
            where = f"pruning_configs[{number}]"
            known_keys(own, where)
            said = {**shared, **{name: value for name, value in own.items() if value is not None}}
            try:
                made.append(_wish({**DEFAULTS, **MORE, **said}, exact="target_sparsity" in said))
            except RequestError as error:
                raise RequestError(f"{where if own else 'WeightPruningConfig'}: {error}") from None
        return tuple(made)

    def __repr__(self) -> str:
        return f"WeightPruningConfig({self.pruning_configs!r}, **{self.weight_compression!r})"


DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        name: parameter.default
        for name, parameter in inspect.signature(WeightPruningConfig).parameters.items()
        if name not in ("pruning_configs", "kwargs")
    }
)
"""Every keyword that a pruner's dict may hold, and its default."""


def known_keys(given: Mapping[str, Any], where: str) -> None:
    """Raise RequestError for the first key that means nothing, naming the nearest one."""
    known = (*DEFAULTS, *MORE)
    for name in given:
        if name not in known:
            hint = nearest(str(name), known) or f" There are {', '.join(known)}."
            raise RequestError(f"{where}: {name!r} is no key.{hint}")
    parameters = given.get("parameters")
    if parameters is not None:
        if not isinstance(parameters, Mapping):
            raise RequestError(f"{where}: parameters={parameters!r}: give a dict, {{'reg_coeff': …}}.")
        for name in parameters:
            if name != "reg_coeff":
                near = nearest(str(name), ("reg_coeff",)) or " There is reg_coeff."
                raise RequestError(f"{where}: {name!r} is no key of parameters.{near}")


def _dicts(given: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(given, Mapping) or not isinstance(given, list | tuple):
        raise RequestError(
            f"pruning_configs={given!r}: give a list with a dict for each pruner. Everything else has a name: "
            "WeightPruningConfig(target_sparsity=0.9)."
        )
    if not given:
        raise RequestError(
            "pruning_configs=[] has no pruner: parse_auto_slim_config was asked for nothing. For one pruner over all "
            "layers, leave it out."
        )
    for own in given:
        if not isinstance(own, Mapping):
            raise RequestError(f"pruning_configs holds {own!r}; give a dict for each pruner.")
    return given


def _wish(given: Mapping[str, Any], *, exact: bool) -> Wish:
    """Check a pruner's keys; ``exact`` tells whether they say how much goes."""
    kind, portions = _type(given["pruning_type"])
    lasso = _lasso(given, kind)
    criterion, kind = _criterion(given, kind)
    pattern = _pattern(given["pattern"])
    start, end, every = (_whole(name, given[name]) for name in ("start_step", "end_step", "pruning_frequency"))
    if end < start:
        raise RequestError(f"end_step={end} comes before start_step={start}.")
    if every < 1:
        raise RequestError(f"pruning_frequency={every}: give a number of steps, at least 1.")
    _one_of("pruning_scope", given["pruning_scope"], ("global", "local"))
    _one_of("sparsity_decay_type", given["sparsity_decay_type"], DECAYS)
    _one_of("criterion_reduce_type", given["criterion_reduce_type"], ("mean", "sum", "max"))
    idle = [
        (
            "criterion_reduce_type",
            given["criterion_reduce_type"] != "mean"
            and (criterion == "block_mask" or pattern == "mha" or kind == "pattern_lock"),
        ),
        ("reg_type='group_lasso'", lasso and (pattern == "mha" or kind in (*WITH_DATA, "pattern_lock"))),
        ("pruning_type='pattern_lock'", kind == "pattern_lock" and pattern == "mha"),
    ]
    for name, nothing in idle:
        if nothing:
            raise RequestError(
                f"{name} has no meaning with pruning_type={kind!r} and pattern={pattern!r}: leave it out."
            )
    for name in ("low_memory_usage", "resume_from_pruned_checkpoint"):
        if not isinstance(given[name], bool):
            raise RequestError(f"{name}={given[name]!r}: give True or False.")
    if given["resume_from_pruned_checkpoint"]:
        raise RequestError(
            "resume_from_pruned_checkpoint: masks are saved beside checkpoints, and resumed with scores and schedule, "
            "by fxslim.PruningCallback or fxslim.Pruner.save and load. To keep nothing but the zeros, take "
            "pruning_type='pattern_lock'."
        )
    low, high = (
        _part(f"{name}_sparsity_ratio_per_op", given[f"{name}_sparsity_ratio_per_op"]) for name in ("min", "max")
    )
    fraction = _fraction(given["target_sparsity"] if exact else None, pattern, high, kind)
    if low > min(fraction, high) and kind != "pattern_lock":
        raise RequestError(f"min_sparsity_ratio_per_op={low} is more than goes in all, {min(fraction, high)}.")
    return Wish(
        kind=kind,
        criterion=criterion,
        pattern=pattern,
        fraction=fraction,
        names=_expressions("op_names", given["op_names"]),
        without=_expressions("excluded_op_names", given["excluded_op_names"]),
        start=start,
        end=end,
        every=every,
        scope=given["pruning_scope"],
        limits=(low, high),
        decay=given["sparsity_decay_type"],
        types=_types(given["pruning_op_types"]),
        reduce=given["criterion_reduce_type"],
        lasso=lasso,
        portions=portions,
    )


def _type(given: Any) -> tuple[str, int]:
    """Return a type without ``_progressive``, and in how many portions it prunes."""
    if not isinstance(given, str):
        raise RequestError(f"pruning_type={given!r}: give one of {', '.join(TYPES)}.")
    kind = given.removesuffix(PROGRESSIVE)
    progressive = kind != given
    known = (*TYPES, *(f"{name}{PROGRESSIVE}" for name in CRITERIA))
    if kind not in TYPES or (progressive and kind not in CRITERIA):
        raise RequestError(f"pruning_type={given!r} is none of {', '.join(TYPES)}.{nearest(given, known)}")
    return kind, PORTIONS if progressive else 1


def _criterion(given: Mapping[str, Any], kind: str) -> tuple[str, str]:
    """Return by which score a pruner goes, and its type where a criterion was named beside it."""
    named = given["criterion_type"]
    if named is None:
        return kind if kind in CRITERIA else "block_mask" if kind == "retrain_free" else "magnitude", kind
    _one_of("criterion_type", named, CRITERIA)
    if kind not in CRITERIA:
        raise RequestError(f"criterion_type={named!r} does nothing with pruning_type={kind!r}.")
    return named, named


def _pattern(given: Any) -> str:
    if not isinstance(given, str):
        raise RequestError(f"pattern={given!r}: give text, such as '4x1', '2:4', 'channelx1' or 'mha'.")
    pattern = given.rpartition("_")[2]  # 'tile_pattern_4x1' was a spelling of '4x1'
    if pattern != "mha":
        try:
            pattern_of(pattern)
        except RequestError as error:
            raise RequestError(f"{str(error).rstrip('.')}, or 'mha'.") from None
    return pattern


def _fraction(given: Any, pattern: str, high: float, kind: str) -> float:
    """Return the fraction that goes: no more than the largest of a layer."""
    fixed = None if pattern == "mha" else pattern_of(pattern).fraction
    otherwise = DEFAULTS["target_sparsity"] if fixed is None else fixed
    asked = _part("target_sparsity", otherwise if given is None else given)
    if fixed is None or kind == "pattern_lock":
        return min(asked, high)
    if abs(asked - fixed) > 1e-9 or high < fixed:
        raise RequestError(
            f"pattern={pattern!r} masks {fixed:g} of every layer: leave target_sparsity= out, or say "
            f"target_sparsity={fixed:g}, with max_sparsity_ratio_per_op= of at least that."
        )
    return fixed


def _lasso(given: Mapping[str, Any], kind: str) -> float:
    parameters = given["parameters"] or {}
    strength = parameters.get("reg_coeff", given["reg_coeff"])
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < float("inf"):
        raise RequestError(f"reg_coeff={strength!r}: give a strength of at least 0.")
    named = given["reg_type"]
    if named is not None:
        _one_of("reg_type", named, ("group_lasso",))
    if (named or kind == "group_lasso") and not strength:
        raise RequestError("group_lasso needs its strength: parameters={'reg_coeff': 0.1}.")
    if strength and not (named or kind == "group_lasso"):
        raise RequestError(f"reg_coeff={strength} does nothing without reg_type='group_lasso'.")
    return float(strength)


def _types(given: Any) -> tuple[str, ...]:
    names = _texts("pruning_op_types", given)
    for name in names:
        _one_of("pruning_op_types", name, LAYERS)
    if not names:
        raise RequestError(f"pruning_op_types is empty; give some of {', '.join(LAYERS)}.")
    return names


def _expressions(name: str, given: Any) -> tuple[str, ...]:
    several = _texts(name, given)
    for one in several:
        try:
            re.compile(one)
        except re.error as error:
            raise RequestError(f"{name}: {one!r} is no regular expression: {error}.") from None
    return several


def _texts(name: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable) or not all(isinstance(one, str) for one in given):
        raise RequestError(f"{name}={given!r}: give a list of texts.")
    return tuple(given)


def _whole(name: str, given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise RequestError(f"{name}={given!r}: give a whole number of optimizer steps.")
    return given


def _part(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < 1:
        raise RequestError(f"{name}={given!r}: give a fraction, a number from 0 up to (but not) 1.")
    return float(given)


def _one_of(name: str, given: Any, known: tuple[str, ...]) -> None:
    if given not in known:
        raise RequestError(f"{name}={given!r} is none of {', '.join(known)}.{nearest(str(given), known)}")
