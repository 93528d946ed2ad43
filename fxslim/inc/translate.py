"""What one old pruner is natively: masks of units, or masks of weights."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import fxslim.api
from fxslim.errors import FxslimError, InputError, RequestError
from fxslim.inc.config import Wish
from fxslim.inc.data import example_of
from fxslim.passes.choose import FFN, select
from fxslim.plan import Note
from fxslim.report import Inspection
from fxslim.site import Site
from fxslim.training.config import PruningConfig, WeightMasks
from fxslim.training.patterns import Layer, layers
from fxslim.training.schedule import Timeline


@dataclass(frozen=True)
class Updates(Timeline):
    """The old tool's updates: after ``start`` steps and every ``every`` from there on, the last one at ``end``."""

    def due(self, step: int) -> bool:
        """Tell whether masks are updated after this many steps."""
        return self.start <= step <= self.end and (step - self.start) % self.every == 0


def updates(wish: Wish) -> Updates:
    """Return when masks are updated: time is completed updates over all updates."""
    count = (wish.end - wish.start) // wish.every
    return Updates(wish.start, wish.start + count * wish.every, wish.every)


class Finder:
    """What a model has to offer; it is traced once, and only if somebody asks.

    Args:
        model: the model.
        dataloader: batches to trace it with; not needed for models of transformers.
    """

    def __init__(self, model: nn.Module, dataloader: Any = None) -> None:
        self.model, self.dataloader = model, dataloader
        self._found: Inspection | FxslimError | None = None

    @property
    def example(self) -> Any:
        """Return inputs to trace the model with."""
        return example_of(self.model, self.dataloader)

    @property
    def found(self) -> Inspection:
        """Return the model's sites; raise what tracing it raises."""
        if self._found is None:
            try:
                self._found = fxslim.api.inspect(self.model, self.example)
            except InputError as error:
                how = (
                    "" if self.dataloader is not None else " In fxslim.inc, the first batch of dataloader= gives them."
                )
                self._found = InputError(f"{error}{how}")
            except FxslimError as error:
                self._found = error
        if isinstance(self._found, FxslimError):
            raise self._found
        return self._found

    def ffn(self) -> list[Site]:
        """Return the feed-forward sites."""
        return [site for site in self.found.sites if site.kind in FFN]

    def attention(self) -> list[Site]:
        """Return the sites whose units are heads."""
        return [site for site in self.found.sites if site.kind == "attention"]


def consumers(site: Site) -> list[str]:
    """Return the paths of the linears that read a site's units."""
    return list(dict.fromkeys(piece.tensor.removesuffix(".weight") for piece in site.slices if piece.role == "in"))


def native(wish: Wish, finder: Finder) -> tuple[PruningConfig | None, list[Note]]:
    """Translate what a pruner is asked to do.

    ``mha`` masks whole heads. ``channelx1`` on all that reads the hidden channels of feed-forward sites, as
    `fxslim.inc.parse_auto_slim_config` names it, masks channels: of several linears that read one hidden state, all.
    Everything else masks weights.

    Returns:
        What goes, or None where nothing is asked for; and what to know of it.

    Raises:
        RequestError: nothing of what is named is there.
    """
    notes: list[Note] = []
    if not wish.fraction and not wish.locks:
        return None, [Note(where=wish.pattern, reason="target_sparsity=0: nothing goes")]
    if wish.pattern == "mha":
        return _units(wish, "heads", _attention(wish, finder), finder, notes), notes
    if wish.pattern == "channelx1" and not wish.locks:
        sites = _channels(wish, finder, notes)
        if sites:
            return _units(wish, "ffn", sites, finder, notes), notes
    return _weights(wish, finder, notes), notes


def _units(wish: Wish, asked: str, sites: Sequence[Site], finder: Finder, notes: list[Note]) -> PruningConfig:
    if wish.portions > 1:
        notes.append(Note(where="mha", reason="heads go as a whole: _progressive has no effect"))
    given: dict[str, Any] = {asked: wish.fraction, "include": tuple(glob.escape(site.name) for site in sites)}
    score = "l1" if wish.criterion == "magnitude" else wish.criterion
    config = PruningConfig(**given, score=score, **_common(wish))
    kinds = {site.kind for site in sites}
    for site in select(finder.found.sites, config.request())[0]:
        if site.kind in kinds and site not in sites:
            raise RequestError(f"{site.name} cannot be told from {sites[0].name} by name; rename one of the modules.")
    return config


