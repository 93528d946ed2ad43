"""What a format is: one file, how it is written, and how it is run to see what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import torch

from fxslim.errors import InputError
from fxslim.export.exportable import Exportable

Run: TypeAlias = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Runs a written model: inputs by name to outputs by name."""


@dataclass(frozen=True)
class Format:
    """A way to write a model.

    Attributes:
        file: name of the file that runtimes open.
        write: writes it.
        load: returns what runs it, or the reason why it cannot be run here.
        packages: what has to be installed to write it.
        extra: the extra of fxslim that brings them.
    """

    file: str
    write: Callable[[Exportable, Path], None]
    load: Callable[[Exportable, Path], Run | str]
    packages: tuple[str, ...] = ()
    extra: str = ""

    def require(self) -> None:
        """Raise InputError unless everything is installed that writing takes."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise InputError(f"{', '.join(missing)} not installed: pip install 'fxslim[{self.extra}]'")
