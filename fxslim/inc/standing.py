"""Callbacks whose masks still stand on a model."""

from __future__ import annotations

import logging
import weakref
from typing import Protocol

from torch import nn

LOG = logging.getLogger("fxslim")


class Standing(Protocol):
    """What is known of callbacks here."""

    model: nn.Module
    finished: bool

    @property
    def settled(self) -> bool:
        """Tell whether the target is reached."""

    def release(self) -> None:
        """Take masks off."""


STANDING: weakref.WeakSet[Standing] = weakref.WeakSet()


def take_off(model: nn.Module) -> None:
    """Take the masks of all callbacks off a model, where it stands."""
    for own in list(STANDING):
        if own.model is model and not own.finished:
            if not own.settled:
                LOG.warning("masks are taken off before they reached their target: the model has the zeros of now.")
            own.release()
