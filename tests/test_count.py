"""Check MAC, parameter and byte counts against ``torch.utils.flop_counter`` and against formulas by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxslim import count
from fxslim.count import UncountedError, macs, macs_of, parameters, weight_bytes

D, F, H, K, E, L, V = 32, 48, 4, 2, 8, 2, 99  # model, hidden, heads, kv heads, head width, layers, vocabulary


def small(name: str, attention: str) -> Any:
    """Return a tiny transformer."""
    text: dict[str, Any] = {"vocab_size": V, "use_cache": False, "attn_implementation": attention}
    shape: dict[str, Any] = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": H}
    shape["num_hidden_layers"] = L
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**shape, **text)).eval()
    if name == "gpt2":
        gpt2 = transformers.GPT2Config(n_embd=D, n_inner=F, n_layer=L, n_head=H, **text)
        return transformers.GPT2LMHeadModel(gpt2).eval()
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=K, **shape, **text)).eval()
    vision: dict[str, Any] = {"image_size": 16, "patch_size": 8, "attn_implementation": attention}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**shape, **vision)).eval()


def traced(module: nn.Module, *args: Any, dynamic: Any = None, **kwargs: Any) -> fx.Graph:
    """Export a module to its ATen training graph."""
    program = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=dynamic, strict=False)
    graph: fx.Graph = program.graph
    return graph


def reference(run: Callable[..., object], *args: Any, **kwargs: Any) -> int:
    """Count FLOPs as torch does, with attention in plain matrix products (its CPU kernel is not counted)."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(*args, **kwargs)
    return int(counter.get_total_flops())


