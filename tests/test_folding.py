"""What never changes takes no width: constant units go, and their consumers' biases take up what they added."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import fxslim
from fxslim.errors import PlanError
from fxslim.inputs import fresh
from fxslim.passes.folding.constants import constants
from fxslim.passes.folding.facts import Fact
from fxslim.passes.narrow import replay
from fxslim.plan import Plan

from agreement import EXACT, INNER_FLOAT32, difference, outputs
from architectures import ARCHITECTURES
from traced import traced

D, F, H, E = 8, 12, 3, 4
DEAD = [1, 4, 7]

HIDDEN = "a mask may hide all positions from a row of the attention"
DROPOUT = "attention dropout changes the sums of the rows"
SINKS = "part of the softmax is cut off, as with attention sinks"
GATED = "the softmax is scaled or gated"
OTHER = "the rows of the attention do not come straight from a softmax"


def given(batch: int = 2, length: int = 5, seed: int = 0, width: int = D) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args, **options).double().eval()


def silence(linear: nn.Module, rows: list[int] = DEAD, bias: float | None = None) -> None:
    """Zero rows of a weight, and set their biases unless they keep their random ones."""
    with torch.no_grad():
        linear.weight[rows] = 0
        if bias is not None and linear.bias is not None:
            linear.bias[rows] = bias


def gone(plan: Plan) -> dict[str, list[int]]:
    return {part.site.name: [u for u in range(part.site.units) if u not in part.keep] for part in plan}


def notes(plan: Plan) -> list[str]:
    return [note.reason for note in plan.notes]


def everywhere(model: Any, *example: Tensor, fresh: tuple[Tensor, ...] = ()) -> Plan:
    """Narrow both forms, insert masks and mask: all compute what the dense model does, and keep the same units."""
    fresh = fresh or tuple(given(4, 9, 7 + i, t.shape[-1]) for i, t in enumerate(example))
    expected = outputs(model, fresh)
    small = fxslim.slim(model, example)
    graphs = [fxslim.compile(model, example, narrow=narrow) for narrow in (True, False)]
    plan: Plan = small.fxslim.plan
    for form in (small, *graphs):
        assert difference(expected, outputs(form, fresh)) <= EXACT
        assert form.fxslim.plan.sites == plan.sites
        assert [note.reason for note in form.fxslim.report.not_done][: len(plan.notes)] == notes(form.fxslim.plan)
    with fxslim.masked(model, plan):
        assert difference(expected, outputs(model, fresh)) <= EXACT
    assert difference(expected, outputs(model, fresh)) == 0
    return plan


# Feed-forward -------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """``fc2(between(act(fc1(x))))``."""

    def __init__(self, act: Any = nn.ReLU, *, bias: bool = True, between: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, F), nn.Linear(F, D, bias=bias)
        self.act, self.between = act(), between or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.fc2(self.between(self.act(self.fc1(x))))
        return hidden


ACTS = [nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.Hardswish]


@pytest.mark.parametrize("act", ACTS)
def test_a_constant_goes_into_the_bias(act: Any) -> None:
    model = made(Mlp, act)
    silence(model.fc1, bias=0.7)
    plan = everywhere(model, given())
    assert gone(plan) == {"ffn": DEAD}
    (fold,) = plan.sites[0].folds
    assert (fold.tensor, fold.dim, fold.bias, fold.rows) == ("fc2.weight", 1, "fc2.bias", tuple(DEAD))
    assert fold.values == pytest.approx([float(act()(torch.tensor(0.7, dtype=torch.float64)))] * 3, rel=1e-15)
    assert notes(plan) == []


@pytest.mark.parametrize("act", ACTS)
def test_a_constant_stays_where_there_is_no_bias(act: Any) -> None:
    model = made(Mlp, act, bias=False)
    silence(model.fc1, bias=0.7)
    plan = everywhere(model, given())
    assert gone(plan) == {}
    assert [(note.where, note.reason) for note in plan.notes] == [("ffn", "3 constant channels stay: fc2 has no bias")]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("act", "value"), [(nn.ReLU, 0.0), (nn.ReLU, -0.5), (nn.GELU, 0.0), (nn.SiLU, 0.0),
                                            (nn.Tanh, 0.0)])  # fmt: skip
def test_zero_needs_no_bias(act: Any, value: float, bias: bool) -> None:
    model = made(Mlp, act, bias=bias)
    silence(model.fc1, bias=value)
    plan = everywhere(model, given())
    assert gone(plan) == {"ffn": DEAD}
    assert plan.sites[0].folds == ()


def test_zero_columns_and_constants_go_together() -> None:
    model = made(Mlp, nn.Sigmoid)
    silence(model.fc1, [1, 2], bias=0.3)
    with torch.no_grad():
        model.fc2.weight[:, [2, 9]] = 0
    plan = everywhere(model, given())
    assert gone(plan) == {"ffn": [1, 2, 9]}
    assert plan.sites[0].folds[0].rows == (1,)


def test_when_every_unit_is_constant_one_stays() -> None:
    model = made(Mlp, nn.Sigmoid)
    silence(model.fc1, list(range(F)))
    plan = everywhere(model, given())
    assert gone(plan) == {"ffn": list(range(1, F))}
    assert notes(plan) == ["every unit is zero or constant; one has to stay"]


def test_rounding_brings_constants_back() -> None:
    model = made(Mlp, nn.Sigmoid)
    silence(model.fc1, bias=0.4)
    small = fxslim.slim(model, given(), round_to=10)
    assert small.fc1.out_features == 10
    assert len(small.fxslim.plan.sites[0].folds[0].rows) == 2
    assert difference(outputs(model, (given(3),)), outputs(small, (given(3),))) <= EXACT


def test_constants_of_constants() -> None:
    """A layer whose weights meet nothing but constants gives constants."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(D, 6), nn.Linear(6, 10), nn.Linear(10, D)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(torch.sigmoid(self.b(torch.sigmoid(self.a(x)))))
            return out

    model = made(Deep)
    silence(model.a, [0, 1])
    with torch.no_grad():
        model.b.weight[5, 2:] = 0  # reads the constants 0 and 1 alone
    plan = everywhere(model, given())
    assert sorted(gone(plan).values()) == [[0, 1], [5]]


