"""Plain PyTorch, no transformers: what is narrowed exactly, what is refused, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import fxslim
from fxslim.errors import UnsupportedModelError
from fxslim.plan import Plan

from agreement import EXACT, difference, outputs, random_plan

B, S, D, H, E, HIDDEN, V = 2, 5, 12, 4, 6, 20, 7
"""Batch, sequence, model width, heads, head width, hidden width, outputs."""

Forward = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Hold some modules, parameters and integers, and compute whatever the test says from them."""

    def __init__(self, compute: Forward, **parts: Any) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def net(compute: Forward, **parts: Any) -> Any:
    """Return a module in eval mode and float64 with reproducible weights."""
    model = Net(compute, **parts).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise / math.sqrt(max(noise[0].numel(), 1)) if noise.dim() > 1 else 0.5 * noise + 0.2)
    return model


def given(batch: int = B, length: int = S, seed: int = 1, width: int = D) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def up(width: int = HIDDEN) -> nn.Linear:
    return nn.Linear(D, width)


def down(width: int = HIDDEN) -> nn.Linear:
    return nn.Linear(width, V)


def narrowed(
    model: Any, x: Tensor, *fresh: Tensor, spread: bool = False, smaller: bool = False
) -> tuple[Plan, Any, Any]:
    """Narrow every site at random in both forms and compare with the masked model, here and not in the tool."""
    sites = fxslim.inspect(model, x).sites
    assert sites, "no site was found"
    plan = random_plan(model, sites, seed=5)
    small = fxslim.slim(model, x, plan=plan)
    graph = fxslim.compile(model, x, plan=plan)
    assert (bool(small.fxslim.plan.spread), small.fxslim.plan.zeroed) == (spread, ())
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, small, graph)]
    assert counts[2] < counts[0]
    assert counts[2] < counts[1] < counts[0] if smaller else counts[1] == counts[2]
    for other in fresh or (given(3, S + 2, 2), given(1, 3, 3)):
        with fxslim.masked(model, plan):
            expected = outputs(model, (other,))
        assert difference(outputs(model, (other,)), expected) > 1e-6  # the masks do something
        assert difference(expected, outputs(small, (other,))) <= EXACT
        assert difference(expected, outputs(graph, (other,))) <= EXACT
    return plan, small, graph


def described(model: Any, x: Tensor | None = None) -> list[str]:
    found = fxslim.inspect(model, given() if x is None else x).sites
    return [f"{s.name} {s.units}{'' if s.groups is None else f'/{s.group_count}'}" for s in found]


# Linear → activation → Linear ---------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu in place": lambda h: F.relu_(h),
    "leaky relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu tanh": lambda h: F.gelu(h, approximate="tanh"),
    "gelu by hand": lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3)))),
    "gelu by erf": lambda h: h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0))),
    "quick gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "silu": F.silu,
    "swish by hand": lambda h: h * torch.sigmoid(h),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "square": torch.square,
    "square by hand": lambda h: h * h,
    "squared relu": lambda h: F.relu(h) ** 2,
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "clamp": lambda h: h.clamp(-0.5, 0.7),
    "abs": torch.abs,
    "cos": torch.cos,  # not zero at zero: masks on producer rows would be wrong
    "exp": torch.exp,
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "residual around": lambda h: h + torch.tanh(h),
    "dropout between": lambda h: F.dropout(F.gelu(h), 0.1, training=False),
    "scaled": lambda h: F.gelu(h) * 0.7 + 0.1,
    "rounded": lambda h: F.gelu(h).float().double(),
    "reshaped": lambda h: F.gelu(h.flatten(0, 1)).unflatten(0, (-1, h.shape[1])),
    "contiguous and back": lambda h: F.gelu(h.transpose(1, 2).contiguous()).transpose(1, 2),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_linear_activation_linear(name: str) -> None:
    act = ACTIVATIONS[name]
    model = net(lambda m, x: m.down(act(m.up(x))), up=up(), down=down())
    narrowed(model, given())
    kind = "generic" if name == "clamp" else "ffn"  # bounds on both sides are no activation to the patterns
    assert described(model) == [f"{kind} {HIDDEN}"]