class Wrap(nn.Module):
    """Make a module of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        """Call it."""
        return self.function(*args)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_transformers_match_the_flop_counter(name: str, attention: str) -> None:
    model = small(name, attention)
    for batch, length in ((2, 7), (3, 12)):
        if name == "vit":
            inputs, free = {"pixel_values": torch.rand(batch, 3, 16, 16)}, {"pixel_values": {0: Dim.AUTO}}
        else:
            ids = torch.randint(V, (batch, length))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            free = {key: {0: Dim.AUTO, 1: Dim.AUTO} for key in inputs}
        graph = traced(model, **inputs, dynamic=free)
        counted = macs(graph)
        assert any(isinstance(size, torch.SymInt) for node in graph.nodes for size in _shape(node))
        assert counted.uncounted == ()
        assert 2 * counted.total == reference(model, **inputs)
        assert counted.total == macs_of(model, **inputs) == sum(counted.by_node.values())


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def test_llama_by_hand() -> None:
    batch, length = 3, 7
    graph = traced(small("llama", "sdpa"), torch.randint(V, (batch, length)))
    projections = D * H * E + 2 * D * K * E + H * E * D
    per_token = L * (projections + 3 * D * F) + D * V
    attention = L * batch * H * length * length * 2 * E
    assert macs(graph).total == batch * length * per_token + attention


def test_vit_by_hand() -> None:
    graph = traced(small("vit", "sdpa"), torch.rand(2, 3, 16, 16))
    patches, tokens = 4, 5
    per_token = L * (4 * D * D + 2 * D * F)
    expected = patches * 3 * 8 * 8 * D + tokens * per_token + L * H * tokens * tokens * 2 * E + D * 2
    assert macs(graph).total == 2 * expected
    convolution = [node for node in graph.nodes if "conv2d" in str(node.target)]
    assert macs(graph).by_node[convolution[0].name] == 2 * patches * 3 * 8 * 8 * D


def rand(*shape: int) -> Tensor:
    """Return a random tensor."""
    return torch.rand(shape)


PRODUCTS: Mapping[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "mm": (torch.mm, (rand(2, 3), rand(3, 5)), 30),
    "addmm": (torch.addmm, (rand(5), rand(2, 3), rand(3, 5)), 30),
    "bmm": (torch.bmm, (rand(7, 2, 3), rand(7, 3, 5)), 210),
    "baddbmm": (torch.baddbmm, (rand(7, 2, 5), rand(7, 2, 3), rand(7, 3, 5)), 210),
    "linear": (functional.linear, (rand(7, 2, 3), rand(5, 3), rand(5)), 210),
    "matmul": (torch.matmul, (rand(7, 2, 3), rand(7, 3, 5)), 210),
    "matmul broadcast": (torch.matmul, (rand(4, 1, 2, 3), rand(7, 3, 5)), 840),
    "matmul by matrix": (torch.matmul, (rand(7, 2, 3), rand(3, 5)), 210),
    "einsum": (lambda a, b: torch.einsum("bshe,bthe->bhst", a, b), (rand(2, 3, 4, 5), rand(2, 7, 4, 5)), 840),
    "einsum ellipsis": (lambda a, b: torch.einsum("...d,df", a, b), (rand(2, 3, 4), rand(4, 5)), 120),
    "einsum chain": (
        lambda a, b, c: torch.einsum("ab,bc,cd->ad", a, b, c),
        (rand(2, 3), rand(3, 5), rand(5, 7)),
        30 + 70,
    ),
    "einsum sums first": (lambda a, b: torch.einsum("abx,bc->ac", a, b), (rand(2, 3, 9), rand(3, 5)), 30),
    "einsum outer": (lambda a, b: torch.einsum("ab,c->abc", a, b), (rand(2, 3), rand(5)), 0),
    "conv1d": (functional.conv1d, (rand(2, 3, 9), rand(5, 3, 4)), 2 * 5 * 6 * 3 * 4),
    "conv2d strided, grouped": (
        lambda x, w: functional.conv2d(x, w, stride=2, padding=1, groups=3),
        (rand(2, 6, 8, 8), rand(9, 2, 3, 3)),
        2 * 9 * 4 * 4 * 2 * 3 * 3,
    ),
    "conv2d without batch": (functional.conv2d, (rand(3, 8, 8), rand(5, 3, 3, 3)), 5 * 6 * 6 * 3 * 3 * 3),
    "conv3d": (functional.conv3d, (rand(1, 2, 4, 4, 4), rand(3, 2, 2, 2, 2)), 3 * 27 * 2 * 8),
    "conv_transpose2d": (
        lambda x, w: functional.conv_transpose2d(x, w, stride=2),
        (rand(2, 3, 4, 4), rand(3, 5, 2, 2)),
        2 * 3 * 16 * 5 * 4,
    ),
    "convolution": (
        lambda x, w: torch.convolution(x, w, None, [1], [0], [1], True, [0], 1),
        (rand(2, 3, 9), rand(3, 5, 4)),
        2 * 3 * 9 * 5 * 4,
    ),
    "attention": (
        functional.scaled_dot_product_attention,
        (rand(2, 3, 4, 5), rand(2, 3, 7, 5), rand(2, 3, 7, 9)),
        2352,
    ),
    "attention, causal": (
        lambda q: functional.scaled_dot_product_attention(q, q, q, is_causal=True),
        (rand(2, 3, 4, 5),),
        2 * 3 * 4 * 4 * 10,
    ),
    "attention, grouped": (
        lambda q, k: functional.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        (rand(2, 6, 4, 5), rand(2, 2, 7, 5)),
        2 * 6 * 4 * 7 * 10,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_by_hand_and_by_the_flop_counter(name: str) -> None:
    function, inputs, expected = PRODUCTS[name]
    counted = macs(traced(Wrap(function), *inputs))
    assert counted.total == expected
    assert counted.uncounted == ()
    assert reference(function, *inputs) == 2 * expected
    assert macs_of(function, *inputs) == expected


OVERLOOKED: Mapping[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "mv": (torch.mv, (rand(2, 3), rand(3)), 6),
    "dot": (torch.dot, (rand(3), rand(3)), 3),
    "addmv": (torch.addmv, (rand(2), rand(2, 3), rand(3)), 6),
    "matmul by vector": (torch.matmul, (rand(7, 2, 3), rand(3)), 42),
    "vector by matmul": (torch.matmul, (rand(3), rand(7, 3, 5)), 105),
    "inner": (torch.inner, (rand(2, 3), rand(5, 3)), 30),
    "tensordot": (
        lambda a, b: torch.tensordot(a, b, dims=([1, 2], [0, 1])),
        (rand(2, 3, 4), rand(3, 4, 5)),
        2 * 12 * 5,
    ),
    "linear to scalar": (functional.linear, (rand(7, 3), rand(3)), 21),
    "einsum to scalar": (lambda a, b: torch.einsum("ab,ab->", a, b), (rand(2, 3), rand(2, 3)), 6),
    "addbmm": (torch.addbmm, (rand(2, 5), rand(7, 2, 3), rand(7, 3, 5)), 210),
}
"""What torch's FLOP counter takes for free on some or all devices."""


