"""The pattern engine on toy graphs: a toy view says what operations mean, so nothing here depends on ATen."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from torch import fx

from fxslim.flow import POINTWISE, AttendView, Edge, LinearView, Step, Via, Walk
from fxslim.forms import Activation, Attend, Linear, Product, Through, Value
from fxslim.match import Match, Miss, Pattern, Scope

FFN = Pattern("ffn", Linear("down", Activation(Linear("up"))))
GATED = Pattern("gated", Linear("down", Product((Activation(Linear("gate")), Through(POINTWISE, Linear("up"))))))
ATTENTION = Pattern(
    "attention",
    Linear(
        "out",
        Through(
            Via.MOVE,
            Attend(
                q=Through(POINTWISE | Via.JOIN, Linear("q", Value("target"))),
                k=Through(POINTWISE | Via.JOIN, Linear("k", Value("source"))),
                v=Through(Via.MOVE, Linear("v")),
            ),
        ),
    ),
)
KINDS = {
    "move": Via.MOVE,
    "join": Via.JOIN,
    "scale": Via.AFFINE,
    "add": Via.AFFINE,
    "mul": Via.PRODUCT,
    "curve": Via.CURVE,
}


@dataclass
class Toy:
    """Build a graph of toy operations and be its view; ``asked`` counts how often a step was looked up."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    asked: dict[fx.Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.x = self.graph.placeholder("x")

    def op(self, kind: str, *operands: fx.Node, **options: object) -> fx.Node:
        """Append an operation."""
        node = self.graph.call_function(OPERATIONS[kind], operands, {})
        node.meta.update(options)
        return node

    def layer(self, name: str, operand: fx.Node, module: str = "") -> fx.Node:
        """Append a linear whose weight is called ``<name>.weight``."""
        return self.op("linear", operand, weight=f"{name}.weight", nn_module_stack={"": (module or name, None)})

    def linear(self, node: fx.Node) -> LinearView | None:
        if node.target is not OPERATIONS["linear"]:
            return None
        return LinearView(node, node.all_input_nodes[0], node.meta["weight"], None, 1, 0)

    def attend(self, node: fx.Node) -> AttendView | None:
        if node.target is not OPERATIONS["attend"]:
            return None
        query, key, value = node.args
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
        return AttendView(node, query, key, value, "sdpa")

    def step(self, node: fx.Node) -> Step | None:
        self.asked[node] = self.asked.get(node, 0) + 1
        kind = node.target.__name__ if callable(node.target) else ""
        if kind not in KINDS:
            return None
        edges = tuple(Edge(operand, node.meta.get("piece")) for operand in node.args if isinstance(operand, fx.Node))
        return Step(KINDS[kind], edges)


def _operation(name: str):
    def operation(*operands):
        raise AssertionError("toy operations are never run")

    operation.__name__ = operation.__qualname__ = name
    return operation


OPERATIONS = {name: _operation(name) for name in (*KINDS, "linear", "attend", "norm")}


@pytest.fixture
def toy() -> Toy:
    return Toy()


def found(pattern: Pattern, toy: Toy, consumer: fx.Node) -> dict[str, tuple[str, ...]]:
    result = pattern.match(consumer, Scope(toy))
    assert isinstance(result, Match), str(result)
    return {role: tuple(w.removesuffix(".weight") for w in weights) for role, weights in result.roles.items()}


def missed(pattern: Pattern, toy: Toy, consumer: fx.Node) -> Miss:
    result = pattern.match(consumer, Scope(toy))
    assert isinstance(result, Miss), str(result)
    return result


def test_a_match_carries_roles_nodes_and_the_common_module(toy: Toy) -> None:
    up = toy.layer("up", toy.x, "model.layer.0.mlp.up")
    curve = toy.op("curve", up)
    down = toy.layer("down", toy.op("scale", toy.op("move", curve)), "model.layer.0.mlp.down")
    match = FFN.match(down, Scope(toy))
    assert isinstance(match, Match)
    assert (match.kind, match.consumer, match.module) == ("ffn", "down.weight", "model.layer.0.mlp")
    assert dict(match.roles) == {"down": ("down.weight",), "up": ("up.weight",)}
    assert dict(match.nodes) == {"down": down.name, "act": curve.name, "up": up.name}
    assert str(match) == "ffn in model.layer.0.mlp: down down.weight, up up.weight"
    assert not match.cross


def test_an_activation_may_be_any_chain_on_one_value(toy: Toy) -> None:
    up = toy.layer("up", toy.x)
    cubic = toy.op("scale", toy.op("mul", up, toy.op("mul", up, up)))
    gelu = toy.op("mul", toy.op("scale", up), toy.op("curve", toy.op("add", up, cubic)))
    down = toy.layer("down", gelu)
    assert found(FFN, toy, down) == {"down": ("down",), "up": ("up",)}
    miss = missed(GATED, toy, down)
    text = "gated at down: expected a product of different values in front of down, found linear (linear) in up"
    assert str(miss) == text


