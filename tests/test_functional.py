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


DONE: dict[str, Body] = {
    "twice": twice,
    "read before": old_reader,
    "a view that is read before": dead_view,
    "a constant": constant,
    "a mask": masked,
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


def piece(x: Tensor) -> Tensor:
    y = x + 1
    y[..., :2] = 0
    return y


def later_view(x: Tensor) -> Tensor:
    y = x + 1
    z = y.transpose(1, 2)
    y.neg_()
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
    "a piece": piece,
    "a view that is read afterwards": later_view,
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
