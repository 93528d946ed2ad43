"""Tapes run what the model runs; consumers are found with the residual stream that they join."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import fxslim
from fxslim.calibration import calibration
from fxslim.errors import InputError
from fxslim.passes import pipelines
from fxslim.passes.fitting.norms import norms, refit_norm
from fxslim.passes.fitting.observe import gradients
from fxslim.passes.fitting.outputs import divergence, draw_of
from fxslim.passes.fitting.sensitivity import sensitivity
from fxslim.passes.fitting.sequences import rows_of
from fxslim.passes.fitting.subjects import subjects_of
from fxslim.passes.fitting.tape import Tape
from fxslim.passes.planning import subject
from fxslim.passes.sites import Sites
from fxslim.pipeline import Facts
from fxslim.program import Program

from agreement import difference, outputs
from everywhere import ENTRIES


def found(name: str) -> tuple[nn.Module, list[dict[str, Any]], Facts]:
    """Return a model, batches in several sizes, and what the passes found."""
    entry = ENTRIES[name]
    model = entry.build(attn="sdpa" if entry.sdpa else "eager")
    shortest = max(8, entry.min_length)
    batches = [entry.inputs(batch=b, length=shortest + more, seed=b) for b, more in ((3, 0), (5, 2), (2, 1))]
    facts = pipelines.inspecting().run(subject(model, batches[0]))
    return model, batches, facts


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "t5", "gptj", "opt"])
def test_a_tape_ends_where_the_model_does(name: str) -> None:
    model, batches, facts = found(name)
    program = facts.get(Program)
    tape = Tape(program, batches, program.tensors)
    with torch.no_grad():
        expected = [outputs(model, {**batch, "use_cache": False} if name != "bert" else batch) for batch in batches]
    for node in tape.nodes[5 :: max(len(tape.nodes) // 4, 1)]:
        tape.advance(node)  # whatever was run before, the rest gives the same
        for i, want in enumerate(expected):
            leaves = pytree.tree_leaves_with_path(tape.outputs(i))
            have = {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}
            shared = want.keys() & have.keys()
            assert shared
            assert difference({k: want[k] for k in shared}, {k: have[k] for k in shared}) < 1e-6


def test_a_fork_leaves_the_tape_where_it_is() -> None:
    _, batches, facts = found("bert")
    program = facts.get(Program)
    tape = Tape(program, batches, program.tensors)
    tape.advance(tape.nodes[10])
    before = [set(values) for values in tape.values]
    other = tape.fork()
    other.advance(other.nodes[-1])
    assert (tape.at, [set(values) for values in tape.values]) == (10, before)
    assert other.at == len(tape.nodes) - 1


def test_inputs_that_were_not_traced_are_refused() -> None:
    _, batches, facts = found("bert")
    program = facts.get(Program)
    with pytest.raises(InputError, match="token_type_ids"):
        Tape(program, [{**batches[0], "token_type_ids": batches[0]["input_ids"]}], program.tensors)


@pytest.mark.parametrize(
    ("name", "joined"),
    [("bert", True), ("llama_gqa", True), ("t5", True), ("gptj", True), ("gpt_neox", True), ("gemma3", False)],
)
def test_the_residual_stream_is_seen_unless_a_norm_stands_between(name: str, joined: bool) -> None:
    _, _, facts = found(name)
    subjects, notes = subjects_of(facts.get(Program), facts.get(Sites).sites)
    assert not notes
    calls = [call for own in subjects.reads.values() for one in own for call in one.calls]
    assert calls
    assert {bool(call.residual) for call in calls} == {joined}


def test_a_shared_layer_is_one_consumer_with_several_calls() -> None:
    _, _, facts = found("albert")
    subjects, _ = subjects_of(facts.get(Program), facts.get(Sites).sites)
    for name, site in subjects.sites.items():
        if site.kind in ("ffn", "attention") and not site.task_head:
            assert [len(one.calls) > 1 for one in subjects.reads[name]] == [True]


def test_tied_weights_are_not_fitted_for_one_of_their_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8).double(), nn.Linear(8, 6, bias=False).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.up(x).relu()
            return x + self.down(hidden) + functional.linear(hidden, self.down.weight.tanh())

    batches = [torch.randn(4, 3, 6, dtype=torch.float64)]
    small: Any = fxslim.slim(Tied().eval(), calibration=batches, ffn=0.5, repair=True)
    assert any("without repair" in note.reason for note in small.fxslim.plan.notes)
    assert len(small.fxslim.plan.sites) == 1
    assert not small.fxslim.plan.weights_changed


def test_gradients_are_those_of_every_sample_by_itself() -> None:
    """Against autograd, one sequence at a time, with a mask in the model's own forward."""
    model, batches, facts = found("bert")
    program = facts.get(Program)
    data = calibration(model, batches[:1])
    subjects, _ = subjects_of(program, facts.get(Sites).sites)
    name, site = next((n, s) for n, s in subjects.sites.items() if s.kind == "ffn")
    wanted = {name: (site.units, subjects.reads[name])}
    inputs = [dict(batch.inputs) for batch in data.batches]
    rows = rows_of(program, data.batches)
    (result,) = [own for _, own in gradients(Tape(program, inputs, program.tensors), wanted, rows, seed=3)]
    (consumer,) = subjects.reads[name]
    module = model.get_submodule(consumer.weight.removesuffix(".weight"))
    mask_of = inputs[0]["attention_mask"].bool()
    generator = draw_of(data.batches[0].inputs, 3)
    noise = torch.randn((int(mask_of.sum()), model.config.hidden_size), generator=generator).double()
    samples = []
    for row in range(len(mask_of)):
        mask = torch.ones(site.units, dtype=torch.float64, requires_grad=True)
        handle = module.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
        hidden = model(**{k: v[row : row + 1] for k, v in inputs[0].items()}).last_hidden_state[0]
        before = int(mask_of[:row].sum())
        own = noise[before : before + int(mask_of[row].sum())]
        samples.append(torch.autograd.grad((hidden[mask_of[row]] * own).sum(), mask)[0])
        handle.remove()
    stacked = torch.stack(samples)
    assert torch.allclose(torch.from_numpy(result.first), stacked.abs().mean(0), rtol=1e-4)
    assert torch.allclose(torch.from_numpy(result.second), stacked.square().mean(0), rtol=1e-4)


