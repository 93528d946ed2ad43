"""Measure models against one another: the same numbers for everybody, with one call."""

from __future__ import annotations

from fxslim.harness.result import Benchmark, Generation, Point, Size
from fxslim.harness.run import benchmark

__all__ = ["Benchmark", "Generation", "Point", "Size", "benchmark"]
