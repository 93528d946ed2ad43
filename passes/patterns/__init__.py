"""The patterns that give sites their kind and their roles."""

from fxslim.match import Pattern
from fxslim.passes.patterns.attention import ATTENTION, GATED_ATTENTION
from fxslim.passes.patterns.ffn import FFN, GATED_FFN

PATTERNS: tuple[Pattern, ...] = (ATTENTION, GATED_ATTENTION, GATED_FFN, FFN)
"""Every pattern, the most specific first; the first that matches a consumer names it."""

__all__ = ["ATTENTION", "FFN", "GATED_ATTENTION", "GATED_FFN", "PATTERNS"]
