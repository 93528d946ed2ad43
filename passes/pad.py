"""Fill up what a given plan keeps to the numbers that kernels can take."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fxslim.plan import Note, Plan, Site, SitePlan


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
            reason = (
                f"rows of {len(stay)} more channels stay, with zero columns: its grouped products need a multiple of "
                f"{multiple}"
            )
            notes.append(Note(where=part.site.name, reason=reason))
        parts.append(part)
    return plan.model_copy(update={"sites": tuple(parts), "notes": tuple(notes)})


def _filled(part: SitePlan, multiple: int) -> tuple[int, ...]:
    """Return which units stay with zero columns: those that do already, and the first of the others."""
    missing = -len(part.left) % multiple
    more = np.flatnonzero(part.taken)[:missing]
    return tuple(sorted((*part.stay, *more.tolist()))) if missing else part.stay
