"""Everything fxslim raises on purpose: one root, each error carries its data and says what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class FxslimError(Exception):
    """Root of every error that fxslim raises on purpose."""


class InputError(FxslimError, ValueError):
    """An argument has the wrong type, value or place."""


class TraceError(FxslimError):
    """The model could not be traced into a graph."""


class RequestError(FxslimError, ValueError):
    """A request cannot be met: unknown glob, fraction out of range, everything asked for."""


class PlanError(FxslimError, ValueError):
    """A plan does not fit the model it is applied to, or is not a valid plan."""


class UnsupportedModelError(FxslimError):
    """The model holds something that fxslim refuses to touch, such as quantized weights."""


class ExportError(FxslimError):
    """A format cannot hold the model, or what was written computes something else than the model."""


class StorageError(InputError, OSError):
    """Files cannot be written or read: no room, no permission, a file that is missing or cut short."""


class OrderError(FxslimError):
    """A pipeline was built with a pass before what it requires."""


class NarrowError(FxslimError):
    """A value that is left after narrowing is not a box, or a rewritten graph disagrees with its labels."""


class VerifyError(FxslimError):
    """Masked and narrowed models disagree.

    Attributes:
        site: name of the first site whose output is wrong, or ``"output"`` when no site could be singled out.
        max_abs: largest absolute difference seen.
        tolerance: largest difference allowed.
        where: the path along which they were run.
        changed: parameters of the narrowed model that are no longer what the plan makes of the dense model's.
    """

    def __init__(self, site: str, max_abs: float, tolerance: float, where: str, *, changed: Sequence[str] = ()) -> None:
        self.site = site
        self.max_abs = max_abs
        self.tolerance = tolerance
        self.where = where
        self.changed = tuple(changed)
        said = (
            f"masked and narrowed models disagree at {site} ({where}): largest difference {max_abs:.3g}, "
            f"allowed {tolerance:.3g}. Leave the site out with skip=, and please report it with the model's config."
        )
        if changed:
            said += (
                f" The narrowed weights are not those of the dense model with units taken out ({changed[0]}, "
                f"{len(changed)} in all): if it was trained since it was narrowed, compare how good both are, on data "
                "of the task."
            )
        super().__init__(said)
