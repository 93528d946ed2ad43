"""Hold the disturbance oracle, and the models that it is used on, to answers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import ARCHITECTURES, PAD
from oracle import Channel, disturb, prunable_linears

B, S, D, F, V = 3, 5, 6, 8, 4  # batch, sequence, model width, hidden width, outputs


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Spare tiny tensors the cost of threads, which is a hundredfold on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """Hold some linears, and compute whatever the test says from them."""

    def __init__(self, forward: Callable[..., object], **children: nn.Module) -> None:
        super().__init__()
        self.compute = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> object:
        return self.compute(self, x)


def block(forward: Callable[..., object], **children: nn.Module) -> Any:
    """Return the block in eval mode and float64, with reproducible weights."""
    model = Block(forward, **children).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(B, S, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


def up() -> nn.Linear:
    return nn.Linear(D, F)


def down() -> nn.Linear:
    return nn.Linear(F, V)


def attention(heads: int, kv_heads: int, width: int) -> Any:
    """Return causal attention with query head h reading key-value head h // (heads // kv_heads); width is E."""

    def forward(m: Any, x: Tensor) -> Any:
        q, k, v = (p(x).unflatten(-1, (-1, width)).transpose(1, 2) for p in (m.q, m.k, m.v))
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)).masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf)
        return m.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    kv, all_heads = kv_heads * width, heads * width
    return block(
        forward, q=nn.Linear(D, all_heads), k=nn.Linear(D, kv), v=nn.Linear(D, kv), out=nn.Linear(all_heads, V)
    )


def columns(found: list[Channel], consumer: str) -> dict[int, set[int]]:
    """Return each channel's columns, having checked that it is prunable and reaches this consumer alone."""
    assert all(c.prunable and list(c.consumers) == [consumer] for c in found), found
    return {c.channel: set(c.consumers[consumer]) for c in found}


def blocks(*heads: int, width: int) -> set[int]:
    return {h * width + e for h in heads for e in range(width)}


# Modules with known answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [torch.relu, torch.tanh, nn.functional.gelu, lambda h: h])
def test_every_hidden_channel_of_an_mlp_reaches_its_own_column(activation: Callable[[Tensor], Tensor]) -> None:
    model = block(lambda m, x: m.down(activation(m.up(x))), up=up(), down=down())
    assert columns(disturb(model, inputs(), "up"), "down") == {j: {j} for j in range(F)}


@pytest.mark.parametrize(("bias", "activation"), [(-50, torch.relu), (50, lambda h: h.clamp(max=0))])
def test_an_activation_that_is_shut_does_not_hide_the_channel(
    bias: int, activation: Callable[[Tensor], Tensor]
) -> None:
    model = block(lambda m, x: m.down(activation(m.up(x))), up=up(), down=down())
    model.up.bias.data.fill_(bias)
    assert not activation(model.up(inputs()["x"])).any()
    assert columns(disturb(model, inputs(), "up"), "down") == {j: {j} for j in range(F)}


def test_what_has_no_consumer_reaches_the_output() -> None:
    model = block(lambda m, x: m.down(torch.relu(m.up(x))), up=up(), down=down())
    found = disturb(model, inputs(), "down")
    assert [(c.channel, c.prunable, dict(c.consumers)) for c in found] == [(j, False, {}) for j in range(V)]
    assert {c.reason for c in found} == {"reaches the output past every linear"}


def test_both_halves_of_a_gated_ffn_reach_the_same_column() -> None:
    model = block(lambda m, x: m.down(torch.sigmoid(m.gate(x)) * m.up(x)), up=up(), gate=up(), down=down())
    for producer in ("up", "gate"):
        assert columns(disturb(model, inputs(), producer), "down") == {j: {j} for j in range(F)}