def test_layer_norm_between_makes_no_site() -> None:
    model = made(Mlp, nn.GELU, between=nn.LayerNorm(F))
    silence(model.fc1, bias=0.7)
    assert everywhere(model, given()).sites == ()


def test_resting_dropout_is_the_identity() -> None:
    model = made(Mlp, nn.GELU, between=nn.Dropout(0.3))
    silence(model.fc1, bias=0.7)
    assert gone(everywhere(model, given())) == {"ffn": DEAD}


class Always(nn.Module):
    """Dropout in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.3, training=True)


@pytest.mark.parametrize(("value", "left"), [(0.0, {"ffn": DEAD}), (0.7, {})])
def test_dropout_that_never_rests_keeps_constants(value: float, left: dict[str, list[int]]) -> None:
    """Refusal, but for zeros."""
    model = made(Mlp, nn.ReLU, between=Always())
    silence(model.fc1, bias=value)
    plan = fxslim.plan(model, given())
    assert gone(plan) == left
    reason = "3 constant channels stay: dropout is active whenever the model runs"
    assert notes(plan) == ([] if left else [reason])


def test_scales_and_shifts_by_parameters() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.randn(F)), nn.Parameter(torch.randn(F))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale - 2 * self.shift

    model = made(Mlp, nn.GELU, between=Scaled())
    silence(model.fc1, bias=0.7)
    with torch.no_grad():
        model.between.scale[0] = 0  # zero times data, then a shift: constant as well
    assert gone(everywhere(model, given())) == {"ffn": [0, *DEAD]}


def test_slopes_of_channels_are_no_last_axis() -> None:
    """A weight of prelu belongs to axis 1, whatever broadcasting would say."""
    model = made(Mlp, lambda: nn.PReLU(5))
    with torch.no_grad():
        model.act.weight.copy_(torch.arange(5.0))
    silence(model.fc1, [1], bias=0.7)
    silence(model.fc1, [2], bias=-0.7)
    assert gone(fxslim.plan(model, given())).get("ffn", []) in ([], [1])
    small = fxslim.slim(model, given())
    assert difference(outputs(model, (given(3),)), outputs(small, (given(3),))) <= EXACT


def test_a_padding_mask_keeps_zeros_alone() -> None:
    """Refusal: zero at padding and 0.7 elsewhere is no constant."""

    class Padded(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.act(self.fc1(x)).masked_fill(x[..., :1] > 1, 0)
            out: Tensor = self.fc2(hidden)
            return out

    model = made(Padded)
    silence(model.fc1, [1], bias=0.7)
    silence(model.fc1, [2], bias=-0.7)
    assert gone(everywhere(model, given())) == {"ffn": [2]}


class Gated(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, *, inner: bool, outer: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, F, bias=inner), nn.Linear(D, F, bias=inner)
        self.down = nn.Linear(F, D, bias=outer)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return out


@pytest.mark.parametrize("side", ["gate", "up"])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_half_a_gate_that_is_zero(side: str, inner: bool, outer: bool) -> None:
    model = made(Gated, inner=inner, outer=outer)
    silence(getattr(model, side), bias=0.0)
    plan = everywhere(model, given())
    assert gone(plan) == {"gated_ffn": DEAD}
    assert plan.sites[0].folds == ()


@pytest.mark.parametrize("side", ["gate", "up"])
def test_half_a_gate_that_is_constant_stays(side: str) -> None:
    """Refusal: a constant times data is data."""
    model = made(Gated, inner=True, outer=True)
    silence(getattr(model, side), bias=0.5)
    plan = everywhere(model, given())
    assert gone(plan) == {}
    assert notes(plan) == ["3 constant channels stay: they are multiplied by data"]


@pytest.mark.parametrize("outer", [True, False])
def test_a_gate_that_is_constant_on_both_sides(outer: bool) -> None:
    model = made(Gated, inner=True, outer=outer)
    silence(model.gate, bias=0.5)
    silence(model.up, bias=-2.0)
    plan = everywhere(model, given())
    assert gone(plan) == ({"gated_ffn": DEAD} if outer else {})
    assert notes(plan) == ([] if outer else ["3 constant channels stay: down has no bias"])


def test_glu() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, 2 * F), nn.Linear(F, D)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(functional.glu(self.up(x)))
            return out

    model = made(Halves)
    silence(model.up, [3], bias=0.0)  # zero times anything
    silence(model.up, [5, F + 5], bias=0.5)  # constant on both sides
    silence(model.up, [6], bias=0.5)  # constant times data
    plan = everywhere(model, given())
    assert list(gone(plan).values()) == [[3, 5]]


# Consumers that are called twice, or share their bias ---------------------------------------------------------------


class Twice(nn.Module):
    """One consumer, two calls."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.up, self.down, self.first, self.second = nn.Linear(D, F), nn.Linear(F, D), first, second

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.first(self.up(x))) + 3 * self.down(self.second(self.up(2 * x)))
        return out