@pytest.mark.parametrize("name", OVERLOOKED)
def test_products_by_hand(name: str) -> None:
    function, inputs, expected = OVERLOOKED[name]
    assert macs(traced(Wrap(function), *inputs)).total == expected
    assert macs_of(function, *inputs) == expected


def test_attention_kernels_on_cpu_are_counted() -> None:
    query, key = rand(2, 3, 4, 5), rand(2, 3, 7, 5)

    def run() -> None:
        functional.scaled_dot_product_attention(query, key, key)

    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == 0  # if this fails, torch has learned it: the rule may go
    assert macs_of(run) == 2 * 3 * 4 * 7 * 10


def test_backward_pass_counts_when_it_runs() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in (rand(2, 3, 4, 5), rand(2, 3, 7, 5), rand(2, 3, 7, 5)))

    def step() -> None:
        torch.autograd.backward(functional.scaled_dot_product_attention(query, key, value).sum())

    assert macs_of(step) == 2 * 3 * 4 * 7 * (10 + 25)
    weight = rand(5, 3).requires_grad_()
    assert macs_of(lambda: torch.autograd.grad(functional.linear(rand(7, 3), weight).sum(), weight)) == 2 * 7 * 15


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (((10, 16), (3, 16, 8)), 10 * 16 * 8),
        (((8, 16), (16, 24)), 8 * 16 * 24),
        (((3, 8, 16), (16, 24)), 8 * 16 * 24),
        (((3, 8, 16), (3, 16, 24)), 3 * 8 * 16 * 24),
    ],
    ids=["rows by experts", "ragged contraction", "ragged columns", "batch"],
)
def test_grouped_products(shapes: tuple[tuple[int, ...], ...], expected: int) -> None:
    left, right = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    groups = None if len(shapes[0]) == len(shapes[1]) == 3 else torch.zeros(3, dtype=torch.int32, device="meta")
    assert macs_of(torch._grouped_mm, left, right, groups) == expected


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_mixture_of_experts(experts: str) -> None:
    top, experts_count, batch, length = 2, 4, 2, 8
    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=F, num_hidden_layers=1, num_attention_heads=H, num_key_value_heads=K,
        vocab_size=V, num_local_experts=experts_count, num_experts_per_tok=top, use_cache=False,
    )  # fmt: skip
    config._experts_implementation = experts
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(V, (batch, length))
    counted = macs(traced(model, ids))
    per_token = 2 * D * H * E + 2 * D * K * E + D * experts_count + top * 3 * D * F + D * V
    exact = batch * length * per_token + batch * H * length * length * 2 * E
    assert counted.uncounted == ()
    assert counted.total == exact
    with torch.no_grad():
        assert macs_of(model, ids) == counted.total


@st.composite
def einsums(draw: st.DrawFn) -> tuple[str, list[tuple[int, ...]]]:
    """Draw an equation of two to four operands over five labels."""
    sizes = dict(zip("abcde", draw(st.permutations([2, 3, 4, 5, 6])), strict=True))
    terms = draw(st.lists(st.lists(st.sampled_from("abcde"), min_size=1, unique=True), min_size=2, max_size=4))
    used = sorted({label for term in terms for label in term})
    target = draw(st.lists(st.sampled_from(used), min_size=1, unique=True))
    equation = ",".join("".join(term) for term in terms) + "->" + "".join(target)
    return equation, [tuple(sizes[label] for label in term) for term in terms]


