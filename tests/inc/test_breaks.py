"""Where the old tool broke: each failure that was measured, and what is right instead."""

from __future__ import annotations

import copy
import logging
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from fxslim.errors import InputError, RequestError, VerifyError
from fxslim.inc import WeightPruningConfig, model_slim, parse_auto_slim_config, prepare_compression, prepare_pruning

D, F = 8, 64


class Block(nn.Module):
    """A feed-forward block of a kind, with a residual and a head, so that nothing is the model's last layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.up, self.gate, self.down, self.other = nn.Linear(D, F), nn.Linear(D, F), nn.Linear(F, D), nn.Linear(F, D)
        self.norm, self.head = nn.LayerNorm(F), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.kind == "second consumer":  # not linear: it reads every channel
            h = torch.relu(h)
            out = self.down(h) + h.square().sum(-1, keepdim=True)
        elif self.kind == "sigmoid gate":
            out = self.down(h * torch.sigmoid(self.gate(x)))
        elif self.kind == "shared":
            h = torch.relu(h)
            out = self.down(h) * torch.sigmoid(self.other(h))
        elif self.kind == "tanh":
            out = self.down(torch.tanh(h))
        elif self.kind == "norm":
            out = self.down(self.norm(h))
        else:
            out = self.down(torch.relu(h))
        result: Tensor = self.head(x + out)
        return result


def block(kind: str) -> Block:
    return Block(kind).double()


def loader() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, D, dtype=torch.float64, generator=generator) for _ in range(3)]


def zero(layer: nn.Linear, count: int) -> None:
    with torch.no_grad():
        layer.weight[:, torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(2))[:count]] = 0


def outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [model(x) for x in loader()]


def same(first: list[Tensor], second: list[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def slimmed(model: Block, multiple: int = 1) -> Block:
    before = outputs(model)
    small = model_slim(model, loader(), multiple)
    assert small is model
    same(outputs(model), before)
    return model


def pruned(model: nn.Module, *, data: Any = None, **asked: Any) -> None:
    """Prune by magnitude before the first step, as parse_auto_slim_config has it."""
    conf = WeightPruningConfig(parse_auto_slim_config(model, data, **asked), pruning_type="magnitude",
                               pruning_scope="local")  # fmt: skip
    callbacks = prepare_compression(model, conf, dataloader=data).callbacks
    callbacks.on_train_begin()
    callbacks.on_train_end()


# What stands between the linears ----------------------------------------------------------------------------------


def test_a_hidden_with_a_second_nonlinear_consumer_is_not_slimmed() -> None:
    """Slimmed, silently wrong (largest difference 4.4)."""
    model = block("second consumer")
    zero(model.down, 32)
    slimmed(model)
    assert model.down.weight.shape == (D, F) and model.up.weight.shape == (F, D)
    with pytest.raises(RequestError, match=r"no feed-forward block was found"):
        parse_auto_slim_config(model, loader(), ffn2_sparsity=0.5)


def test_a_sigmoid_gate_is_slimmed_with_its_linear() -> None:
    """Slimmed, then the forward crashed."""
    model = block("sigmoid gate")
    pruned(model, data=loader(), ffn2_sparsity=0.5)
    slimmed(model)
    assert [tuple(layer.weight.shape) for layer in (model.up, model.gate, model.down)] == [(32, D), (32, D), (D, 32)]


def test_a_hidden_shared_by_two_linears_loses_the_same_channels_in_both() -> None:
    """IndexError, or a broken model."""
    model = block("shared")
    (keys,) = parse_auto_slim_config(model, loader(), ffn2_sparsity=0.5)
    assert sorted(keys["op_names"]) == ["down", "other"]
    pruned(model, data=loader(), ffn2_sparsity=0.5)
    assert torch.equal((model.down.weight == 0).all(0), (model.other.weight == 0).all(0))
    slimmed(model)
    assert (model.up.out_features, model.down.weight.shape[1], model.other.weight.shape[1]) == (32, 32, 32)


def test_a_hidden_shared_by_two_linears_with_zeros_in_one_stays() -> None:
    model = block("shared")
    zero(model.down, 32)
    slimmed(model)
    assert model.up.weight.shape == (F, D)


def test_a_tanh_between_the_linears_is_found() -> None:
    """Not found, silently."""
    model = block("tanh")
    pruned(model, data=loader(), ffn2_sparsity=0.75)
    slimmed(model)
    assert model.up.weight.shape == (16, D)


def test_a_norm_between_the_linears_is_refused_with_the_reason() -> None:
    """Not found, silently. What a norm returns depends on every channel: none can go."""
    model = block("norm")
    with pytest.raises(RequestError, match=r"no feed-forward block was found. What was found instead: .*down.*norm"):
        parse_auto_slim_config(model, loader(), ffn2_sparsity=0.5)
    zero(model.down, 32)
    slimmed(model)
    assert model.up.weight.shape == (F, D)


# How many go ------------------------------------------------------------------------------------------------------


def test_which_zeros_go_at_a_multiple_is_always_the_same() -> None:
    """40 zero columns at multiple 32: ``random.sample`` decided which 32 went."""
    models = []
    for seed in (3, 4):
        model = block("relu")
        zero(model.down, 40)
        torch.manual_seed(seed)
        models.append(slimmed(model, 32))
    assert models[0].down.weight.shape == (D, 32)
    assert all(
        torch.equal(one, other) for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )


def test_fewer_zeros_than_the_multiple_stay_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """31 zero columns: nothing happened, and nothing was said."""
    model = block("relu")
    zero(model.down, 31)
    with caplog.at_level(logging.WARNING, logger="fxslim"):
        slimmed(model, 32)
    assert model.up.weight.shape == (F, D)
    assert "rounded up to a multiple of 32, everything stays" in caplog.text
    slimmed(model, 1)
    assert model.up.weight.shape == (F - 31, D)


def test_half_of_the_heads_is_half_of_the_heads() -> None:
    """``int(0.4999…·n)`` turned a 50 % head target into 25 %."""
    for decay in ("exp", "cos"):
        model = bert()
        conf = WeightPruningConfig([{"pattern": "mha", "target_sparsity": 0.5}], end_step=7, pruning_scope="local",
                                   sparsity_decay_type=decay)  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        callbacks = prepare_pruning(model, conf, optimizer)
        for _ in range(7):
            model(torch.arange(14).reshape(2, 7)).last_hidden_state.square().mean().backward()
            optimizer.step()
        callbacks.on_train_end()
        columns = (model.encoder.layer[0].attention.output.dense.weight == 0).all(0)
        assert columns.reshape(4, 4).all(1).sum() == 2


# Heads ------------------------------------------------------------------------------------------------------------


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_attention_heads=4, intermediate_size=32, num_hidden_layers=1, vocab_size=20)
    return BertModel(config).double().eval()


@pytest.mark.parametrize("where", ["output", "value"])
def test_a_head_goes_when_nothing_of_it_is_read(where: str) -> None:
    """Only if q and k and v *and* the output columns were all zero; output columns alone changed nothing."""
    model = bert()
    attention = model.encoder.layer[0].attention
    with torch.no_grad():
        if where == "output":
            attention.output.dense.weight[:, 4:12] = 0
        else:  # values that are zero whatever is read
            attention.self.value.weight[4:12] = 0
            attention.self.value.bias[4:12] = 0
    x = torch.arange(14).reshape(2, 7)
    before = model(x).last_hidden_state
    model_slim(model)
    assert attention.self.query.weight.shape == (8, 16) and attention.output.dense.weight.shape == (16, 8)
    assert torch.allclose(model(x).last_hidden_state, before, rtol=0, atol=1e-12)


# Errors -----------------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    hooks = {
        name: len(module._forward_pre_hooks) + len(module._forward_hooks) for name, module in model.named_modules()
    }
    return {"tensors": {name: value.clone() for name, value in model.state_dict().items()}, "hooks": hooks,
            "forward": [vars(module).get("forward") for module in model.modules()]}  # fmt: skip


def untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after["hooks"] == before["hooks"] and after["forward"] == before["forward"]
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(value, after["tensors"][name]) for name, value in before["tensors"].items())


def test_an_error_in_model_slim_is_raised_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any error became one warning, and a half-changed model."""
    model = bert()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[:, :16] = 0
        model.encoder.layer[0].attention.output.dense.weight[:, 4:12] = 0
    before = state_of(model)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise VerifyError("somewhere", 1.0, 0.1, "a test")

    monkeypatch.setattr("fxslim.passes.narrowing.compare", fails)
    with pytest.raises(VerifyError):
        model_slim(model, round_multiplier=1)
    untouched(model, before)


