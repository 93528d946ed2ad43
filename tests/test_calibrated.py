"""Post-training pruning from end to end: small real architectures in float64, every result against the dense model."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import fxslim
from fxslim import api
from fxslim.calibration import calibration
from fxslim.errors import InputError, PlanError, RequestError
from fxslim.passes.annotate import Labels
from fxslim.passes.choose import Choice, Request
from fxslim.passes.fitting import latency
from fxslim.passes.fitting.budget import Price
from fxslim.passes.fitting.exact import exact
from fxslim.passes.fitting.outputs import divergence, loss, size
from fxslim.passes.fitting.sequences import rows_of
from fxslim.passes.fitting.subjects import subjects_of
from fxslim.passes.fitting.unseen import expect_unseen, weigh_unseen
from fxslim.passes.masking import Masks, masks
from fxslim.passes.pipelines import inspecting
from fxslim.passes.planning import cut_of, new_plan, subject
from fxslim.passes.sites import Sites
from fxslim.program import Program
from fxslim.site import SitePlan
from fxslim.timer import Estimate

from agreement import difference, outputs
from everywhere import ENTRIES

NAMES = ("bert", "llama_gqa", "t5", "vit_classify", "albert")


def model_of(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return a model and batches of eight rows, some of them padded."""
    architecture = ENTRIES[name]
    length = max(10, architecture.min_length)
    return architecture.build(attn="sdpa" if architecture.sdpa else "eager"), [
        architecture.inputs(batch=8, length=length, seed=seed) for seed in range(12)
    ]