def test_two_linears_in_a_row_are_a_near_miss(toy: Toy) -> None:
    down = toy.layer("down", toy.op("scale", toy.layer("up", toy.x)))
    miss = missed(FFN, toy, down)
    assert str(miss) == "ffn at down: expected an activation in front of down, found linear (linear) in up"
    assert miss.depth == 2
    assert missed(FFN, toy, toy.layer("other", toy.x)).depth == 1


def test_a_norm_is_named_where_a_linear_should_be(toy: Toy) -> None:
    norm = toy.op("norm", toy.layer("up", toy.x), nn_module_stack={"": ("layer.0.norm", None)})
    miss = missed(FFN, toy, toy.layer("down", toy.op("curve", norm)))
    assert str(miss) == "ffn at down: expected Linear behind the activation, found norm (norm) in layer.0.norm"
    assert (miss.kind, miss.anchor, miss.depth, miss.found) == ("ffn", "down.weight", 2, norm)


def test_different_values_added_are_no_activation(toy: Toy) -> None:
    base = toy.layer("base", toy.x)
    low = toy.layer("b", toy.layer("a", toy.x))
    down = toy.layer("down", toy.op("curve", toy.op("add", base, low)))
    miss = missed(FFN, toy, down)
    assert str(miss) == "ffn at down: expected Linear behind the activation, found add (add) of linear and linear_2"
    assert miss.mixes == (base, low)


@pytest.mark.parametrize("swapped", [False, True])
def test_gate_and_up_in_either_order(toy: Toy, swapped: bool) -> None:
    gate, up = toy.op("curve", toy.layer("gate", toy.x)), toy.op("scale", toy.layer("up", toy.x))
    down = toy.layer("down", toy.op("move", toy.op("mul", *((up, gate) if swapped else (gate, up)))))
    assert found(GATED, toy, down) == {"down": ("down",), "gate": ("gate",), "up": ("up",)}
    assert "found mul (mul) of" in str(missed(FFN, toy, down))


def test_factors_of_one_value_belong_together(toy: Toy) -> None:
    gate, up = toy.layer("gate", toy.x), toy.layer("up", toy.x)
    nested = toy.op("mul", gate, toy.op("mul", up, toy.op("curve", gate)))  # gate * (up * sigmoid(gate))
    assert found(GATED, toy, toy.layer("down", nested)) == {"down": ("down",), "gate": ("gate",), "up": ("up",)}


def test_pieces_of_one_linear_are_gate_and_up(toy: Toy) -> None:
    fused = toy.layer("fused", toy.x)
    first, second = toy.op("move", fused, piece=0), toy.op("move", fused, piece=1)
    down = toy.layer("down", toy.op("mul", toy.op("curve", first), second))
    assert found(GATED, toy, down) == {"down": ("down",), "gate": ("fused",), "up": ("fused",)}
    same = toy.op("move", fused, piece=0)
    plain = toy.layer("plain", toy.op("mul", toy.op("curve", first), same))
    assert found(FFN, toy, plain) == {"down": ("plain",), "up": ("fused",)}


def test_several_gates(toy: Toy) -> None:
    a, b, up = (toy.layer(name, toy.x) for name in ("a", "b", "up"))
    value = toy.op("mul", toy.op("curve", a), toy.op("mul", toy.op("curve", b), up))
    assert found(GATED, toy, toy.layer("down", value)) == {"down": ("down",), "gate": ("a", "b"), "up": ("up",)}


def test_where_every_factor_is_curved_the_last_one_is_up(toy: Toy) -> None:
    value = toy.op("mul", *(toy.op("curve", toy.layer(name, toy.x)) for name in ("tanh", "sigmoid")))
    assert found(GATED, toy, toy.layer("down", value)) == {"down": ("down",), "gate": ("tanh",), "up": ("sigmoid",)}


def test_a_product_without_a_curve_is_refused(toy: Toy) -> None:
    value = toy.op("mul", toy.layer("a", toy.x), toy.layer("b", toy.x))
    miss = missed(GATED, toy, toy.layer("down", value))
    assert str(miss) == "gated at down: expected an activation behind the product, found linear (linear) in a"


def test_the_deepest_failure_of_a_product_is_kept(toy: Toy) -> None:
    norm = toy.op("norm", toy.x)
    miss = missed(GATED, toy, toy.layer("down", toy.op("mul", toy.op("curve", norm), toy.layer("up", toy.x))))
    assert str(miss) == "gated at down: expected Linear behind the activation, found norm (norm)"


def test_a_part_may_ask_for_a_plainer_path_than_the_product_walks(toy: Toy) -> None:
    strict = Pattern("strict", Linear("down", Product((Through(Via.MOVE, Linear("left")),))))
    value = toy.op("mul", toy.op("scale", toy.layer("a", toy.x)), toy.layer("b", toy.x))
    miss = missed(strict, toy, toy.layer("down", value))
    assert str(miss) == "strict at down: expected only move behind the product, found linear (linear) in a"


