"""Fill up what a given plan keeps to the numbers that kernels can take."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fxslim.plan import Note, Plan
from fxslim.site import Site, SitePlan, units_by_group


def padded(plan: Plan, sites: Mapping[str, Site]) -> Plan:
    """Let rows of as many units as it takes stay, with zero columns, until every site's multiple is met.

    A plan whose edits were found already is what was verified, and is left as it is.

    Args:
        plan: a plan that was given.
        sites: the model's own sites, by name.
    """
    if plan.edits or plan.zeroed:
        return plan
    parts, notes = [], list(plan.notes)
    for part in plan.sites:
        multiple = sites[part.site.name].multiple
        stay = _filled(part, multiple)
        if stay != part.stay:
            part = part.model_copy(update={"stay": stay})
            each = part.site.group_count if part.site.groups_stay else 1
            reason = (
                f"rows of {len(stay) // each} more channels{' of every expert' if each > 1 else ''} stay, with zero "
                f"columns: its grouped products need a multiple of {multiple}"
            )
            notes.append(Note(where=part.site.name, reason=reason))
        parts.append(part)
    return plan.model_copy(update={"sites": tuple(parts), "notes": tuple(notes)})


def _filled(part: SitePlan, multiple: int) -> tuple[int, ...]:
    """Return which units stay with zero columns: those that do already, and the first of the others."""
    stay = list(part.stay)
    for units in units_by_group(part.site) if part.site.groups_stay else [np.arange(part.site.units)]:
        taken = units[part.taken[units]]
        missing = -(len(units) - len(taken)) % multiple
        stay.extend(taken[:missing].tolist())
    return tuple(sorted(stay))