def test_a_constant_vector_in_the_code_is_cut_in_the_graph_only() -> None:
    scale = torch.linspace(0.5, 1.5, HIDDEN, dtype=torch.float64)
    model = net(lambda m, x: m.down(F.gelu(m.up(x)) * scale), up=up(), down=down())
    narrowed(model, given(), spread=True)


def test_a_detour_through_a_box_keeps_as_many_in_every_row() -> None:
    """Twenty channels are viewed as 4 x 5 on the way: what is left is a box if every row keeps the same number."""
    model = net(lambda m, x: m.down(F.gelu(m.up(x).unflatten(-1, (4, -1))).flatten(-2)), up=up(), down=down())
    (site,) = fxslim.inspect(model, given()).sites
    assert (site.kind, site.units, site.group_count) == ("ffn", 20, 4)
    plan = fxslim.plan(model, given(), ffn=0.5)
    assert [sum(unit // 5 == row for unit in plan.sites[0].keep) for row in range(4)] == [3, 3, 3, 3]
    narrowed(model, given())


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.GELU(), nn.SiLU(inplace=True), nn.Tanh(), nn.Sigmoid(), nn.Hardtanh()]
)
def test_a_sequence_of_modules(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(D, HIDDEN), module, nn.Dropout(0.3), nn.Linear(HIDDEN, V)).double().eval()
    plan, small, _ = narrowed(model, given())
    assert [part.site.kind for part in plan] == ["ffn"]
    kept = len(plan.sites[0].keep)
    assert (small[0].out_features, small[3].in_features) == (kept, kept)
    assert small[0].weight.shape == (kept, D)
    assert small[0].bias.shape == (kept,)
    assert small[3].bias.shape == (V,)


def test_three_layers_have_two_sites() -> None:
    model = net(lambda m, x: m.c(F.gelu(m.b(torch.relu(m.a(x))))), a=up(), b=nn.Linear(HIDDEN, 16), c=nn.Linear(16, V))
    assert [part.site.units for part in narrowed(model, given())[0]] == [HIDDEN, 16]


@pytest.mark.parametrize("bias", [True, False])
def test_a_learned_scale_and_shift_follow_the_channels(bias: bool) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        return m.down(F.gelu(m.up(x)) * m.scale + m.shift)

    scale, shift = nn.Parameter(torch.ones(HIDDEN)), nn.Parameter(torch.zeros(HIDDEN))
    model = net(
        compute, up=nn.Linear(D, HIDDEN, bias=bias), down=nn.Linear(HIDDEN, V, bias=bias), scale=scale, shift=shift
    )
    plan, small, _ = narrowed(model, given())
    assert small.scale.shape == small.shift.shape == (len(plan.sites[0].keep),)


def test_a_buffer_follows_the_channels() -> None:
    model = net(lambda m, x: m.down(F.gelu(m.up(x)) * m.scale), up=up(), down=down())
    model.register_buffer("scale", torch.linspace(0.5, 1.5, HIDDEN, dtype=torch.float64))
    plan, small, graph = narrowed(model, given())
    assert small.scale.shape == graph.scale.shape == (len(plan.sites[0].keep),)
    assert torch.equal(small.scale, model.scale[list(plan.sites[0].keep)])


def test_batch_norm_in_eval_follows_the_channels() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        return m.down(torch.relu(m.norm(m.up(x).transpose(1, 2)).transpose(1, 2)))

    model = net(compute, up=up(), norm=nn.BatchNorm1d(HIDDEN), down=down())
    with torch.no_grad():
        model.norm.running_mean.copy_(torch.linspace(-1, 1, HIDDEN))
        model.norm.running_var.copy_(torch.linspace(0.5, 2, HIDDEN))
    plan, small, _ = narrowed(model, given())
    assert small.norm.num_features == small.norm.running_var.numel() == len(plan.sites[0].keep)


