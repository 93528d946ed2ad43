"""Paths: every way in which a model can be run, and no trace of having run it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxslim.passes.paths import Path, generates, paths, tensors_of
from fxslim.sharing import evaluating

from architectures import ARCHITECTURES
from stacks import Feed, Stack

MASK = frozenset({"attention_mask"})


@pytest.mark.parametrize(
    ("name", "attention", "expected"),
    [
        ("bert", "eager", ["as given", "without mask", "sdpa attention", "sdpa attention without mask"]),
        ("bert", "sdpa", ["as given", "without mask", "eager attention", "eager attention without mask"]),
        ("gptj", "eager", ["as given", "without mask", "generate with cache"]),
        ("vit_classify", "sdpa", ["as given", "eager attention"]),
    ],
)
def test_every_path_that_a_model_offers(name: str, attention: str, expected: list[str]) -> None:
    entry = ARCHITECTURES[name]
    model = entry.build(attn=attention)  # type: ignore[arg-type]
    assert [path.name for path in paths(model, entry.inputs(), filled=MASK)] == [*expected, "training"]
    assert [path.name for path in paths(model, entry.inputs(), filled=MASK, train=False)] == expected


def test_a_plain_module_has_one_path_in_either_mode() -> None:
    stack = Stack((Feed(),))
    path, trained = paths(stack.build(), {"x": stack.inputs()})
    assert trained == Path("training", path.inputs, training=True)
    assert path == Path("as given", path.inputs)
    assert not generates(stack.build())


def test_masks_stay_where_they_may_not_be_left_out() -> None:
    entry = ARCHITECTURES["bert"]
    assert [path.name for path in paths(entry.build(), entry.inputs())] == [*("as given", "sdpa attention", "training")]


def test_switching_attention_is_undone() -> None:
    entry = ARCHITECTURES["llama_gqa"]
    model = entry.build(attn="sdpa")
    given, _, eager, *_ = paths(model, entry.inputs(), filled=MASK)
    one, other = given.run(model), eager.run(model)
    assert model.config._attn_implementation == "sdpa"
    assert max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) < 1e-6
    assert eager.attention == "eager"


def test_attention_is_switched_while_running() -> None:
    entry = ARCHITECTURES["bert"]
    model, seen = entry.build(attn="eager"), []
    model.encoder.layer[0].register_forward_hook(lambda *_: seen.append(model.config._attn_implementation))
    found = paths(model, entry.inputs(), filled=MASK)
    seen.clear()
    for path in found:
        path.run(model)
    assert seen == ["eager", "eager", "sdpa", "sdpa", "eager"]


def test_generation_returns_the_logits_of_every_step() -> None:
    entry = ARCHITECTURES["gpt2"]
    model = entry.build()
    path = next(path for path in paths(model, entry.inputs(), filled=MASK) if path.generate)
    steps = path.run(model)
    assert [tuple(step.shape) for step in steps] == [(3, 99)] * 3


def test_modes_come_back_after_errors_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    model[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == before


def test_dropout_is_off_and_gradients_are_not_recorded() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    path = Path("as given", {"input": torch.ones(8, 2)})
    first, second = path.run(model)[0], path.run(model)[0]
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert model.training


def test_results_are_the_tensors() -> None:
    x = torch.ones(2)
    found = tensors_of({"a": x, "b": (x.long(), [x * 2]), "c": None, "d": 3.0})
    assert [t.tolist() for t in found] == [[1, 1], [1, 1], [2, 2]]


def test_a_path_that_cannot_run_fails() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such input")

    with pytest.raises(ValueError, match="no such input"):
        Path("as given", {"x": torch.ones(1)}).run(Picky())
