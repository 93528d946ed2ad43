"""One spelling: einsums of several operands become products of two, and compute what they did."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxslim.spelling import letters_of, pair_einsums

from traced import numbers

CASES: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "scores, values, output": ("bhts,bshe,hed->btd", ((2, 3, 4, 5), (2, 5, 3, 6), (3, 6, 7))),
    "a chain": ("ab,bc,cd,de->ae", ((2, 3), (3, 4), (4, 5), (5, 6))),
    "without an arrow": ("ab,bc,cd", ((2, 3), (3, 4), (4, 5))),
    "an ellipsis": ("...ij,jk,...k->...i", ((2, 5, 3, 4), (4, 6), (5, 6))),
    "a size of one": ("bi,bj,ij->b", ((1, 3), (2, 4), (3, 4))),
    "outer": ("a,b,c->cba", ((2,), (3,), (4,))),
}


@pytest.mark.parametrize("path", [None, (1, 2, 0, 1), (0, 2, 0, 1)], ids=["in order", "last first", "ends first"])
@pytest.mark.parametrize("name", CASES)
def test_an_einsum_becomes_products_of_two(name: str, path: tuple[int, ...] | None) -> None:
    equation, shapes = CASES[name]
    given = tuple(numbers(*shape) for shape in shapes)
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(given))]
    for node, tensor in zip(nodes, given, strict=True):
        node.meta["val"] = tensor
    order = {} if path is None else {"path": [0, 1] * (len(given) - 3) + list(path)}
    product = graph.call_function(torch.ops.aten.einsum.default, (equation, nodes), order)
    product.meta["val"] = torch.einsum(equation, *given)
    graph.output(product)
    pair_einsums(graph)
    products = [node for node in graph.nodes if node.op == "call_function"]
    assert [len(node.args[1]) for node in products] == [2] * (len(given) - 1)
    found = torch.fx.GraphModule(nn.Module(), graph)(*given)
    assert torch.allclose(found, torch.einsum(equation, *given), rtol=1e-12, atol=1e-12)
    for node, value in zip(products, _values(graph, given), strict=True):
        assert node.meta["val"].shape == value.shape


def _values(graph: torch.fx.Graph, given: tuple[Tensor, ...]) -> list[Tensor]:
    env: dict[torch.fx.Node, Tensor] = dict(zip(graph.find_nodes(op="placeholder"), given, strict=True))
    for node in graph.nodes:
        if node.op == "call_function":
            env[node] = torch.einsum(node.args[0], *(env[argument] for argument in node.args[1]))
    return [value for node, value in env.items() if node.op == "call_function"]


def test_a_letter_that_an_operand_has_twice_is_left_alone() -> None:
    assert letters_of("ii,ij,jk->k", (2, 2, 2)) is None
