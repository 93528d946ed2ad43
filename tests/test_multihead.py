"""``nn.MultiheadAttention`` with some of its heads: as torch's own, head by head, alone and in torch's transformers."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.edit import MultiheadEdit
from fxslim.errors import InputError, PlanError, VerifyError
from fxslim.multihead import NarrowedMultiheadAttention, keep_heads
from fxslim.passes.edits import Edits, find_edits
from fxslim.passes.heads import head_edits
from fxslim.passes.narrow import replay
from fxslim.plan import Plan
from fxslim.site import Site, SitePlan, Slice, blocks_of

from agreement import EXACT, difference, outputs, random_plan, same_state, state

B, L, S, D, H, E, HIDDEN = 2, 5, 7, 12, 4, 3, 10
"""Batch, queries, keys, model width, heads, head width, hidden width."""
KEEP = (0, 3)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without biases": {"bias": False},
    "other widths": {"kdim": 8, "vdim": 9},
    "other widths without biases": {"kdim": 8, "bias": False},
    "own key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "both keys": {"add_bias_kv": True, "add_zero_attn": True, "vdim": 9},
}
"""Options of the attention."""
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*nested:UserWarning", "ignore:Support for mismatched:UserWarning", "ignore:enable_nested:UserWarning"
)
MASKS = ("none", "2-D bool", "2-D float", "3-D bool", "3-D float", "causal")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomised(model: Any, seed: int = 0) -> Any:
    """Fill every parameter, biases included, in float64."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1 / max(parameter.shape[-1], 1) ** 0.5 if parameter.dim() > 1 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tensor(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(name: str, **more: Any) -> nn.MultiheadAttention:
    return randomised(nn.MultiheadAttention(D, H, **KINDS[name], **more))


