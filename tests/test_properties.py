"""Properties of narrowing over generated stacks, in float64.

The reference knows nothing of graphs: a stack's specification says which rows belong to which unit, masking is zeroing
the consumer's columns by hand, and narrowing is deleting rows by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxslim
from fxslim.plan import Plan
from fxslim.site import Site, SitePlan

from stacks import ACTIVATIONS, Attend, Feed, Layer, Stack

TOLERANCE = 1e-12
Keep = Mapping[int, tuple[int, ...]]
"""Layer -> kept units."""

FEEDS = st.builds(
    Feed,
    hidden=st.integers(2, 6),
    gates=st.integers(0, 2),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dropout=st.booleans(),
    bias=st.booleans(),
    scale=st.booleans(),
)
ATTENTIONS = (
    st.builds(
        Attend,
        kv=st.integers(1, 3),
        per_group=st.integers(1, 3),
        head=st.integers(2, 3),
        form=st.sampled_from(("by hand", "sdpa", "einsum")),
        share=st.sampled_from(("expand", "repeat_interleave", "enable_gqa")),
        layout=st.sampled_from(("apart", "contiguous", "interleaved")),
        cross=st.booleans(),
        bias=st.booleans(),
    )
    .filter(lambda spec: spec.units > 1)
    .map(lambda spec: replace(spec, cross=spec.cross and spec.layout == "apart"))
)
STACKS = st.builds(
    Stack,
    layers=st.lists(FEEDS | ATTENTIONS, min_size=1, max_size=2).map(tuple),
    width=st.integers(3, 4),
    residual=st.booleans(),
    norm=st.booleans(),
)
SEEDS = st.integers(0, 1 << 16)


def _name(layer: Layer, number: int) -> str:
    kind = "attention" if isinstance(layer, Attend) else "gated_ffn" if layer.gates else "ffn"
    return f"layers.{number}:{kind}"


def _keep(rng: np.random.Generator, units: int, groups: int) -> tuple[int, ...]:
    """Draw units to keep: some groups, the same number in each; any units where every unit is its own group."""
    width = units // groups
    kept = rng.permutation(groups)[: rng.integers(1, groups + 1)]
    count = int(rng.integers(1, width + 1))
    return tuple(sorted(int(g * width + i) for g in kept for i in rng.permutation(width)[:count]))


def _keeps(stack: Stack, rng: np.random.Generator) -> dict[int, tuple[int, ...]]:
    return {i: _keep(rng, layer.units, layer.groups) for i, layer in enumerate(stack.layers)}


def _sites(model: nn.Module, x: Tensor) -> dict[str, Site]:
    return {site.name: site for site in fxslim.inspect(model, x).sites}


def _plan(model: nn.Module, x: Tensor, stack: Stack, keeps: Keep) -> Plan:
    """Return a plan with given keeps."""
    sites = _sites(model, x)
    parts = [SitePlan(site=sites[_name(stack.layers[i], i)], keep=keep) for i, keep in keeps.items()]
    return fxslim.plan(model, x).model_copy(update={"sites": tuple(parts)})


def _gone(stack: Stack, keeps: Keep) -> dict[tuple[str, int], tuple[str, list[int]]]:
    """Return tensor and dimension -> role, rows of which no kept unit needs any."""
    found = {}
    for layer, keep in keeps.items():
        for tensor, (dim, role, rows) in stack.rows(layer).items():
            needed = {row for unit in keep for row in rows[unit]}
            found[tensor, dim] = (role, sorted({row for own in rows for row in own} - needed))
    return found


def _masked(model: nn.Module, stack: Stack, keeps: Keep) -> nn.Module:
    """Return a copy with the consumers' columns at zero."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for (tensor, dim), (role, rows) in _gone(stack, keeps).items():
            if role == "in":
                made.get_parameter(tensor).index_fill_(dim, torch.tensor(rows, dtype=torch.int64), 0)
    return made


def _deleted(model: nn.Module, stack: Stack, keeps: Keep) -> dict[str, Tensor]:
    """Return the weights with rows deleted."""
    made = dict(model.state_dict())
    for (tensor, dim), (_, rows) in _gone(stack, keeps).items():
        keep = [row for row in range(made[tensor].shape[dim]) if row not in rows]
        made[tensor] = made[tensor].index_select(dim, torch.tensor(keep))
    return made


