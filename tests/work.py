"""How much work something is, without a clock: machines are slow and fast, and calls of functions are the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the calls of Python functions inside: the only number of the list."""
    count = [0]

    def note(_frame: Any, event: str, _argument: Any) -> None:
        count[0] += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield count
    finally:
        sys.setprofile(before)