class Attend(nn.Module):
    """Call an attention on one input or two, and return what it returns first."""

    def __init__(self, inner: nn.MultiheadAttention, **options: Any) -> None:
        super().__init__()
        self.inner = inner
        self.options = options

    def forward(self, x: Tensor, memory: Tensor | None = None, values: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        values = memory if values is None else values
        out: Tensor = self.inner(x, memory, values, **self.options)[0]
        return out


def inputs_of(dense: nn.MultiheadAttention, *, self_attention: bool) -> tuple[Tensor, ...]:
    """Return queries, keys and values, batch first."""
    x = tensor(B, L, D)
    if self_attention:
        return (x, x, x)
    return (x, tensor(B, S, dense.kdim, seed=2), tensor(B, S, dense.vdim, seed=3))


def narrowed(dense: nn.MultiheadAttention, keep: tuple[int, ...] = KEEP) -> tuple[NarrowedMultiheadAttention, Plan]:
    """Narrow one attention by the tool, with heads that the test says."""
    model = Attend(dense, need_weights=False)
    batch_first = (t if dense.batch_first else t.transpose(0, 1) for t in inputs_of(dense, self_attention=False))
    given = tuple(batch_first)
    (site,) = [s for s in fxslim.inspect(model, given).sites if s.kind == "attention"]
    plan = random_plan(model, (site,)).model_copy(update={"sites": (SitePlan(site=site, keep=keep),)})
    small: Any = fxslim.slim(model, given, plan=plan)
    assert small.fxslim.plan.zeroed == ()
    assert isinstance(small.inner, NarrowedMultiheadAttention)
    return small.inner, small.fxslim.plan


def by_head(dense: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None,
            keep: tuple[int, ...]) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute each head by itself, from the formula.  (B, L, D), (B, S, Dk), (B, S, Dv), (B, H, L, S) -> ..."""
    if dense.in_proj_weight is not None:
        wq, wk, wv = (dense.in_proj_weight[i * D : (i + 1) * D] for i in range(3))
    else:
        wq, wk, wv = dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight
    biases = dense.in_proj_bias if dense.in_proj_bias is not None else torch.zeros(3 * D, dtype=torch.float64)
    out = torch.zeros(len(q), q.shape[1], D, dtype=torch.float64)
    every = []
    for head in keep:
        rows = slice(head * E, (head + 1) * E)
        query, key, value = (
            torch.einsum("bsd,ed->bse", t, w[rows]) + biases[i * D : (i + 1) * D][rows]
            for i, (t, w) in enumerate(((q, wq), (k, wk), (v, wv)))
        )
        if dense.bias_k is not None and dense.bias_v is not None:
            key = torch.cat([key, dense.bias_k[0, 0, rows].expand(len(q), 1, E)], 1)
            value = torch.cat([value, dense.bias_v[0, 0, rows].expand(len(q), 1, E)], 1)
        if dense.add_zero_attn:
            key, value = (torch.cat([t, torch.zeros(len(q), 1, E, dtype=torch.float64)], 1) for t in (key, value))
        scores = torch.einsum("ble,bse->bls", query, key) / E**0.5
        if added is not None:
            scores[..., : added.shape[-1]] += added[:, head]
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out = out + torch.einsum("bls,bse,de->bld", weights, value, dense.out_proj.weight[:, rows])
        every.append(weights)
    return (out if dense.out_proj.bias is None else out + dense.out_proj.bias), torch.stack(every, 1)


def masks(kind: str, keys: int, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Return a mask as torch takes it, and what it adds to the scores of each head.  (B, H, L, S)"""
    if kind == "none":
        return None, None
    if kind == "causal":
        mask = torch.ones(L, keys).triu(1).bool()
    else:
        shape = (L, keys) if kind.startswith("2-D") else (batch * H, L, keys)
        mask = tensor(*shape, seed=4) > 0.5
        mask[..., 0] = False  # a query without any key is undefined
    if kind.endswith("float"):
        mask = tensor(*mask.shape, seed=5)
    added = mask if kind.endswith("float") else torch.zeros(mask.shape).double().masked_fill(mask, float("-inf"))
    spread = added.expand(batch, H, L, keys) if mask.dim() == 2 else added.view(batch, H, L, keys)
    return mask, spread


# The module by itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_it_computes_the_kept_heads(name: str, batch_first: bool) -> None:
    """Every mask, padding and layout: as the formula says, and as torch's own with the other heads masked."""
    dense = attention(name, batch_first=batch_first)
    small, _ = narrowed(dense)
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        masked.out_proj.weight.view(D, H, E)[:, [1, 2]] = 0
    selves = [False] if {"kdim", "vdim"} & KINDS[name].keys() else [True, False]
    for own, batched, kind, padded in itertools.product(selves, (True, False), MASKS, (None, "bool", "float")):
        q, k, v = inputs_of(dense, self_attention=own)
        keys = k.shape[1]
        mask, added = masks(kind, keys, B if batched else 1)
        padding = None
        if padded is not None:
            padding = torch.zeros(B, keys).bool()
            padding[1, -2:] = True
            padding = padding if padded == "bool" else tensor(B, keys, seed=6)
            more = torch.zeros(B, keys).double().masked_fill(padding, -1e30) if padded == "bool" else padding
            count = B if batched else 1
            more = more[-count:, None, None].expand(-1, H, L, -1)
            added = more if added is None else added + more
        given = [t if batched else t[-1] for t in (q, k, v)]
        given = [given[0]] * 3 if own else given
        if batched and not batch_first:
            given = [given[0].transpose(0, 1)] * 3 if own else [t.transpose(0, 1) for t in given]
        hints = {"attn_mask": mask, "key_padding_mask": padding if batched or padding is None else padding[-1]}
        # The formula sees the last row only where the input is one row.
        rows = [t if batched else t[-1:] for t in (q, k, v)]
        expected, weights = by_head(dense, *rows, added, KEEP)
        if not batched:
            expected, weights = expected[0], weights[0]
        elif not batch_first:
            expected = expected.transpose(0, 1)
        with torch.no_grad():
            fused, none = small(*given, need_weights=False, **hints)
            plain, averaged = small(*given, **hints)
            _, single = small(*given, average_attn_weights=False, **hints)
            torchs, every = masked(*given, average_attn_weights=False, **hints)
        assert none is None
        for found in (fused, plain, torchs):
            assert difference({"": expected}, {"": found}) <= EXACT, (own, batched, kind, padded)
        assert difference({"": weights}, {"": single}) <= EXACT
        assert difference({"": weights.mean(-3)}, {"": averaged}) <= EXACT
        assert difference({"": every.index_select(-3, torch.tensor(KEEP))}, {"": single}) <= EXACT


@pytest.mark.parametrize("name", KINDS)
def test_the_causal_hint(name: str) -> None:
    dense = attention(name, batch_first=True)
    small, _ = narrowed(dense)
    q, k, v = (t[:, :L] for t in inputs_of(dense, self_attention=False))
    mask = torch.ones(L, L).triu(1).bool()
    with torch.no_grad():
        dense.out_proj.weight.view(D, H, E)[:, [1, 2]] = 0
        for weights, padding in itertools.product((True, False), (None, torch.zeros(B, L).bool())):
            hints = {"attn_mask": mask, "is_causal": True, "need_weights": weights, "key_padding_mask": padding}
            assert difference({"": dense(q, k, v, **hints)[0]}, {"": small(q, k, v, **hints)[0]}) <= EXACT


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("weights", [True, False])
def test_gradients_are_those_of_the_masked_attention(name: str, weights: bool) -> None:
    dense = attention(name, batch_first=True)
    small, plan = narrowed(dense)
    for training in (False, True):
        grads = []
        for module in (dense, small):
            module.train(training)
            module.zero_grad()
            q, k, v = (t.clone().requires_grad_() for t in inputs_of(dense, self_attention=False))
            model = Attend(module, need_weights=weights)
            if module is dense:
                with fxslim.masked(model, plan):
                    out = model(q, k, v)
                    (out * tensor(*out.shape, seed=9)).sum().backward()
            else:
                out = model(q, k, v)
                (out * tensor(*out.shape, seed=9)).sum().backward()
            named = {f"inner.{n}": p.grad for n, p in module.named_parameters()}
            grads.append({**named, "q": q.grad, "k": k.grad, "v": v.grad})
        for (path, dim), gone in plan.removed_rows().items():
            grads[0][path] = grads[0][path].index_select(dim, torch.from_numpy(np.flatnonzero(~gone)))
        for each in grads:  # a bias of all keys changes no softmax: its gradient is zero up to rounding
            each.pop("inner.bias_k", None)
        worst = max(float((grads[0][n] - grads[1][n]).abs().max()) for n in grads[0])
        assert worst <= EXACT


def test_dropout_drops_weights_in_training_only() -> None:
    dense = attention("plain", batch_first=True, dropout=0.5)
    small, _ = narrowed(dense)
    x = tensor(B, L, D)
    for weights in (True, False):
        small.eval()
        assert torch.equal(small(x, x, x, need_weights=weights)[0], small(x, x, x, need_weights=weights)[0])
        small.train()
        torch.manual_seed(0)
        first, given = small(x, x, x, need_weights=weights, average_attn_weights=False)
        assert not torch.equal(first, small(x, x, x, need_weights=weights)[0])
        if given is not None:
            assert 0.2 < float((given == 0).double().mean()) < 0.8
            doubled = given[given != 0].sum() / given.numel() * given.shape[-1]
            assert 0.6 < float(doubled.detach()) < 1.4


def test_masks_for_the_heads_that_are_left() -> None:
    """Whoever asks the module how many heads it has builds its masks for those."""
    small, _ = narrowed(attention("plain", batch_first=True))
    x, mask = tensor(B, L, D), tensor(B * H, L, L, seed=4)
    own = mask.view(B, H, L, L)[:, list(KEEP)].flatten(0, 1)
    assert torch.equal(small(x, x, x, attn_mask=mask)[0], small(x, x, x, attn_mask=own)[0])


def test_it_is_torchs_attention_everywhere_else() -> None:
    dense = attention("own key", batch_first=True)
    small, _ = narrowed(dense)
    assert isinstance(small, nn.MultiheadAttention)
    assert list(small.state_dict()) == list(dense.state_dict())
    assert (small.num_heads, small.head_dim, small.embed_dim, small.kept_heads) == (2, E, D, KEEP)
    assert "num_heads=2 of 4" in repr(small)
    x = tensor(B, L, D)
    want = small(x, x, x)[0]
    assert torch.equal(copy.deepcopy(small)(x, x, x)[0], want)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, x, x)[0], want)
    half = copy.deepcopy(small).to(torch.bfloat16)
    assert half(x.bfloat16(), x.bfloat16(), x.bfloat16())[0].dtype == torch.bfloat16
    other: Any = nn.MultiheadAttention(D, H, batch_first=True, add_bias_kv=True).double()
    for name, parameter in small.named_parameters():
        path, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(path), leaf, nn.Parameter(torch.zeros_like(parameter)))
    keep_heads(other, KEEP)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x, x, x)[0], want)