def test_two_calls_with_the_same_constants_fold_once() -> None:
    model = made(Twice, nn.ReLU(), nn.LeakyReLU())
    silence(model.up, bias=0.6)
    plan = everywhere(model, given())
    assert list(gone(plan).values()) == [DEAD]
    assert len(plan.sites[0].folds) == 1


def test_two_calls_with_different_constants() -> None:
    """Refusal."""
    model = made(Twice, nn.ReLU(), nn.GELU())
    silence(model.up, [1, 4], bias=0.6)
    silence(model.up, [7], bias=0.0)
    plan = everywhere(model, given())
    assert list(gone(plan).values()) == [[7]]
    assert [reason.partition(": ")[2] for reason in notes(plan)] == ["down is called with different constants"]


class Shared(nn.Module):
    """Two consumers with weights of their own and one bias; ``apart`` gives the second another hidden layer."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.up, self.other = nn.Linear(D, F), nn.Linear(D, F)
        self.a, self.b = nn.Linear(F, D), nn.Linear(F, D)
        self.b.bias = self.a.bias
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        second = self.other(x) if self.apart else self.up(x)
        out: Tensor = self.a(torch.sigmoid(self.up(x))) + self.b(torch.sigmoid(second))
        return out


@pytest.mark.parametrize("apart", [True, False])
def test_a_bias_that_others_use(apart: bool) -> None:
    """Refusal."""
    model = made(Shared, apart=apart)
    silence(model.up)
    plan = everywhere(model, given())
    assert gone(plan) == {}
    assert len(notes(plan)) == 1
    assert notes(plan) == [f"3 constant channels stay: the bias of {'a' if apart else 'b'} is used elsewhere"]


def test_two_consumers_fold_into_their_own_biases() -> None:
    class Two(nn.Module):
        def __init__(self, *, bias: bool) -> None:
            super().__init__()
            self.up, self.a, self.b = nn.Linear(D, F), nn.Linear(F, D), nn.Linear(F, D, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.sigmoid(self.up(x))
            out: Tensor = self.a(hidden) + self.b(hidden.square())
            return out

    model = made(Two, bias=True)
    silence(model.up)
    plan = everywhere(model, given())
    assert list(gone(plan).values()) == [DEAD]
    assert {fold.bias for fold in plan.sites[0].folds} == {"a.bias", "b.bias"}
    model = made(Two, bias=False)
    silence(model.up)
    plan = everywhere(model, given())
    assert gone(plan) == {}
    assert notes(plan)[0].endswith("3 constant channels stay: b has no bias") or notes(plan) == [
        "3 constant units stay: b has no bias"
    ]


class Computed(nn.Module):
    """A consumer whose weight is computed at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, F)), nn.Parameter(torch.randn(D))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight.tanh(), self.bias)