def test_a_fused_producer_reaches_each_column_twice() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        gate, value = m.both(x).chunk(2, -1)
        return m.down(torch.sigmoid(gate) * value)

    model = block(forward, both=nn.Linear(D, 2 * F), down=down())
    assert columns(disturb(model, inputs(), "both"), "down") == {j: {j % F} for j in range(2 * F)}


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (4, 1)])
def test_attention_by_head_and_by_group(heads: int, kv_heads: int) -> None:
    width, group = 3, heads // kv_heads
    model = attention(heads, kv_heads, width)
    served = {g: range(g * group, (g + 1) * group) for g in range(kv_heads)}
    expected = {
        "q": {c: blocks(c // width, width=width) for c in range(heads * width)},
        "k": {c: blocks(*served[c // width], width=width) for c in range(kv_heads * width)},
        "v": {c: {h * width + c % width for h in served[c // width]} for c in range(kv_heads * width)},
    }
    if kv_heads == 1:  # the only group cannot go
        assert {c.reason for c in disturb(model, inputs(), "k")} == {"reaches all 12 inputs of out"}
        del expected["k"]
    for producer, reached in expected.items():
        assert columns(disturb(model, inputs(), producer), "out") == reached


def test_a_norm_over_the_hidden_axis_mixes_all_channels() -> None:
    model = block(lambda m, x: m.down(m.norm(m.up(x))), up=up(), norm=nn.LayerNorm(F), down=down())
    found = disturb(model, inputs(), "up")
    assert not any(c.prunable for c in found)
    assert {c.reason for c in found} == {f"reaches all {F} inputs of down"}


def test_two_consumers_are_both_found() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = torch.relu(m.up(x))
        return m.down(h) * m.other(h.flip(-1))

    model = block(forward, up=up(), down=down(), other=down())
    for c in disturb(model, inputs(), "up"):
        assert c.prunable
        assert c.consumers == {"down": {c.channel}, "other": {F - 1 - c.channel}}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, h: (m.down(h), h),
        lambda m, h: {"y": m.down(h), "more": [h.sum(-1)]},
        lambda m, h: m.down(h) + h[..., :V] * 0.01 + h[..., V:] * 0.01,
    ],
)
def test_a_second_use_that_is_no_linear_keeps_the_channel(forward: Callable[..., object]) -> None:
    model = block(lambda m, x: forward(m, torch.relu(m.up(x))), up=up(), down=down())
    for c in disturb(model, inputs(), "up"):
        assert not c.prunable
        assert c.consumers == {"down": {c.channel}}
        assert c.reason == "reaches the output past every linear"


def test_a_path_that_opens_once_the_columns_are_zero_is_seen() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.up(x) * torch.tensor([1.0, 0.0])  # all that `down` sees is channel 0
        y = m.down(h)
        return torch.where(y == 0, h.sum(-1, keepdim=True), y)

    model = block(forward, up=nn.Linear(D, 2), down=nn.Linear(2, V, bias=False))
    (found,) = disturb(model, inputs(), "up", [0])
    assert not found.prunable
    assert found.consumers == {"down": {0}}
    assert found.reason == "reaches the output although the columns that it reaches are zero"


def test_what_else_writes_to_a_column_is_another_question() -> None:
    """A stream without a norm: the oracle follows the channel alone, and cannot know that the input must stay."""
    model = block(lambda m, x: m.head(x + m.up(x)), up=nn.Linear(D, D), head=nn.Linear(D, V))
    assert columns(disturb(model, inputs(), "up"), "head") == {j: {j} for j in range(D)}


def test_a_pair_that_is_used_twice_is_still_a_pair() -> None:
    twice = block(lambda m, x: m.down(torch.relu(m.up(x))) + m.down(torch.tanh(m.up(x + 1))), up=up(), down=down())
    assert columns(disturb(twice, inputs(), "up"), "down") == {j: {j} for j in range(F)}


@pytest.mark.parametrize(
    ("inner", "expected"),
    [(lambda m, x: m.other(x), lambda j: {j}), (lambda m, x: m.up(x).flip(-1), lambda j: {j, F - 1 - j})],
    ids=["another producer", "the same, flipped"],
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_consumer_whose_calls_see_different_columns_keeps_the_channel(
    inner: Callable[[Any, Tensor], Tensor], expected: Callable[[int], set[int]], order: int
) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        first, second = [m.up(x), inner(m, x)][::order]
        return m.down(torch.relu(first)) + m.down(torch.tanh(second))

    model = block(forward, up=up(), other=up(), down=down())
    for c in disturb(model, inputs(), "up"):
        assert not c.prunable
        assert c.consumers == {"down": expected(c.channel)}
        assert c.reason == "reaches other inputs, or none, in other calls of down"


def test_a_dead_channel_reaches_nothing() -> None:
    model = block(lambda m, x: m.down(m.up(x)[..., :4]), up=up(), down=nn.Linear(4, V))
    assert [c.prunable for c in disturb(model, inputs(), "up")] == [True] * 4 + [False] * 4
    assert disturb(model, inputs(), "up", [7]) == [Channel("up", 7, {}, False, "reaches nothing")]


@pytest.mark.parametrize(
    ("hidden", "output"),
    [
        (lambda m, x: m.up(x.transpose(0, 1)), lambda y: y),
        (lambda m, x: m.up(x) - m.up(x).mean(0), lambda y: y),
        (lambda m, x: m.up(x), lambda y: y.flatten(1) @ y.flatten(1).T),
        (lambda m, x: m.up(x), lambda y: y.square().mean()),
    ],
    ids=["sequence first", "rows meet inside", "rows meet in the output", "scalar output"],
)
def test_models_whose_copies_do_not_stay_apart_are_probed_one_by_one(
    hidden: Callable[[Any, Tensor], Tensor], output: Callable[[Tensor], Tensor]
) -> None:
    model = block(lambda m, x: output(m.down(torch.relu(hidden(m, x)))), up=up(), down=down())
    assert columns(disturb(model, inputs(), "up"), "down") == {j: {j} for j in range(F)}
    assert not any(c.prunable for c in disturb(model, inputs(), "down"))


def test_refusals_leave_no_hook_behind() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.up(x)
        return m.up(h[..., :D]) if h.abs().max() > m.limit else m.down(h)

    model = block(forward, up=up(), down=down(), idle=up())
    model.limit = 1.01 * model.up(inputs()["x"]).abs().max()
    with pytest.raises(ValueError, match=r"'idle' is not a linear that the model calls; those are \['up', 'down'\]"):
        disturb(model, inputs(), "idle")
    with pytest.raises(ValueError, match="disturbing 'up' changes what the model calls: 'up' instead of 'down'"):
        disturb(model, inputs(), "up")
    with pytest.raises(ValueError, match="not finite"):
        disturb(model, {"x": inputs()["x"] * torch.nan}, "up")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="eval mode and float64"):
        disturb(model.float(), inputs(), "up")
    with pytest.raises(ValueError, match="eval mode and float64"):
        disturb(model.double().train(), inputs(), "up")


# Architectures ------------------------------------------------------------------------------------------------------


def test_bert() -> None:
    architecture = ARCHITECTURES["bert_classify"]
    model, given = architecture.build(), architecture.inputs()
    layer = "bert.encoder.layer.1."
    out = layer + "attention.output.dense"
    for role in ("query", "key"):
        found = columns(disturb(model, given, f"{layer}attention.self.{role}"), out)
        assert found == {c: blocks(c // 8, width=8) for c in range(32)}
    assert columns(disturb(model, given, layer + "attention.self.value"), out) == {c: {c} for c in range(32)}
    hidden = columns(disturb(model, given, layer + "intermediate.dense"), layer + "output.dense")
    assert hidden == {c: {c} for c in range(48)}
    assert columns(disturb(model, given, "bert.pooler.dense"), "classifier") == {c: {c} for c in range(32)}
    for producer in (out, layer + "output.dense", "classifier"):
        assert not any(c.prunable for c in disturb(model, given, producer, [0, 2]))


def test_gpt2_fuses_query_key_and_value() -> None:
    architecture = ARCHITECTURES["gpt2"]
    model, given = architecture.build(), architecture.inputs()
    layer = "transformer.h.0."
    found = columns(disturb(model, given, layer + "attn.c_attn"), layer + "attn.c_proj")
    assert found == {c: blocks(c % 32 // 8, width=8) if c < 64 else {c - 64} for c in range(96)}
    assert columns(disturb(model, given, layer + "mlp.c_fc"), layer + "mlp.c_proj") == {c: {c} for c in range(48)}


def test_llama_gqa() -> None:
    architecture = ARCHITECTURES["llama_gqa"]
    model, given = architecture.build(), architecture.inputs()
    layer = "model.layers.0."
    out = layer + "self_attn.o_proj"
    group = {c: (c // 6 * 2, c // 6 * 2 + 1) for c in range(12)}
    keys = columns(disturb(model, given, layer + "self_attn.k_proj"), out)
    assert keys == {c: blocks(*group[c], width=6) for c in range(12)}
    values = columns(disturb(model, given, layer + "self_attn.v_proj"), out)
    assert values == {c: {h * 6 + c % 6 for h in group[c]} for c in range(12)}
    queries = columns(disturb(model, given, layer + "self_attn.q_proj"), out)
    assert queries == {c: blocks(c // 6, width=6) for c in range(24)}


@pytest.mark.parametrize("name", ["bart", "clip"])
def test_probes_cover_every_linear(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model: Any = architecture.build()
    found = prunable_linears(model, architecture.inputs(), probe=2)
    assert set(found) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for producer, probed in found.items():
        assert [c.channel for c in probed] == [0, model.get_submodule(producer).out_features - 1]
        inner = producer.endswith(("q_proj", "k_proj", "v_proj", "fc1"))
        assert [c.prunable for c in probed] == [inner] * 2, probed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_is_what_the_table_says(name: str) -> None:
    architecture = ARCHITECTURES[name]
    state = torch.random.get_rng_state()
    model: Any = architecture.build()
    twins = dict(architecture.build(torch.float32).named_parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    assert not model.training
    assert model.config._attn_implementation == "eager"
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.float(), twins[key]), key
        assert parameter.numel() == 1 or parameter.detach().std() > 0.01, key
    given = architecture.inputs(2, 6, seed=3)
    with torch.no_grad():
        output = model(**given)[0]
        other = model(**architecture.inputs(2, 6, seed=4))[0]
    assert output.dtype == torch.float64
    assert output.isfinite().all()
    assert not torch.allclose(output, other, atol=1e-3)
    if architecture.text:
        mask = architecture.inputs(8, 9)["attention_mask"]
        assert mask[0].all()
        assert (mask.diff() <= 0).all()  # right-padded
        assert not mask.all()
        assert (architecture.inputs(8, 9)["input_ids"] == PAD).equal(mask == 0)
    if architecture.generates:
        start = given.get("decoder_input_ids", given["input_ids"]).shape[1]
        assert model.generate(**given, max_new_tokens=6, do_sample=False).shape == (2, start + 6 + architecture.decoder)
