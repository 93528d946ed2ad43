"""Models that hand per-head tensors between their modules: gathered where a narrowed module meets the others."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fxslim
from fxslim.edit import AttentionEdit, GatherEdit
from fxslim.errors import PlanError
from fxslim.gather import Gather
from fxslim.passes.narrow import replay
from fxslim.plan import Plan

from agreement import EXACT, INNER_FLOAT32, difference, outputs
from architectures import BOS, HEADS, HIDDEN, LAYERS, PAD, POSITIONS, VOCAB, WIDTH, randomise

T5 = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "pad_token_id": PAD,
      "eos_token_id": None, "decoder_start_token_id": BOS, "dropout_rate": 0.0}  # fmt: skip
MPNET = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
         "intermediate_size": HIDDEN, "max_position_embeddings": POSITIONS,
         "relative_attention_num_buckets": 32}  # fmt: skip
BLOOM = {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "pad_token_id": PAD,
         "bos_token_id": BOS, "eos_token_id": None}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One architecture; ``sites`` is how many attention sites it has."""

    model: str
    config: Any
    sites: int
    seq2seq: bool = False
    generates: bool = False

    def build(self) -> Any:
        """Return a fresh model in float64."""
        with torch.random.fork_rng(devices=[]):
            model = getattr(transformers, self.model)(copy.deepcopy(self.config)).double().eval()
        randomise(model, self.model)
        return model

    def inputs(self, batch: int, length: int, seed: int) -> dict[str, Any]:
        """Return inputs with padding on the right in every second row."""
        generator = torch.Generator().manual_seed(seed)
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[1::2, -2:] = 0
        made = {"input_ids": torch.randint(4, VOCAB, (batch, length), generator=generator), "attention_mask": mask}
        if self.seq2seq:
            made["decoder_input_ids"] = torch.randint(4, VOCAB, (batch, length + 1), generator=generator)
        return made


CASES = {
    "t5 encoder": Case("T5EncoderModel", transformers.T5Config(**T5), LAYERS),
    "t5": Case("T5ForConditionalGeneration", transformers.T5Config(**T5), 3 * LAYERS, seq2seq=True, generates=True),
    "mpnet": Case("MPNetModel", transformers.MPNetConfig(**MPNET), LAYERS),
    "bloom": Case("BloomForCausalLM", transformers.BloomConfig(**BLOOM), LAYERS, generates=True),
}


@cache
def narrowed(name: str) -> tuple[Any, Any]:
    """Return a dense model and its narrowed copy; neither is changed by any test."""
    model = CASES[name].build()
    return model, fxslim.slim(model, heads=0.5, ffn=0.25)


def calls(name: str) -> list[dict[str, Any]]:
    """Return inputs of several sizes, none of which was traced."""
    return [{**CASES[name].inputs(*sizes), **_no_cache(name)} for sizes in ((3, 9, 1), (1, 6, 2), (4, 4, 3), (5, 8, 4))]


def _no_cache(name: str) -> dict[str, Any]:
    return {"use_cache": False} if CASES[name].generates else {}


def same(model: nn.Module, plan: Plan, small: nn.Module, name: str) -> None:
    for inputs in calls(name):
        with fxslim.masked(model, plan):
            expected = outputs(model, inputs)
        assert difference(expected, outputs(small, inputs)) <= INNER_FLOAT32


@pytest.mark.parametrize("name", CASES)
def test_heads_go_everywhere(name: str) -> None:
    model, small = narrowed(name)
    plan = small.fxslim.plan
    assert plan.zeroed == ()
    attention = [part for part in plan if part.site.kind == "attention"]
    assert [(part.site.units, len(part.keep)) for part in attention] == [(HEADS, HEADS // 2)] * CASES[name].sites
    assert any(isinstance(edit, GatherEdit | AttentionEdit) for edit in plan.edits)
    assert small.num_parameters() < model.num_parameters()
    same(model, plan, small, name)


@pytest.mark.parametrize("name", CASES)
def test_the_graph_too(name: str) -> None:
    model, small = narrowed(name)
    graph = fxslim.compile(model, heads=0.5, ffn=0.25)
    assert graph.fxslim.plan.sites == small.fxslim.plan.sites
    same(model, graph.fxslim.plan, graph, name)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.generates])
def test_the_same_tokens_are_generated(name: str) -> None:
    model, small = narrowed(name)
    prompt = {"input_ids": CASES[name].inputs(2, 5, 1)["input_ids"]}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for use_cache in (True, False):
        with fxslim.masked(model, small.fxslim.plan):
            expected = model.generate(**prompt, **options, use_cache=use_cache)
        assert torch.equal(small.generate(**prompt, **options, use_cache=use_cache), expected)
    assert len({tuple(row) for row in expected.tolist()}) == 2