def test_divergence_is_kl_of_logits_and_squares_of_anything_else() -> None:
    first, second = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    p, q = first.softmax(-1)[mask.bool()], second.softmax(-1)[mask.bool()]
    total, weight = divergence({"logits": first}, {"logits": second}, mask)
    assert total == pytest.approx(float((p * (p / q).log()).sum()))
    assert weight == 3
    total, weight = divergence((first,), (second,), mask)
    assert total == pytest.approx(float((first - second)[mask.bool()].square().sum()))
    assert weight == pytest.approx(float(first[mask.bool()].square().sum()))
    total, _ = divergence((first,), (second,), mask, torch.tensor([False, True]))
    assert total == pytest.approx(float((first - second)[1, 0].square().sum()))


def test_sensitivity_is_the_jacobian_of_the_output() -> None:
    """The expected damage of a small error is the measured one: the metric and weights against the real model.

    One draw of noise gives a sample of the metric; their mean is what the Jacobian makes of an error.
    """
    model, batches, facts = found("bert")
    model = model.double()
    facts = pipelines.inspecting().run(subject(model, batches[0]))
    program = facts.get(Program)
    data = calibration(model, batches[:1])
    subjects, _ = subjects_of(program, facts.get(Sites).sites)
    rows = rows_of(program, data.batches)
    consumers = [one for own in subjects.reads.values() for one in own]
    inputs = [dict(batch.inputs) for batch in data.batches]
    tape = Tape(program, inputs, {n: t.detach() for n, t in program.tensors.items()})
    draws = 400
    total: dict[str, Tensor] = {}
    for seed in range(draws):
        made = sensitivity(tape, consumers, rows, seed=seed)
        for name, root in made.roots.items():
            total[name] = total.get(name, torch.zeros_like(root)) + root @ root.T / draws
    with torch.no_grad():
        dense = model(**batches[0]).last_hidden_state
    mask = batches[0]["attention_mask"].bool()
    generator = torch.Generator().manual_seed(0)
    for consumer in consumers[-2:]:
        module = model.get_submodule(consumer.weight.removesuffix(".weight"))
        ratios = []
        for _ in range(12):
            error = 1e-4 * torch.randn(*mask.shape, dense.shape[-1], generator=generator, dtype=torch.float64)
            error = error * mask[..., None]
            handle = module.register_forward_hook(lambda m, a, out, error=error: out + error)
            with torch.no_grad():
                apart = model(**batches[0]).last_hidden_state - dense
            handle.remove()
            measured = float(apart[mask].square().sum() / dense[mask].square().sum())
            spread = error[mask].T @ error[mask] / int(mask.sum())
            ratios.append(float((total[consumer.weight] * spread).sum()) / measured)
        assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.15)
    for node, weights in made.weights.items():
        counts, _ = rows.of(node, 0, weights[0].numel(), weights[0].device)
        assert float(weights[0][counts].mean()) == pytest.approx(1.0, abs=0.1)  # the floor adds a little


def test_factors_of_norms_are_least_squares() -> None:
    model, batches, facts = found("bert")
    program = facts.get(Program)
    data = calibration(model, batches)
    rows = rows_of(program, data.batches)
    own = norms(program)
    modules = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert {one.weight.removesuffix(".weight") for one in own} == modules
    last = own[-1]
    inputs = [dict(batch.inputs) for batch in data.batches]
    other = {n: t if "intermediate" not in n else t + 0.3 for n, t in program.tensors.items()}  # a model that is off
    mine, dense = Tape(program, inputs, other), Tape(program, inputs, program.tensors)
    found_ = refit_norm(last, mine, dense, rows)
    z, y = [], []
    for i, batch in enumerate(batches):
        mask = batch["attention_mask"].bool().reshape(-1)
        z.append(last.plain(mine, i)[mask].double())
        y.append(dense.peek(last.node, i).reshape(-1, z[0].shape[-1])[mask].double())
    rows_z, rows_y = torch.cat(z), torch.cat(y)
    for channel in (0, 3):
        line = torch.stack([rows_z[:, channel], torch.ones(len(rows_z), dtype=torch.float64)], 1)
        want = torch.linalg.lstsq(line, rows_y[:, channel, None]).solution[:, 0]
        assert found_[last.weight][channel].item() == pytest.approx(float(want[0]), rel=1e-4)
        assert found_[str(last.bias)][channel].item() == pytest.approx(float(want[1]), rel=1e-4, abs=1e-5)
    same = refit_norm(last, Tape(program, inputs, program.tensors), Tape(program, inputs, program.tensors), rows)
    for name, tensor in same.items():  # the dense model itself needs nothing
        torch.testing.assert_close(tensor, program.tensors[name], rtol=1e-4, atol=1e-5)
