"""Masks of channels and heads: scores and counts against formulas in plain torch, constraints at every update."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxslim
from fxslim.errors import InputError, RequestError
from fxslim.training.scores import SCORES

from agreement import difference, outputs
from everywhere import ENTRIES
from stacks import Attend, Feed, Stack


class Masked(nn.Module):
    """A feed-forward network and an attention with a mask of its own on every unit, as the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.channels: Tensor | None = None
        self.heads: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.up(x))
        x = x + self.down(hidden if self.channels is None else hidden * self.channels)
        q, k, v = (part(x).unflatten(-1, (3, 2)).transpose(1, 2) for part in (self.q, self.k, self.v))
        value = (q @ k.mT / math.sqrt(2)).softmax(-1) @ v
        value = value if self.heads is None else value * self.heads[:, None, None]
        return x + self.o(value.transpose(1, 2).flatten(-2))


def model_of() -> Masked:
    torch.manual_seed(0)
    return Masked().double()


def batch(seed: int) -> Tensor:
    return torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def pruner_of(model: nn.Module, **asked: Any) -> fxslim.Pruner:
    given = {"ffn": 0.5, "heads": 0.4, "start": 0, "end": 4, "every": 1, **asked}
    return fxslim.Pruner(model, fxslim.PruningConfig(**given), example_inputs=batch(0))


def site(pruner: fxslim.Pruner, asked: str) -> Any:
    assert pruner.units is not None
    (own,) = (own for own in pruner.units.sites if own.asked == asked)
    return own


def test_gradients_of_masks_are_those_of_masks() -> None:
    """Weights times gradients, summed over what reads a unit, are derivatives by masks that are really there."""
    model = model_of()
    reference = copy.deepcopy(model)
    pruner = pruner_of(model, score="block_mask", start=3, end=3)
    loss_of(model, batch(1)).backward()
    pruner.before_step()
    reference.channels = torch.ones(8, dtype=torch.float64, requires_grad=True)
    reference.heads = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss_of(reference, batch(1)).backward()
    for asked, mask in (("ffn", reference.channels), ("heads", reference.heads)):
        assert mask.grad is not None
        assert torch.allclose(site(pruner, asked).score, mask.grad.abs(), rtol=1e-10, atol=1e-14)


def by_hand(score: str, weights: list[np.ndarray], gradients: list[np.ndarray], width: int, cost: float) -> np.ndarray:
    """Return a score after several steps.  weights and gradients of the consumer: (out, in) -> (units,)"""
    total = np.zeros(weights[0].shape[1] // width)
    for weight, gradient in zip(weights, gradients, strict=True):
        columns = [slice(i * width, (i + 1) * width) for i in range(len(total))]
        mask = np.array([(weight[:, own] * gradient[:, own]).sum() for own in columns])
        product = np.array([np.abs(weight[:, own] * gradient[:, own]).sum() for own in columns])
        plain = np.array([np.abs(gradient[:, own]).sum() for own in columns])
        total = {
            "gradient": plain,
            "snip": product,
            "snip_momentum": 0.9 * total + product,
            "taylor": 0.85 * total + 0.15 * np.abs(mask),
            "fisher": 0.85 * total + 0.15 * mask**2 / cost,
            "block_mask": 0.9 * total + np.abs(mask),
        }[score]
    return total


@pytest.mark.parametrize("score", [name for name in SCORES if SCORES[name].gradients])
def test_scores_over_steps(score: str) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    pruner = pruner_of(model, score=score, start=9, end=9)
    seen: dict[str, list[list[np.ndarray]]] = {"down": [[], []], "o": [[], []]}
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        for name, kept in seen.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter) and weight.grad is not None
            kept[0].append(weight.detach().numpy().copy())
            kept[1].append(weight.grad.numpy().copy())
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
    costs = {"ffn": 6 + 1 + 6, "heads": 3 * (2 * 6 + 2) + 2 * 6}
    for asked, name, width in (("ffn", "down", 1), ("heads", "o", 2)):
        expected = by_hand(score, *seen[name], width, costs[asked])
        assert np.allclose(site(pruner, asked).score.numpy(), expected, rtol=1e-10, atol=1e-15), asked