GATES: dict[str, Forward] = {
    "silu": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
    "sigmoid": lambda m, x: m.down(torch.sigmoid(m.gate(x)) * m.up(x)),
    "tanh, other order": lambda m, x: m.down(m.up(x) * torch.tanh(m.gate(x))),
    "gelu, activation on both": lambda m, x: m.down(F.gelu(m.gate(x)) * F.relu(m.up(x))),
    "several gates": lambda m, x: m.down(torch.sigmoid(m.gate(x)) * torch.tanh(m.other(x)) * m.up(x)),
    "a gate that is a difference": lambda m, x: m.down(torch.sigmoid(m.gate(x) - m.other(x)) * m.up(x)),
    "bilinear": lambda m, x: m.down(m.gate(x) * m.up(x)),
    "interpolation": lambda m, x: m.down(torch.lerp(m.gate(x), m.up(x), torch.sigmoid(m.other(x)))),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str) -> None:
    model = net(GATES[name], up=up(), gate=up(), other=up(), down=down())
    (part,) = narrowed(model, given())[0]
    assert part.site.units == HIDDEN
    used = {"up", "gate", "down"} | ({"other"} if name.startswith(("several", "a gate that", "inter")) else set())
    assert {piece.tensor.partition(".")[0] for piece in part.site.slices} == used
    if name.startswith(("silu", "sigmoid", "tanh", "gelu", "several")):
        assert part.site.kind == "gated_ffn"