def test_calls_that_do_not_fit_are_refused() -> None:
    small, _ = narrowed(attention("plain", batch_first=True))
    x = tensor(B, L, D)
    nested = torch.nested.as_nested_tensor([x[0], x[1, :3]])
    whole = torch.zeros(L, L, dtype=torch.int64)
    for given, hints, message in (
        (
            (x, x, x),
            {"attn_mask": tensor(3, L, L)},
            r"attn_mask has shape \(3, 5, 5\); expected \(L, S\), or 2 times 4",
        ),
        ((x, x, x), {"attn_mask": whole}, r"attn_mask has dtype torch\.int64; expected bool or floating point"),
        (
            (x, x, x),
            {"is_causal": True},
            r"is_causal says that attn_mask is the causal mask, and there is no attn_mask",
        ),
        ((x, x[0], x), {}, r"expected 2-D or 3-D inputs, got \[\(2, 5, 12\), \(5, 12\), \(2, 5, 12\)\]"),
        ((nested, x, x), {}, r"a nested tensor can only attend to itself, without masks"),
    ):
        with pytest.raises(InputError, match=message):
            small(*given, **hints)


# Models -------------------------------------------------------------------------------------------------------------


class Biased(nn.Module):
    """Attention with a learned bias for every head, repeated over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(D, H, batch_first=True)
        self.table = nn.Parameter(torch.zeros(H, 9, 9))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        bias = self.table[:, :size, :size].repeat(x.shape[0], 1, 1)
        out: Tensor = self.inner(x, x, x, attn_mask=bias, need_weights=False)[0]
        return out


class Padded(nn.Module):
    """Attention whose padding is spread over the heads by hand, as the attention says or as the test says."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(D, H, batch_first=True)
        self.asks = asks

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        heads = self.inner.num_heads if self.asks else H
        mask = padding[:, None, None].expand(-1, heads, x.shape[1], -1).flatten(0, 1)
        out: Tensor = self.inner(x, x, x, attn_mask=mask)[0]
        return out