@given(einsums())
@settings(deadline=None, max_examples=200)
def test_any_einsum_matches_the_flop_counter(case: tuple[str, list[tuple[int, ...]]]) -> None:
    equation, shapes = case
    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation, *(torch.empty(shape, device="meta") for shape in shapes))
    assert 2 * count._einsum(equation, shapes) == counter.get_total_flops()


@pytest.mark.parametrize("path", [(0, 1, 0, 1, 0, 1), (1, 2, 0, 2, 0, 1), (0, 3, 0, 1, 0, 1), (3, 1, 2, 0, 1, 0)])
def test_einsum_follows_its_path(path: tuple[int, ...]) -> None:
    equation, shapes = "ab,bc,cd,de->ae", [(2, 3), (3, 5), (5, 7), (7, 11)]
    with FlopCounterMode(display=False) as counter:
        torch.ops.aten.einsum(equation, [torch.empty(shape, device="meta") for shape in shapes], path=path)
    assert 2 * count._einsum(equation, shapes, path=path) == counter.get_total_flops()


def test_repeated_einsum_label_is_a_diagonal() -> None:
    assert count._einsum("aab,bc->ac", [(4, 4, 3), (3, 5)]) == 4 * 3 * 5
    assert count._einsum("...ij, ...jk", [(7, 2, 3), (3, 5)]) == 7 * 2 * 3 * 5


# --- What has no rule -----------------------------------------------------------------------------------------------

UNCOUNTED: Mapping[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "bilinear": (functional.bilinear, (rand(2, 3), rand(2, 4), rand(5, 3, 4))),
    "cdist": (torch.cdist, (rand(30, 3), rand(30, 3))),
    "linalg_multi_dot": (lambda a: torch.linalg.multi_dot([a, a, a]), (rand(3, 3),)),
    "linalg_inv": (torch.linalg.inv, (torch.eye(3),)),
}


@pytest.mark.parametrize("name", UNCOUNTED)
def test_products_without_a_rule_are_named(name: str) -> None:
    function, inputs = UNCOUNTED[name]
    counted = macs(traced(Wrap(function), *inputs))
    assert len(counted.uncounted) == 1
    assert counted.uncounted[0].startswith(name)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm")
def test_recurrent_layers_are_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]

    counted = macs(traced(Recurrent(), rand(5, 2, 4)))
    assert counted.uncounted == ("lstm",)
    assert counted.total == 5 * 2 * 4 * 3


def test_running_a_product_without_a_rule_raises() -> None:
    function, inputs = UNCOUNTED["bilinear"]
    with pytest.raises(UncountedError, match="_trilinear") as caught:
        macs_of(function, *inputs)
    assert caught.value.ops == ("aten._trilinear",)
    assert torch.backends.mha.get_fastpath_enabled()