@pytest.mark.parametrize("cut", ["chunk", "split", "slice", "unbind", "glu"])
def test_fused_gates(cut: str) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        both = m.both(x)
        if cut == "glu":
            return m.down(F.glu(both, -1))
        halves = {
            "chunk": lambda: both.chunk(2, -1),
            "split": lambda: both.split(both.shape[-1] // 2, -1),
            "slice": lambda: (both[..., : both.shape[-1] // 2], both[..., both.shape[-1] // 2 :]),
            "unbind": lambda: both.unflatten(-1, (2, -1)).unbind(-2),
        }[cut]()
        return m.down(F.silu(halves[0]) * halves[1])

    model = net(compute, both=up(2 * HIDDEN), down=down())
    plan, small, _ = narrowed(model, given())
    (part,) = plan
    assert part.site.units == HIDDEN
    kept = list(part.keep)
    assert torch.equal(small.both.weight, model.both.weight[[*kept, *(HIDDEN + k for k in kept)]])


@pytest.mark.parametrize(
    ("compute", "consumers"),
    [
        (lambda m, x: m.down(F.gelu(m.up(x))) + m.other(F.gelu(m.up(x))), {"down", "other"}),
        (lambda m, x: (lambda h: m.down(torch.relu(h)) + m.other(h))(m.up(x)), {"down", "other"}),
        (lambda m, x: (lambda h: m.down(h) * m.other(torch.tanh(h)))(F.gelu(m.up(x))), {"down", "other"}),
        (lambda m, x: (lambda h: m.down(h) + m.down(h * h))(F.gelu(m.up(x))), {"down"}),
        (lambda m, x: torch.cat([m.down(m.up(x)), m.other(m.up(x).abs())], -1), {"down", "other"}),
    ],
    ids=["shared by two linears", "linear and not", "used non-linearly by a second linear", "one linear twice", "cat"],
)
def test_a_hidden_tensor_with_several_linear_consumers(compute: Forward, consumers: set[str]) -> None:
    model = net(compute, up=up(), down=down(), other=down())
    (part,) = narrowed(model, given())[0]
    assert {p.tensor.partition(".")[0] for p in part.site.slices if p.role == "in"} == consumers


def test_a_flipped_second_consumer_ties_channels_in_pairs() -> None:
    model = net(
        lambda m, x: (lambda h: m.down(h) + m.other(h.flip(-1)))(F.gelu(m.up(x))), up=up(), down=down(), other=down()
    )
    (part,) = narrowed(model, given())[0]
    keep = set(part.keep)
    piece = next(p for p in part.site.slices if p.tensor == "other.weight")
    assert {HIDDEN - 1 - row for row in piece.owners().argsort()[list(keep)].tolist()} <= set(range(HIDDEN))


# Refusals -----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Forward, str]] = {
    "layer norm between": (lambda m, x: m.down(m.norm(F.gelu(m.up(x)))), "layer_norm"),
    "norm before the activation": (lambda m, x: m.down(F.gelu(m.norm(m.up(x)))), "layer_norm"),
    "rms norm by hand": (lambda m, x: (lambda h: m.down(h * h.square().mean(-1, True).rsqrt()))(m.up(x)), "mean"),
    "softmax over channels": (lambda m, x: m.down(m.up(x).softmax(-1)), "softmax"),
    "normalised": (lambda m, x: m.down(F.normalize(m.up(x), dim=-1)), "linalg_vector_norm"),
    "group norm": (lambda m, x: m.down(F.group_norm(m.up(x).transpose(1, 2), 1).transpose(1, 2)), "group_norm"),
    "returned": (lambda m, x: (lambda h: (m.down(h), h))(F.gelu(m.up(x))), "output"),
    "returned before the activation": (lambda m, x: (lambda h: (m.down(F.gelu(h)), h))(m.up(x)), "output"),
    "summed": (lambda m, x: (lambda h: m.down(h) + h.sum(-1, keepdim=True))(F.gelu(m.up(x))), "sum"),
    "its square averaged": (lambda m, x: (lambda h: m.down(h) + h.square().mean(-1, True))(F.gelu(m.up(x))), "mean"),
    "its largest": (lambda m, x: (lambda h: m.down(h) + h.amax(-1, keepdim=True))(F.gelu(m.up(x))), "amax"),
    "sorted": (lambda m, x: m.down(m.up(x).sort(-1).values), "sort"),
    "shifted into itself": (lambda m, x: (lambda h: m.down(h + h.roll(1, -1)))(F.gelu(m.up(x))), "together"),
    "added to the input": (lambda m, x: m.square_down(m.even(x + F.gelu(m.square(x)))), "input"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    compute, word = REFUSED[name]
    model = net(
        compute, up=up(), down=down(), norm=nn.LayerNorm(HIDDEN), even=nn.LayerNorm(D),
        square=nn.Linear(D, D), square_down=nn.Linear(D, V),
    )  # fmt: skip
    found = fxslim.inspect(model, given())
    consumer = "square_down" if name == "added to the input" else "down"
    assert [s.name for s in found.sites if any(p.tensor == f"{consumer}.weight" for p in s.slices)] == []
    reasons = [note.reason for note in found.pinned if note.where == consumer]
    assert reasons, f"{consumer} is neither narrowed nor explained: {found}"
    assert word in reasons[0], reasons
    assert reasons[0] in str(found)
    assert reasons[0] in found.why(consumer)
    small = fxslim.slim(model, given(), ffn=0.5)
    assert small.fxslim.report.not_done[0].reason == "no feed-forward site was found; fxslim.inspect(model) says why"
    assert difference(outputs(model, (given(),)), outputs(small, (given(),))) == 0


@pytest.mark.parametrize("count", [1, 4])
def test_channels_that_are_used_elsewhere_stay_and_the_rest_goes(count: int) -> None:
    model = net(lambda m, x: (lambda h: (m.down(h), h[..., :count]))(F.gelu(m.up(x))), up=up(), down=down())
    (site,) = fxslim.inspect(model, given()).sites
    assert site.units == HIDDEN - count
    narrowed(model, given())


# Attention ----------------------------------------------------------------------------------------------------------


def heads(t: Tensor, width: int = E) -> Tensor:
    return t.unflatten(-1, (-1, width)).transpose(1, 2)


def joined(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(2)


def by_hand(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(E)).softmax(-1)
    return m.out(joined(weights @ v))


def causal(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2) * E**-0.5).masked_fill(~mask, -torch.inf)
    return m.out(joined(F.dropout(scores.softmax(-1), 0.1, training=False) @ v))


def fused_kernel(m: Any, x: Tensor) -> Tensor:
    return m.out(joined(F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), is_causal=True)))


def einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (-1, E)) for p in (m.q, m.k, m.v))
    weights = torch.einsum("bqhe,bkhe->bhqk", q, k).div(E**0.5).softmax(-1)
    return m.out(torch.einsum("bhqk,bkhe->bqhe", weights, v).flatten(2))