@pytest.mark.parametrize("name", CASES)
def test_a_plan_rebuilds_the_model_from_a_skeleton(name: str) -> None:
    _, small = narrowed(name)
    plan = Plan.from_json(small.fxslim.plan.to_json())
    assert plan == small.fxslim.plan
    rebuilt = CASES[name].build()
    with torch.device("meta"):
        skeleton: Any = type(rebuilt)(copy.deepcopy(CASES[name].config)).double().eval()
    replay(skeleton, plan)
    skeleton.load_state_dict(small.state_dict(), assign=True)
    replay(rebuilt, plan)
    if any(buffer.is_meta for buffer in skeleton.buffers()):  # not in a state dict
        for (path, buffer), real in zip(skeleton.named_buffers(), rebuilt.buffers(), strict=True):
            if buffer.is_meta:
                owner, _, leaf = path.rpartition(".")
                skeleton.get_submodule(owner)._buffers[leaf] = real
    skeleton.tie_weights()
    for inputs in calls(name)[:2]:
        for other in (skeleton, rebuilt):
            found = outputs(other, inputs)
            assert all(torch.equal(want, found[key]) or difference({"": want}, {"": found[key]}) <= EXACT
                       for key, want in outputs(small, inputs).items())  # fmt: skip


@pytest.mark.parametrize("name", ["t5 encoder", "t5", "bloom"])
def test_copies_and_other_attention(name: str) -> None:
    """The implementation is read when a module is called, and a copy has a config of its own."""
    model, small = narrowed(name)
    copied = copy.deepcopy(small)
    inputs = calls(name)[0]
    expected = outputs(small, inputs)
    assert difference(expected, outputs(copied, inputs)) <= EXACT
    current = small.config._attn_implementation
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not type(small)._supports_sdpa:
            continue
        copied.set_attn_implementation(implementation)
        assert copied.config._attn_implementation == implementation
        assert difference(expected, outputs(copied, inputs)) <= INNER_FLOAT32
    assert small.config._attn_implementation == current
    assert model.config._attn_implementation == current
    assert difference(expected, outputs(small, inputs)) <= EXACT


def test_a_layer_in_the_middle_hands_the_whole_bias_on() -> None:
    """What a layer returns as it was given is for the next layer, which has all heads."""
    case = CASES["t5 encoder"]
    config = copy.deepcopy(case.config)
    config.num_layers = 3
    model: Any = type(case.build())(config).double().eval()
    small: Any = fxslim.slim(model, heads=0.5, include="encoder.block.1")
    assert small.fxslim.plan.zeroed == ()
    assert [edit.edit for edit in small.fxslim.plan.edits] == ["attention"]
    inputs = calls("t5 encoder")[0]
    with fxslim.masked(model, small.fxslim.plan):
        expected = outputs(model, inputs)
    assert difference(expected, outputs(small, inputs)) <= INNER_FLOAT32


@pytest.mark.parametrize("name", ["t5 encoder", "mpnet", "bloom"])
def test_narrowing_twice_gathers_once(name: str) -> None:
    """The second keep counts among the heads that the first one left."""
    model = CASES[name].build()
    once: Any = fxslim.slim(model, heads=0.25)
    twice: Any = fxslim.slim(once, heads=0.34)
    plan = twice.fxslim.plan
    assert plan.zeroed == ()
    assert [len(part.keep) for part in plan] == [2] * LAYERS
    gathers = [edit for edit in plan.edits if isinstance(edit, GatherEdit | AttentionEdit)]
    assert len({(edit.edit, edit.module, edit.name) for edit in gathers}) == len(gathers) > 0
    assert all(edit.size == HEADS and len(edit.keep) == 2 for edit in gathers)
    same(model, plan, twice, name)
    again: Any = replay(CASES[name].build(), plan)
    same(model, plan, again, name)


def test_a_gather_takes_heads_and_leaves_everything_else() -> None:
    keep = (1, 3)
    biases = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    plain, runs = Gather("b", 1, 4, keep, 3, False), Gather("b", 0, 4, keep, 2, True)
    assert torch.equal(plain.take(biases), biases[:, [1, 3]])
    other = torch.zeros(2, 5, 3)
    for left in (other, torch.zeros(2), torch.zeros(3, 4), None, "b"):  # without an axis of heads it fits all of them
        assert plain.take(left) is left
    rows = biases.flatten(0, 1)  # two batch rows of four heads
    assert torch.equal(runs.take(rows), biases[:, [1, 3]].flatten(0, 1))
    odd = torch.zeros(6, 3)
    assert runs.take(odd) is odd


def test_a_gather_finds_its_argument_wherever_it_is_given() -> None:
    class Takes(nn.Module):
        def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
            return x, bias

    module, hook, bias = Takes(), Gather("bias", 1, 4, (0, 2), 2, False), torch.randn(2, 4)
    module.register_forward_pre_hook(hook, with_kwargs=True)
    for _, found in (module(bias, bias), module(bias, bias=bias)):
        assert torch.equal(found, bias[:, [0, 2]])
    assert module(bias)[1] is None
    assert module(bias)[0] is bias


def test_plans_that_gather_what_is_not_there_are_refused() -> None:
    name = "mpnet"
    plan = narrowed(name)[1].fxslim.plan
    edit = next(edit for edit in plan.edits if isinstance(edit, GatherEdit))
    for change, message in (
        ({"name": "nothing"}, r"the plan gathers 'nothing' of .*, whose forward does not take it"),
        ({"keep": (0, HEADS)}, r"the plan gathers heads of .* that do not exist"),
        ({"module": "nowhere"}, r"the plan edits nowhere\..*, which does not exist"),
    ):
        model = CASES[name].build()
        before = {key: tensor.shape for key, tensor in model.state_dict().items()}
        with pytest.raises(PlanError, match=message):
            replay(model, plan.model_copy(update={"edits": (edit.model_copy(update=change),)}))
        assert {key: tensor.shape for key, tensor in model.state_dict().items()} == before
