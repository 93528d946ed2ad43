"""Whole experts: which routers can lose them, and what keeps the others."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.errors import NarrowError, RequestError
from fxslim.passes.narrow import replay
from fxslim.plan import Plan
from fxslim.site import Site, SitePlan
from test_experts import D, Grouped, X, agree, given, seeded

from agreement import difference, outputs, random_plan

EXPERTS, TOP = 8, 2


class Routed(nn.Module):
    """Experts behind a router of some kind."""

    def __init__(self, kind: str, experts: int = EXPERTS, width: int = 8, hidden: int = 5, groups: int = 2) -> None:
        super().__init__()
        self.kind, self.experts, self.groups = kind, experts, groups
        self.router = nn.Linear(width, experts, bias=kind == "late")
        self.correction = nn.Parameter(torch.randn(experts) / 9) if kind in ("sigmoid", "corrected") else None
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / 2)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / 2)

    def grouped(self, best: Tensor) -> Tensor:
        chosen = best.topk(1, dim=-1)[1]
        mask = torch.zeros_like(best).scatter(1, chosen, 1)
        each = self.experts // self.groups
        return mask.unsqueeze(-1).expand(-1, self.groups, each).reshape(-1, self.experts).bool()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        if self.kind == "late":
            weights, ids = logits.topk(TOP, dim=-1)
            return weights.softmax(-1), ids
        if self.kind == "capped":
            weights, ids = torch.topk(logits.mul(0.1).tanh() * 10, TOP, dim=-1)
            return weights.sigmoid(), ids
        if self.kind in ("sigmoid", "corrected"):
            scores = logits.sigmoid()
            choice = scores + self.correction
            if self.kind == "sigmoid":
                best = choice.view(-1, self.groups, self.experts // self.groups).topk(2, dim=-1)[0].sum(-1)
                choice = choice.masked_fill(~self.grouped(best), float("-inf"))
            ids = choice.topk(TOP, dim=-1)[1]
            weights = scores.gather(1, ids)
            return weights / weights.sum(-1, keepdim=True), ids
        scores = nn.functional.softmax(logits, dim=-1)
        if self.kind == "limited":
            best = scores.view(-1, self.groups, self.experts // self.groups).max(dim=-1).values
            scores = scores.masked_fill(~self.grouped(best), 0.0)
        if self.kind == "normalised":
            scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        weights, ids = torch.topk(scores, TOP, dim=-1)
        if self.kind == "one hot":
            return (nn.functional.one_hot(ids, self.experts).to(scores.dtype) * scores.unsqueeze(1)).sum(-1), ids
        if self.kind == "numbers":
            weights = weights + ids
        return weights, ids

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, ids = self.route(x)
        rows = x.repeat_interleave(TOP, dim=0).unsqueeze(1)
        inner = torch.bmm(rows, self.up[ids.reshape(-1)]).relu()
        out = torch.bmm(inner, self.down[ids.reshape(-1)]).view(-1, TOP, shape[-1])
        return (out * weights.unsqueeze(-1)).sum(1).reshape(shape)


def routed(kind: str, **options: Any) -> Any:
    return seeded(Routed, kind, dtype=torch.float64, **options)


def experts_of(model: nn.Module, x: Any = (D,)) -> tuple[Site, ...]:
    return tuple(site for site in fxslim.inspect(model, x).sites if site.kind == "experts")


ROUTERS = {"early": (None, 2), "late": (None, 2), "capped": (None, 2), "corrected": (None, 2), "sigmoid": (2, 2),
           "limited": (2, 2)}  # fmt: skip
"""Kind of router to groups and how many experts (of every group) have to stay."""


@pytest.mark.parametrize("kind", ROUTERS)
def test_experts_go_with_everything_that_belongs_to_them(kind: str) -> None:
    model = routed(kind)
    (site,) = experts_of(model)
    groups, least = ROUTERS[kind]
    assert (site.units, site.least, site.groups_stay) == (EXPERTS, least, groups is not None)
    assert site.groups == (None if groups is None else tuple(unit // 4 for unit in range(8)))
    assert site.roles == {"router": ("router.weight",)}
    tensors = {name for name, own in model.named_parameters() if EXPERTS in own.shape[:1]}
    assert {(piece.tensor, piece.dim, piece.role) for piece in site.slices} == {(name, 0, "out") for name in tensors}
    for fraction in (0.5, 0.9):
        plan = random_plan(model, (site,), fraction)
        slim, _ = agree(model, plan, D, 1e-12)
        gone = EXPERTS - len(plan.sites[0].keep)
        each = sum(own[0].numel() for name, own in model.named_parameters() if name in tensors)
        assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in slim.parameters()) == gone * each


@pytest.mark.parametrize("kind", ["early", "sigmoid"])
def test_experts_and_their_channels_go_together(kind: str) -> None:
    model = routed(kind)
    plan = random_plan(model, fxslim.inspect(model, (D,)).sites)
    assert {part.site.kind for part in plan} == {"experts", "ffn"}
    slim, _ = agree(model, plan, D, 1e-12)
    again = Plan.from_json(slim.fxslim.plan.to_json())
    assert difference(outputs(slim, (D,)), outputs(replay(routed(kind), again), (D,))) == 0
    smaller = fxslim.slim(slim, (D,), ffn=0.4)
    with fxslim.masked(model, smaller.fxslim.plan):
        assert difference(outputs(model, (D,)), outputs(smaller, (D,))) <= 1e-12


def test_grouped_products_lose_experts() -> None:
    """Ends of groups are counted, and counts of removed experts are zero."""
    model = seeded(Grouped, 6, bias=True)
    plan = random_plan(model, fxslim.inspect(model, (X,)).sites)
    assert [part.site.kind for part in plan] == ["experts", "gated_ffn"]
    slim, _ = agree(model, plan)
    assert (slim.experts, tuple(slim.up.shape)) == (4, (4, 16, 8))


class Literal(Routed):
    """Writes its number of experts down."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).view(-1, 8).topk(TOP, dim=-1)
        return weights.softmax(-1), ids


