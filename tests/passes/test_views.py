"""Canonical views of ATen graphs: every spelling of a linear and of attention, and how values flow through the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fxslim.flow import AttendView, LinearView, Step, Via
from fxslim.passes.steps import name_of
from fxslim.passes.views import Views, attend_view, linear_view
from fxslim.program import Program, shape_of
from fxslim.trace import trace

IN, OUT, HEADS, WIDTH = 6, 5, 2, 3
X = torch.zeros(2, 4, IN)


class Body(nn.Module):
    """A module with a few tensors whose forward is a function of itself and its inputs."""

    def __init__(self, body: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.body(self, x) if y is None else self.body(self, x, y)


def traced(body: Callable[..., Any], x: Tensor = X, y: Tensor | None = None, **modules: Any) -> Program:
    return trace(Body(body, **modules), {"x": x} if y is None else {"x": x, "y": y})


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def result(program: Program) -> fx.Node:
    node = program.graph.output_node().args[0][0]
    assert isinstance(node, fx.Node)
    return node


def linears(program: Program) -> list[LinearView]:
    return [view for node in program.graph.nodes if (view := linear_view(program, node)) is not None]


LINEARS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "linear": (lambda m, x: m.a(x), {"a": nn.Linear(IN, OUT)}),
    "linear without bias": (lambda m, x: m.a(x), {"a": nn.Linear(IN, OUT, bias=False)}),
    "addmm of a stored transpose": (lambda m, x: m.a(x), {"a": Conv1D(OUT, IN)}),
    "matmul": (lambda m, x: x @ m.w, {"w": matrix(IN, OUT)}),
    "matmul of t": (lambda m, x: x @ m.w.t(), {"w": matrix(OUT, IN)}),
    "matmul of T": (lambda m, x: x @ m.w.T, {"w": matrix(OUT, IN)}),
    "matmul of transpose": (lambda m, x: x @ m.w.transpose(-1, 0), {"w": matrix(OUT, IN)}),
    "matmul of permute": (lambda m, x: x @ m.w.permute(1, 0), {"w": matrix(OUT, IN)}),
    "transposed twice": (lambda m, x: functional.linear(x, m.w.t().clone().t()), {"w": matrix(OUT, IN)}),
    "mm": (lambda m, x: torch.mm(x.view(-1, IN), m.w), {"w": matrix(IN, OUT)}),
    "cast weight": (
        lambda m, x: functional.linear(x, m.w.to(x.dtype)),
        {"w": nn.Parameter(torch.zeros(OUT, IN).half())},
    ),
    "cast and transposed": (lambda m, x: x @ m.w.to(x.dtype).t(), {"w": nn.Parameter(torch.zeros(OUT, IN).half())}),
    "part of a weight": (lambda m, x: functional.linear(x, m.w[OUT:]), {"w": matrix(2 * OUT, IN)}),
    "einsum": (lambda m, x: torch.einsum("bsd,df->bsf", x, m.w), {"w": matrix(IN, OUT)}),
    "einsum, weight first": (lambda m, x: torch.einsum("fd,bsd->bsf", m.w, x), {"w": matrix(OUT, IN)}),
    "convolution with kernel 1": (lambda m, x: m.a(x.mT), {"a": nn.Conv1d(IN, OUT, 1)}),
}


@pytest.mark.parametrize("spelling", LINEARS)
def test_every_spelling_of_a_linear_is_one_view(spelling: str) -> None:
    body, modules = LINEARS[spelling]
    program = traced(body, **modules)
    (view,) = linears(program)
    stored = program.tensors[view.weight]
    assert view.weight == ("a.weight" if "a" in modules else "w")
    assert view.bias == ("a.bias" if "a.bias" in program.tensors else None)
    assert stored.shape[view.in_dim] == IN
    assert stored.shape[view.out_dim] in (OUT, 2 * OUT)
    assert {view.in_dim, view.out_dim} == {0, 1}
    assert IN in shape_of(view.input)
    assert OUT in shape_of(view.node)


def test_a_tied_weight_goes_by_its_first_name() -> None:
    embedding, head = nn.Embedding(9, IN), nn.Linear(IN, 9)
    head.weight = embedding.weight
    program = traced(lambda m, x: m.head(m.table(x)), torch.zeros(2, 4, dtype=torch.int64), table=embedding, head=head)
    (view,) = linears(program)
    assert view.weight in program.tensors
    assert program.aliases == {({"head.weight", "table.weight"} - {view.weight}).pop(): view.weight}


@pytest.mark.parametrize(
    ("body", "modules"),
    [
        (lambda m, x: m.a(x.mT), {"a": nn.Conv1d(IN, OUT, 3)}),
        (lambda m, x: m.a(x.mT), {"a": nn.Conv1d(IN, IN, 1, groups=IN)}),
        (lambda m, x: functional.linear(x, m.w * 2), {"w": matrix(OUT, IN)}),
        (lambda m, x: x @ m.w, {"w": matrix(IN)}),
        (lambda m, x: x @ x.mT * m.w, {"w": matrix(1)}),
        (lambda m, x: torch.einsum("bsd,d->bs", x, m.w), {"w": matrix(IN)}),
    ],
    ids=["kernel 3", "depthwise", "computed weight", "vector", "two activations", "einsum with a vector"],
)
def test_what_is_no_linear(body: Callable[..., Any], modules: dict[str, Any]) -> None:
    assert linears(traced(body, **modules)) == []


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def qkv() -> dict[str, nn.Module]:
    return {name: nn.Linear(IN, IN) for name in "qkv"}


def masked(m: Body, x: Tensor) -> Tensor:
    scores = heads(m.q(x)) @ heads(m.k(x)).transpose(-1, -2) / WIDTH**0.5
    scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), -1e9)
    return functional.dropout(scores.softmax(-1, dtype=torch.float64).to(x.dtype), 0.1, m.training) @ heads(m.v(x))


def flat(m: Body, x: Tensor) -> Tensor:
    q, k, v = (heads(f(x)).flatten(0, 1) for f in (m.q, m.k, m.v))
    return torch.bmm(torch.baddbmm(torch.zeros(1, 4, 4), q, k.mT, beta=0.5).softmax(-1), v)


def relative(m: Body, x: Tensor) -> Tensor:
    q, k = heads(m.q(x)), heads(m.k(x))
    scores = q @ k.mT + torch.einsum("bhsd,std->bhst", q, m.table)
    return torch.where(torch.ones(4, 4).bool(), scores, -1.0).softmax(-1) @ heads(m.v(x))


def sinks(m: Body, x: Tensor) -> Tensor:
    scores = torch.cat([heads(m.q(x)) @ heads(m.k(x)).mT, m.sink.expand(x.shape[0], HEADS, 4, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ heads(m.v(x))


def contracted(m: Body, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (HEADS, WIDTH)) for f in (m.q, m.k, m.v))
    return torch.einsum("bhst,bthd->bshd", torch.einsum("bshd,bthd->bhst", q, k).softmax(-1), v)


ATTENTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sdpa": (lambda m, x: functional.scaled_dot_product_attention(*(heads(f(x)) for f in (m.q, m.k, m.v))), {}),
    "scale, mask, cast, dropout": (masked, {}),
    "baddbmm and bmm": (flat, {}),
    "relative positions": (relative, {"table": matrix(4, 4, WIDTH)}),
    "sinks": (sinks, {"sink": matrix(1, HEADS, 1, 1)}),
    "einsum": (contracted, {}),
}


@pytest.mark.parametrize("spelling", ATTENTIONS)
def test_every_spelling_of_attention_is_one_view(spelling: str) -> None:
    body, extra = ATTENTIONS[spelling]
    program = traced(body, **qkv(), **extra)
    view = attend_view(program, result(program))
    assert isinstance(view, AttendView)
    assert view.form == ("sdpa" if spelling == "sdpa" else "explicit")
    assert [behind(program, node) for node in (view.query, view.key, view.value)] == [
        "q.weight",
        "k.weight",
        "v.weight",
    ]


def behind(program: Program, node: fx.Node) -> str:
    """Return the weight of the linear behind data movement."""
    views = Views(program)
    while (view := views.linear(node)) is None:
        step = views.step(node)
        assert step is not None and step.via is Via.MOVE
        node = step.edges[0].node
    return view.weight


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: (m.q(x) @ m.k(x).mT).sigmoid() @ m.v(x),
        lambda m, x: (m.q(x) @ m.k(x).mT) @ m.v(x),
        lambda m, x: m.v(m.q(x).softmax(-1) + m.k(x)),
        lambda m, x: m.q(x).softmax(-1).mT @ (m.k(x) + m.v(x)),
    ],
    ids=["sigmoid", "linear attention", "a softmax in front of a linear", "no scores"],
)
def test_what_is_no_attention(body: Callable[..., Any]) -> None:
    program = traced(body, **qkv())
    views = Views(program)
    assert [node.name for node in program.graph.nodes if views.attend(node)] == []


STEPS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Via | None, int]] = {
    "relu": (lambda h, g: h.relu(), Via.CURVE, 1),
    "hardswish": (lambda h, g: functional.hardswish(h), Via.CURVE, 1),
    "maximum": (lambda h, g: torch.max(h, torch.zeros_like(h)), Via.CURVE, 1),
    "square": (lambda h, g: h * h, Via.PRODUCT, 2),
    "product": (lambda h, g: h * g, Via.PRODUCT, 2),
    "ratio": (lambda h, g: h / g, Via.CURVE, 2),
    "reciprocal": (lambda h, g: torch.ones(OUT) / h, Via.CURVE, 1),
    "scale": (lambda h, g: h * 2, Via.AFFINE, 1),
    "mask": (lambda h, g: h * torch.ones(4, 1), Via.AFFINE, 1),
    "difference": (lambda h, g: h - g, Via.AFFINE, 2),
    "where by a mask": (lambda h, g: torch.where(torch.ones(4, 1).bool(), h, 0.0), Via.AFFINE, 1),
    "where by a value": (lambda h, g: torch.where(h > 0, h, 0.1 * h), Via.CURVE, 3),
    "guard": (lambda h, g: h.clamp(-7, 7), Via.AFFINE, 1),
    "upper guard": (lambda h, g: h.clamp(max=7), Via.AFFINE, 1),
    "clamp at zero": (lambda h, g: h.clamp(min=0), Via.CURVE, 1),
    "cast": (lambda h, g: h.double(), Via.MOVE, 1),
    "transpose": (lambda h, g: h.mT, Via.MOVE, 1),
    "index": (lambda h, g: h[torch.arange(2), 0], Via.MOVE, 1),
    "stack": (lambda h, g: torch.stack([h, g]), Via.JOIN, 2),
    "layer norm": (lambda h, g: functional.layer_norm(h, (OUT,)), Via.NORM, 1),
    "mean": (lambda h, g: h.mean(-1, keepdim=True), Via.NORM, 1),
    "softmax": (lambda h, g: h.softmax(-1), None, 0),
    "two activations": (lambda h, g: h @ g.mT, None, 0),
    "shape only": (lambda h, g: torch.zeros_like(h) + 1, None, 0),
    "routing": (lambda h, g: h.flatten(0, 1)[g.argmax(-1)], None, 0),
}


@pytest.fixture(scope="module")
def every_step() -> dict[str, Step | None]:
    """Trace all of them at once; each is one output."""

    def body(m: Body, x: Tensor) -> list[Tensor]:
        h, g = m.a(x), m.b(x)
        return [operation(h, g) for operation, _, _ in STEPS.values()]

    program = traced(body, a=nn.Linear(IN, OUT), b=nn.Linear(IN, OUT))
    views = Views(program)
    results: Any = program.graph.output_node().args[0]
    return {name: views.step(node) for name, node in zip(STEPS, results, strict=True)}


@pytest.mark.parametrize("name", STEPS)
def test_how_values_flow(name: str, every_step: dict[str, Step | None]) -> None:
    _, via, operands = STEPS[name]
    step = every_step[name]
    assert (step.via, len(step.edges)) == (via, operands) if step else via is None


def test_side_inputs_do_not_flow() -> None:
    """Positions, masks made from an input, norm weights and rotary tables are no operands of a step."""

    def body(m: Body, x: Tensor, y: Tensor) -> Tensor:
        table = torch.arange(4)[:, None] * m.frequency
        return m.a(x) * table.cos() * y[:, :, None] * m.scale

    frequency = nn.Buffer(torch.ones(OUT))
    program = traced(body, y=torch.ones(2, 4), a=nn.Linear(IN, OUT), frequency=frequency, scale=matrix(OUT))
    views = Views(program)
    node, passed = result(program), 0
    while views.linear(node) is None:
        step = views.step(node)
        assert step is not None and step.via is Via.AFFINE
        (edge,) = step.edges
        node, passed = edge.node, passed + 1
    assert passed == 3


def test_pieces_are_told_apart() -> None:
    def body(m: Body, x: Tensor) -> Tensor:
        first, second = m.a(x).chunk(2, -1)
        sliced = m.a(x)[..., :3], m.a(x)[:, :, 3:], m.a(x)[:, :]
        one, two = m.a(x).unflatten(-1, (2, 3)).unbind(-2)
        return torch.cat([first, second, *sliced, one, two, functional.glu(m.a(x))], -1)

    program = traced(body, a=nn.Linear(IN, 6))
    views = Views(program)
    joined = views.step(result(program))
    assert joined is not None
    pieces = []
    for edge in joined.edges:
        step = views.step(edge.node)
        assert step is not None
        pieces.append(tuple(inner.piece for inner in step.edges))
    chunks, slices, whole, bound, glu = pieces[:2], pieces[2:4], pieces[4], pieces[5:7], pieces[7]
    assert all(one != other and one != (None,) for one, other in (chunks, slices, bound))
    assert whole == (None,)
    assert len(set(glu)) == 2
    assert name_of(joined.edges[7].node) == "glu"
