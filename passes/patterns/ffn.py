"""Feed-forward networks: hidden channels between one linear and the next."""

from fxslim.flow import POINTWISE
from fxslim.forms import Activation, Linear, Product, Through
from fxslim.match import Pattern

GATED_FFN = Pattern(
    "gated_ffn",
    Linear("down", Product((Activation(Linear("gate")), Through(POINTWISE, Linear("up"))))),
)
"""down(act(gate(x)) * up(x)); gate and up may be pieces of one linear, and there may be several gates."""

FFN = Pattern("ffn", Linear("down", Activation(Linear("up"))))
"""down(act(up(x)))."""