def test_magnitude_is_the_norm_of_what_a_unit_owns() -> None:
    model = model_of()
    pruner = pruner_of(model, score="magnitude", schedule="one_shot", start=1, end=1)
    state = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    pruner.before_step()
    pruner.after_step()
    expected = np.sqrt(
        np.square(state["up.weight"]).sum(1) + np.square(state["up.bias"]) + np.square(state["down.weight"]).sum(0)
    )
    assert np.allclose(site(pruner, "ffn").score.numpy(), expected, rtol=1e-6)
    assert set(np.flatnonzero(site(pruner, "ffn").gone)) == set(np.argsort(expected)[:4])


def test_l1_is_the_sum_of_what_reads_a_unit() -> None:
    model = model_of()
    pruner = pruner_of(model, score="l1", schedule="one_shot", start=1, end=1)
    state = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    pruner.before_step()
    pruner.after_step()
    for asked, expected in (
        ("ffn", np.abs(state["down.weight"]).sum(0)),
        ("heads", np.abs(state["o.weight"]).sum(0).reshape(-1, 2).sum(1)),
    ):
        own = site(pruner, asked)
        assert np.allclose(own.score.numpy(), expected, rtol=1e-12)
        assert set(np.flatnonzero(own.gone)) == set(np.argsort(expected)[: own.gone.sum()])
        assert own.gone.any()


def test_masked_units_learn_nothing_and_leave_no_trace() -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    pruner = pruner_of(model, score="taylor")
    pruner.optimizer = optimizer
    for step in range(8):
        loss_of(model, batch(step)).backward()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
        for asked, name, width in (("ffn", "down", 1), ("heads", "o", 2)):
            gone = np.flatnonzero(np.repeat(site(pruner, asked).gone, width))
            weight = model.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter) and weight.grad is not None
            assert weight[:, gone].count_nonzero() == 0
            if pruner.step > 4:
                assert weight.grad[:, gone].count_nonzero() == 0
            for moment in ("exp_avg", "exp_avg_sq"):
                assert optimizer.state[weight][moment][:, gone].count_nonzero() == 0
        optimizer.zero_grad()
    gone = site(pruner, "ffn").gone
    assert optimizer.state[model.up.weight]["exp_avg"][gone].count_nonzero() == 0
    assert optimizer.state[model.up.bias]["exp_avg_sq"][gone].count_nonzero() == 0
    assert optimizer.state[model.up.weight]["exp_avg"][~gone].count_nonzero() > 0