class Twice(nn.Module):
    """Two attentions over the same projections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(D, H, batch_first=True) for _ in range(2))
        self.second.in_proj_weight = self.first.in_proj_weight
        self.second.in_proj_bias = self.first.in_proj_bias

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x, x, x)[0])
        out: Tensor = self.second(x, x, x)[0]
        return out


class Encode(nn.Module):
    """Torch's encoder, with every option of its layers."""

    def __init__(self, *, causal: bool = False, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True, **options}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, HIDDEN, **options), 2, nn.LayerNorm(D))
        self.causal = causal

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        out: Tensor = self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=self.causal)
        return out


class Decode(nn.Module):
    """Torch's decoder."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True, **options}
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, H, HIDDEN, **options), 2)

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        out: Tensor = self.decoder(x, memory, tgt_mask=mask, memory_key_padding_mask=padding, tgt_is_causal=True)
        return out


class Translate(nn.Module):
    """Torch's whole transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(D, H, 1, 1, HIDDEN, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        out: Tensor = self.inner(memory, x, tgt_mask=mask, src_key_padding_mask=padding, src_is_causal=False,
                                 tgt_is_causal=True, memory_is_causal=False)  # fmt: skip
        return out


def alone(batch: int, length: int) -> tuple[Tensor, ...]:
    return (tensor(batch, length, D, seed=batch),)