def test_every_part_needs_a_value_of_its_own(toy: Toy) -> None:
    parts = tuple(Through(POINTWISE, Linear(role)) for role in ("one", "two", "three"))
    value = toy.op("mul", toy.layer("a", toy.x), toy.layer("b", toy.x))
    miss = missed(Pattern("triple", Linear("down", Product(parts))), toy, toy.layer("down", value))
    assert miss.expected == "a product of different values in front of down"


def test_attention_and_what_feeds_it(toy: Toy) -> None:
    q = toy.layer("q", toy.x)
    rotated = toy.op("add", toy.op("scale", q), toy.op("join", toy.op("move", q, piece=0), toy.op("move", q, piece=1)))
    k, v = toy.layer("k", toy.op("move", toy.x)), toy.layer("v", toy.x)
    out = toy.layer("out", toy.op("move", toy.op("attend", rotated, toy.op("move", k), v)))
    match = ATTENTION.match(out, Scope(toy))
    assert isinstance(match, Match)
    assert {role: weights[0][:-7] for role, weights in match.roles.items()} == {r: r for r in ("out", "q", "k", "v")}
    assert match.nodes["attend"] == "attend"
    assert match.nodes["target"] == match.nodes["source"] == "x"
    assert not match.cross


def test_cross_attention_reads_another_value(toy: Toy) -> None:
    y = toy.graph.placeholder("y")
    attend = toy.op("attend", toy.layer("q", toy.x), toy.layer("k", toy.layer("latent", y)), toy.layer("v", y))
    match = ATTENTION.match(toy.layer("out", attend), Scope(toy))
    assert isinstance(match, Match) and match.cross
    assert (match.nodes["target"], match.nodes["source"]) == ("x", "y")


def test_joined_heads_give_several_weights(toy: Toy) -> None:
    k = toy.op("join", toy.layer("k_plain", toy.x), toy.layer("k_rotated", toy.x))
    attend = toy.op("attend", toy.layer("q", toy.x), k, toy.layer("v", toy.x))
    assert found(ATTENTION, toy, toy.layer("out", attend))["k"] == ("k_plain", "k_rotated")


@pytest.mark.parametrize(
    ("feed", "text"),
    [
        ("curve", "attention at out: expected attention in front of out, found curve (curve)"),
        ("value", "attention at out: expected Linear behind the value, found placeholder (x)"),
        ("query", "attention at out: expected Linear behind the query, found add (add) of linear and x"),
    ],
)
def test_what_attention_refuses(toy: Toy, feed: str, text: str) -> None:
    linear = toy.layer("q", toy.x)
    if feed == "curve":
        value = toy.op("curve", toy.op("attend", linear, linear, linear))
    elif feed == "value":
        value = toy.op("attend", linear, linear, toy.x)
    else:
        value = toy.op("attend", toy.op("add", linear, toy.x), linear, linear)
    assert str(missed(ATTENTION, toy, toy.layer("out", value))) == text


def test_a_pattern_starts_at_a_linear(toy: Toy) -> None:
    with pytest.raises(ValueError, match="x is no linear"):
        FFN.match(toy.x, Scope(toy))


def test_nested_products_are_taken_apart_once(toy: Toy) -> None:
    """Every product holds the one before twice over: taken apart naively, 60 of them are 2**60 factors."""
    value, other = toy.layer("a", toy.x), toy.layer("b", toy.x)
    for _ in range(60):
        value, other = toy.op("mul", value, other), value
    down = toy.layer("down", value)
    scope = Scope(toy)
    assert isinstance(GATED.match(down, scope), Match)  # a to some power is a curve
    assert isinstance(FFN.match(down, scope), Miss)
    assert max(toy.asked.values()) < 20


def test_a_long_residual_stream_is_walked_once(toy: Toy) -> None:
    stream = toy.x
    consumers = []
    for i in range(2000):
        consumer = toy.layer(f"layer{i}", stream)
        consumers.append(consumer)
        stream = toy.op("add", stream, consumer)
    scope = Scope(toy)
    assert all(isinstance(FFN.match(consumer, scope), Miss) for consumer in consumers)
    assert max(toy.asked.values()) < 10


def test_a_walk_remembers_pieces_only_if_asked(toy: Toy) -> None:
    piece = toy.op("move", toy.op("move", toy.x, piece="left"), piece="top")
    assert Walk(toy, Via.MOVE, pieces=True).region(piece).sources[0].piece == ("left", "top")
    assert Walk(toy, Via.MOVE, pieces=False).region(piece).sources[0].piece == ()
    assert Walk(toy, Via.AFFINE, pieces=False).region(piece).sources[0].node is piece
