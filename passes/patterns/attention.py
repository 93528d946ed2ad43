"""Attention: heads between the projections and the output projection."""

from fxslim.flow import POINTWISE, Via
from fxslim.forms import Attend, Linear, Product, Through, Value
from fxslim.match import Pattern

_HEADS = Through(
    Via.MOVE | Via.JOIN | Via.AFFINE,
    Attend(
        q=Through(POINTWISE | Via.JOIN | Via.NORM, Linear("q", Value("target"))),
        k=Through(POINTWISE | Via.JOIN | Via.NORM, Linear("k", Value("source"))),
        v=Through(POINTWISE | Via.JOIN | Via.NORM, Linear("v")),
    ),
)

ATTENTION = Pattern("attention", Linear("out", _HEADS))
"""out(attend(q(x), k(y), v(y))), with positions, norms and copies for groups of heads on the way.

One linear may play several of the roles (fused QKV). Where ``target`` and ``source`` are different values the match is
cross attention.
"""

GATED_ATTENTION = Pattern("attention", Linear("out", Product((_HEADS, Through(POINTWISE, Linear("gate"))))))
"""out(attend(q(x), k(y), v(y)) * act(gate(x))); query and gate may be pieces of one linear."""
