"""In-place operations become functional ones where nobody else sees the memory, and only there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxslim.functional import functionalize, mutates

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 4)
Body = Callable[[Tensor], Any]


class Runs(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def rewritten(body: Body) -> tuple[bool, fx.Graph, Callable[[Tensor], Any]]:
    """Return whether all is functional, the graph, and a way to run it."""
    exported = torch.export.export(Runs(body), (X,), strict=False)
    module = copy.deepcopy(exported.graph_module)
    assert any(mutates(node) for node in module.graph.nodes)
    done = functionalize(module.graph)
    module.recompile()
    specs = exported.graph_signature.input_specs
    lifted = {spec.arg.name: exported.constants[spec.target] for spec in specs if spec.target in exported.constants}

    def run(x: Tensor) -> Any:
        return module(*(lifted.get(node.name, x) for node in module.graph.find_nodes(op="placeholder")))

    return done, module.graph, run


def twice(x: Tensor) -> Tensor:
    y = x * 2
    y += 1
    return y.mul_(3)


def old_reader(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    z = y * 5
    y.div_(2)
    return y, z


def dead_view(x: Tensor) -> Tensor:
    y = x + 1
    z = y.transpose(1, 2) * 2
    y.neg_()
    return z.transpose(1, 2) + y


def constant(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


def masked(x: Tensor) -> Tensor:
    y = x.exp()
    y[x > 0] = 0
    return y


def piece(x: Tensor) -> Tensor:
    y = x + 1
    y[..., :2] = 0
    return y


def later_view(x: Tensor) -> Tensor:
    y = x + 1
    z = y.transpose(1, 2)
    y.neg_()
    return z


def rows(x: Tensor) -> Tensor:
    """Every row of a triangle is made of those above it, as in chunked linear attention."""
    y = x @ x.transpose(1, 2)
    for i in range(1, 3):
        row = y[..., i, :i].clone()
        y[..., i, :i] = row + (row.unsqueeze(-1) * y[..., :i, :i].clone()).sum(-2)
    return y + torch.eye(3, dtype=y.dtype)


def other_views(x: Tensor) -> tuple[Tensor, ...]:
    """Names of one memory before and after it is written by another name of it."""
    y = x + 1
    turned, first = y.transpose(1, 2), y[:, 0]
    before = turned * 2
    first += 5
    row = turned[0]
    y[1] *= 3
    return y, turned, first, row, before


def result_is_written(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    z = y[:, 1:].mul_(2)
    y.neg_()
    z.add_(7)
    return y, z


def other_dtype(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float32)
    y[:, 1:] = x[:, 1:]
    y[:, 0].fill_(3)
    return y


def one_of_two(x: Tensor) -> tuple[Tensor, Tensor]:
    values, places = x.topk(2, -1)
    values /= values.sum(-1, keepdim=True)
    return values, places


def everything(x: Tensor) -> Tensor:
    y = x * 2
    y[:] = x.flip(1)
    return y


DONE: dict[str, Body] = {
    "twice": twice,
    "read before": old_reader,
    "a view that is read before": dead_view,
    "a constant": constant,
    "a mask": masked,
    "a piece": piece,
    "a view that is read afterwards": later_view,
    "rows one by one": rows,
    "other views": other_views,
    "a result that is written": result_is_written,
    "a piece of another dtype": other_dtype,
    "a piece that is everything": everything,
    "one of two results": one_of_two,
}


@pytest.mark.parametrize("case", DONE)
def test_values_stay(case: str) -> None:
    done, graph, run = rewritten(DONE[case])
    assert done
    assert not any(mutates(node) for node in graph.nodes)
    for given in (X, X.flip(-1) * 3):
        found, wanted = run(given), DONE[case](given.clone())
        found = found if isinstance(wanted, tuple) else found[0]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def maybe_view(x: Tensor) -> Tensor:
    y = x + 1
    z = y.reshape(6, 4)
    y[:, 0] = 0
    return z


def halves(x: Tensor) -> Tensor:
    first, second = (x + 1).chunk(2, -1)
    first.neg_()
    return first + second


def wider(x: Tensor) -> Tensor:
    return x.float().add_(x)


def given(x: Tensor) -> Tensor:
    return x.add_(1) * 2


LEFT: dict[str, Body] = {
    "a view that may be a copy is read afterwards": maybe_view,
    "pieces of one value": halves,
    "a wider operand": wider,
    "an input": given,
}


@pytest.mark.parametrize("case", LEFT)
def test_what_others_see_is_left_alone(case: str) -> None:
    done, _, run = rewritten(LEFT[case])
    assert not done
    found = run(X.clone())[-1 if case == "an input" else 0]
    assert torch.equal(found, LEFT[case](X.clone()))