def test_foreign_ops_are_suspect() -> None:
    @torch.library.custom_op("fxslim_test::blend", mutates_args=())
    def blend(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @torch.library.custom_op("fxslim_test::double", mutates_args=())
    def double(a: Tensor) -> Tensor:
        return 2 * a

    blend.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
    double.register_fake(torch.empty_like)
    counted = macs(traced(Wrap(lambda a, b: double(blend(a, b))), rand(2, 3), rand(3, 5)))
    assert counted.uncounted == ("blend",)
    with pytest.raises(UncountedError, match="blend"):
        macs_of(lambda: double(blend(rand(2, 3), rand(3, 5))))


def test_cheap_ops_are_not_suspect() -> None:
    def cheap(x: Tensor) -> Tensor:
        y = functional.interpolate(x[None], scale_factor=2.0, mode="linear")[0]
        y = functional.layer_norm(y, y.shape[-1:]) * torch.linspace(0, 1, y.shape[-1])
        return functional.gelu(torch.linalg.vector_norm(y, dim=-1, keepdim=True) + y).softmax(-1)

    counted = macs(traced(Wrap(cheap), rand(3, 8)))
    assert (counted.total, counted.uncounted) == (0, ())
    assert macs_of(cheap, rand(3, 8)) == 0


def test_python_functions_methods_and_modules_are_named() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return torch.matmul(x, y).matmul(x) + (x @ y).view(-1)  # type: ignore[no-any-return]

    assert macs(fx.symbolic_trace(Plain()).graph).uncounted == ("linear", "matmul", "matmul_1", "matmul_2")


def test_nodes_without_sizes_are_named() -> None:
    graph = traced(nn.Linear(3, 5), rand(2, 3))
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta.clear()
    assert macs(graph).uncounted == ("linear",)


def test_sizes_that_depend_on_data_are_named() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return x[x[:, 0] > 0.5] @ weight

    counted = macs(traced(Chosen(), rand(9, 3), rand(3, 5)))
    assert (counted.total, counted.uncounted) == (0, ("matmul",))


# --- Subgraphs, fake tensors, fused layers ---------------------------------------------------------------------------


def test_blocks_without_gradients_count_in_place() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                y = self.linear(x) * 2
                z = functional.bilinear(y, y, y.new_ones(2, 5, 5))
            return z, x @ x.T

    counted = macs(traced(Frozen(), rand(2, 3)))
    assert sorted(counted.by_node.values()) == [12, 30]
    assert [name.partition("/")[2] for name in counted.uncounted] == ["bilinear"]


def test_the_dearer_branch_counts() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, (x,))  # type: ignore[no-any-return]

    assert macs(traced(Branch(), rand(3, 3))).total == 54


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_meta_and_fake_tensors(name: str) -> None:
    model = small(name, "sdpa")
    expected = macs_of(model, torch.zeros(2, 7, dtype=torch.long))
    assert macs_of(model.to("meta"), torch.zeros(2, 7, dtype=torch.long, device="meta")) == expected
    with FakeTensorMode():
        model = small(name, "sdpa")
        assert macs_of(model, torch.zeros(2, 7, dtype=torch.long)) == expected


def test_fused_encoder_layer_counts() -> None:
    layer = nn.TransformerEncoderLayer(D, H, F, batch_first=True).eval()
    expected = 2 * 5 * (4 * D * D + 2 * D * F) + 2 * H * 5 * 5 * 2 * E
    with torch.no_grad():
        assert macs_of(layer, rand(2, 5, D)) == expected
    with torch.inference_mode():
        assert macs_of(layer, rand(2, 5, D)) == expected
    assert macs(traced(layer, rand(2, 5, D))).total == expected


# --- Weights --------------------------------------------------------------------------------------------------------


class Weights(nn.Module):
    """Hold one weight under four names, a bias and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(3, 5, bias=False)
        self.second.weight = self.first.weight
        self.copy = nn.Parameter(self.first.weight.detach())
        self.transposed = nn.Parameter(self.first.weight.detach().T)
        self.register_buffer("table", torch.zeros(100))


def test_tied_weights_count_once() -> None:
    assert parameters(Weights()) == 20
    assert weight_bytes(Weights()) == 80
    bert = small("bert", "eager")
    assert parameters(bert) == bert.num_parameters()
    assert weight_bytes(bert.half()) == 2 * parameters(bert)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_weights_need_no_memory(device: str) -> None:
    with torch.device(device):
        assert parameters(nn.Sequential(nn.Linear(3, 5), nn.Linear(3, 5))) == 40
    with FakeTensorMode():
        assert parameters(nn.Sequential(nn.Linear(3, 5), nn.Linear(3, 5))) == 40


def test_parts_of_one_tensor_are_different_weights() -> None:
    module = nn.Module()
    whole = torch.zeros(2, 3)
    module.top, module.bottom = nn.Parameter(whole[0]), nn.Parameter(whole[1])
    assert parameters(module) == 6
    assert parameters(nn.Module()) == 0