def main_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the numbers that matter of an output: of tokens that are no padding."""
    first = next(value for value in outputs(model, inputs).values() if value.is_floating_point())
    mask = inputs.get("attention_mask")
    return first[mask.bool()] if mask is not None and first.shape[:2] == mask.shape else first


def damage(model: nn.Module, small: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Return the squared difference of outputs, relative to the dense model's."""
    pairs = [(main_of(model, batch), main_of(small, batch)) for batch in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


@pytest.mark.parametrize("name", NAMES)
def test_repaired_models_are_closer_to_the_dense_one(name: str) -> None:
    model, batches = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    repaired: Any = fxslim.slim(model, calibration=batches[:8], ffn=0.5, heads=0.5)
    plain: Any = fxslim.slim(model, calibration=batches[:8], ffn=0.5, heads=0.5, repair=False)
    assert repaired.fxslim.plan.weights_changed
    assert not plain.fxslim.plan.weights_changed
    assert {f.how for f in repaired.fxslim.report.fits} <= {"refit", "scaled", "sliced"}
    assert damage(model, repaired, batches[8:]) < 0.9 * damage(model, plain, batches[8:])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_both_forms_are_the_masked_and_repaired_model() -> None:
    model, batches = model_of("bert")
    asked: dict[str, Any] = {"calibration": batches, "ffn": 0.5, "heads": 0.5}
    small: Any = fxslim.slim(model, **asked)
    graph: Any = fxslim.compile(model, **asked)
    assert small.fxslim.report.verification.relative < 1e-10
    assert graph.fxslim.plan.weights_changed
    assert difference(outputs(small, batches[0]), outputs(graph, batches[0])) < 1e-10
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_narrowing_in_place_takes_the_repaired_weights() -> None:
    model, batches = model_of("bert")
    small = fxslim.slim(model, calibration=batches, ffn=0.5)
    expected = outputs(small, batches[0])
    same = fxslim.slim(model, calibration=batches, ffn=0.5, inplace=True)
    assert same is model
    assert difference(expected, outputs(model, batches[0])) < 1e-12


def test_a_plan_is_repaired_as_it_is() -> None:
    model, batches = model_of("bert")
    plan = fxslim.plan(model, calibration=batches[:8], ffn=0.5, heads=0.5, method="wanda")
    assert not plan.weights_changed
    plain: Any = fxslim.slim(model, plan=plan)
    small: Any = fxslim.slim(model, plan=plan, calibration=batches[:8])
    assert [p.keep for p in small.fxslim.plan] == [p.keep for p in plan]
    assert damage(model, small, batches[8:]) < 0.9 * damage(model, plain, batches[8:])


def test_a_repaired_plan_is_refused_on_the_dense_model() -> None:
    model, batches = model_of("bert")
    small: Any = fxslim.slim(model, calibration=batches, ffn=0.5)
    with pytest.raises(PlanError, match="repaired"):
        fxslim.slim(model, plan=small.fxslim.plan)
    with pytest.raises(PlanError, match="repaired"):
        fxslim.verify(model, small, plan=small.fxslim.plan)


@pytest.mark.parametrize("method", ["random", "magnitude", "taylor", "fisher", "wanda", "flap", "obs"])
def test_every_method_narrows(method: str) -> None:
    model, batches = model_of("llama_gqa")
    small: Any = fxslim.slim(model, calibration=batches[:4], ffn=0.5, heads=0.5, method=method)
    assert {p.site.kind: len(p.keep) / p.site.units for p in small.fxslim.plan} == {"attention": 0.5, "gated_ffn": 0.5}
    assert small.fxslim.plan.requested["method"] == method


def test_obs_does_less_damage_than_scores() -> None:
    model, batches = model_of("bert")

    def lost(method: str, *, repair: bool) -> float:
        small = fxslim.slim(model, calibration=batches[:8], ffn=0.5, heads=0.5, method=method, repair=repair)
        return damage(model, small, batches[8:])

    obs, wanda = lost("obs", repair=True), lost("wanda", repair=False)
    assert obs < lost("random", repair=False)
    assert obs < wanda


# Budgets -------------------------------------------------------------------------------------------------------------


def share(model: nn.Module, small: nn.Module, what: str) -> float:
    sizes = [[p.numel() * (p.element_size() if what == "bytes" else 1) for p in m.parameters()] for m in (model, small)]
    return sum(sizes[1]) / sum(sizes[0])


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_budgets_hold_and_are_used(name: str, uniform: bool) -> None:
    model, batches = model_of(name)
    small: Any = fxslim.slim(model, calibration=batches[:4], target=fxslim.macs(0.7), uniform=uniform)
    report = small.fxslim.report
    assert report.macs_after <= 0.7 * report.macs_before
    assert report.macs_after > 0.45 * report.macs_before
    kept: dict[str, set[int]] = {}
    for fit in report.fits:
        kept.setdefault(fit.kind, set()).add(fit.kept)
    if uniform:
        assert {len(sizes) for sizes in kept.values()} == {1}


def test_several_budgets_hold_at_once() -> None:
    model, batches = model_of("bert")
    dense = sum(p.numel() for p in model.parameters())
    limit = int(0.85 * dense * 8)
    small: Any = fxslim.slim(
        model, calibration=batches[:4], target=[fxslim.macs(0.8), fxslim.params(0.9), fxslim.memory(limit)]
    )
    assert small.fxslim.report.macs_after <= 0.8 * small.fxslim.report.macs_before
    assert share(model, small, "params") <= 0.9
    assert sum(p.numel() * 8 for p in small.parameters()) <= limit


def test_a_budget_without_data_is_met_by_magnitude_and_called_weak() -> None:
    model, _ = model_of("bert")
    small: Any = fxslim.slim(model, target=fxslim.macs(0.7))
    assert small.fxslim.plan.requested["method"] == "magnitude"
    assert any("weak" in note.reason for note in small.fxslim.plan.notes)
    assert small.fxslim.report.macs_after <= 0.7 * small.fxslim.report.macs_before


def test_a_budget_out_of_reach_is_refused() -> None:
    model, batches = model_of("bert")
    with pytest.raises(RequestError, match=r"cannot be reached.* leave (\d+\.\d)%") as refused:
        fxslim.slim(model, calibration=batches[:2], target=fxslim.params(0.01))
    least = float(re.search(r"leave (\d+\.\d)%", str(refused.value)).group(1)) / 100  # type: ignore[union-attr]
    small: Any = fxslim.slim(model, calibration=batches[:2], target=fxslim.params(least))  # what it says can be had
    left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert least - 0.001 < left <= least


def test_a_speed_up_is_met_by_what_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a clock that counts MACs, sizes are those of the same budget in MACs."""
    model, batches = model_of("bert")
    counted: list[float] = []

    def ratios(self: latency.Latency, models: dict[str, nn.Module], *_: Any, **__: Any) -> dict[str, Estimate]:
        dense = fxslim.count.macs_of(self.dense, **self.inputs)
        found = {name: fxslim.count.macs_of(own, **self.inputs) / dense for name, own in models.items()}
        counted.extend(found.values())
        return {name: Estimate(one, one * 0.99, one * 1.01) for name, one in found.items()}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency.Latency, "_ratios", ratios)
    small: Any = fxslim.slim(model, calibration=batches[:4], target=fxslim.speedup(1.5, inputs=batches[0]))
    reached = fxslim.count.macs_of(small, **batches[0]) / fxslim.count.macs_of(model, **batches[0])
    assert 1 / 1.5 * 0.9 < reached <= 1 / 1.5 * 1.03
    (made,) = small.fxslim.report.reached
    assert (made.target, made.unit, made.asked) == ("speedup(1.5)", "times faster", pytest.approx(1.5))
    assert made.measured == pytest.approx(1 / reached)
    assert made.predicted == pytest.approx(1.5, rel=0.1)
    assert made.within == pytest.approx(0.01)
    assert "speedup(1.5)" in str(small.fxslim.report)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    tables = len(counted)
    fxslim.slim(model, calibration=batches[:4], target=fxslim.speedup(1.5, inputs=batches[0]))
    assert len(counted) - tables < tables  # the table was read from disk


# Experts -------------------------------------------------------------------------------------------------------------


@functools.cache
def mixture() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return a mixture of experts with a part in the output that can be seen, and batches with padding."""
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
                             "intermediate_size": 12, "num_hidden_layers": 2, "num_local_experts": 5}  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval().double()
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(2 * drawn / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + drawn / 10)
    batches = []
    for _ in range(6):
        ids, mask = torch.randint(0, 50, (4, 9), generator=generator), torch.ones(4, 9, dtype=torch.int64)
        mask[1, 6:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return model, batches


EXPERTS = ("mlp:experts", "mlp.experts:gated_ffn")


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        (fxslim.macs(0.6), {}),
        (fxslim.macs(0.6), {"repair": False, "method": "wanda"}),
        (fxslim.params(0.45), {}),
        (fxslim.params(0.45), {"uniform": True}),
    ],
)
def test_one_budget_is_over_experts_too(target: Any, asked: dict[str, Any]) -> None:
    model, batches = mixture()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small: Any = fxslim.slim(model, calibration=batches, target=target, **asked)
    report = small.fxslim.report
    after = report.macs_after / report.macs_before if target.resource == "macs" else share(model, small, "params")
    assert 0.8 * target.share < after <= target.share
    fits = [fit for fit in report.fits if fit.site.endswith(EXPERTS)]
    assert fits and all(fit.how == ("sliced" if asked.get("repair", True) else "") for fit in fits)
    assert all(fit.damage > 0 or asked.get("uniform") for fit in fits)
    assert {part.site.name for part in small.fxslim.plan} == {fit.site for fit in report.fits}
    assert sum("chosen by magnitude, without repair" in note.reason for note in report.not_done) == 4
    assert report.verification.relative < 1e-10
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_what_is_expected_of_experts_is_the_divergence_of_the_masked_model() -> None:
    model, batches = mixture()
    facts = inspecting().run(subject(model, batches[0]))
    program, labels, sites = facts.get(Program), facts.get(Labels), facts.get(Sites)
    subjects, _ = subjects_of(program, sites.sites, unseen=True)
    assert [name.endswith(EXPERTS) for name in subjects.unseen] == [True] * 4

    def masking(parts: Any) -> Masks:
        return masks(program, labels, cut_of(labels, sites, tuple(parts), masks=True), parts)

    weigh_unseen(program, subjects)
    data = calibration(model, batches)
    assert expect_unseen(program, subjects, rows_of(program, data.batches), masking, lambda name: None) == []
    for name, site in subjects.unseen.items():
        curve, measured = subjects.curves[name, False], dict(subjects.expected[name, False])
        assert all(len(step) == (5 if site.groups else 1) for step in curve.steps)
        assert len(curve.steps) == (11 if site.groups else 3)
        sizes = [n for n in range(len(curve.steps) + 1) if float(curve.damage[n]) in measured]
        assert len(sizes) == len(measured) >= 2
        for steps in sizes:
            part = SitePlan(site=site, keep=curve.keep(site.units, steps))
            found = subjects.damage(name, False, steps)
            assert found == pytest.approx(
                divergence_of(model, new_plan(model, Choice((part,), ()), Request()), batches)
            )
            assert found > 1e-4


