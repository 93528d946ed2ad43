"""Masks of units: channels and heads, masked at their consumers' inputs, with zeros in the weights behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.errors import InputError, RequestError
from fxslim.passes.choose import (
    FFN,
    Measured,
    Request,
    count_of,
    measure,
    merged,
    part_of,
    pick,
    rounded,
    select,
    unmet,
)
from fxslim.passes.rows import clear
from fxslim.passes.sites import Sites
from fxslim.plan import Note
from fxslim.program import named_tensors
from fxslim.report import Inspection
from fxslim.site import Site, SitePlan, Slice, units_by_group
from fxslim.training.config import PruningConfig
from fxslim.training.hooks import Hook, MaskedInput
from fxslim.training.lowest import lowest_of_all
from fxslim.training.optimizer import forget
from fxslim.training.processes import agreed, averaged
from fxslim.training.scores import SCORES


@dataclass
class MaskedSite:
    """A site, its consumers, and which of its units are masked.

    Attributes:
        site: the site.
        asked: what the config calls its units: ``ffn``, ``heads`` or ``value``.
        gone: which units are masked.  (units,) bool
        score: the units' scores.  (units,)
        cost: how many weights go with a unit.
        owners: for every slice that is summed over, the owner of its rows; as many as there are owners where they stay.
    """

    site: Site
    asked: str
    gone: np.ndarray
    score: Tensor
    cost: float
    owners: list[tuple[Slice, Tensor, int]] = field(default_factory=list)

    def sums(self, rows_of: Callable[[Slice], Tensor | None]) -> Tensor:
        """Sum something about the rows of every consumer over the units.  (units,)"""
        total = torch.zeros_like(self.score)
        for piece, owner, count in self.owners:
            rows = rows_of(piece)
            if rows is None:
                continue
            own = torch.zeros(count + 1, dtype=total.dtype, device=total.device)
            own = own.index_add(0, owner, rows.to(total))[:count]
            groups = None if piece.groups is None else torch.tensor(piece.groups, device=own.device)
            total += own if groups is None else own[groups]
        return total

    def groups(self, scores: np.ndarray) -> np.ndarray:
        """Sum scores over groups.  (units,) -> (groups,)"""
        of = np.arange(self.site.units) if self.site.groups is None else np.asarray(self.site.groups)
        total = np.zeros(self.site.group_count)
        np.add.at(total, of, scores)
        return total


class MaskedUnits:
    """The masks of all sites that a config is about.

    Args:
        model: the model.
        found: its sites.
        config: what goes.

    Raises:
        RequestError: nothing is found of what is asked for.
        InputError: weights are computed at every call, or frozen where a score needs their gradients.
    """

    def __init__(self, model: nn.Module, found: Inspection, config: PruningConfig) -> None:
        self.model, self.config, self.score = model, config, SCORES[config.score]
        self.heard = not self.score.gradients
        """Whether there is something to choose by: gradients have been seen, or none are needed."""
        self.tensors: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
        request = config.request()
        selected, notes = select(found.sites, request)
        self.sites = [self._site(site, asked) for site in selected if (asked := _asked(site, config)) is not None]
        every = [*notes, *unmet(selected, request), *self._short(), *_refused(found)]
        self.notes: tuple[Note, ...] = tuple(merged(every))
        if not self.sites:
            reasons = "; ".join(f"{note.where}: {note.reason}" for note in self.notes)
            raise RequestError(f"nothing that the config asks for was found. {reasons}")
        for asked in dict.fromkeys(own.asked for own in self.sites):
            if fraction := getattr(config, asked):  # heads may be there for their groups alone
                config.check_limits(asked, fraction, "site")
        self.masks: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        """Masks that take gradients themselves, because the weights behind them are frozen."""
        self.handles: list[Any] = []
        for own in self.sites:
            for piece, _, _ in own.owners:
                if piece.hook is not None and piece.hook not in self.masks:
                    weight = self.tensors[piece.tensor]
                    self.masks[piece.hook] = torch.ones(piece.size, dtype=own.score.dtype, device=weight.device)
                    if self.score.gradients and not weight.requires_grad:
                        self.leaves[piece.hook] = self.masks[piece.hook].requires_grad_()
                    hook = Hook(MaskedInput(self.masks[piece.hook]))
                    module = model.get_submodule(piece.hook)
                    self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _site(self, site: Site, asked: str) -> MaskedSite:
        owners: list[tuple[Slice, Tensor, int]] = []
        weights = [self._weight(piece) for piece in site.slices if piece.role == "in"]
        device = weights[0].device
        dtype = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
        for piece in site.slices:
            if piece.role == "in":
                count = site.units if piece.groups is None else max(piece.groups) + 1
                owner = torch.from_numpy(piece.owners())
                owners.append((piece, torch.where(owner < 0, count, owner).to(device), count))
        rows = [(piece, np.count_nonzero(piece.owners() >= 0)) for piece in site.slices if piece.tensor in self.tensors]
        cost = sum(self.tensors[piece.tensor].numel() / piece.rows * count for piece, count in rows) / site.units
        gone, score = np.zeros(site.units, dtype=bool), torch.zeros(site.units, dtype=dtype, device=device)
        return MaskedSite(site, asked, gone, score, cost, owners)

    def _weight(self, piece: Slice) -> nn.Parameter:
        weight = self.tensors.get(piece.tensor)
        if weight is None or not piece.direct:
            raise InputError(
                f"{piece.tensor} is computed at every call (pruned or parametrized), and zeros in it do not last; make "
                "it permanent first, with torch.nn.utils.prune.remove or parametrize.remove_parametrizations."
            )
        if self.score.gradients and not weight.requires_grad and (self.score.of != "mask" or piece.hook is None):
            raise InputError(
                f"score={self.config.score!r} reads the gradient of {piece.tensor}, which is frozen; train it, leave "
                "its site out with skip=, or take score='fisher', 'taylor' or 'magnitude'."
            )
        return weight

    def _short(self) -> list[Note]:
        """Return why sites lose nothing in the end, where something is asked of them."""
        notes = []
        for asked in dict.fromkeys(own.asked for own in self.sites) if self.config.scope == "global" else ():
            sites = [own for own in self.sites if own.asked == asked]
            wanted = part_of(getattr(self.config, asked), sum(own.site.units for own in sites))
            most = sum(self._limits(own)[1] * len(units_by_group(own.site)) for own in sites)
            if wanted > most:
                notes.append(Note(where=asked, reason=f"{most} of {wanted} units go: limits are rounded down by site"))
        for own in self.sites if self.config.scope == "local" else ():
            seen = Measured(own.gone, np.zeros(own.site.units), np.zeros(own.site.group_count), real=True)
            gone, note = pick(own.site, seen, self.config.request())
            if gone.any() and not rounded(own.site, gone, seen, self.config.round_to).any():
                note = f"rounded up to a multiple of {self.config.round_to}, everything stays"
            if note:
                notes.append(Note(where=own.site.name, reason=note))
        return notes

    # What a step says -------------------------------------------------------------------------------------------------

    def observe(self, scale: float) -> None:
        """Take note of the gradients of a step, before the optimizer uses them.

        Args:
            scale: what gradients of masks are still multiplied by, when those of weights are not any more.
        """
        if not self.score.gradients:
            return
        pieces = [piece for own in self.sites for piece, _, _ in own.owners]
        self.heard = self.heard or any(self._gradient(piece) is not None for piece in pieces)
        seen = self.sums(scale)
        for mask in self.leaves.values():
            mask.grad = None
        costs = [own.cost if self.score.per_cost else 1 for own in self.sites]
        steps = [self.score.step(one) / cost for one, cost in zip(seen, costs, strict=True)]
        if not bool(torch.stack([step.sum().to(steps[0]) for step in steps]).isfinite().all()):
            return  # the optimizer leaves such a step out, too, where losses are scaled
        for own, step in zip(self.sites, steps, strict=True):
            own.score = self.score.after(own.score, step, self.config.decay)

    def sums(self, scale: float = 1.0) -> list[Tensor]:
        """Return what the gradients of a step say of every unit, summed over what reads it.  (units,) for every site

        Args:
            scale: see `observe`.
        """
        return [own.sums(lambda piece: self._rows(piece, scale)) for own in self.sites]

    def _rows(self, piece: Slice, scale: float) -> Tensor | None:
        """Return what a step says of the rows of a consumer.  (rows,)"""
        gradient = self._gradient(piece)
        if gradient is None:
            return None
        if piece.hook in self.leaves:
            return averaged(gradient * self.leaves[piece.hook].detach()) / scale
        return self._read(piece)

    def _gradient(self, piece: Slice) -> Tensor | None:
        """Return the gradient by a consumer's weight, or by its mask where the weight is frozen."""
        if piece.hook in self.leaves:
            return self.leaves[piece.hook].grad
        return self.tensors[piece.tensor].grad

    def _read(self, piece: Slice) -> Tensor:
        """Return what is summed over the weights that read the rows of a consumer.  (rows,)"""
        weight = self.tensors[piece.tensor]
        values = self.score.elements(weight, weight.grad)
        if piece.lead is None:
            return values.movedim(piece.dim, 0).reshape(piece.size, -1).sum(1)
        return values.movedim((piece.lead, piece.dim), (0, 1)).reshape(piece.rows, -1).sum(1)

    def rest(self) -> None:
        """Take no more gradients of masks: they have reached their target."""
        for mask in self.leaves.values():
            mask.requires_grad_(False)
            mask.grad = None
        self.leaves.clear()

    def spare(self) -> None:
        """Clear the gradients of masked columns whose inputs no hook masks."""
        for own in self.sites:
            for piece, _, _ in own.owners if own.gone.any() else ():
                gradient = self.tensors[piece.tensor].grad
                if piece.hook is None and gradient is not None:
                    self._clear(own, piece, gradient)

    # What goes --------------------------------------------------------------------------------------------------------

    def update(self, change: Callable[[float], float]) -> None:
        """Mask what has to go by now.

        Args:
            change: the fraction that goes at the end -> the one that goes now.
        """
        scores = {own.site.name: self._scores(own) for own in self.sites}
        for own in self.sites if self.score.owned or not self.score.gradients else ():  # those of weights, as they are
            own.score = torch.from_numpy(scores[own.site.name]).to(own.score)
        chosen = self._chosen(change, scores)
        device = next(iter(self.tensors.values())).device
        every = agreed(torch.from_numpy(np.concatenate(chosen)), device).numpy()
        for own, gone in zip(self.sites, np.split(every, np.cumsum([len(gone) for gone in chosen])[:-1]), strict=True):
            own.gone = gone.copy()
        self._set_masks()

    def _chosen(self, change: Callable[[float], float], scores: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return what goes of every site; what is masked already is part of it."""
        request = self.config.request(change)
        requests = self._shared(change, scores) if self.config.scope == "global" else {}
        chosen = []
        for own in self.sites:
            seen = Measured(own.gone, scores[own.site.name], own.groups(scores[own.site.name]), real=True)
            gone, _ = pick(own.site, seen, requests.get(own.site.name, request))
            chosen.append(rounded(own.site, gone, seen, self.config.round_to) | own.gone)
        return chosen

    def _scores(self, own: MaskedSite) -> np.ndarray:
        """Return the scores of a site's units; those of weights are as the weights are now."""
        if self.score.owned:
            return measure(own.site, named_tensors(self.model)).scores
        score = own.score if self.score.gradients else own.sums(self._read)
        scores: np.ndarray = score.double().cpu().numpy()
        return scores

    def _shared(self, change: Callable[[float], float], scores: Mapping[str, np.ndarray]) -> dict[str, Request]:
        """Return what is asked of every site, by one threshold over all sites whose units are called the same.

        One step at a site takes one unit of every group; its score is their mean.
        """
        requests: dict[str, Request] = {}
        for asked in dict.fromkeys(own.asked for own in self.sites):
            last = getattr(self.config, asked)
            sites = [own for own in self.sites if own.asked == asked]
            fraction = change(last) if last else 0.0
            steps, limits = [], []
            for own in sites:
                ranked = np.where(own.gone, -np.inf, scores[own.site.name])
                members = units_by_group(own.site)
                steps.append(torch.from_numpy(np.mean([np.sort(ranked[one]) for one in members], axis=0)))
                least, most = self._limits(own)
                limits.append((part_of(fraction / last, least) if last else 0, most))
            sizes = [len(units_by_group(own.site)) for own in sites]
            total = part_of(fraction, sum(own.site.units for own in sites))
            for own, taken in zip(sites, lowest_of_all(steps, sizes, total, limits), strict=True):
                requests[own.site.name] = _only(asked, int(taken.sum()) / len(taken))
        return requests

    def _limits(self, own: MaskedSite) -> tuple[int, int]:
        """Return how many units of every group go at least and at most."""
        each = len(units_by_group(own.site)[0])
        low, high = self.config.limits
        return min(math.ceil(low * each - 1e-9), each - 1), count_of(high, each)

    @torch.no_grad()
    def _set_masks(self) -> None:
        for own in self.sites:
            for piece, _, _ in own.owners:
                if piece.hook is not None:
                    rows = torch.from_numpy(piece.removed(own.gone)).to(self.masks[piece.hook].device)
                    self.masks[piece.hook].masked_fill_(rows, 0)

    # What follows -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fold(self) -> None:
        """Put zeros into the columns of all masked units."""
        for own in self.sites:
            for piece, _, _ in own.owners if own.gone.any() else ():
                self._clear(own, piece, self.tensors[piece.tensor].data)

    @property
    def hooked(self) -> bool:
        """Tell whether hooks keep gradients away from all masked columns."""
        return all(piece.hook is not None for own in self.sites for piece, _, _ in own.owners)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take other weights, by name."""
        for name, tensor in tensors.items():
            own = self.tensors[name]
            own.data.copy_(agreed(tensor, own.device))

    @torch.no_grad()
    def forget(self, optimizer: Any) -> None:
        """Clear what an optimizer remembers of everything that masked units own."""
        for own in self.sites:
            for piece in own.site.slices if own.gone.any() else ():
                if piece.tensor in self.tensors:

                    def cleared(value: Tensor, own: MaskedSite = own, piece: Slice = piece) -> None:
                        self._clear(own, piece, value)

                    forget(optimizer, self.tensors[piece.tensor], cleared)

    def _clear(self, own: MaskedSite, piece: Slice, tensor: Tensor) -> None:
        clear(tensor, piece.dim, piece.per_expert(piece.removed(own.gone)), piece.lead)

    def release(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    # What is told and kept --------------------------------------------------------------------------------------------

    def parts(self, *, final: bool = False) -> tuple[SitePlan, ...]:
        """Return what is left of every site of which anything is masked; final: would be, if all went by now."""
        every = [own.gone for own in self.sites]
        if final:
            every = self._chosen(lambda fraction: fraction, {own.site.name: self._scores(own) for own in self.sites})
        return tuple(
            SitePlan(site=own.site, keep=tuple(np.flatnonzero(~gone).tolist()))
            for own, gone in zip(self.sites, every, strict=True)
            if gone.any()
        )

    def sparsity(self) -> dict[str, float]:
        """Return the masked fraction of all units of a kind."""
        kinds = dict.fromkeys(own.asked for own in self.sites)
        every = {kind: [own.gone for own in self.sites if own.asked == kind] for kind in kinds}
        return {kind: float(np.concatenate(gone).mean()) for kind, gone in every.items()}

    def scores(self) -> np.ndarray:
        """Return the scores of all units that are not masked."""
        return np.concatenate([own.score.double().cpu().numpy()[~own.gone] for own in self.sites])

    def state(self) -> dict[str, Tensor]:
        """Return masks and scores, by site."""
        found: dict[str, Tensor] = {}
        for own in self.sites:
            found[f"units.{own.site.name}.gone"] = torch.from_numpy(own.gone.copy())
            found[f"units.{own.site.name}.score"] = own.score.detach().cpu().clone()
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take masks and scores; see `state`."""
        for own in self.sites:
            own.gone = state[f"units.{own.site.name}.gone"].numpy().astype(bool)
            own.score = state[f"units.{own.site.name}.score"].to(own.score)
        self.heard = self.heard or any(bool(own.score.any()) for own in self.sites)
        for mask in self.masks.values():
            mask.data.fill_(1)
        self._set_masks()


def _refused(found: Inspection) -> tuple[Note, ...]:
    assert found.analysis is not None
    return found.analysis.facts.get(Sites).refused


def _only(asked: str, fraction: float) -> Request:
    wanted: dict[str, Any] = {asked: fraction}
    return Request(**wanted)


def _asked(site: Site, config: PruningConfig) -> str | None:
    """Return which of a config's fractions is about a site; None where none is."""
    if site.kind in FFN:
        return "ffn" if config.ffn else None
    if site.of_values:
        return "value" if config.value else None
    return "heads" if site.kind == "attention" and (config.heads or config.kv_groups) else None