def memory(batch: int, length: int) -> tuple[Tensor, ...]:
    return (*alone(batch, length), tensor(batch, length + 2, D, seed=7))


def ends(batch: int, length: int) -> Tensor:
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[1::2, -2:] = True
    return padding


Inputs = Callable[[int, int], tuple[Tensor, ...]]
PADDED: Inputs = lambda b, n: (*alone(b, n), ends(b, n))  # noqa: E731
CROSS: Inputs = lambda b, n: (*memory(b, n), ends(b, n + 2))  # noqa: E731
MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    **{f"self {name}": (lambda n=name: Attend(attention(n, batch_first=True)), alone) for name in KINDS
       if not {"kdim", "vdim"} & KINDS[name].keys()},
    **{f"cross {name}": (lambda n=name: Attend(attention(n, batch_first=True), need_weights=False),
       lambda b, n, k=KINDS[name]: (*alone(b, n), tensor(b, S, k.get("kdim", D), seed=7),
                                    tensor(b, S, k.get("vdim", D), seed=8))) for name in KINDS},
    "length first": (lambda: Attend(attention("plain")), lambda b, n: (tensor(n, b, D),)),
    "weights of each head": (lambda: Attend(attention("plain"), average_attn_weights=False), alone),
    "a bias for each head": (Biased, alone),
    "a mask for each head": (lambda: Padded(asks=False), PADDED),
    "a mask for each head that it has": (lambda: Padded(asks=True), PADDED),
    "shared projections": (Twice, alone),
    "encoder": (Encode, alone),
    "encoder, padded": (Encode, PADDED),
    "encoder, causal": (lambda: Encode(causal=True), alone),
    "encoder, norm first": (lambda: Encode(norm_first=True), PADDED),
    "encoder, gelu": (lambda: Encode(activation="gelu"), PADDED),
    "encoder, length first": (lambda: Encode(batch_first=False), lambda b, n: (tensor(n, b, D),)),
    "encoder without biases": (lambda: Encode(bias=False), PADDED),
    "decoder": (Decode, memory),
    "decoder, padded, norm first": (lambda: Decode(norm_first=True), CROSS),
    "transformer": (Translate, CROSS),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_masked_slim_and_compiled_agree(name: str) -> None:
    build, make = MODELS[name]
    model = randomised(build())
    given = make(B, L)
    sites = fxslim.inspect(model, given).sites
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    kinds = [site.kind for site in sites]
    assert kinds.count("attention") == (1 if name == "shared projections" else len(attentions))
    assert set(kinds) <= {"attention", "ffn"}
    for site in sites:
        if site.kind == "attention":
            assert set(site.roles) == {"q", "k", "v", "out"}
            assert site.units == H
            assert [piece.hook for piece in site.slices if piece.role == "in"].count(None) >= 1  # never called
    plan = random_plan(model, sites, 0.5, seed=3)
    before = state(model)
    small: Any = fxslim.slim(model, given, plan=plan)
    graph = fxslim.compile(model, given, plan=plan)
    assert same_state(before, state(model))
    assert small.fxslim.plan.zeroed == ()
    assert {e.module for e in small.fxslim.plan.edits if isinstance(e, MultiheadEdit)} == {
        path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, small, graph)]
    assert counts[0] > counts[1] == counts[2]
    agree(model, plan, small, make)
    agree(model, plan, graph, make, graph=True)
    read = Plan.from_json(small.fxslim.plan.to_json())
    assert read == small.fxslim.plan
    with torch.device("meta"):
        skeleton = replay(build().double().eval(), read)
    skeleton.load_state_dict(small.state_dict(), assign=True)
    agree(model, plan, skeleton, make)