def divergence_of(model: nn.Module, plan: fxslim.Plan, batches: list[dict[str, Tensor]]) -> float:
    """Return the mean divergence of the masked model at tokens of every fifth sequence."""
    rows = [[value[row : row + 1] for value in batch.values()] for batch in batches for row in range(4)]
    apart: list[Tensor] = []
    for ids, mask in rows[4::5]:
        own = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            dense = model(**own).logits.log_softmax(-1)
            with fxslim.masked(model, plan):
                other = model(**own).logits.log_softmax(-1)
        apart.append((dense.exp() * (dense - other)).sum(-1)[mask.bool()])
    return float(torch.cat(apart).mean())


# Data ----------------------------------------------------------------------------------------------------------------


class Rows:
    """What a dataset of rows offers."""

    column_names = ("input_ids", "attention_mask", "labels", "text")

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, row: int) -> dict[str, Any]:
        length = int(self.batch["attention_mask"][row].sum())
        own = {name: value[row][:length].tolist() for name, value in self.batch.items()}
        return {**own, "labels": 1, "text": "words"}


def test_every_kind_of_data_says_the_same() -> None:
    model, (batch, *_) = model_of("bert")
    names = list(batch)
    kinds: list[Any] = [
        [batch],
        [tuple(batch.values())],
        iter([batch]),
        DataLoader([{name: batch[name][row] for name in names} for row in range(8)], batch_size=8),  # type: ignore[arg-type]
        Rows(batch),
        [{**batch, "labels": torch.zeros(8, dtype=torch.int64)}],
    ]
    expected = calibration(model, kinds[0])
    for kind in kinds:
        found = calibration(model, kind)
        assert found.tokens == expected.tokens == int(batch["attention_mask"].sum())
        for name in names:
            assert torch.equal(found.batches[0].inputs[name], batch[name]), (kind, name)