def test_experts_without_an_edit_are_refused_in_a_module() -> None:
    """They cannot stay in place: zeros do not keep them from being selected. A graph has no such numbers."""
    model = seeded(Literal, "late", dtype=torch.float64)
    plan = random_plan(model, experts_of(model))
    with pytest.raises(NarrowError, match=r"no edit of the module's integers expresses fewer experts at experts"):
        fxslim.slim(model, (D,), plan=plan)
    with fxslim.masked(model, plan):
        expected = outputs(model, (D,))
    assert difference(expected, outputs(fxslim.compile(model, (D,), plan=plan), (D,))) <= 1e-12


def test_minus_infinity_on_the_logits_alone_would_be_wrong() -> None:
    """A correction bias would select removed experts again."""
    model = routed("corrected")
    with torch.no_grad():
        model.correction[:4] += 10
    (site,) = experts_of(model)
    agree(model, given(model, SitePlan(site=site, keep=(4, 5, 6, 7))), D, 1e-12)


def test_the_model_is_as_before() -> None:
    model = routed("early")
    before = outputs(model, (D,))
    with fxslim.masked(model, random_plan(model, experts_of(model))):
        assert difference(before, outputs(model, (D,))) > 1e-3
    assert difference(before, outputs(model, (D,))) == 0


PINNED = {
    "numbers": "experts: numbers of what is selected are read by aten.add",
    "one hot": "experts: numbers of what is selected are read by aten.one_hot",
    "normalised": "experts: all its experts go together (tied by aten.sum.dim_IntList)",
}


@pytest.mark.parametrize("kind", PINNED)
def test_what_reads_more_than_the_selected_keeps_all_experts(kind: str) -> None:
    model = routed(kind)
    assert experts_of(model) == ()
    plan = fxslim.plan(model, (D,), experts=0.5)
    assert not plan.sites
    assert [note.reason for note in plan.notes if note.where == "router"] == [PINNED[kind]]
    assert "no experts were found that can go" in str(plan)
    assert PINNED[kind] in str(fxslim.inspect(model, (D,)))


def test_as_many_stay_as_are_selected() -> None:
    (part,) = fxslim.plan(routed("early"), (D,), experts=0.5)
    assert len(part.keep) == 4
    plan = fxslim.plan(routed("early"), (D,), experts=0.9)
    assert len(plan.sites[0].keep) == 2
    assert "experts=0.9: at least 2 experts have to stay, as many as are selected" in str(plan)
    plan = fxslim.plan(routed("sigmoid"), (D,), experts=0.9)
    assert len(plan.sites[0].keep) == 4
    assert "experts=0.9: at least 2 experts of every group have to stay" in str(plan)
    (site,) = experts_of(routed("early"))
    with pytest.raises(ValueError, match="at least 2 units have to stay"):
        SitePlan(site=site, keep=(1,))
    assert "experts: as many are selected as there are" in str(
        fxslim.plan(routed("early", experts=2), (D,), experts=0.5)
    )
    with pytest.raises(RequestError, match="experts=1 asks for every unit"):
        fxslim.plan(routed("early"), (D,), experts=1)


def test_lossless_leaves_experts_alone() -> None:
    """An expert that returns zeros still takes its share of what is selected."""
    model = routed("early")
    with torch.no_grad():
        model.down[3] = 0
    assert not [part for part in fxslim.plan(model, (D,)) if part.site.kind == "experts"]


# Models of transformers ---------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 4, "intermediate_size": 24}  # fmt: skip
LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "moe_intermediate_size": 12, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
          "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 6},
    "Qwen2Moe": {"num_experts": 6, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
    "DeepseekV2": {**LATENT, "topk_method": "group_limited_greedy"},
    "DeepseekV3": LATENT,
}


@functools.cache
def built(name: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)):
            tensor.copy_(torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)
    model.set_experts_implementation("batched_mm")
    return model.double()


@pytest.mark.parametrize("name", MODELS)
def test_models_lose_experts(name: str) -> None:
    model = built(name)
    (site,) = experts_of(model, None)
    assert site.groups_stay == name.startswith("Deepseek")
    plan = random_plan(model, (site,))
    small, graph = fxslim.slim(model, plan=plan), fxslim.compile(model, plan=plan)
    for length in (7, 4):
        ids = {"input_ids": torch.arange(2 * length).reshape(2, length) * 3 % 99, "use_cache": False}
        with fxslim.masked(model, plan):
            expected = outputs(model, ids)
        assert difference(expected, outputs(model, ids)) > 1e-4
        for made in (small, graph):
            assert difference(expected, outputs(made, ids)) <= 1e-6