def test_a_consumer_whose_weight_is_computed() -> None:
    """Refusal, but for zeros: what a plan folds is computed from stored tensors."""
    model = made(Mlp)
    model.fc2 = made(Computed)
    silence(model.fc1, [1, 4], bias=0.7)
    silence(model.fc1, [7], bias=-0.7)
    plan = everywhere(model, given())
    assert list(gone(plan).values()) == [[7]]
    assert [note.partition(" stay: ")[2] for note in notes(plan)] == ["the weight of fc2 is computed"]


def test_a_consumer_with_two_inner_axes() -> None:
    """Heads and widths are summed over in one product; a bias that is added later is not its own."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H * E), nn.Parameter(torch.randn(H, E, D))
            self.bias = nn.Parameter(torch.randn(D))

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.up(x)).unflatten(-1, (H, E))
            return torch.einsum("bshe,hed->bsd", hidden, self.down) + self.bias

    model = made(Inner)
    silence(model.up, HEAD, bias=-0.3)
    assert all(units in ([1], HEAD) for units in gone(everywhere(model, given())).values())
    silence(model.up, HEAD, bias=0.3)
    assert gone(everywhere(model, given())) == {}


# Attention ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention whose weighting is a function of queries, keys and values.  (B, S, D) -> (B, S, D)"""

    def __init__(self, weighing: Callable[..., Tensor], *, bias: bool = True, keys: int = H) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, H * E), nn.Linear(D, keys * E), nn.Linear(D, keys * E)
        self.out, self.gate = nn.Linear(H * E, D, bias=bias), nn.Linear(D, H * E)
        self.sinks = nn.Parameter(torch.randn(H))
        self.drop = nn.Dropout(0.1)
        self.weighing = weighing

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, E)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = self.weighing(self, q, k, v, *(() if mask is None else (mask,)))
        hidden = mixed.transpose(1, 2).flatten(2)
        if self.weighing is gated_output:
            hidden = hidden * torch.sigmoid(self.gate(x))
        out: Tensor = self.out(hidden)
        return out


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / E**0.5


