"""Naming whole models: every layer's attention and feed-forward network, and why everything else has no name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from fxslim.inputs import bind
from fxslim.match import Match
from fxslim.passes.name import Naming, names
from fxslim.trace import trace

from architectures import ARCHITECTURES, Attention
from work import counted

LLAMA = """
attention in model.layers.0.self_attn: out=o_proj q=q_proj k=k_proj v=v_proj
gated_ffn in model.layers.0.mlp: down=down_proj gate=gate_proj up=up_proj
"""
PHI3 = """
attention in model.layers.0.self_attn: out=o_proj q=qkv_proj k=qkv_proj v=qkv_proj
gated_ffn in model.layers.0.mlp: down=down_proj gate=gate_up_proj up=gate_up_proj
"""
BERT = """
attention in {0}.encoder.layer.0.attention: out=output.dense q=self.query k=self.key v=self.value
ffn in {0}.encoder.layer.0: down=output.dense up=intermediate.dense
"""
GPTJ = """
attention in transformer.h.0.attn: out=out_proj q=q_proj k=k_proj v=v_proj
ffn in transformer.h.0.mlp: down=fc_out up=fc_in
"""
CLIP = """
attention in {0}.encoder.layers.0.self_attn: out=out_proj q=q_proj k=k_proj v=v_proj
ffn in {0}.encoder.layers.0.mlp: down=fc2 up=fc1
"""
EXPECTED = {
    "bert_classify": BERT.format("bert") + "ffn in the model: down=classifier up=bert.pooler.dense",
    "roberta_classify": BERT.format("roberta") + "ffn in classifier: down=out_proj up=dense",
    "distilbert_classify": """
        attention in distilbert.transformer.layer.0.attention: out=out_lin q=q_lin k=k_lin v=v_lin
        ffn in distilbert.transformer.layer.0.ffn: down=lin2 up=lin1
        ffn in the model: down=classifier up=pre_classifier
    """,
    "electra_classify": BERT.format("electra") + "ffn in classifier: down=out_proj up=dense",
    "gpt2": """
        attention in transformer.h.0.attn: out=c_proj q=c_attn k=c_attn v=c_attn
        ffn in transformer.h.0.mlp: down=c_proj up=c_fc
    """,
    "gptj": GPTJ,
    "gpt_neox": """
        attention in gpt_neox.layers.0.attention: out=dense q=query_key_value k=query_key_value v=query_key_value
        ffn in gpt_neox.layers.0.mlp: down=dense_4h_to_h up=dense_h_to_4h
    """,
    "opt": """
        attention in model.decoder.layers.0.self_attn: out=out_proj q=q_proj k=k_proj v=v_proj
        ffn in model.decoder.layers.0: down=fc2 up=fc1
    """,
    "llama": LLAMA,
    "llama_gqa": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "phi": """
        attention in model.layers.0.self_attn: out=dense q=q_proj k=k_proj v=v_proj
        ffn in model.layers.0.mlp: down=fc2 up=fc1
    """,
    "phi3": PHI3,
    "phi3_gqa": PHI3,
    "bart": """
        attention in model.encoder.layers.0.self_attn: out=out_proj q=q_proj k=k_proj v=v_proj
        ffn in model.encoder.layers.0: down=fc2 up=fc1
        attention in model.decoder.layers.0.self_attn: out=out_proj q=q_proj k=k_proj v=v_proj
        cross attention in model.decoder.layers.0.encoder_attn: out=out_proj q=q_proj k=k_proj v=v_proj
        ffn in model.decoder.layers.0: down=fc2 up=fc1
    """,
    "vit_classify": """
        attention in vit.layers.0.attention: out=o_proj q=q_proj k=k_proj v=v_proj
        ffn in vit.layers.0.mlp: down=fc2 up=fc1
    """,
    "clip": CLIP.format("vision_model") + CLIP.format("text_model"),
}
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers")


def printed(naming: Naming) -> list[str]:
    """Print matches with the weights below their module."""
    return [_printed(match) for match in naming.matches]


def _printed(match: Match) -> str:
    below = f"{match.module}." if match.module else ""
    short = {
        role: "+".join(w.removeprefix(below).removesuffix(".weight") for w in ws) for role, ws in match.roles.items()
    }
    roles = " ".join(f"{role}={weights}" for role, weights in short.items())
    return f"{'cross ' if match.cross else ''}{match.kind} in {match.module or 'the model'}: {roles}"


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def shallow(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return config sizes with one layer in every stack."""
    return {
        key: 1 if key in DEPTHS else shallow(value) if isinstance(value, Mapping) else value
        for key, value in sizes.items()
    }