def test_padding_says_nothing() -> None:
    """Whatever stands at padding, the same units go and the same weights are found."""
    model, batches = model_of("bert")
    other = []
    for batch in batches[:4]:
        hidden = batch["attention_mask"] == 0
        other.append({**batch, "input_ids": torch.where(hidden, 5, batch["input_ids"])})
    first, second = (fxslim.slim(model, calibration=own, ffn=0.5, heads=0.5) for own in (batches[:4], other))
    assert any((batch["attention_mask"] == 0).any() for batch in batches[:4])
    for (name, mine), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-10), name


def test_no_more_tokens_are_used_than_asked() -> None:
    model, batches = model_of("bert")
    every, few = calibration(model, batches), calibration(model, batches, max_tokens=100, seed=3)
    assert few.tokens <= 100 < every.tokens
    assert calibration(model, batches, max_tokens=100, seed=3) == few


class Chain(nn.Module):
    """A feed-forward network whose hidden channels are copies: half of them can take the others' place exactly."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = nn.Linear(6, 8).double(), nn.Linear(8, 6).double()
        with torch.no_grad():
            for weight in (self.up.weight, self.up.bias, self.down.weight, self.down.bias):
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
            self.up.weight[4:] = self.up.weight[:4]
            self.up.bias[4:] = self.up.bias[:4]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


def test_copies_are_taken_out_at_no_loss() -> None:
    model = Chain()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(64, 6, dtype=torch.float64, generator=generator) for _ in range(4)]
    small: Any = fxslim.slim(model, calibration=batches, ffn=0.5)
    assert small.down.weight.shape == (6, 4)
    probe = torch.randn(10, 6, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        apart = float((small(probe) - model(probe)).norm() / model(probe).norm())
        sliced = fxslim.slim(model, calibration=batches, ffn=0.5, repair=False)
        assert apart < 1e-3 < float((sliced(probe) - model(probe)).norm() / model(probe).norm())


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxslim.passes.fitting import repair

    model, batches = model_of("bert")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain, calls = repair.refit, 0

    def stops(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(repair, "refit", stops)
    with pytest.raises(KeyboardInterrupt):
        fxslim.slim(model, calibration=batches, ffn=0.5, heads=0.5, inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "fxslim")


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"calibration": []}, InputError, "no batch"),
        ({"calibration": ["text"]}, InputError, "Tokenize"),
        ({"calibration": 5}, InputError, "iterable"),
        ({"calibration": {"input_ids": torch.ones(2, 3)}}, InputError, "in a list"),
        (
            {"calibration": [{"input_ids": IDS}, {"input_ids": IDS, "attention_mask": IDS}]},
            InputError,
            "batch 1 has attention_mask, batch 0 has not",
        ),
        ({"calibration": [{"input_ids": torch.ones(2, 3).long()}], "ffn": 0.0}, RequestError, "how much"),
        ({"method": "obs"}, RequestError, "give calibration"),
        ({"method": "wandb"}, RequestError, "Did you mean wanda"),
        ({"calibraton": []}, RequestError, "Did you mean calibration"),
        ({"max_tokens": 5}, RequestError, "does nothing"),
        ({"repair": True}, RequestError, "does nothing"),
        ({"uniform": True}, RequestError, "target"),
        ({"target": fxslim.macs(0.5)}, RequestError, "not both"),
        ({"seed": -1}, RequestError, "seed"),
    ],
)
def test_bad_requests_say_what_is_wrong(asked: dict[str, Any], error: type[Exception], says: str) -> None:
    model, _ = model_of("bert")
    with pytest.raises(error, match=says):
        fxslim.slim(model, **{"ffn": 0.5, **asked})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fxslim.macs(1.5), "between 0 and 1"),
        (lambda: fxslim.params(0), "between 0 and 1"),
        (lambda: fxslim.memory("400 apples"), "number of bytes"),
        (lambda: fxslim.speedup(0.5), "above 1"),
        (lambda: fxslim.slim(nn.Linear(2, 2), target=0.5), "give fxslim.macs"),
    ],
)
def test_bad_targets_say_what_is_wrong(make: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        make()


# Several processes ---------------------------------------------------------------------------------------------------


def _worker(rank: int, path: str, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model, batches = model_of("bert")
    own = [{name: value[rank * 4 : rank * 4 + 4] for name, value in batch.items()} for batch in batches[:5]]
    small: Any = fxslim.slim(model, calibration=own, ffn=0.5, heads=0.5)
    queue.put((rank, [part.keep for part in small.fxslim.plan], {k: v.numpy() for k, v in small.state_dict().items()}))
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds_on_all_the_data(tmp_path: Path) -> None:
    found = _of_two(_worker, tmp_path)
    model, batches = model_of("bert")
    halves = [{k: v[half : half + 4] for k, v in batch.items()} for half in (0, 4) for batch in batches[:5]]
    small: Any = fxslim.slim(model, calibration=halves, ffn=0.5, heads=0.5)
    for keeps, state in found.values():
        assert keeps == [part.keep for part in small.fxslim.plan]
        for name, value in small.state_dict().items():
            assert torch.allclose(torch.from_numpy(state[name]), value, rtol=1e-7, atol=1e-9), name


def _different(rank: int, path: str, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model, _ = model_of("bert")
    data = [{"input_ids": torch.randint(5, 99, (4, 8 + 24 * rank), generator=torch.Generator().manual_seed(rank))}] * 3
    counts: list[float] = []
    plain = Price.of

    def of(self: Price, resource: str, parts: Any) -> float:
        counts.append(plain(self, resource, parts))
        return counts[-1]

    Price.of = of  # type: ignore[method-assign]
    small: Any = fxslim.slim(model, calibration=data, target=fxslim.macs(0.6))
    kept = [part.keep for part in small.fxslim.plan]
    queue.put((rank, (kept, counts), {k: v.numpy() for k, v in small.state_dict().items()}))
    torch.distributed.destroy_process_group()


def test_processes_with_data_of_other_lengths_agree_on_sizes(tmp_path: Path) -> None:
    """MACs are counted at the sizes of an example, and every process has another one."""
    found = _of_two(_different, tmp_path)
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        torch.testing.assert_close(torch.from_numpy(found[1][1][name]), torch.from_numpy(value))


def _of_two(work: Any, folder: Path) -> dict[int, tuple[Any, dict[str, Any]]]:
    """Return what each of two processes has found, and its tensors."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=work, args=(rank, str(folder / "meet"), queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = {rank: (own, state) for rank, own, state in (queue.get(timeout=120) for _ in workers)}
    for worker in workers:
        worker.join(60)
    return found