def flattened_batch(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(p(x)).flatten(0, 1) for p in (m.q, m.k, m.v))
    weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
    return m.out(joined(torch.bmm(weights, v).unflatten(0, (x.shape[0], -1))))


def linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (F.elu(heads(m.q(x))) + 1, F.elu(heads(m.k(x))) + 1, heads(m.v(x)))
    return m.out(joined(q @ (k.transpose(-1, -2) @ v)))


def head_scale(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    weights = (q @ k.transpose(-1, -2) * m.scale[:, None, None]).softmax(-1)
    return m.out(joined(weights @ v))


ATTENTIONS: dict[str, Forward] = {
    "by hand": by_hand,
    "causal": causal,
    "sdpa": fused_kernel,
    "einsum": einsum,
    "flattened batch": flattened_batch,
    "a scale per head": head_scale,
}


def projections(kv: int = H) -> dict[str, nn.Module]:
    return {"q": nn.Linear(D, H * E), "k": nn.Linear(D, kv * E), "v": nn.Linear(D, kv * E), "out": nn.Linear(H * E, V)}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str) -> None:
    extra = {"scale": nn.Parameter(torch.ones(H))} if name == "a scale per head" else {}
    model = net(ATTENTIONS[name], **projections(), **extra)
    assert described(model) == [f"attention {H}"]
    plan, small, _ = narrowed(model, given())
    keep = list(plan.sites[0].keep)
    columns = [head * E + e for head in keep for e in range(E)]
    for part in ("q", "k", "v"):
        assert torch.equal(getattr(small, part).weight, getattr(model, part).weight[columns])
        assert torch.equal(getattr(small, part).bias, getattr(model, part).bias[columns])
    assert torch.equal(small.out.weight, model.out.weight[:, columns])
    assert torch.equal(small.out.bias, model.out.bias)
    if extra:
        assert torch.equal(small.scale, model.scale[keep])


def test_attention_without_softmax_narrows_values_equally_in_every_head() -> None:
    model = net(linear_attention, **projections())
    (site,) = fxslim.inspect(model, given()).sites
    assert (site.units, site.group_count) == (H * E, H)
    narrowed(model, given(), spread=True)  # the head width is a number in the code


def shared_heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    k, v = (m.repeat(t) for t in (k, v))
    return m.out(joined((q @ k.transpose(-1, -2)).softmax(-1) @ v))


def kernel_with_groups(m: Any, x: Tensor) -> Tensor:
    return m.out(joined(F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), enable_gqa=True)))


def expanded(t: Tensor) -> Tensor:
    b, k, s, e = t.shape
    return t[:, :, None].expand(b, k, 2, s, e).reshape(b, k * 2, s, e)