def curved(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Step an optimizer that may ask for the loss several times."""

    def loss() -> Tensor:
        optimizer.zero_grad()
        own = loss_of(model, batch(step))
        own.backward()
        return own

    optimizer.step(loss)  # type: ignore[arg-type]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda own: torch.optim.AdamW(own, lr=0.05),
    "SGD": lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9, nesterov=True),
    "Adafactor": lambda own: torch.optim.Adafactor(own, lr=0.05),
    "LBFGS": lambda own: torch.optim.LBFGS(own, lr=0.1, max_iter=3),
}


def test_zeros_stay_whatever_the_optimizer_remembers() -> None:
    """Also where the pruner does not know it, and where its memory is one vector over all parameters."""
    model = model_of()
    found, dense = fxslim.inspect(model, batch(0)), copy.deepcopy(model.state_dict())
    config = fxslim.PruningConfig(ffn=0.5, heads=0.4, score="l1", start=2, end=2)
    for (name, make), known in itertools.product(OPTIMIZERS.items(), (False, True)):
        model.load_state_dict(dense)
        optimizer = make(list(model.parameters()))
        pruner = fxslim.Pruner(model, config, found=found, optimizer=optimizer if known else None)
        for step in range(5):
            curved(model, optimizer, step)
            pruner.before_step()
            pruner.after_step()
            for asked, weight, width in (("ffn", model.down.weight, 1), ("heads", model.o.weight, 2)):
                gone = np.flatnonzero(np.repeat(site(pruner, asked).gone, width))
                assert bool(len(gone)) == (step > 0)
                assert weight[:, gone].count_nonzero() == 0, (name, known)
            copied = copy.deepcopy(model)  # without masks: the zeros are what counts
            assert torch.equal(copied(batch(9)), model(batch(9)))
        pruner.release()


def test_memory_in_a_form_of_its_own_is_left_alone() -> None:
    """In the codes of an 8-bit optimizer, 0 stands for the lowest value there is."""
    model = model_of()
    weight = model.down.weight
    codes = torch.full(weight.shape, 127, dtype=torch.uint8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[weight] = {"state1": codes, "absmax1": torch.ones(1), "exp_avg": torch.ones_like(weight)}
    pruner = pruner_of(model, start=1, end=1, score="l1")
    pruner.optimizer = optimizer
    pruner.after_step()
    assert (codes == 127).all()
    gone = site(pruner, "ffn").gone
    assert (optimizer.state[weight]["exp_avg"] == 0).all(0).tolist() == gone.tolist()


@pytest.mark.parametrize("clears", [True, False])
def test_a_choice_without_gradients_is_refused(clears: bool) -> None:
    """Calls in the wrong order would mask the first units that come."""
    model = model_of()
    pruner = pruner_of(model, start=2, end=2, weights=fxslim.WeightMasks(fraction=0.5))
    names = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(2):
        loss_of(model, batch(step)).backward()
        if clears:
            model.zero_grad()
            pruner.before_step()
        with pytest.raises(InputError, match="none has been seen") if step else nullcontext():
            pruner.after_step()
    with pytest.raises(InputError, match="none has been seen"), pytest.warns(UserWarning, match="ended after"):
        pruner_of(model).finish()
    assert all(torch.equal(value, names[name]) for name, value in model.state_dict().items())
    pruner.release()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("form", ["module", "exported"])
def test_masks_grow_to_the_exact_count_and_narrow_without_loss(form: str) -> None:
    model: Any = model_of()
    if form == "exported":  # its modules hold weights and are never called
        model = torch.export.export(model, (batch(0),)).module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pruner_of(model, ffn=0.7, heads=0.6, end=10, schedule="linear")
    counts = []
    for step in range(12):
        loss_of(model, batch(step)).backward()
        pruner.before_step()
        optimizer.step()
        before = site(pruner, "ffn").gone.copy()
        pruner.after_step()
        assert (before <= site(pruner, "ffn").gone).all()
        counts.append(int(site(pruner, "ffn").gone.sum()))
        optimizer.zero_grad()
    assert counts == [math.floor(0.7 * min(step, 10) / 10 * 8 + 1e-9) for step in range(1, 13)]
    assert site(pruner, "heads").gone.sum() == 1  # 0.6 of 3 heads: 1.8
    masked = outputs(model, (batch(9),))
    pruner.finish()
    assert difference(masked, outputs(model, (batch(9),))) < 1e-12
    small: Any = fxslim.slim(model, batch(0))
    assert small.down.weight.shape == (6, 3)
    assert {len(part.keep) for part in small.fxslim.plan} == {3, 2}
    assert difference(outputs(model, (batch(9),)), outputs(small, (batch(9),))) < 1e-12


@pytest.mark.parametrize("name", ["llama_gqa", "t5", "gpt2", "bart", "vit_classify", "albert"])
def test_real_models_can_be_narrowed_after_every_update(name: str) -> None:
    """Equal counts per group hold at every update, in the local and in the global scope."""
    architecture = ENTRIES[name]
    inputs = architecture.inputs(batch=4, length=max(10, architecture.min_length), seed=1)
    for scope in ("local", "global"):
        model = architecture.build(attn="sdpa" if architecture.sdpa else "eager").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        asked: Any = {"ffn": 0.6, "heads": 0.5, "scope": scope, "start": 0, "end": 3, "every": 1, "schedule": "linear"}
        pruner = fxslim.Pruner(model, fxslim.PruningConfig(**asked), optimizer=optimizer)
        assert pruner.units is not None
        expected = pruner.figures()
        assert (expected.parameters, expected.macs) == (sum(p.numel() for p in model.parameters()), 1.0)
        for _ in range(3):
            sum(v.float().square().mean() for v in tensors_of(model, inputs)).backward()  # type: ignore[union-attr]
            pruner.before_step()
            optimizer.step()
            pruner.after_step()
            optimizer.zero_grad()
            for part in pruner.units.parts():  # refuses unequal groups
                assert 0 < len(part.keep) < part.site.units
        figures = pruner.figures()
        pruner.finish()
        small: Any = fxslim.slim(model.eval())
        plan = {part.site.name: part.keep for part in small.fxslim.plan}
        assert plan == {part.site.name: part.keep for part in pruner.units.parts()}
        assert small.fxslim.report.parameters_after == figures.parameters
        assert small.fxslim.report.macs_after / small.fxslim.report.macs_before == pytest.approx(figures.macs)
        assert (figures.final_parameters, figures.final_macs) == (figures.parameters, figures.macs)
        if scope == "local":
            assert (expected.final_parameters, expected.final_macs) == (figures.parameters, figures.macs)
        wanted = {own.site.name: own.gone.sum() for own in pruner.units.sites}
        if scope == "local":
            asked_plan = fxslim.plan(architecture.build(attn="sdpa"), ffn=0.6, heads=0.5)
            assert wanted == {part.site.name: part.site.units - len(part.keep) for part in asked_plan}


def tensors_of(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    output = model(**inputs)
    return [value for value in output.to_tuple() if isinstance(value, Tensor) and value.requires_grad]


class Adapted(nn.Module):
    """A frozen linear, and two small ones beside it that are trained."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.a = nn.Linear(base.in_features, 2, bias=False).double()
        self.b = nn.Linear(2, base.out_features, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.b(self.a(x))
        return out


@pytest.mark.parametrize("score", ["fisher", "taylor", "block_mask"])
def test_masks_of_frozen_weights_take_gradients_themselves(score: str) -> None:
    """Adapters beside frozen weights: scores are those of the model in which everything is trained."""
    model = model_of()
    model.down = Adapted(model.down)  # type: ignore[assignment]
    free = copy.deepcopy(model).requires_grad_()
    pruners = []
    for own in (model, free):
        optimizer = torch.optim.SGD([p for name, p in own.named_parameters() if "base" not in name], lr=0.1)
        pruner = pruner_of(own, score=score, start=0, end=3, schedule="linear")
        pruner.optimizer = optimizer
        for step in range(5):
            own.zero_grad()
            (loss_of(own, batch(step)) * (16 if own is model else 1)).backward()
            for parameter in own.parameters():  # as a scaler does
                if parameter.grad is not None and own is model:
                    parameter.grad /= 16
            pruner.before_step(scale=16.0 if own is model else 1.0)
            optimizer.step()
            pruner.after_step()
        pruners.append(pruner)
    for asked in ("ffn", "heads"):
        first, second = (site(pruner, asked) for pruner in pruners)
        assert (first.gone == second.gone).all()
        assert torch.allclose(first.score, second.score, rtol=1e-9, atol=1e-18)
        assert first.gone.any()
    pruners[0].finish()
    assert {len(part.keep) for part in fxslim.plan(model, batch(0))} == {4, 2}


# Scope ----------------------------------------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    """Return two feed-forward layers of which the second one's weights are twice as large."""
    torch.manual_seed(0)
    model = Stack((Feed(hidden=10), Feed(hidden=10))).build()
    with torch.no_grad():
        for parameter in model.layers[1].parameters():  # type: ignore[union-attr]
            parameter.mul_(2)
    return model


@pytest.mark.parametrize(("limits", "expected"), [((0.0, 1.0), [9, 1]), ((0.0, 0.8), [8, 2]), ((0.25, 1.0), [7, 3])])
def test_one_threshold_over_all_layers_within_limits(limits: tuple[float, float], expected: list[int]) -> None:
    model, x = two_layers(), Stack((Feed(hidden=10),)).inputs()
    config = fxslim.PruningConfig(
        ffn=0.5, score="magnitude", scope="global", limits=limits, schedule="one_shot", start=1, end=1
    )
    pruner = fxslim.Pruner(model, config, example_inputs=x)
    pruner.before_step()
    pruner.after_step()
    assert pruner.units is not None
    assert [int(own.gone.sum()) for own in pruner.units.sites] == expected


def test_limits_are_rounded_by_layer() -> None:
    """0.98 of all 20 are 19, of each 10 are 9: no layer goes as a whole, nor beyond its limit."""
    config = fxslim.PruningConfig(ffn=0.98, score="magnitude", scope="global", limits=(0.0, 0.98),
                                  schedule="one_shot", start=1, end=1)  # fmt: skip
    pruner = fxslim.Pruner(two_layers(), config, example_inputs=Stack((Feed(hidden=10),)).inputs())
    pruner.before_step()
    pruner.after_step()
    assert pruner.units is not None
    assert [int(own.gone.sum()) for own in pruner.units.sites] == [9, 9]
    assert [str(note.reason) for note in pruner.notes] == ["18 of 19 units go: limits are rounded down by site"]


@pytest.mark.parametrize("score", ["magnitude", "l1", "fisher"])
def test_figures_change_nothing(score: str) -> None:
    model = model_of()
    pruner = pruner_of(model, score=score, start=1, end=9)
    loss_of(model, batch(0)).backward()
    pruner.before_step()
    before = {name: value.clone() for part in pruner._parts() for name, value in part.state().items()}
    assert pruner.figures() == pruner.figures()
    after = {name: value for part in pruner._parts() for name, value in part.state().items()}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        model.down.weight[0, 0] = torch.nan
    assert pruner.figures().parameters == sum(p.numel() for p in model.parameters())


def test_limits_that_cannot_be_met() -> None:
    x = Stack((Feed(hidden=10),)).inputs()
    for limits in ((0.0, 0.3), (0.8, 0.9)):
        config = fxslim.PruningConfig(ffn=0.5, score="magnitude", scope="global", limits=limits, start=1, end=1)
        with pytest.raises(RequestError, match=r"ffn=0\.5 cannot go in all where limits="):
            fxslim.Pruner(two_layers(), config, example_inputs=x)


def test_include_skip_and_round_to() -> None:
    stack = Stack((Feed(hidden=10), Feed(hidden=12)))
    given: dict[str, Any] = {"ffn": 0.5, "score": "magnitude", "start": 1, "end": 1}
    for asked, expected in (({"include": "layers.1"}, [5]), ({"skip": "layers.1"}, [6]), ({"round_to": 4}, [8, 8])):
        pruner = fxslim.Pruner(
            stack.build(),
            fxslim.PruningConfig(**given, **asked),
            example_inputs=stack.inputs(),  # type: ignore[arg-type]
        )
        pruner.before_step()
        pruner.after_step()
        assert pruner.units is not None
        kept = [int((~own.gone).sum()) for own in pruner.units.sites]
        assert kept == {"include": [6], "skip": [5], "round_to": [8, 8]}[next(iter(asked))], expected
    with pytest.raises(RequestError, match="matches no module"):
        fxslim.Pruner(stack.build(), fxslim.PruningConfig(ffn=0.5, skip="nowhere", start=1, end=1),
                      example_inputs=stack.inputs())  # fmt: skip


# Consumers without a hook ---------------------------------------------------------------------------------------------


class Torchs(nn.Module):
    """Torch's own encoder layer: its attention reads the output projection's weight without calling the module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def test_columns_are_masked_where_no_hook_fires() -> None:
    model = Torchs().double().train()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    config = fxslim.PruningConfig(ffn=0.5, heads=0.5, start=1, end=1, score="taylor")
    pruner = fxslim.Pruner(model, config, example_inputs=x, optimizer=optimizer)
    assert pruner.units is not None
    assert any(piece.hook is None for own in pruner.units.sites for piece, _, _ in own.owners)
    for _ in range(4):
        loss_of(model, x).backward()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
        optimizer.zero_grad()
        gone = np.flatnonzero(np.repeat(site(pruner, "heads").gone, 2))
        weight = model.layer.self_attn.out_proj.weight
        assert len(gone) == 4
        assert weight[:, gone].count_nonzero() == 0
        assert optimizer.state[weight]["exp_avg"][:, gone].count_nonzero() == 0
    pruner.finish()
    small: Any = fxslim.slim(model.eval(), x)
    assert small.layer.self_attn.num_heads == 2
    assert difference(outputs(model, (x,)), outputs(small, (x,))) < 1e-12


def test_whole_groups_are_masked() -> None:
    stack = Stack((Attend(kv=2, per_group=2),))
    model, x = stack.build(), stack.inputs()
    config = fxslim.PruningConfig(kv_groups=0.5, start=1, end=1, score="magnitude")
    pruner = fxslim.Pruner(model, config, example_inputs=x)
    pruner.before_step()
    pruner.after_step()
    pruner.finish()
    (part,) = fxslim.plan(model, x)
    assert len(part.keep) == 2 and len({part.site.groups[unit] for unit in part.keep}) == 1  # type: ignore[index]


def test_what_will_not_be_done_is_said() -> None:
    model = model_of()
    assert {note.reason for note in pruner_of(model, heads=0.3, ffn=0.1).notes} == {
        "heads=0.3 is less than one head of 3 heads",
        "ffn=0.1 of 8 channels is less than one",
    }
    assert {note.reason for note in pruner_of(model_of(), heads=0.0, round_to=8).notes} == {
        "rounded up to a multiple of 8, everything stays"
    }


# Copies, ends, refusals -----------------------------------------------------------------------------------------------


def test_copies_compute_the_same_and_go_without_masks() -> None:
    model = model_of()
    pruner = pruner_of(model, start=1, end=1)
    loss_of(model, batch(0)).backward()
    pruner.before_step()
    pruner.after_step()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(batch(2)), model(batch(2)))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(batch(2)), model(batch(2)))
    small = fxslim.slim(copied, batch(0))
    narrowed = fxslim.slim(model, batch(0))
    assert difference(outputs(model, (batch(2),)), outputs(small, (batch(2),))) < 1e-12
    assert difference(outputs(model, (batch(2),)), outputs(narrowed, (batch(2),))) < 1e-12
    model.zero_grad()
    loss_of(model, batch(1)).backward()
    gone = site(pruner, "ffn").gone
    assert model.down.weight.grad is not None
    assert model.down.weight.grad[:, gone].count_nonzero() == 0  # the model's own masks are where they were


class Switch(nn.Module):
    """Asks the data which way to go: it cannot be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(model_of() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks if x.sum() > 0 else reversed(self.blocks)  # type: ignore[arg-type]
        out: Tensor = second(first(x))
        return out


def test_models_traced_in_parts_are_masked_too() -> None:
    model = Switch().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = fxslim.PruningConfig(ffn=0.5, heads=0.4, start=0, end=3, every=1, schedule="linear")
    pruner = fxslim.Pruner(model, config, example_inputs=batch(0), optimizer=optimizer)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
        if step == 1:
            between: Any = fxslim.slim(copy.deepcopy(model), batch(0))
            assert difference(outputs(model, (batch(7),)), outputs(between, (batch(7),))) < 1e-12
            assert between.blocks[0].down.in_features == 6
    figures = pruner.figures()
    pruner.finish()
    small: Any = fxslim.slim(model, batch(0))
    assert [len(part.keep) for part in small.fxslim.plan] == [4, 2, 4, 2]
    assert small.fxslim.report.parameters_after == figures.parameters
    for seed in range(4):
        assert difference(outputs(model, (batch(seed),)), outputs(small, (batch(seed),))) < 1e-12


def test_the_end_leaves_a_plain_model_even_after_an_error() -> None:
    model = model_of()
    names = set(model.state_dict())
    pruner = pruner_of(model)
    assert set(model.state_dict()) == names
    with pytest.raises(KeyboardInterrupt), pruner:
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="make a new Pruner"):
        pruner.before_step()


def test_a_narrowed_model_is_pruned_again() -> None:
    model: Any = fxslim.slim(model_of(), batch(0), ffn=0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = fxslim.PruningConfig(ffn=0.5, heads=0.4, start=0, end=3, every=1)
    pruner = fxslim.Pruner(model, config, example_inputs=batch(0), optimizer=optimizer)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
    pruner.finish()
    small: Any = fxslim.slim(model, batch(0))
    assert small.down.in_features == 3
    assert difference(outputs(model, (batch(9),)), outputs(small, (batch(9),))) < 1e-12
    assert [len(part.keep) for part in small.fxslim.plan] == [3, 2]  # of the dense model's


def test_training_that_ends_early_is_finished_with_a_warning() -> None:
    model = model_of()
    pruner = pruner_of(model, score="magnitude", end=9)
    with pytest.warns(UserWarning, match="before masks reached their target at 9"):
        pruner.finish()
    assert site(pruner, "ffn").gone.sum() == 4
    pruner.finish()


def test_infinite_gradients_say_nothing() -> None:
    model = model_of()
    pruner = pruner_of(model, start=9, end=9)
    (loss_of(model, batch(0)) * float("inf")).backward()
    pruner.before_step()
    assert site(pruner, "ffn").score.count_nonzero() == 0


def test_what_cannot_be_masked_is_refused() -> None:
    model = model_of()
    model.down.weight.requires_grad_(requires_grad=False)
    with pytest.raises(InputError, match=r"down\.weight, which is frozen"):
        pruner_of(model, score="snip")
    pruner_of(model, score="magnitude").release()
    torchs = Torchs()
    torchs.layer.self_attn.out_proj.weight.requires_grad_(requires_grad=False)
    with pytest.raises(InputError, match=r"out_proj\.weight, which is frozen"):
        fxslim.Pruner(torchs, fxslim.PruningConfig(heads=0.5, start=1, end=1), example_inputs=torch.randn(3, 4, 8))
    model = model_of()
    nn.utils.prune.identity(model.down, "weight")
    with pytest.raises(InputError, match=r"down\.weight is computed at every call"):
        pruner_of(model)
    with pytest.raises(RequestError, match="no attention site was found"):
        fxslim.Pruner(two_layers(), fxslim.PruningConfig(heads=0.5, start=1, end=1),
                      example_inputs=Stack((Feed(),)).inputs())  # fmt: skip


def test_a_model_that_was_inspected_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    found = fxslim.inspect(model, batch(0))
    monkeypatch.setattr("fxslim.api.inspect", None)
    config = fxslim.PruningConfig(ffn=0.5, score="l1", start=1, end=1)
    pruner = fxslim.Pruner(model, config, found=found)
    assert pruner.units is not None and pruner.units.sites
    pruner.release()
    with pytest.raises(InputError, match="about another model"):
        fxslim.Pruner(model_of(), config, found=found)


def test_a_target_can_be_reached_at_once() -> None:
    model = model_of()
    pruner = pruner_of(model, score="l1", weights=fxslim.WeightMasks(fraction=0.5, portions=3), start=1, end=9)
    pruner.reach()
    assert pruner.sparsity()["ffn"] == 0.5
    gone, count = (
        sum(int((layer.weight == 0).sum()) for layer in layers_of(model)),
        sum(layer.weight.numel() for layer in layers_of(model)),
    )
    assert gone >= count // 2
    pruner.release()
    with pytest.raises(InputError, match="reach"):
        pruner.reach()


def layers_of(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