def agree(model: Any, plan: Plan, small: Any, make: Inputs, *, graph: bool = False) -> None:
    """Compare with the masked model on other inputs, with torch's fused layers and without."""
    for batch, length in ((3, L + 2), (1, 3), (B, L)):
        given = make(batch, length)
        for fused in (False, True):
            if graph and fused:
                continue  # a graph holds the operations, whose results at padding are others
            torch.backends.mha.set_fastpath_enabled(fused)
            try:
                dense = outputs(model, given)
                with fxslim.masked(model, plan):
                    expected = outputs(model, given)
                found = outputs(small, given)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
            assert difference(dense, expected) > 1e-6  # the masks do something
            assert difference(expected, found) <= EXACT, (batch, length, fused)


TWICE = ("self own key", "self zero key", "cross other widths", "cross both keys", "length first",
         "a mask for each head", "shared projections", "encoder, padded", "decoder, padded, norm first",
         "transformer")  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_narrowing_twice_is_narrowing_once(name: str) -> None:
    build, make = MODELS[name]
    model = randomised(build())
    once: Any = fxslim.slim(model, make(B, L), heads=0.25, ffn=0.25)
    twice: Any = fxslim.slim(once, make(B, L), heads=0.34, ffn=0.25)
    plan = twice.fxslim.plan
    edits = [edit for edit in plan.edits if isinstance(edit, MultiheadEdit)]
    assert plan.zeroed == ()
    assert {(edit.size, len(edit.keep)) for edit in edits} == {(H, 2)}
    agree(model, plan, twice, make)
    again: Any = replay(copy.deepcopy(model), plan)
    agree(model, plan, again, make)
    kept = {path: m.kept_heads for path, m in twice.named_modules() if isinstance(m, NarrowedMultiheadAttention)}
    assert kept == {edit.module: edit.keep for edit in edits}


@pytest.mark.parametrize("name", ["encoder, padded", "encoder, norm first", "decoder", "transformer"])
def test_gradients_in_torchs_transformers(name: str) -> None:
    """In training mode, without dropout, every kept weight has the masked model's gradient."""
    build, make = MODELS[name]
    model = randomised(build())
    given = make(B, L)
    plan = random_plan(model, fxslim.inspect(model, given).sites, 0.5, seed=3)
    small: Any = fxslim.slim(model, given, plan=plan)
    for each in (model, small):
        each.train()
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
    with fxslim.masked(model, plan):
        expected = model(*given)
        (expected**2).sum().backward()
    found = small(*given)
    (found**2).sum().backward()
    assert difference({"": expected.detach()}, {"": found.detach()}) <= EXACT
    grads = {n: p.grad for n, p in model.named_parameters()}
    for (path, dim), gone in plan.removed_rows().items():
        grads[path] = grads[path].index_select(dim, torch.from_numpy(np.flatnonzero(~gone)))
    scale = max(float(g.abs().max()) for g in grads.values())
    assert all(float((p.grad - grads[n]).abs().max()) <= 1e-12 * scale for n, p in small.named_parameters())


def test_masks_on_the_fused_path_are_exact() -> None:
    """Hooks inside a layer turn its fused kernel off, and rows that the encoder has packed are masked one by one."""
    model = randomised(Encode())
    given = PADDED(B, L)
    plan = random_plan(model, fxslim.inspect(model, given).sites, 0.5, seed=3)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for (name, dim), gone in plan.removed_rows().items():
            if name.endswith(("out_proj.weight", "linear2.weight")):
                by_hand.get_parameter(name).index_fill_(dim, torch.from_numpy(np.flatnonzero(gone)), 0)
    expected = outputs(by_hand, given)
    with fxslim.masked(model, plan):
        assert difference(expected, outputs(model, given)) <= EXACT
    (packed,) = expected.values()
    assert torch.equal(packed[1, -1], packed[1, -2])  # it did pack: padding holds zeros, normed


def test_in_place() -> None:
    model = Attend(attention("plain", batch_first=True))
    before = outputs(model, alone(B, L))
    assert fxslim.slim(model, alone(B, L), heads=0.25, inplace=True) is model
    assert isinstance(model.inner, NarrowedMultiheadAttention)
    assert difference(before, outputs(model, alone(B, L))) > 1e-6