@pytest.mark.parametrize(
    ("compute", "repeat"),
    [
        (shared_heads, lambda t: t.repeat_interleave(2, 1)),
        (shared_heads, expanded),
        (kernel_with_groups, None),
    ],
    ids=["repeat_interleave", "expand", "enable_gqa"],
)
def test_grouped_queries(compute: Forward, repeat: Any) -> None:
    model = net(compute, **projections(kv=2), repeat=repeat)
    assert described(model) == ["attention 4/2"]
    x = given()
    for request, kept in (({"heads": 0.5}, 2), ({"kv_groups": 0.5}, 2), ({"heads": 0.5, "kv_groups": 0.5}, 1)):
        plan = fxslim.plan(model, x, **request)
        assert [len(part.keep) for part in plan] == [kept]
        graph = fxslim.compile(model, x, plan=plan)
        small = fxslim.slim(model, x, plan=plan)
        with fxslim.masked(model, plan):
            expected = outputs(model, (given(3, 8, 4),))
        assert difference(expected, outputs(graph, (given(3, 8, 4),))) <= EXACT
        assert difference(expected, outputs(small, (given(3, 8, 4),))) <= EXACT


def test_one_key_and_value_for_all_heads() -> None:
    model = net(
        lambda m, x: m.out(joined((heads(m.q(x)) @ heads(m.k(x)).transpose(-1, -2)).softmax(-1) @ heads(m.v(x)))),
        **projections(kv=1),
    )
    parts = narrowed(model, given(), spread=True)[0]
    assert [part.site.units for part in parts] == [H, E]
    owners = [{p.tensor.partition(".")[0] for p in part.site.slices} for part in parts]
    assert owners == [{"q", "out"}, {"v", "out"}]


FUSED: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda t: [heads(part) for part in t.chunk(3, -1)],
    "three first": lambda t: t.unflatten(-1, (3, -1, E)).permute(2, 0, 3, 1, 4).unbind(0),
    "head first": lambda t: t.unflatten(-1, (-1, 3, E)).permute(3, 0, 2, 1, 4).unbind(0),
    "head first, chunk": lambda t: heads(t, 3 * E).chunk(3, -1),
    "stacked innermost": lambda t: t.unflatten(-1, (-1, E, 3)).transpose(1, 2).unbind(-1),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_query_key_value(name: str) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        q, k, v = FUSED[name](m.qkv(x))
        return m.out(joined((q @ k.transpose(-1, -2) / 3).softmax(-1) @ v))

    model = net(compute, qkv=nn.Linear(D, 3 * H * E), out=nn.Linear(H * E, V))
    assert described(model) == [f"attention {H}"]
    narrowed(model, given())


def test_query_and_key_norms_inside_a_head_are_no_obstacle() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.q_norm(heads(m.q(x))), m.k_norm(heads(m.k(x))), heads(m.v(x))
        return m.out(joined(F.scaled_dot_product_attention(q, k, v)))

    model = net(compute, **projections(), q_norm=nn.RMSNorm(E), k_norm=nn.LayerNorm(E))
    assert described(model) == [f"attention {H}"]
    _, small, _ = narrowed(model, given())
    assert small.q_norm.weight.shape == (E,)


def test_a_norm_over_all_heads_is_refused() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        return m.out(joined(F.scaled_dot_product_attention(heads(m.norm(m.q(x))), heads(m.k(x)), heads(m.v(x)))))

    model = net(compute, **projections(), norm=nn.LayerNorm(H * E))
    found = fxslim.inspect(model, given())
    assert all(site.kind != "attention" for site in found.sites)


def test_cross_attention() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        memory = torch.tanh(m.memory(x[:, :3]))
        return m.out(joined(F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(memory)), heads(m.v(memory)))))

    model = net(compute, **projections(), memory=nn.Linear(D, D))
    plan, _, _ = narrowed(model, given())
    assert [part.site.kind for part in plan] == ["ffn", "attention"] or {p.site.kind for p in plan} >= {"attention"}