def softmax(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def in_float32(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhst,bhtd->bhsd", torch.softmax(scores(q, k), dim=-1, dtype=torch.float64), v)


def fused(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


def causal(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def finite_mask(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    low = torch.finfo(q.dtype).min
    mask = torch.where(k[:, :1, :, :1].transpose(-1, -2) > 0, torch.zeros((), dtype=q.dtype), low)
    return (scores(q, k) + mask).softmax(-1) @ v


def fused_finite_mask(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    low = torch.finfo(q.dtype).min
    mask = torch.where(k[:, :1, :, :1].transpose(-1, -2) > 0, torch.zeros((), dtype=q.dtype), low)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, 1, q.shape[2], -1))


PASSES = [softmax, in_float32, fused, causal, finite_mask, fused_finite_mask]


def infinite_mask(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(k[:, :1, :, :1].transpose(-1, -2) > 5, -torch.inf).softmax(-1) @ v


def fused_bool_mask(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = k[:, :1, :, :1].transpose(-1, -2) < 5
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, 1, q.shape[2], -1))


def two_masks(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    low = torch.finfo(q.dtype).min
    mask = torch.where(k[:, :1, :, :1].transpose(-1, -2) < 5, torch.zeros((), dtype=q.dtype), low)
    return (scores(q, k) + (mask + mask)).softmax(-1) @ v


def with_sinks(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k)
    sinks = self.sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    return torch.cat([weights, sinks], -1).softmax(-1)[..., :-1] @ v


def gated_weights(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).softmax(-1) * self.sinks.sigmoid()[:, None, None]) @ v


def sigmoid(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).sigmoid() @ v


def other_axis(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-2) @ v


def dropout_module(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights: Tensor = self.drop(scores(q, k).softmax(-1))
    return weights @ v


def dropout_function(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.dropout(scores(q, k).softmax(-1), 0.1 if self.training else 0.0, self.training) @ v


def fused_dropout(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)


def training_fails(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if self.training:
        raise ValueError("labels are missing")
    return softmax(self, q, k, v)


def gated_output(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(self, q, k, v)


BREAKS = [
    (infinite_mask, HIDDEN),
    (fused_bool_mask, HIDDEN),
    (two_masks, HIDDEN),
    (with_sinks, SINKS),
    (gated_weights, GATED),
    (sigmoid, OTHER),
    (other_axis, OTHER),
    (dropout_module, DROPOUT),
    (dropout_function, DROPOUT),
    (fused_dropout, DROPOUT),
    (training_fails, "the model does not run in training mode, where attention may have dropout"),
    (gated_output, "they are multiplied by data"),
]
HEAD = list(range(E, 2 * E))


@pytest.mark.parametrize("weighing", PASSES)
def test_constant_values_pass_where_rows_sum_to_one(weighing: Any) -> None:
    model = made(Attention, weighing)
    silence(model.v, HEAD)
    plan = everywhere(model, given())
    assert gone(plan) == {"attention": [1]}
    assert notes(plan) == []
    assert plan.sites[0].folds[0].values == tuple(model.v.bias[HEAD].tolist())


@pytest.mark.parametrize(("weighing", "reason"), BREAKS)
def test_constant_values_stay_where_rows_may_not(weighing: Any, reason: str) -> None:
    """Refusals, each with its reason; whatever the weights are, zeros go."""
    model = made(Attention, weighing)
    silence(model.v, HEAD)
    plan = everywhere(model, given())
    assert gone(plan) == {}
    assert len(notes(plan)) == 1
    assert notes(plan)[0].partition(" stay: ")[::2] == (notes(plan)[0].partition(" stay: ")[0], reason)
    assert notes(plan)[0].startswith("1 constant ")
    silence(model.v, HEAD, bias=0.0)
    plan = everywhere(model, given())
    assert list(gone(plan).values()) == [[1]]
    assert notes(plan) == []


def test_values_without_a_bias_to_fold_into() -> None:
    model = made(Attention, softmax, bias=False)
    silence(model.v, HEAD)
    plan = everywhere(model, given())
    assert gone(plan) == {}
    assert notes(plan) == ["1 constant heads stay: out has no bias"]


def test_part_of_a_head_is_no_unit() -> None:
    model = made(Attention, fused)
    silence(model.v, HEAD[:-1])
    assert everywhere(model, given()).sites == ()


@pytest.mark.parametrize("enable", [True, False])
def test_values_that_heads_share(enable: bool) -> None:
    def grouped(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if enable:
            return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return functional.scaled_dot_product_attention(q, k, v)

    class Grouped(Attention):
        def __init__(self) -> None:
            super().__init__(grouped, keys=2)
            self.q, self.out = nn.Linear(D, 4 * E), nn.Linear(4 * E, D)

    model = made(Grouped)
    silence(model.v, HEAD)
    plan = everywhere(model, given())
    assert gone(plan) == {"attention": [2, 3]}
    assert len(plan.sites[0].folds[0].rows) == 2 * E


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_a_mask_of_the_users(kind: torch.dtype) -> None:
    """Refusal: an input may hold anything."""

    def masked(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    model = made(Attention, masked)
    silence(model.v, HEAD)
    mask = torch.ones(5, 5, dtype=kind).tril()
    plan = everywhere(model, given(), mask, fresh=(given(4, 5, 7), mask))
    assert gone(plan) == {}
    assert notes(plan) == [f"1 constant heads stay: {HIDDEN}"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_multihead_attention(dropout: float) -> None:
    """Torch's own module: one weight for all three, and an output projection that is never called."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(H * E, H, dropout=dropout, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.mha(x, x, x, need_weights=False)[0]
            return out

    model = made(Own)
    width = H * E
    with torch.no_grad():
        model.mha.in_proj_bias.normal_(generator=torch.Generator().manual_seed(3))
        model.mha.in_proj_weight[[2 * width + row for row in HEAD]] = 0
    small, graph = fxslim.slim(model, given(width=width)), fxslim.compile(model, given(width=width))
    assert [part.keep for part in small.fxslim.plan] == ([] if dropout else [(0, 2)])
    assert small.fxslim.plan.sites == graph.fxslim.plan.sites
    fresh = (given(3, 6, 4, width),)
    expected = outputs(model, fresh)
    with fxslim.masked(model, small.fxslim.plan):
        assert difference(expected, outputs(model, fresh)) <= EXACT
    for other in (model, small, graph):
        assert difference(expected, outputs(other, fresh)) <= EXACT


# Convolutions -------------------------------------------------------------------------------------------------------


class Convolved(nn.Module):
    """``down(act(up(x)))`` over channels in axis 1."""

    def __init__(self, down: nn.Module, between: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Conv1d(D, F, 1), down, between or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.between(torch.sigmoid(self.up(x))))
        return out


@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions_fold_unless_they_pad(padding: int) -> None:
    model = made(lambda: Convolved(nn.Conv1d(F, D, 3, padding=padding)))
    silence(model.up)
    with torch.no_grad():
        model.down.weight[:, 0] = 0
    x = given(2, D, 0, 9)
    plan = everywhere(model, x, fresh=(given(3, D, 1, 9),))
    assert list(gone(plan).values()) == [[0] if padding else [0, *DEAD]]
    reason = "a convolution pads its input with zeros"
    assert [note.partition(" stay: ")[2] for note in notes(plan)] == ([reason] if padding else [])


@pytest.mark.parametrize(("padding", "folds"), [(1, False), (0, True)])
def test_depthwise_convolutions(padding: int, folds: bool) -> None:
    model = made(lambda: Convolved(nn.Conv1d(F, D, 1), nn.Conv1d(F, F, 3, padding=padding, groups=F)))
    silence(model.up)
    plan = everywhere(model, given(2, D, 0, 9), fresh=(given(3, D, 1, 9),))
    assert list(gone(plan).values()) == ([DEAD] if folds else [])


# Plans --------------------------------------------------------------------------------------------------------------


def folding() -> tuple[Any, Plan]:
    model = made(Mlp, nn.Sigmoid)
    silence(model.fc1)
    return model, fxslim.plan(model, given())


def test_a_plan_with_folds_is_replayed_from_json() -> None:
    model, plan = folding()
    again = Plan.from_json(plan.to_json())
    assert again == plan
    fresh = (given(3, 6, 4),)
    for form in (fxslim.slim, fxslim.compile):
        assert difference(outputs(model, fresh), outputs(form(model, given(), plan=again), fresh)) <= EXACT
    narrowed = fxslim.slim(model, given())
    inplace = fxslim.slim(copy.deepcopy(model), given(), inplace=True)
    assert torch.equal(inplace.fc2.bias, narrowed.fc2.bias)


def test_a_skeleton_takes_its_bias_from_the_narrowed_checkpoint() -> None:
    model, plan = folding()
    narrowed = fxslim.slim(model, given(), plan=plan)
    with torch.device("meta"):
        skeleton = Mlp(nn.Sigmoid)
    replay(skeleton, plan)
    skeleton.load_state_dict(narrowed.state_dict(), assign=True)
    assert difference(outputs(model, (given(3),)), outputs(skeleton.eval(), (given(3),))) <= EXACT


def test_plans_with_folds_compose() -> None:
    model = made(Mlp, nn.Sigmoid)
    silence(model.fc1, [1], bias=0.3)
    first = fxslim.slim(model, given())
    silence(first.fc1, [2, 3])  # what were 3 and 4
    second = fxslim.slim(first, given())
    silence(model.fc1, [3, 4])
    plan = second.fxslim.plan
    assert gone(plan) == {"ffn": [1, 3, 4]}
    fresh = (given(3),)
    for other in (second, fxslim.slim(model, given(), plan=plan), fxslim.compile(model, given(), plan=plan)):
        assert difference(outputs(model, fresh), outputs(other, fresh)) <= EXACT


def test_a_fold_must_be_about_what_goes() -> None:
    model, plan = folding()
    text = plan.to_json().replace('"rows":[1,4,7]', '"rows":[0,4,7]')
    with pytest.raises(PlanError, match=r"a fold of fc2\.weight is not about rows that go"):
        Plan.from_json(text)
    for bias, message in (("fc3.bias", "does not have"), ("fc1.bias", "does not fit")):
        wrong = Plan.from_json(plan.to_json().replace('"bias":"fc2.bias"', f'"bias":"{bias}"'))
        before = copy.deepcopy(model.state_dict())
        for form in (fxslim.slim, fxslim.compile):
            with pytest.raises(PlanError, match=message):
                form(model, given(), plan=wrong)
        with pytest.raises(PlanError, match=message), fxslim.masked(model, wrong):
            pass
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_requests_take_zeros_first_and_fold_nothing() -> None:
    model = made(Mlp, nn.ReLU)
    silence(model.fc1, [5, 6], bias=0.0)
    silence(model.fc1, [8], bias=0.9)
    with torch.no_grad():
        model.fc2.weight[:, [5, 6]] *= 100  # the largest of all, and never read
    plan = fxslim.plan(model, given(), ffn=0.17)
    assert gone(plan) == {"ffn": [5, 6]}
    assert fxslim.plan(model, given(), ffn=0.5).sites[0].folds == ()


def test_weights_on_meta_say_nothing() -> None:
    with torch.device("meta"):
        model = Mlp(nn.ReLU)
        x = torch.empty(2, 5, D)
    assert fxslim.plan(model.eval(), x).sites == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    model = made(Mlp, nn.GELU).to(dtype)
    silence(model.fc1, bias=0.7)
    x = given().to(dtype)
    small, graph = fxslim.slim(model, x), fxslim.compile(model, x)
    assert small.fc1.out_features == F - 3
    assert small.fc2.bias.dtype == dtype
    assert small.fxslim.plan.sites == graph.fxslim.plan.sites


def test_pruned_producers() -> None:
    model = made(Mlp, nn.GELU)
    mask = torch.ones(F, D)
    mask[DEAD] = 0
    prune.custom_from_mask(model.fc1, "weight", mask)
    prune.random_unstructured(model.fc2, "weight", amount=0.2)
    plan = everywhere(model, given())
    assert gone(plan) == {"ffn": DEAD}
    assert prune.is_pruned(model)


# Real architectures -------------------------------------------------------------------------------------------------


UPS = {
    "bert": ("encoder.layer.{}.intermediate.dense",),
    "gpt2": ("transformer.h.{}.mlp.c_fc",),
    "opt": ("model.decoder.layers.{}.fc1",),
    "llama": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
}


def inputs_of(name: str) -> dict[str, Any]:
    inputs: dict[str, Any] = ARCHITECTURES[name].inputs(3, 9, 2)
    return {**inputs, "use_cache": False} if ARCHITECTURES[name].generates else inputs


@pytest.mark.parametrize("name", UPS)
def test_masked_producers_of_transformers(name: str) -> None:
    """Rows of the up projection are zero, their biases are not."""
    model: Any = ARCHITECTURES[name].build()
    rows = [0, 5, 11, 47]
    for layer, path in enumerate(UPS[name][0].format(layer) for layer in (0, 1)):
        weight = model.get_submodule(path).weight
        weight.data.index_fill_(1 if name == "gpt2" else 0, torch.tensor(rows[layer:]), 0)
    small, graph = fxslim.slim(model), fxslim.compile(model)
    assert list(gone(small.fxslim.plan).values()) == [rows, rows[1:]]
    assert small.fxslim.plan.sites == graph.fxslim.plan.sites
    assert all(bool(part.folds) == (name not in ("llama",)) or name == "opt" for part in small.fxslim.plan)
    expected, tolerance = outputs(model, inputs_of(name)), EXACT if name in ("bert", "gpt2") else INNER_FLOAT32
    for form in (small, graph):
        assert difference(expected, outputs(form, inputs_of(name))) <= tolerance


def test_a_saved_model_keeps_what_was_folded(tmp_path: Path) -> None:
    model: Any = ARCHITECTURES["bert_mlm"].build(torch.float32)
    silence(model.bert.encoder.layer[1].intermediate.dense, [2, 3, 5])
    small: Any = fxslim.slim(model)
    assert small.fxslim.plan.sites[0].folds
    fxslim.save_pretrained(small, tmp_path / "small")
    loaded: Any = fxslim.from_pretrained(tmp_path / "small")
    assert loaded.fxslim.plan.sites == small.fxslim.plan.sites
    assert torch.equal(loaded.bert.encoder.layer[1].output.dense.bias, small.bert.encoder.layer[1].output.dense.bias)
    assert difference(outputs(small, inputs_of("bert_mlm")), outputs(loaded, inputs_of("bert_mlm"))) <= 1e-5


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]

    def values(self, *args: Any) -> dict[fx.Node, Any]:
        self.seen: dict[fx.Node, Any] = {}
        self.run(*args, enable_io_processing=False)
        return self.seen


@pytest.mark.parametrize("name", ["bert", "distilbert_qa", "gpt2", "gptj", "gpt_neox", "opt", "llama_gqa", "phi",
                                  "phi3", "bart", "vit_classify", "clip"])  # fmt: skip
def test_what_is_called_constant_is(name: str) -> None:
    """An oracle: the graph is run, and every element of every value that is said to be constant is compared."""
    model: Any = ARCHITECTURES[name].build()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for key in [key for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]:
            setattr(module, key, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.Linear | Conv1D):
            width = module.weight.shape[0 if isinstance(module, nn.Linear) else 1]
            rows = torch.randperm(width, generator=generator)[: width // 3]
            module.weight.data.index_fill_(0 if isinstance(module, nn.Linear) else 1, rows, 0)
    program = traced(model, None)
    found = constants(program, model)
    inputs = fresh(program, seed=5)
    given_to = [program.tensors[program.tensor_of[n.name]] if n.name in program.tensor_of else None
                for n in program.graph.nodes if n.op == "placeholder"]  # fmt: skip
    leaves = iter(torch.utils._pytree.tree_leaves(inputs))
    with torch.no_grad():
        seen = Recorder(fx.GraphModule({}, program.graph)).values(
            *(next(leaves) if tensor is None else tensor for tensor in given_to)
        )
    compared = 0
    for node, fact in found.facts.items():
        for known, value in (
            [(fact, seen[node])] if isinstance(fact, Fact) else zip(fact or (), seen[node], strict=True)
        ):
            if known is not None:
                where = known.constant.expand(value.shape)
                gap = (value - known.value.expand(value.shape))[where].abs()
                assert not gap.numel() or float(gap.max()) <= 1e-6 * max(1.0, float(value.abs().max())), node
                compared += int(where.sum())
    assert compared > 1000


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_constant_values_of_transformers(dropout: float) -> None:
    model: Any = ARCHITECTURES["bert"].build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    silence(model.encoder.layer[0].attention.self.value, list(range(8, 16)))
    small, graph = fxslim.slim(model), fxslim.compile(model)
    assert list(gone(small.fxslim.plan).values()) == ([] if dropout else [[1]])
    assert notes(small.fxslim.plan) == ([f"1 constant heads stay: {DROPOUT}"] if dropout else [])
    for form in (small, graph):
        assert difference(outputs(model, inputs_of("bert")), outputs(form, inputs_of("bert"))) <= EXACT


def test_notes_of_all_layers_are_one() -> None:
    """Llama's down projections have no bias; its values are zero, not constant, so heads go."""
    model: Any = ARCHITECTURES["phi"].build()
    for layer in model.model.layers:
        layer.mlp.fc2.bias = None
        silence(layer.mlp.fc1, [3, 4])
    small = fxslim.slim(model)
    (note,) = small.fxslim.report.not_done
    assert note.where.endswith(" and 1 more")
    assert note.reason == "2 constant channels stay: fc2 has no bias"