def _common(wish: Wish) -> dict[str, Any]:
    line = updates(wish)
    limits = wish.limits if wish.scope == "global" else (0.0, 1.0)
    return {"schedule": wish.decay, "start": line.start, "end": line.end, "every": line.every, "scope": wish.scope,
            "limits": limits}  # fmt: skip


def _weights(wish: Wish, finder: Finder, notes: list[Note]) -> PruningConfig:
    chosen = layers_of(wish, finder.model, notes)
    masks = WeightMasks(
        fraction=None if wish.locks else wish.fraction,
        pattern=wish.pattern,
        kinds=tuple(dict.fromkeys(layer.kind for layer in chosen)),
        lock=wish.locks,
        lasso=wish.lasso,
        reduce=wish.reduce,
        portions=wish.portions,
    )
    common = _common(wish) | ({"scope": "local", "limits": (0.0, 1.0)} if wish.locks else {})
    include = tuple(glob.escape(layer.path) for layer in chosen)
    return PruningConfig(weights=masks, score=wish.criterion, include=include, **common)


def layers_of(wish: Wish, model: nn.Module, notes: list[Note]) -> list[Layer]:
    """Return the layers whose weights a pruner is about: those named, without a task's head."""
    every = [layer for layer in layers(model)[0] if _typed(layer, wish.types)]
    paths = [layer.path for layer in every]
    chosen = set(paths if not wish.names else named(wish.names, paths)) - set(named(wish.without, paths))
    last = last_linear(model)
    if last in chosen:
        chosen.remove(last)
        notes.append(Note(where=last, reason="the model's last layer is left alone, as a task's head"))
    if not chosen:
        what = (
            f"op_names={list(wish.names)}, excluded_op_names={list(wish.without)}, pruning_op_types={list(wish.types)}"
        )
        raise RequestError(f"{what} leave no layer of the model: layers are {_some(paths)}.")
    return [layer for layer in every if layer.path in chosen]


def last_linear(model: nn.Module) -> str:
    """Return the path of the model's last module, dropout aside, where it is a linear layer or a convolution."""
    paths = [(path, module) for path, module in model.named_modules() if not isinstance(module, nn.Dropout)]
    path, module = paths[-1]
    return path if isinstance(module, nn.Linear | nn.Conv2d) else ""


def named(expressions: Iterable[str], paths: Sequence[str]) -> list[str]:
    """Return the paths that are named: by themselves, or by a regular expression that is found in them."""
    whole = set(paths)
    found: set[str] = set()
    for one in expressions:
        found |= {one} if one in whole else {path for path in paths if re.search(one, path)}
    return [path for path in paths if path in found]


def _typed(layer: Layer, types: Iterable[str]) -> bool:
    kind = type(layer.module).__name__
    return any(kind == one or layer.kind == one for one in types)


def _attention(wish: Wish, finder: Finder) -> list[Site]:
    sites = [site for site in finder.attention() if not site.task_head]
    chosen = [site for site in sites if (not wish.names or _touches(site, wish.names))]
    chosen = [site for site in chosen if not _touches(site, wish.without)]
    if not chosen:
        where = _some([site.name for site in sites]) if sites else missing(finder.found)
        raise RequestError(f"pattern='mha': there are no heads to take out. {where}")
    return chosen


def _touches(site: Site, expressions: Sequence[str]) -> bool:
    return bool(named(expressions, [site.name, site.module, *site.modules()]))


def _channels(wish: Wish, finder: Finder, notes: list[Note]) -> list[Site]:
    """Return the feed-forward sites that ``channelx1`` is about; none where it is about other layers."""
    if not wish.names or wish.reduce == "max" or wish.portions > 1 or wish.lasso:
        return []
    try:
        sites = finder.ffn()
    except FxslimError as error:
        notes.append(Note(where="channelx1", reason=f"columns of weights are masked, layer by layer: {error}"))
        return []
    paths = [layer.path for layer in layers(finder.model)[0]]
    every = list(dict.fromkeys([*paths, *(path for site in sites for path in consumers(site))]))
    chosen = set(named(wish.names, every)) - set(named(wish.without, every))
    inside = [site for site in sites if set(consumers(site)) <= chosen]
    if inside and chosen == {path for site in inside for path in consumers(site)}:
        return inside
    return []


def missing(found: Inspection) -> str:
    """Say why nothing was found."""
    reasons = dict.fromkeys(f"{note.where}: {note.reason}" for note in (*found.pinned, *found.notes))
    return f"What was found instead: {_some(list(reasons)) or 'nothing'}"


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:6]) + (", …" if len(texts) > 6 else "")
