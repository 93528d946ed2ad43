"""Compute sums as exactly as dtypes allow, whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
"""Where it is said which products of float32 may be rounded: to TensorFloat-32, or to bfloat16."""


@contextmanager
def exact() -> Iterator[None]:
    """Turn off autocast, rounded products and inference mode while the context is open."""
    chip = torch.accelerator.current_accelerator()
    kinds = {"cpu", chip.type} if chip is not None else {"cpu"}
    before = [products.fp32_precision for products in PRODUCTS]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in sorted(kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for products in PRODUCTS:
                products.fp32_precision = "ieee"
            yield
        finally:
            for products, precision in zip(PRODUCTS, before, strict=True):
                products.fp32_precision = precision