os.environ.setdefault("HF_HUB_OFFLINE", "1")


# What plain transformers loads -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "skip", "fields"), [
    ("llama_gqa", (), {"intermediate_size", "num_attention_heads"}),
    ("bert", ("*attention*",), {"intermediate_size"}),
    ("bert", (), set()),
])  # fmt: skip
def test_even_sizes_load_without_fxslim_where_the_config_can_say_them(
    name: str, skip: tuple[str, ...], fields: set[str], tmp_path: Path
) -> None:
    model, batches = model_of(name)
    before = model.config.to_dict()
    small: Any = fxslim.slim(model, calibration=batches[:4], target=fxslim.macs(0.7), uniform=True, skip=skip)
    assert model.config.to_dict() == before
    assert set(small.fxslim.plan.config) == fields
    small.eval()
    with torch.no_grad():
        expected = small(**batches[0])[0]
    fxslim.save_pretrained(small, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(fxslim.from_pretrained(tmp_path / "ours").eval()(**batches[0])[0], expected)
    if not fields:
        assert not small.fxslim.report.plain.loads
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            type(model).from_pretrained(tmp_path / "ours")
        return
    plain = type(model).from_pretrained(tmp_path / "ours", attn_implementation=model.config._attn_implementation)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**batches[0])[0], expected, rtol=1e-6, atol=1e-6)