def test_weights_returned_keep_the_heads() -> None:
    def compute(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = (heads(m.q(x)) @ heads(m.k(x)).transpose(-1, -2)).softmax(-1)
        return m.out(joined(weights @ heads(m.v(x)))), weights

    found = fxslim.inspect(net(compute, **projections()), given())
    assert all(site.kind != "attention" for site in found.sites)
    (site,) = found.sites
    assert (site.of_values, site.groups_stay) == (True, True)
    reason = "part of it has to stay (an output of the model); value= takes value channels"
    assert [note.reason for note in found.pinned if note.where == site.name] == [reason]


def test_weights_averaged_over_heads_keep_the_heads() -> None:
    def compute(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = (heads(m.q(x)) @ heads(m.k(x)).transpose(-1, -2)).softmax(-1)
        return m.out(joined(weights @ heads(m.v(x)))), weights.mean(1)

    found = fxslim.inspect(net(compute, **projections()), given())
    assert all(site.kind != "attention" for site in found.sites)


# Integers in modules ------------------------------------------------------------------------------------------------


def counted(m: Any, x: Tensor) -> Tensor:
    b, s, _ = x.shape
    q, k, v = (p(x).view(b, s, m.num_heads, m.head_width).transpose(1, 2) for p in (m.q, m.k, m.v))
    return m.out(
        (q @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(1, 2).reshape(b, s, m.num_heads * m.head_width)
    )


def test_a_number_of_heads_is_edited() -> None:
    model = net(counted, **projections(), num_heads=H, head_width=E)
    plan, small, _ = narrowed(model, given())
    assert small.num_heads == len(plan.sites[0].keep) == 2
    assert (small.head_width, model.num_heads) == (E, H)
    (edit,) = small.fxslim.plan.edits
    assert (edit.edit, edit.module, edit.name, edit.old, edit.new) == ("attribute", "", "num_heads", H, 2)


def constant(m: Any, x: Tensor) -> Tensor:
    b, s, _ = x.shape
    q, k, v = (p(x).view(b, s, 4, 6).transpose(1, 2) for p in (m.q, m.k, m.v))
    return m.out((q @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(1, 2).reshape(b, s, 24))


def test_a_number_in_the_code_keeps_the_values_wide_and_says_so() -> None:
    """No attribute can be edited: the linears are narrowed, what lies between them is not, and the report says it."""
    model = net(constant, **projections())
    plan, small, graph = narrowed(model, given(), spread=True)
    assert small.fxslim.plan.spread == ("attention",)
    (note,) = small.fxslim.report.not_done
    assert "zeros stand between them in the old places" in note.reason
    assert graph.fxslim.plan.zeroed == ()
    kept = [head * E + i for head in plan.sites[0].keep for i in range(E)]
    assert torch.equal(small.out.weight, model.out.weight[:, kept])
    weights = sum(linear.weight.numel() for linear in (model.q, model.k, model.v, model.out))
    tokens = given().shape[0] * given().shape[1]
    saved = tokens * weights * (H - len(plan.sites[0].keep)) // H  # attention itself is as it was
    report = small.fxslim.report
    assert report.macs_before - report.macs_after == saved


# Larger modules -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer block as everybody writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.k, self.v = (nn.Linear(D, H * E) for _ in range(3))
        self.out = nn.Linear(H * E, D)
        self.mlp = nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Dropout(0.1), nn.Linear(HIDDEN, D))
        self.layer_scale = nn.Parameter(torch.full((D,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + by_hand(self, self.norm1(x))
        return x + self.layer_scale * self.mlp(self.norm2(x))


class Vision(nn.Module):
    """Patches by convolution, blocks, a mean, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, D, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(1, 16, D))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def pixels(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_vision_transformer() -> None:
    torch.manual_seed(0)
    model = Vision().double().eval()
    names = [f"blocks.{i}{site}" for i in range(2) for site in (f":attention {H}", f".mlp:ffn {HIDDEN}")]
    assert described(model, pixels(2, 0)) == names
    narrowed(model, pixels(2, 0), pixels(3, 1), pixels(1, 2))
    reasons = {note.where: note.reason for note in fxslim.inspect(model, pixels(2, 0)).pinned}
    assert "layer_norm" in reasons["head"]
    assert "pixels" in reasons["patches"]


class ConvBlock(nn.Module):
    """A block in the manner of ConvNeXt: depthwise convolution, norm, channels up and down, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.norm = nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.gamma = nn.Parameter(torch.full((D,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(h)))).permute(0, 3, 1, 2)


def test_a_convolutional_block() -> None:
    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, D, 4, stride=4), nn.Conv2d(D, V, 1)
    model = nn.Sequential(stem, ConvBlock(), ConvBlock(), head).double().eval()
    assert described(model, pixels(2, 0)) == [*(f"{i}:ffn {HIDDEN}" for i in (1, 2)), f"generic {D}"]
    narrowed(model, pixels(2, 0), pixels(3, 1), pixels(1, 2), spread=True, smaller=True)  # what blocks add to is wider


def test_channels_between_convolutions() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 8, 1), nn.SiLU(), nn.Conv2d(8, V, 3))
    model = nn.Sequential(*layers).double().eval()
    plan, small, _ = narrowed(model, pixels(2, 0), pixels(3, 1), pixels(1, 2))
    assert [part.site.units for part in plan] == [10, 8]
    kept = [len(part.keep) for part in plan]
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (kept[0],) * 3
    assert (small[3].out_channels, small[5].in_channels) == (kept[1],) * 2


def test_a_depthwise_convolution_between_changes_its_groups() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 10, 1), nn.ReLU(), nn.Conv2d(10, 10, 3, groups=10), nn.ReLU(), nn.Conv2d(10, V, 1))
    model = nn.Sequential(*layers).double().eval()
    plan, small, _ = narrowed(model, pixels(2, 0), pixels(3, 1), pixels(1, 2))
    kept = len(plan.sites[0].keep)
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (kept,) * 3


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_encoder_layer(norm_first: bool) -> None:
    """nn.MultiheadAttention ties its heads to its width: the module form has one of its own that does not."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(D, 3, HIDDEN, batch_first=True, norm_first=norm_first).double().eval()
    sites = fxslim.inspect(model, given()).sites
    assert [(site.kind, site.units) for site in sites] == [("attention", 3), ("ffn", HIDDEN)]
    plan, small, graph = narrowed(model, given())
    assert small.self_attn.num_heads == len(plan.sites[0].keep)
    assert graph.fxslim.plan.zeroed == ()


class Shared(nn.Module):
    """One block called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.tanh(self.block(x)))