def named(name: str, attn: Attention, layers: int = 1) -> Naming:
    architecture = ARCHITECTURES[name]
    if layers == 1:
        architecture = replace(architecture, sizes=shallow(architecture.sizes))
    model = architecture.build(attn=attn)
    return names(trace(model, *bind(model, None)))


CASES = [(name, attn) for name in EXPECTED for attn in ("eager", "sdpa") if attn == "eager" or ARCHITECTURES[name].sdpa]
FAST = CASES[::2]  # every architecture once, half of them with either attention


@pytest.mark.parametrize(("name", "attn"), FAST)
def test_architectures(name: str, attn: Attention) -> None:
    assert printed(named(name, attn)) == lines(EXPECTED[name])


@pytest.mark.slow
def test_the_rest_of_the_architectures() -> None:
    for name, attn in CASES[1::2]:
        assert printed(named(name, attn)) == lines(EXPECTED[name]), (name, attn)


def test_every_layer_is_named() -> None:
    once, twice = lines(EXPECTED["llama_gqa"]), printed(named("llama_gqa", "sdpa", layers=2))
    assert twice == once + [line.replace("layers.0", "layers.1") for line in once]


class Body(nn.Module):
    """A module with linears a, b, c, d and a norm whose forward is a function of itself and x."""

    def __init__(self, body: Callable[..., Tensor], widths: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.body = body
        for name, (fan_in, fan_out) in widths.items():
            setattr(self, name, nn.Linear(fan_in, fan_out))
        self.norm = nn.LayerNorm(12)
        self.inner = nn.LayerNorm(8)
        self.prelu = nn.PReLU(8)
        self.table = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


WIDTHS = {"a": (12, 8), "b": (12, 8), "c": (12, 8), "d": (8, 12), "fused": (12, 16), "e": (12, 12)}


def naming(body: Callable[..., Tensor], **widths: tuple[int, int]) -> Naming:
    return names(trace(Body(body, {**WIDTHS, **widths}), {"x": torch.zeros(2, 5, 12)}))


def hidden(body: Callable[[Body, Tensor], Tensor]) -> list[str]:
    """Name ``d(body(x))`` where the body gives the 8 hidden channels."""
    return [line.split(": ", 1)[1] for line in printed(naming(lambda m, x: m.d(body(m, x))))]


def quick_gelu(h: Tensor) -> Tensor:
    return h * torch.sigmoid(1.702 * h)


def tanh_gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.tanh(0.79788 * (h + 0.044715 * h**3)))