def test_half_precision_is_calibrated_in_single() -> None:
    model, batches = model_of("bert")
    half = copy.deepcopy(model).to(torch.bfloat16)
    small: Any = fxslim.slim(half, calibration=batches[:4], target=fxslim.macs(0.7))
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    plain: Any = fxslim.slim(half, plan=fxslim.plan(half, ffn=0.3, heads=0.25))
    with torch.no_grad():
        wanted = model.float()(**batches[5])[0]
        errors = [float((one(**batches[5])[0].float() - wanted).norm() / wanted.norm()) for one in (small, plain)]
    assert errors[0] < errors[1]  # chosen and fitted on data: closer than by magnitude


# Data and models that give little -------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two blocks with a norm each, and an output of one's choice."""

    def __init__(self, out: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))
        self.out = out

    def forward(self, x: Tensor) -> Any:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(norm(x))))
        if self.out == "argmax":
            return x.argmax(-1)
        if self.out == "infinite":
            return x.masked_fill(x > 1, -torch.inf)
        return x.detach() if self.out == "detach" else x


@pytest.mark.parametrize("out", ["argmax", "detach", "infinite"])
def test_outputs_without_a_gradient_count_all_tokens_alike(out: str) -> None:
    model = Small(out).double()
    x = [torch.randn(8, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    small: Any = fxslim.slim(model, x[0], calibration=x, target=fxslim.params(0.8))
    assert any("count alike" in note.reason for note in small.fxslim.plan.notes)
    with pytest.raises(InputError, match="gradients"):
        fxslim.slim(model, x[0], calibration=x, ffn=0.5, method="fisher")


def test_calibration_works_in_inference_mode() -> None:
    model = Small().double()
    x = [torch.randn(8, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    plain: Any = fxslim.slim(model, x[0], calibration=x, ffn=0.5)
    with torch.inference_mode():
        small: Any = fxslim.slim(model, x[0], calibration=x, ffn=0.5)
    assert small.fxslim.plan.sites == plain.fxslim.plan.sites


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_data_that_never_varies_changes_no_factor_of_a_norm(scale: float) -> None:
    model = Small().double()
    row = torch.randn(1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (scale * row).expand(12, 5, 16).clone()
    small: Any = fxslim.slim(model, x, calibration=[x], ffn=0.5)
    for mine, theirs in zip(small.norms, model.norms, strict=True):
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert float((small(x) - model(x)).norm() / model(x).norm()) < 1e-6  # one input: its output can be kept


@pytest.mark.parametrize(("batch", "match"), [
    (lambda: torch.full((4, 5, 16), torch.nan), "batch 1: x holds NaN"),
    (lambda: torch.zeros(0, 5, 16), "batch 1: x holds no rows"),
])  # fmt: skip
def test_bad_batches_are_named(batch: Any, match: str) -> None:
    x = torch.randn(8, 5, 16)
    with pytest.raises(InputError, match=match):
        fxslim.slim(Small(), x, calibration=[x, batch()], ffn=0.5)


def test_what_has_no_end_is_read_as_far_as_it_is_used() -> None:
    x = torch.randn(8, 5, 16)
    read = 0

    def endless() -> Iterator[Tensor]:
        nonlocal read
        while True:
            read += 1
            yield x

    fxslim.slim(Small(), x, calibration=endless(), max_tokens=24, ffn=0.5)
    assert read == 4


def test_a_bias_that_something_else_reads_is_not_fitted() -> None:
    class Tied(Small):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + self.down[0].bias

    model = Tied().double()
    x = [torch.randn(8, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    small: Any = fxslim.slim(model, x[0], calibration=x, ffn=0.5)
    assert torch.equal(small.down[0].bias, model.down[0].bias)
    assert any("is read by" in note.reason for note in small.fxslim.plan.notes)


def test_config_fields_that_no_shape_depends_on_stay_as_they_are(tmp_path: Path) -> None:
    """Windows, token ids and lengths that happen to equal an old size."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=64, pad_token_id=4,
        num_hidden_layers=2, vocab_size=99, sliding_window=32, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).double().eval()
    batches = [{"input_ids": torch.randint(5, 99, (4, 12))} for _ in range(6)]
    small: Any = fxslim.slim(model, calibration=batches, target=fxslim.macs(0.6), uniform=True)
    assert set(small.fxslim.plan.config) <= {"intermediate_size", "num_attention_heads", "num_key_value_heads"}
    assert "intermediate_size" in small.fxslim.plan.config
    small.save_pretrained(tmp_path)
    plain = MistralForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = torch.randint(5, 99, (2, 60))
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, small(input_ids=ids).logits, rtol=1e-9, atol=1e-9)
    again: Any = fxslim.slim(small, ffn=0.5)
    fxslim.save_pretrained(again, tmp_path / "again")
    loaded = fxslim.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, again(input_ids=ids).logits)


# Found by reviews ----------------------------------------------------------------------------------------------------


def test_one_logit_is_a_number_and_no_distribution() -> None:
    """A regression's divergence is a square; as a distribution over one class it would always be zero."""
    dense, other = {"logits": torch.tensor([[1.0], [2.0]])}, {"logits": torch.tensor([[2.0], [2.0]])}
    assert divergence(dense, other, None) == (1.0, 5.0)
    assert size(dense, None) == 5.0
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, generator=torch.Generator().manual_seed(0))
    ratings = {"labels": torch.tensor([4.5, 0.5])}
    assert float(loss(dense, None, ratings, draw)) == pytest.approx(float((dense["logits"] * noise).sum()))


def test_labels_that_name_no_class_are_drawn() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def own(labels: dict[str, Tensor]) -> float:
        return float(loss({"logits": logits}, None, labels, torch.Generator().manual_seed(1)))

    assert own({"labels": torch.full((6,), -1)}) == own({"labels": torch.full((6,), 7)}) == own({})
    given = torch.tensor([0, 1, 2, 0, 1, 2])
    assert own({"labels": given}) == pytest.approx(float(functional.cross_entropy(logits, given, reduction="sum")))


def test_branches_beside_each_other_make_up_for_one_stream_once() -> None:
    """Attention and feed-forward of a GPT-NeoX layer add to one stream: the second sees what the first has done."""
    model, batches = model_of("gpt_neox")
    facts = inspecting().run(subject(model, batches[0]))
    subjects, _ = subjects_of(facts.get(Program), facts.get(Sites).sites)
    counts = {name.rsplit(":", 1)[1]: {len(call.residual) for one in own for call in one.calls}
              for name, own in subjects.reads.items()}  # fmt: skip
    assert counts == {"attention": {1}, "ffn": {2}}
    for layer in ("layers.0", "layers.1"):
        attention, ffn = (own[0].calls[0] for name, own in subjects.reads.items() if layer in name)
        assert attention.node in {ffn.residual[0], *ffn.residual[0].all_input_nodes} | set(_behind(ffn.residual[0]))
        assert attention.residual[0] is ffn.residual[1]


def _behind(node: Any) -> Iterator[Any]:
    while node.all_input_nodes and node.op == "call_function":
        node = node.all_input_nodes[0]
        yield node


def test_what_the_caller_has_switched_on_changes_nothing() -> None:
    model, batches = Small(), []
    for seed in range(4):
        batches.append(torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(seed)))
    plain: Any = fxslim.slim(model, batches[0], calibration=batches, ffn=0.5)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            plan = fxslim.plan(model, batches[0], calibration=batches, ffn=0.5)
            with exact():
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
                assert (batches[0] @ batches[0].mT).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [part.keep for part in plan] == [part.keep for part in plain.fxslim.plan]
    with torch.inference_mode():
        fisher = fxslim.plan(model, batches[0], calibration=batches, ffn=0.5, method="fisher")
    assert fisher.sites == fxslim.plan(model, batches[0], calibration=batches, ffn=0.5, method="fisher").sites


def test_magnitude_without_data_is_called_weak() -> None:
    model, _ = model_of("bert")
    for form in (fxslim.slim, fxslim.compile):
        small: Any = form(model, ffn=0.5)
        assert sum("weak choice" in note.reason for note in small.fxslim.report.notes) == 1
        assert "weak choice" in str(small.fxslim.report)
    assert "weak" not in str(fxslim.slim(model).fxslim.report)


def test_what_was_not_inspected_is_traced_again() -> None:
    model, batches = model_of("bert")
    found = fxslim.inspect(model)
    given = [{**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])} for batch in batches[:2]]
    small: Any = fxslim.slim(found, calibration=given, ffn=0.5)
    assert small.fxslim.report.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches[:2])


def test_copies_are_said_and_fit_no_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 16, dtype=torch.float64, generator=generator)
    model = Small().double()
    few: Any = fxslim.slim(model, x, calibration=[x] * 20, ffn=0.5)
    reasons = [note.reason for note in few.fxslim.plan.notes if note.where == "calibration"]
    assert any("76 of 80 sequences are copies" in reason for reason in reasons)
    assert any("fewer than 4 tokens" in reason for reason in reasons)
    assert {fit.how for fit in few.fxslim.report.fits} <= {"scaled", "sliced"}
    many: Any = fxslim.slim(model, x, calibration=[torch.randn(80, 5, 16, generator=generator).double()], ffn=0.5)
    assert not [note for note in many.fxslim.plan.notes if note.where == "calibration"]
    assert {fit.how for fit in many.fxslim.report.fits} == {"refit"}


def pair_of_one_config() -> tuple[Any, Any]:
    config = transformers.BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=2,
                                     vocab_size=99)  # fmt: skip
    return transformers.BertModel(config).eval(), transformers.BertModel(config).eval()