def test_a_block_called_twice_is_one_pair_of_sites() -> None:
    torch.manual_seed(0)
    model = Shared().double().eval()
    assert described(model) == [f"block:attention {H}", f"block.mlp:ffn {HIDDEN}"]
    narrowed(model, given())


def test_one_module_under_two_names() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D))
    model = net(lambda m, x: m.last(m.second(torch.tanh(m.first(x)))), first=mlp, second=mlp, last=nn.Linear(D, V))
    plan, small, graph = narrowed(model, given())
    assert [part.site.units for part in plan if part.site.units == HIDDEN] == [HIDDEN]
    assert small.first is small.second
    assert graph.first[0].weight is graph.second[0].weight if isinstance(graph.first, nn.Sequential) else True


def test_weights_as_bare_parameters() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        return torch.einsum("bsf,fv->bsv", torch.relu(x @ m.a + m.bias), m.b)

    parts = {"a": (D, HIDDEN), "b": (HIDDEN, V), "bias": (HIDDEN,)}
    model = net(compute, **{name: nn.Parameter(torch.zeros(shape)) for name, shape in parts.items()})
    plan, small, _ = narrowed(model, given())
    assert small.a.shape == (D, len(plan.sites[0].keep))


def test_nothing_but_norms_has_nothing_to_narrow() -> None:
    model = net(lambda m, x: m.head(m.norm(x)), norm=nn.LayerNorm(D), head=nn.Linear(D, V))
    found = fxslim.inspect(model, given())
    assert found.sites == ()
    assert [note.where for note in found.pinned] == ["head"]
    with pytest.raises(UnsupportedModelError, match="has no parameters: there is nothing to narrow"):
        fxslim.inspect(nn.Sequential(nn.ReLU()), given())