# Refusals -----------------------------------------------------------------------------------------------------------


class Own(nn.MultiheadAttention):
    """A forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_subclass_stays_in_place() -> None:
    model = Attend(randomised(Own(D, H, batch_first=True)), need_weights=False)
    small: Any = fxslim.slim(model, alone(B, L), heads=0.5)
    assert small.fxslim.plan.zeroed == ("inner:attention",)
    assert type(small.inner) is Own
    (note,) = small.fxslim.report.not_done
    assert "its units stay in place, with zero columns" in note.reason
    edit = MultiheadEdit(module="inner", size=H, keep=KEEP)
    plan = random_plan(model, ()).model_copy(update={"edits": (edit,)})
    with pytest.raises(PlanError, match=r"the plan narrows inner as torch's nn\.MultiheadAttention, not a Own"):
        replay(model, plan)


def test_parts_of_heads_stay_in_place() -> None:
    """Single value channels have no place in an attention whose heads are all as wide."""
    model = Attend(attention("plain", batch_first=True))
    slices = (
        Slice(tensor="inner.in_proj_weight", dim=0, size=3 * D, role="out", blocks=blocks_of(np.arange(3 * D) - 2 * D)),
        Slice(tensor="inner.out_proj.weight", dim=1, size=D, role="in", blocks=blocks_of(np.arange(D))),
    )
    site = Site(name="inner:generic", kind="generic", module="inner", units=D, slices=slices)
    plan = random_plan(model, ()).model_copy(update={"sites": (SitePlan(site=site, keep=tuple(range(1, D))),)})
    assert head_edits(model, plan, plan.sites) is None
    assert find_edits(model, plan, {}, {}) == Edits((), (), ("inner:generic",))


@pytest.mark.parametrize("average", [True, False])
def test_weights_that_the_model_returns_pin_the_heads(average: bool) -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(D, H, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.inner(x, x, x, average_attn_weights=average)

    found = fxslim.inspect(randomised(Shows()), alone(B, L))
    assert found.sites == ()
    assert [note.reason for note in found.pinned if note.where == "inner.out_proj"] == [
        "what is left of a value is not a box"
    ]


class Sloped(nn.Module):
    """A slope for each head, computed from how many heads the attention says it has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        heads, size = self.inner.num_heads, x.shape[1]
        slopes = torch.arange(1, heads + 1, dtype=x.dtype)[:, None, None]
        far = (torch.arange(size)[:, None] - torch.arange(size)).abs()
        mask = (-slopes * far).repeat(x.shape[0], 1, 1)
        out: Tensor = self.inner(x, x, x, attn_mask=mask)[0]
        return out


def test_slopes_that_depend_on_the_number_of_heads_are_noticed() -> None:
    model = randomised(Sloped())
    plan = random_plan(model, fxslim.inspect(model, alone(B, L)).sites, 0.25)
    assert (
        difference(outputs(model, alone(B, L)), outputs(fxslim.compile(model, alone(B, L), plan=plan), alone(B, L))) > 0
    )
    with pytest.raises(VerifyError, match="masked and narrowed models disagree at output"):
        fxslim.slim(model, alone(B, L), plan=plan)


def test_plans_for_another_attention_are_refused() -> None:
    model = Attend(attention("plain", batch_first=True))
    plan = narrowed(attention("plain", batch_first=True))[1]
    edit = next(edit for edit in plan.edits if isinstance(edit, MultiheadEdit))
    for change, message in (
        ({"size": 3, "keep": (0,)}, r"expects inner\.num_heads to be 3, found 4: it was made for another model"),
        ({"keep": (0, H)}, r"the plan keeps heads of inner that do not exist"),
        ({"keep": ()}, r"the plan keeps heads of inner that do not exist"),
        ({"module": "nowhere"}, r"the plan edits nowhere\.num_heads, which does not exist"),
    ):
        before = state(model)
        with pytest.raises(PlanError, match=message):
            replay(model, plan.model_copy(update={"edits": (edit.model_copy(update=change),)}))
        assert same_state(before, state(model))