def test_narrowing_in_place_leaves_a_config_that_others_share() -> None:
    model, other = pair_of_one_config()
    before = other.config.to_dict()
    batches = [{"input_ids": torch.randint(5, 99, (8, 12))} for _ in range(4)]
    small = fxslim.slim(model, calibration=batches, target=fxslim.macs(0.8), uniform=True, skip="*attention*",
                        inplace=True)  # fmt: skip
    assert small is model and model.config.intermediate_size < 64
    assert other.config.to_dict() == before and not hasattr(other.config, "fxslim")
    assert {id(module.config) for module in model.modules() if hasattr(module, "config")} == {id(model.config)}
    assert fxslim.slim(other, ffn=0.5).config.intermediate_size == 32
    assert other.config.to_dict() == before and not hasattr(other.config, "fxslim")


@pytest.mark.parametrize("where", ["put", "own_config", "replay"])
def test_an_interrupt_while_narrowing_in_place_leaves_the_model_as_it_was(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair_of_one_config()
    batches = [{"input_ids": torch.randint(5, 99, (8, 12))} for _ in range(4)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config, seen = model.config, []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    plain = getattr(api, where)

    def stops(*args: Any) -> Any:
        plain(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, where, stops)
    with pytest.raises(KeyboardInterrupt):
        fxslim.slim(model, calibration=batches, ffn=0.5, inplace=True)
    assert model.config is config and model.encoder.layer[0].attention.self.config is config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    seen.clear()
    model(**batches[0])
    handle.remove()
    model(**batches[0])
    assert seen == [1]