ACTIVATIONS: dict[str, Callable[[Body, Tensor], Tensor]] = {
    "gelu": lambda m, h: functional.gelu(h),
    "gelu, tanh": lambda m, h: functional.gelu(h, approximate="tanh"),
    "gelu by hand": lambda m, h: tanh_gelu(h),
    "quick gelu": lambda m, h: quick_gelu(h),
    "silu by hand": lambda m, h: h / (1 + torch.exp(-h)),
    "squared relu": lambda m, h: functional.relu(h) ** 2,
    "squared relu, as a product": lambda m, h: functional.relu(h) * functional.relu(h),
    "leaky relu by hand": lambda m, h: torch.where(h > 0, h, 0.01 * h),
    "softsign": lambda m, h: functional.softsign(h),
    "hardswish": lambda m, h: functional.hardswish(h),
    "log sigmoid": lambda m, h: functional.logsigmoid(h),
    "prelu": lambda m, h: m.prelu(h.mT).mT,
    "clamp at zero": lambda m, h: h.clamp(min=0),
    "maximum": lambda m, h: torch.maximum(h, torch.zeros(())),
    "scale, mask, dropout, cast": lambda m, h: (
        functional.dropout(h.double().tanh() * 2 * torch.ones(5, 1), 0.5, m.training).float().contiguous()
    ),
    "movement": lambda m, h: functional.relu(h.reshape(-1, 8)).reshape(2, 5, 8)[:, 0],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_plain_networks(name: str) -> None:
    assert hidden(lambda m, x: ACTIVATIONS[name](m, m.a(x))) == ["down=d up=a"]


def interleaved_factors(m: Body, x: Tensor) -> Tensor:
    gate = m.a(x)
    return gate * (m.b(x) * gate.sigmoid())


GATED: dict[str, tuple[Callable[[Body, Tensor], Tensor], str]] = {
    "silu": (lambda m, x: functional.silu(m.a(x)) * m.b(x), "gate=a up=b"),
    "either order": (lambda m, x: m.b(x) * functional.silu(m.a(x)), "gate=a up=b"),
    "gelu by hand": (lambda m, x: tanh_gelu(m.a(x)) * m.b(x), "gate=a up=b"),
    "interleaved factors": (interleaved_factors, "gate=a up=b"),
    "two gates": (lambda m, x: m.a(x).tanh() * (m.b(x).sigmoid() * m.c(x)), "gate=a+b up=c"),
    "both curved": (lambda m, x: m.a(x).tanh() * m.b(x).sigmoid(), "gate=a up=b"),
    "shifted, guarded": (lambda m, x: (m.b(x).clamp(-7, 7) + 1) * quick_gelu(m.a(x).clamp(max=7)), "gate=a up=b"),
    "glu": (lambda m, x: functional.glu(m.fused(x)), "gate=fused up=fused"),
}
SPLITS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "chunk": lambda h: h.chunk(2, -1),
    "split": lambda h: h.split([8, 8], -1),
    "slices": lambda h: (h[..., :8], h[..., 8:]),
    "strides": lambda h: (h[..., ::2], h[..., 1::2]),
    "unbind": lambda h: h.unflatten(-1, (2, 8)).unbind(-2),
    "select": lambda h: (h.unflatten(-1, (2, 8))[..., 0, :], h.unflatten(-1, (2, 8))[..., 1, :]),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_networks(name: str) -> None:
    body, roles = GATED[name]
    assert hidden(body) == [f"down=d {roles}"]


@pytest.mark.parametrize("name", SPLITS)
def test_pieces_of_one_linear_are_gate_and_up(name: str) -> None:
    def body(m: Body, x: Tensor) -> Tensor:
        gate, up = SPLITS[name](m.fused(x))
        return functional.silu(gate) * up

    assert hidden(body) == ["down=d gate=fused up=fused"]


def test_a_hidden_value_with_two_uses_is_still_named() -> None:
    def body(m: Body, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        return m.d(h) + h.sum(-1, keepdim=True)

    assert printed(naming(body)) == ["ffn in the model: down=d up=a"]


REFUSED: dict[str, tuple[Callable[[Body, Tensor], Tensor], str]] = {
    "a norm in front of the consumer": (
        lambda m, x: m.inner(m.a(x).relu()),
        "ffn at d: expected an activation in front of down, found aten.layer_norm (layer_norm) in inner",
    ),
    "a norm in front of the activation": (
        lambda m, x: m.inner(m.a(x)).relu(),
        "ffn at d: expected Linear behind the activation, found aten.layer_norm (layer_norm) in inner",
    ),
    "a norm on the gate": (
        lambda m, x: m.inner(m.a(x)).relu() * m.b(x),
        "gated_ffn at d: expected Linear behind the activation, found aten.layer_norm (layer_norm) in inner",
    ),
    "two linears in a row": (
        lambda m, x: 2 * m.a(x),
        "ffn at d: expected an activation in front of down, found aten.linear (linear) in a",
    ),
    "two linears added": (
        lambda m, x: functional.gelu(m.a(x) + m.b(x)),
        "ffn at d: expected Linear behind the activation, found aten.add (add) of linear and linear_1",
    ),
    "no activation on either factor": (
        lambda m, x: m.a(x) * m.b(x),
        "gated_ffn at d: expected an activation behind the product, found aten.linear (linear) in a",
    ),
    "softmax": (
        lambda m, x: m.a(x).softmax(-1),
        "ffn at d: expected an activation in front of down, found aten.softmax (softmax)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str) -> None:
    body, text = REFUSED[name]
    found = naming(lambda m, x: m.d(body(m, x)))
    assert found.matches == ()
    assert text in found.why("d.weight").splitlines()
    assert found.why("d") == found.why("d.weight")


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merged(functional.scaled_dot_product_attention(q, k, v))


def projected(m: Body, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads(m.a(x)), heads(m.b(x)), heads(m.c(x))


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def interleaved(x: Tensor) -> Tensor:
    """Rotate pairs of neighbours, as tensors that are unbound and stacked again."""
    angle = torch.arange(5)[:, None] / 3
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1).flatten(-2)


def spun(x: Tensor) -> Tensor:
    """Rotate pairs of neighbours, as complex numbers."""
    turns = torch.polar(torch.ones(5, 1), torch.arange(5)[:, None] / 3)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def each_head(m: Body, x: Tensor) -> Tensor:
    q, k, v = projected(m, x)
    return torch.cat([attend(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1]) for i in range(2)], -1)


def grouped(m: Body, x: Tensor) -> Tensor:
    k, v = (f(x).unflatten(-1, (1, 4)).transpose(1, 2) for f in (m.k, m.v))
    return attend(heads(m.a(x)), k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def latent(m: Body, x: Tensor) -> Tensor:
    """Keys have a part that all heads share (multi-head latent attention)."""
    compressed = normed(m.e(x))
    shared = m.b(x)[..., None, :4].transpose(1, 2).expand(-1, 2, -1, -1)
    q = heads(m.q(compressed))
    return attend(q, torch.cat([heads(m.a(compressed)), spun(shared)], -1), heads(m.c(compressed)))


ATTENTIONS: dict[str, tuple[Callable[[Body, Tensor], Tensor], str]] = {
    "plain": (lambda m, x: attend(*projected(m, x)), "q=a k=b v=c"),
    "norms on q and k": (
        lambda m, x: attend(normed(heads(m.a(x))), functional.layer_norm(heads(m.b(x)), (4,)), heads(m.c(x))),
        "q=a k=b v=c",
    ),
    "interleaved rotation": (
        lambda m, x: attend(interleaved(heads(m.a(x))), interleaved(heads(m.b(x))), heads(m.c(x))),
        "q=a k=b v=c",
    ),
    "complex rotation": (
        lambda m, x: attend(spun(heads(m.a(x))), spun(heads(m.b(x))), heads(m.c(x))),
        "q=a k=b v=c",
    ),
    "one call per head": (each_head, "q=a k=b v=c"),
    "copies for groups": (grouped, "q=a k=k v=v"),
    "interleaved fusion": (
        lambda m, x: attend(*m.qkv(x).unflatten(-1, (2, 3, 4)).permute(3, 0, 2, 1, 4)),
        "q=qkv k=qkv v=qkv",
    ),
    "latent": (latent, "q=q k=a+b v=c"),
    "an output gate": (lambda m, x: attend(*projected(m, x)) * m.g(x).sigmoid(), "q=a k=b v=c gate=g"),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_by_hand(name: str) -> None:
    body, roles = ATTENTIONS[name]
    found = naming(lambda m, x: m.d(body(m, x)), k=(12, 4), v=(12, 4), qkv=(12, 24), q=(12, 16), g=(12, 8))
    assert [line for line in printed(found) if " d" in line or "=d" in line] == [
        f"attention in the model: out=d {roles}"
    ]


REFUSED_ATTENTIONS: dict[str, tuple[Callable[[Body, Tensor], Tensor], str]] = {
    "a norm over all heads": (
        lambda m, x: m.inner(attend(*projected(m, x))),
        "attention at d: expected attention in front of out, found aten.layer_norm (layer_norm) in inner",
    ),
    "sigmoid in place of softmax": (
        lambda m, x: merged((heads(m.a(x)) @ heads(m.b(x)).mT).sigmoid() @ heads(m.c(x))),
        "attention at d: expected attention in front of out, found aten.matmul (matmul_1)",
    ),
    "keys without a linear": (
        lambda m, x: attend(heads(m.a(x)), heads(x[..., :8]), heads(m.c(x))),
        "attention at d: expected Linear behind the key, found placeholder (x)",
    ),
    "values of two linears added": (
        lambda m, x: attend(heads(m.a(x)), heads(m.b(x)), heads(m.b(x) + m.c(x))),
        "attention at d: expected Linear behind the value, found aten.add (add) of linear_2 and linear_3",
    ),
}


@pytest.mark.parametrize("name", REFUSED_ATTENTIONS)
def test_refused_attentions_say_why(name: str) -> None:
    body, text = REFUSED_ATTENTIONS[name]
    found = naming(lambda m, x: m.d(body(m, x)))
    assert found.matches == ()
    assert text in found.why("d").replace("(scaled_dot_product_attention)", "(sdpa)").splitlines()


class Torch(nn.Module):
    """Self and cross attention by ``nn.MultiheadAttention``, whose ``out_proj`` is never called."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.own, self.other = (nn.MultiheadAttention(12, 2, batch_first=True) for _ in range(2))
        self.weights = weights

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.own(x, x, x, need_weights=self.weights)[0]
        return self.other(x, y, y, need_weights=self.weights)[0]


@pytest.mark.parametrize("weights", [False, True])
def test_multihead_attention(weights: bool) -> None:
    found = names(trace(Torch(weights), {"x": torch.zeros(2, 5, 12), "y": torch.zeros(2, 7, 12)}))
    roles = "out=out_proj q=in_proj_weight k=in_proj_weight v=in_proj_weight"
    assert printed(found) == [f"attention in own: {roles}", f"cross attention in other: {roles}"]


def test_lookups() -> None:
    architecture = replace(ARCHITECTURES["gpt2"], sizes=shallow(ARCHITECTURES["gpt2"].sizes))
    model = architecture.build(attn="sdpa")
    program = trace(model, *bind(model, None))
    found = names(program)
    ffn = found.by_consumer("transformer.h.0.mlp.c_proj.weight")
    assert ffn is not None and ffn.kind == "ffn" and ffn.nodes["act"].startswith("mul")
    assert found.by_consumer("transformer.h.0.mlp.c_fc.weight") is None
    assert found.why("transformer.h.0.mlp.c_fc.weight") == str(ffn)
    assert found.why("transformer.h.0").splitlines() == [str(match) for match in found.matches]
    assert found.why("nowhere") == "no linear in the graph has a weight called or below 'nowhere'"
    for name in ("lm_head.weight", "transformer.wte.weight"):  # tied: one tensor, two names
        assert found.why(name).startswith("attention at ")
        assert "found aten.layer_norm" in found.why(name)


def test_a_shared_layer_is_named_at_each_call() -> None:
    def body(m: Body, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + m.d(m.a(x).relu())
        return x

    found = naming(body)
    assert printed(found) == ["ffn in the model: down=d up=a"] * 2
    assert found.by_consumer("d.weight") == found.matches[0]


@pytest.mark.parametrize(("model", "each"), [("Bert", 2), ("Llama", 2)])
def test_the_work_of_naming_grows_with_the_layers(model: str, each: int) -> None:
    calls = []
    for layers in (2, 8):
        config = getattr(transformers, f"{model}Config")(
            hidden_size=16, num_attention_heads=2, intermediate_size=24, vocab_size=30, num_hidden_layers=layers
        )
        built = getattr(transformers, f"{model}Model")(config)
        program = trace(built, *bind(built, None))
        with counted() as count:
            found = names(program)
        assert len(found.matches) == each * layers
        calls.append(count[0])
    assert calls[1] < 5 * calls[0]
