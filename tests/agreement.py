"""Compare what two models compute, without asking fxslim: every tensor of the output against its own scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxslim.passes.prepare import fingerprint, permanent
from fxslim.plan import Plan
from fxslim.site import Site, SitePlan

EXACT = 1e-12
"""Largest relative difference of float64 models: rounding, in another order of summation."""
INNER_FLOAT32 = 1e-6
"""The same for float64 models that compute a norm, a softmax or an angle in float32."""

FLOAT32_INSIDE = {"gptj", "gpt_neox", "llama", "llama_gqa", "mistral", "qwen2", "phi", "phi3", "phi3_gqa"} | {
    *("t5", "t5_gated", "t5_encoder", "mt5", "umt5", "bloom", "mpt", "falcon_mq", "falcon_mha", "falcon_new"),
    *("codegen", "persimmon", "qwen3", "gemma3", "olmo2", "llava", "gpt_oss", "deepseek_v2", "deepseek_v3"),
    "qwen3_next",
}
"""Architectures with rotary angles or RMS norms: float32, whatever the model's dtype; some softmaxes, too."""


FIXED = {"llava": 2}
"""Batch sizes that a trace fixes: as many image tokens as image features."""


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Turn torch's fused encoder layers off: at padding they hold other values than the operations in a graph."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def tolerance(name: str) -> float:
    """Return the largest relative difference that rounding explains for an architecture in float64."""
    return INNER_FLOAT32 if name in FLOAT32_INSIDE else EXACT


def outputs(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> dict[str, Tensor]:
    """Run a model without gradients and return the tensors of its output by where they are."""
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    leaves = pytree.tree_leaves_with_path(result)
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Return the largest difference of any tensor relative to its scale; names, shapes and dtypes must agree."""
    assert expected.keys() == found.keys()
    assert expected, "a comparison of nothing"
    worst = 0.0
    for name, want in expected.items():
        have = found[name]
        assert (want.shape, want.dtype) == (have.shape, have.dtype), name
        if not want.is_floating_point():
            assert torch.equal(want, have), name
            continue
        assert want.isfinite().all(), name
        assert have.isfinite().all(), name
        scale = float(want.abs().max())
        assert scale > 1e-6, f"{name} is zero: nothing would show"
        worst = max(worst, float((want - have).abs().max()) / scale)
    return worst


def random_keep(site: Site, fraction: float, generator: np.random.Generator) -> SitePlan:
    """Remove about this fraction of a site's units (at least one) at random, equally many in every group.

    What is left is a multiple of the site's, unless that is everything.
    """
    members = [np.arange(site.units)] if site.groups is None else _members(site)
    gone: list[int] = []
    for group in members:
        count = min(max(1, round(fraction * len(group))), len(group) - site.least)
        step = site.multiple if site.multiple < len(group) else 1
        count = min(-(-count // step) * step, len(group) - step)
        gone.extend(generator.permutation(group)[:count].tolist())
    return SitePlan(site=site, keep=tuple(unit for unit in range(site.units) if unit not in gone))


def random_plan(model: nn.Module, sites: tuple[Site, ...], fraction: float = 0.4, seed: int = 0) -> Plan:
    """Return a plan for a model that removes units of every site at random."""
    generator = np.random.default_rng(seed)
    parts = tuple(random_keep(site, fraction, generator) for site in sites)
    return Plan(fxslim="test", torch=torch.__version__, fingerprint=fingerprint(permanent(model)), sites=parts)


def _members(site: Site) -> list[np.ndarray]:
    groups = np.asarray(site.groups)
    return [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]


def state(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model that a failing call could have changed, to be compared with `same_state`."""
    seen: dict[str, Any] = {"": [name for name, _ in model.named_modules()]}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                for leaf, tensor in value.items():
                    seen[f"{name}.{key}.{leaf}"] = _tensor(tensor)
            elif isinstance(value, Tensor):
                seen[f"{name}.{key}"] = _tensor(value)
            elif key == "config" and hasattr(value, "to_dict"):
                seen[f"{name}.{key}"] = (id(value), repr(value.to_dict()), value._attn_implementation)
            elif key.endswith("_hooks") or "hooks_with" in key or "always_called" in key:
                seen[f"{name}.{key}"] = list(value)
            elif isinstance(value, int | float | str | bool | tuple | type(None)):
                seen[f"{name}.{key}"] = value
        seen[f"{name}.class"] = type(module)
    return seen


def same_state(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Compare two states bit for bit; NaN equals itself."""
    assert before.keys() == after.keys()
    changed = [key for key, value in before.items() if value != after[key]]
    assert changed == []
    return True


def _tensor(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    if tensor.device.type == "meta" or tensor.is_quantized:
        return id(tensor), tuple(tensor.shape), tensor.dtype
    grad = None if not tensor.is_leaf or tensor.grad is None else id(tensor.grad)
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return id(tensor), tuple(tensor.shape), tensor.dtype, tensor.requires_grad, grad, raw