CASES: dict[str, Callable[[nn.Module, Any], object]] = {
    "second pruner names nothing": lambda model, optimizer: prepare_pruning(
        model, WeightPruningConfig([{"pattern": "mha"}, {"op_names": ["nowhere"]}], end_step=4), optimizer
    ),
    "second pruner has no size": lambda model, optimizer: prepare_pruning(
        model,
        WeightPruningConfig([{"pattern": "mha"}, {"op_names": ["query"], "pattern": "5x1"}], end_step=4),
        optimizer,
    ),
    "data of another kind": lambda model, optimizer: prepare_pruning(
        model, WeightPruningConfig([{}, {"pruning_type": "wanda", "pattern": "1x1"}], end_step=4), optimizer, ["text"]
    ),
    "an optimizer that cannot be seen": lambda model, optimizer: prepare_pruning(
        model, WeightPruningConfig(end_step=4), types.SimpleNamespace(param_groups=[], state={})
    ),
    "an optimizer that cannot be seen, beside data": lambda model, optimizer: prepare_pruning(
        model,
        WeightPruningConfig(pruning_type="wanda", pattern="1x1", target_sparsity=0.5),
        types.SimpleNamespace(param_groups=[], state={}),
        [{"input_ids": torch.arange(14).reshape(2, 7)}],
    ),
    "no optimizer at all": lambda model, optimizer: prepare_pruning(model, WeightPruningConfig(end_step=4), model),
    "limits": lambda model, optimizer: prepare_pruning(
        model, WeightPruningConfig([{"pattern": "mha"}, {"target_sparsity": 0.97, "pattern": "16x1",
                                    "max_sparsity_ratio_per_op": 0.975}], pruning_type="retrain_free"), optimizer,
        [{"input_ids": torch.arange(14).reshape(2, 7)}]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_error_while_preparing_changes_nothing(case: str) -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state_of(model)
    with pytest.raises((RequestError, InputError)):
        CASES[case](model, optimizer)
    untouched(model, before)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_nothing_is_patched_and_everything_can_be_undone() -> None:
    """``torch.save``, ``optimizer.step`` and ``forward`` were replaced for good."""
    save, load = torch.save, torch.load
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state_of(model)
    callbacks = prepare_pruning(model, WeightPruningConfig([{"pattern": "mha"}, {}], target_sparsity=0.5, end_step=4),
                                optimizer)  # fmt: skip
    assert torch.save is save and torch.load is load
    assert "step" not in vars(optimizer) or vars(optimizer)["step"].__name__ == "step"
    assert not {"prunings", "inc_hook_handle"} & vars(model).keys()
    assert model.state_dict().keys() == before["tensors"].keys()
    whole = pickle.loads(pickle.dumps(model))  # the masks are no part of a copy
    x = torch.arange(14).reshape(2, 7)
    assert torch.equal(whole(x).last_hidden_state, model(x).last_hidden_state)
    assert pickle.loads(pickle.dumps(optimizer)).state_dict() == optimizer.state_dict()
    callbacks.release()
    untouched(model, before)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_two_configs_one_after_the_other_do_not_know_of_each_other() -> None:
    model = block("relu")
    for target in (0.25, 0.5):
        conf = WeightPruningConfig([{"op_names": ["up"], "pattern": "1x1"}], target_sparsity=target,
                                   pruning_type="magnitude")  # fmt: skip
        prepare_pruning(model, conf, torch.optim.SGD(model.parameters(), lr=0.1)).on_train_end()
        assert (model.up.weight == 0).double().mean() == target
    assert (model.down.weight != 0).all()


def test_what_is_called_beside_the_hooks_counts_once() -> None:
    """Scripts that call the callbacks of ``prepare_pruning`` as well."""
    sparsities = []
    for by_hand in (False, True):
        model = block("relu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        conf = WeightPruningConfig(target_sparsity=0.5, pattern="1x1", end_step=6, sparsity_decay_type="linear")
        callbacks: Any = prepare_pruning(model, conf, optimizer)
        if by_hand:
            callbacks.on_train_begin()
        seen = []
        for step, x in enumerate(loader()):
            if by_hand:
                callbacks.on_epoch_begin(0)
                callbacks.on_step_begin(step)
            optimizer.zero_grad()
            loss = callbacks.on_after_compute_loss(x, None, model(x).square().mean())
            loss.backward()
            if by_hand:
                callbacks.on_before_optimizer_step()
            optimizer.step()
            if by_hand:
                callbacks.on_after_optimizer_step()
                callbacks.on_step_end()
                callbacks.on_epoch_end()
            seen.append(callbacks.sparsity["weights"])
        callbacks.release()
        sparsities.append(seen)
    assert sparsities[0] == sparsities[1]
    assert sparsities[0] == pytest.approx([1 / 12, 2 / 12, 3 / 12], abs=1e-3)


def test_model_slim_takes_masks_off_that_nobody_took_off() -> None:
    """Scripts of ``prepare_pruning`` never called ``on_train_end``."""
    model = block("relu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    conf = WeightPruningConfig(parse_auto_slim_config(model, loader(), ffn2_sparsity=0.5), end_step=3)
    prepare_pruning(model, conf, optimizer, loader())
    for x in loader():
        model(x).square().mean().backward()
        optimizer.step()
    slimmed(model)
    assert model.up.weight.shape == (32, D)
    model(loader()[0]).sum().backward()  # no mask of another size is left behind
    assert not optimizer._optimizer_step_pre_hooks


def test_a_schedule_that_training_does_not_reach_is_told() -> None:
    """The last update never came when training had exactly ``end_step`` steps."""
    model = block("relu")
    callbacks = prepare_compression(
        model, WeightPruningConfig(target_sparsity=0.5, pattern="1x1", end_step=9)
    ).callbacks
    for x in loader():
        model(x).square().mean().backward()
        callbacks.on_before_optimizer_step()
        callbacks.on_after_optimizer_step()
    with pytest.warns(UserWarning, match=r"before masks reached their target"):
        callbacks.on_train_end()
    zeros = sum(int((layer.weight == 0).sum()) for layer in (model.up, model.gate, model.down, model.other))
    assert zeros == 4 * D * F // 2


def test_pruners_that_overlap_hold_together() -> None:
    """Heads, blocks of the weights behind them, and single weights before them, on one model and one schedule each."""
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruners = [
        {"pattern": "mha"},
        {"op_names": ["attention.output.dense"], "end_step": 3},
        {"pattern": "1x1", "op_names": ["query"]},
    ]
    callbacks = prepare_pruning(model, WeightPruningConfig(pruners, target_sparsity=0.5, end_step=4), optimizer)
    x = torch.arange(14).reshape(2, 7)
    for _ in range(6):
        model(x).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert callbacks.sparsity == {"heads": 0.5, "weights": 0.5, "weights 2": 0.5}
    callbacks.on_train_end()
    attention = model.encoder.layer[0].attention
    output, query = attention.output.dense.weight.detach(), attention.self.query.weight.detach()
    assert (output == 0).all(0).reshape(4, 4).all(1).sum() == 2  # heads
    assert (output == 0).reshape(4, 4, 16).all(1).sum() >= 32  # blocks of four outputs
    assert (query == 0).sum() == 128
    with torch.no_grad():
        before = model.eval()(x).last_hidden_state
        assert torch.allclose(model_slim(model)(x).last_hidden_state, before, rtol=0, atol=1e-12)
    assert query.shape == (16, 16) and attention.self.query.weight.shape == (8, 16)


def test_attentions_can_be_left_alone() -> None:
    model = bert()
    conf = WeightPruningConfig([{"pattern": "mha", "excluded_op_names": ["layer.0"]}], end_step=4)
    with pytest.raises(RequestError, match=r"there are no heads to take out. encoder.layer.0.attention:attention"):
        prepare_compression(model, conf)


# Conv1D -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["channelx1", "1xchannel", "4x1"])
def test_conv1d_is_pruned_along_the_right_axis(pattern: str) -> None:
    """GPT-2's Conv1D, whose weight is (in, out), was pruned along the wrong axis."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_head=4, n_layer=1, vocab_size=20, n_positions=16)
    model = GPT2LMHeadModel(config).double()
    plain = copy.deepcopy(model)
    conf = WeightPruningConfig([{"op_names": ["c_fc"], "pattern": pattern}], target_sparsity=0.5,
                               pruning_type="magnitude", pruning_scope="local")  # fmt: skip
    prepare_pruning(model, conf, torch.optim.SGD(model.parameters(), lr=0.1)).on_train_end()
    layer, dense = model.transformer.h[0].mlp.c_fc, plain.transformer.h[0].mlp.c_fc
    assert isinstance(layer, Conv1D)
    matrix, before = layer.weight.detach().T, dense.weight.detach().T  # (out, in)
    sizes = {"channelx1": (64, 1), "1xchannel": (1, 16), "4x1": (4, 1)}[pattern]
    apart = before.abs().reshape(64 // sizes[0], sizes[0], 16 // sizes[1], sizes[1]).mean((1, 3))
    gone = apart <= apart.ravel().sort().values[apart.numel() // 2 - 1]
    assert torch.equal(matrix == 0, gone.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1))