def _same_weights(found: nn.Module, expected: Mapping[str, Tensor]) -> bool:
    state = found.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def _apart(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape
    return float((first - second).abs().max() / (1 + first.abs().max()))


INTERLEAVED = Stack((Attend(2, 3, 2, layout="interleaved", share="enable_gqa"), Feed(gates=2, scale=True)))
CONTIGUOUS = Stack((Attend(2, 2, 2, form="einsum", layout="contiguous", share="repeat_interleave"),), residual=False)
CROSS = Stack((Attend(3, 1, form="by hand", cross=True), Attend(1, 3)), norm=False)


@settings(max_examples=14)
@given(stack=STACKS, seed=SEEDS)
@example(INTERLEAVED, 1)
@example(CONTIGUOUS, 2)
@example(CROSS, 3)
def test_masked_and_narrowed_agree(stack: Stack, seed: int) -> None:
    """Both forms, with the weights and the counts that deleting rows by hand gives, on sizes that were not traced."""
    model, x, rng = stack.build(seed), stack.inputs(), np.random.default_rng(seed)
    keeps = _keeps(stack, rng)
    plan = _plan(model, x, stack, keeps)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    small, graph = fxslim.slim(model, x, plan=again), fxslim.compile(model, x, plan=again)
    assert type(small) is type(model)
    assert not small.fxslim.plan.zeroed
    expected = _deleted(model, stack, keeps)
    assert _same_weights(small, expected)
    assert _same_weights(graph, expected)
    reference = _masked(model, stack, keeps)
    for batch, length in ((2, 5), (3, 4), (1, 7)):
        other = stack.inputs(batch, length, seed=seed + 1)
        with torch.no_grad():
            want = reference(other)
            with fxslim.masked(model, plan):
                assert _apart(want, model(other)) <= TOLERANCE
            assert _apart(want, small(other)) <= TOLERANCE
            assert _apart(want, graph(other)) <= TOLERANCE
    for form in (small, graph):
        report = form.fxslim.report
        assert report.parameters_before == sum(p.numel() for p in model.parameters())
        assert report.parameters_after == sum(p.numel() for p in form.parameters())
        assert report.parameters_after == sum(t.numel() for t in expected.values())
        assert report.macs_before == fxslim.count.macs_of(model, x)
        assert report.macs_after == fxslim.count.macs_of(form, x)


@settings(max_examples=4)
@given(stack=STACKS, seed=SEEDS)
@example(INTERLEAVED, 1)
def test_keeping_everything_is_the_identity(stack: Stack, seed: int) -> None:
    model, x = stack.build(seed), stack.inputs()
    other = stack.inputs(3, 4, seed=seed)
    everything = {i: tuple(range(layer.units)) for i, layer in enumerate(stack.layers)}
    for plan in (fxslim.plan(model, x), _plan(model, x, stack, everything)):
        for form in (fxslim.slim(model, x, plan=plan), fxslim.compile(model, x, plan=plan)):
            assert _same_weights(form, model.state_dict())
            with torch.no_grad():
                assert torch.equal(form(other), model(other))


@settings(max_examples=4)
@given(stack=STACKS, seed=SEEDS)
@example(INTERLEAVED, 5)
@example(CONTIGUOUS, 5)
def test_two_narrowings_are_one(stack: Stack, seed: int) -> None:
    model, x, rng = stack.build(seed), stack.inputs(), np.random.default_rng(seed)
    first = _keeps(stack, rng)
    small = fxslim.slim(model, x, plan=_plan(model, x, stack, first))
    sites = _sites(small, x)
    second, both, parts = {}, {}, []
    for i, layer in enumerate(stack.layers):
        groups = len({unit // (layer.units // layer.groups) for unit in first[i]})
        second[i] = _keep(rng, len(first[i]), groups)
        both[i] = tuple(first[i][unit] for unit in second[i])
        if len(first[i]) > 1:
            parts.append(SitePlan(site=sites[_name(layer, i)], keep=second[i]))
        else:  # one unit is no site any more
            assert _name(layer, i) not in sites
    smaller = fxslim.slim(small, x, plan=fxslim.plan(small, x).model_copy(update={"sites": tuple(parts)}))
    once = fxslim.slim(model, x, plan=_plan(model, x, stack, both))
    assert _same_weights(smaller, dict(once.state_dict()))
    with torch.no_grad():
        assert torch.equal(smaller(x), once(x))


def _permuted(stack: Stack, model: nn.Module, orders: Keep) -> nn.Module:
    """Return a copy in whose layers unit ``j`` is what was unit ``order[j]``."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for layer, order in orders.items():
            for tensor, (dim, _, rows) in stack.rows(layer).items():
                old, new = model.get_parameter(tensor).movedim(dim, 0), made.get_parameter(tensor).movedim(dim, 0)
                for unit, source in enumerate(order):
                    new[rows[unit]] = old[rows[source]]
    return made


@settings(max_examples=4)
@given(stack=STACKS, seed=SEEDS)
@example(INTERLEAVED, 7)
def test_the_order_of_units_means_nothing(stack: Stack, seed: int) -> None:
    """Permute producers and consumers, map the keep: the narrowed models are the same function."""
    model, x, rng = stack.build(seed), stack.inputs(), np.random.default_rng(seed)
    keeps, orders, mapped = _keeps(stack, rng), {}, {}
    for i, layer in enumerate(stack.layers):
        width = layer.units // layer.groups
        orders[i] = tuple(int(g * width + u) for g in rng.permutation(layer.groups) for u in rng.permutation(width))
        mapped[i] = tuple(unit for unit, source in enumerate(orders[i]) if source in keeps[i])
    shuffled = _permuted(stack, model, orders)
    one = fxslim.slim(model, x, plan=_plan(model, x, stack, keeps))
    other = fxslim.slim(shuffled, x, plan=_plan(shuffled, x, stack, mapped))
    fresh = stack.inputs(3, 4, seed=seed)
    with torch.no_grad():
        assert _apart(model(fresh), shuffled(fresh)) <= TOLERANCE
        assert _apart(one(fresh), other(fresh)) <= TOLERANCE


class _Second(nn.Module):
    """A feed-forward network whose hidden value has a second user."""

    def __init__(self, stack: Stack, use: str, seed: int) -> None:
        super().__init__()
        self.layer, self.use = stack.build(seed).layers[0], use

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        hidden = layer.activation(layer.up[0](x))
        second = {
            "returned": lambda: hidden * 2,
            "summed": lambda: hidden.sum(-1),
            "one channel": lambda: hidden[..., -1],
            "softmax": lambda: hidden.softmax(-1) @ hidden.mT,
            "two channels": lambda: hidden[..., :2].tanh(),
        }[self.use]()
        return layer.down(hidden), second


@settings(max_examples=12)
@given(
    feed=FEEDS.map(lambda spec: replace(spec, gates=0, scale=False, dropout=False)),
    use=st.sampled_from(("returned", "summed", "one channel", "softmax", "two channels")),
    seed=SEEDS,
)
@example(Feed(hidden=64), "one channel", 0)
@example(Feed(hidden=64), "two channels", 0)
def test_a_hidden_value_with_a_second_user_is_refused(feed: Feed, use: str, seed: int) -> None:
    """What the second user reads stays; every channel, unless it reads only some of them."""
    stack = Stack((feed,))
    model = _Second(stack, use, seed).eval()
    found = fxslim.inspect(model, stack.inputs())
    read = {"one channel": {feed.hidden - 1}, "two channels": {0, 1}}.get(use, set(range(feed.hidden)))
    free = sorted(set(range(feed.hidden)) - read)
    columns = [row for site in found.sites for piece in site.slices if piece.role == "in"
               for row in np.flatnonzero(piece.owners() >= 0).tolist()]  # fmt: skip
    assert columns == (free if len(free) > 1 else [])
    if not columns:
        assert [note.where for note in found.pinned if note.where == "layer.down"] == ["layer.down"]
        assert "layer.down" in found.why("layer.down")
