"""Tensors in files: operations on them return what they return in memory, and hold no more of it than a block."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxslim import outofcore
from fxslim.mapped import is_mapped
from fxslim.outofcore import OutOfCore

ROWS = torch.tensor([0, 2, 3, 7, 11, 12, 13, 14])
MASK = torch.arange(16) % 3 == 0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors of 256 bytes be large, and go in blocks of 64."""
    monkeypatch.setattr(outofcore, "LARGE", 256)
    monkeypatch.setattr(outofcore, "BLOCK", 64)


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def grouped(w: Tensor) -> Tensor:
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    return torch._grouped_mm(weight(8, 16), w.reshape(3, 12, 16).transpose(1, 2), offs=ends)


def changed(w: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    change(w)
    return w


MADE: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "clone": ((16, 24), lambda w: w.clone()),
    "transposed": ((16, 24), lambda w: w.t().contiguous()),
    "converted": ((16, 24), lambda w: w.to(torch.bfloat16).double()),
    "rows": ((16, 24), lambda w: w.index_select(0, ROWS)),
    "columns": ((24, 16), lambda w: w.index_select(-1, ROWS)),
    "rows of experts": ((3, 16, 8), lambda w: w.take_along_dim(ROWS.flip(0).reshape(1, -1, 1).expand(3, -1, 1), 1)),
    "gathered along the first": ((16, 24), lambda w: w.take_along_dim(ROWS.reshape(-1, 1), 0)),
    "cat": ((16, 24), lambda w: torch.cat([w, w], dim=-1)),
    "stack": ((16, 24), lambda w: torch.stack([w, w], dim=1)),
    "copy": ((16, 24), lambda w: changed(w.clone(), lambda made: made.t().copy_(w[:, :1].reshape(16)))),
    "masked": ((24, 16), lambda w: changed(w.clone(), lambda made: made.masked_fill_(MASK, 0))),
    "cleared rows": ((16, 24), lambda w: changed(w.clone(), lambda made: made.index_fill_(0, ROWS, 0))),
    "cleared columns": ((3, 8, 16), lambda w: changed(w.clone(), lambda made: made.index_fill_(-1, ROWS, 1))),
    "no way of its own": ((16, 24), lambda w: torch.sort(w, dim=1).values),
    "in a higher-order operator": (
        (16, 24),
        lambda w: torch.ops.higher_order.wrap_with_set_grad_enabled(True, torch.clone, w),
    ),
    "parameter": ((16, 24), lambda w: nn.Parameter(w, requires_grad=False).double()),
}
PRODUCTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "linear": ((24, 16), lambda w: F.linear(weight(2, 3, 16), w)),
    "linear with bias": ((24, 16), lambda w: F.linear(weight(2, 3, 16), w, weight(24))),
    "scaled": ((24, 16), lambda w: torch.addmm(weight(4, 24), weight(4, 16), w.t(), beta=0.5, alpha=2)),
    "of a matrix the other way": ((16, 24), lambda w: weight(5, 16) @ w),
    "grouped": ((36, 16), grouped),
    "embedding": ((16, 24), lambda w: F.embedding(torch.tensor([[1, 15]]), w)),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_is_in_a_file_and_the_same(name: str, small: None, tmp_path: Path) -> None:
    shape, make = MADE[name]
    with OutOfCore(tmp_path):
        found = make(weight(*shape))
    expected = make(weight(*shape))
    assert is_mapped(found)
    assert not is_mapped(expected)
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert torch.equal(found, expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_the_same_up_to_rounding(name: str, small: None, tmp_path: Path) -> None:
    shape, make = PRODUCTS[name]
    with OutOfCore(tmp_path):
        found = make(weight(*shape))
    torch.testing.assert_close(found, make(weight(*shape)), rtol=1e-6, atol=1e-6)
    assert is_mapped(found) == (found.nbytes >= 256)


class Largest(TorchDispatchMode):
    """Records the most bytes of a tensor in a file that an operation is given; views and shapes read nothing."""

    NOTHING = (torch.ops.aten.empty_like.default, torch.ops.aten.set_.source_Storage_storage_offset)

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func not in self.NOTHING:
            given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.numel()]
            self.bytes = max([self.bytes, *(t.numel() * t.itemsize for t in given if is_mapped(t))])
        return func(*args, **(kwargs or {}))


WHOLE = {"no way of its own", "of a matrix the other way", "embedding", "gathered along the first", "rows"}
"""What is given the whole tensor, of which it reads some rows or all."""


@pytest.mark.parametrize("name", sorted({*MADE, *PRODUCTS} - WHOLE))
def test_no_more_than_a_block_is_worked_on(name: str, small: None, tmp_path: Path) -> None:
    shape, make = (MADE | PRODUCTS)[name]
    with OutOfCore(tmp_path):
        given = weight(*shape)
    with Largest() as seen, OutOfCore(tmp_path):
        make(given)
    assert 0 < seen.bytes < given.nbytes


def resident() -> Iterator[int]:
    """Yield how many KiB of each mapped tensor are in this process's memory."""
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = ".mapped" in line
        elif ours and line.startswith("Rss:"):
            yield int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says which pages are in memory")
def test_no_page_stays_and_no_number_is_lost(tmp_path: Path) -> None:
    gc.collect()
    others = len(list(resident()))
    with OutOfCore(tmp_path):
        one = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
        other = one.clone()
        other[5] = 1
        other.view(1024, 1024)[:, 3].fill_(2)
        linear = F.linear(torch.ones(1, 1024), other.view(1024, 1024))
        assert len(list(resident())) == others + 2
        assert sum(resident()) == 0
    expected = weight(1 << 20)
    assert torch.equal(one, expected)
    expected[5] = 1
    expected.view(1024, 1024)[:, 3] = 2
    assert torch.equal(other, expected)
    torch.testing.assert_close(linear, expected.view(1024, 1024).sum(dim=1)[None], rtol=1e-4, atol=1e-3)
    assert sum(resident()) > 0  # they were read just now, and nobody gives pages back any more
    del one, other
    assert len(list(resident())) == others


def test_a_full_disk_is_an_error_even_if_a_model_takes_no_notice(small: None, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"), OutOfCore(tmp_path), suppress(OSError):
            torch.zeros(100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())
