"""Tensors that are somewhere else, and read when they are asked for: never more than a few of them at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

KEPT = 4
"""How many tensors are in memory at a time: those of one operation, and as many more."""


class Lazy(Mapping[str, torch.Tensor]):
    """Tensors by name; the last ones that were read are kept, since most are asked for several times in a row."""

    def __init__(self, names: Collection[str], kept: int = KEPT) -> None:
        """Know ``names``, and keep the last ``kept`` tensors."""
        self._names, self._kept = names, kept
        self._last: OrderedDict[str, torch.Tensor] = OrderedDict()

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise KeyError(name)
        if name in self._last:
            self._last.move_to_end(name)
            return self._last[name]
        while len(self._last) >= self._kept:
            self._last.popitem(last=False)  # before the next one is there
        self._last[name] = made = self.read(name)
        return made

    def forget(self, name: str) -> None:
        """Let go of a tensor."""
        self._last.pop(name, None)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Return the name of a kept tensor that this one is, or is a view of."""
        place = tensor.untyped_storage().data_ptr()
        held = [name for name, own in self._last.items() if own.untyped_storage().data_ptr() == place]
        return held[0] if held and self._last[held[0]].dtype == tensor.dtype else None


class Spilled(Lazy, MutableMapping[str, torch.Tensor]):
    """Tensors that are written to files of a folder, one file each, when they are set."""

    def __init__(self, folder: Path) -> None:
        """Write into ``folder``, which exists."""
        self.files: dict[str, Path] = {}
        super().__init__(self.files)
        self._folder = folder

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self.forget(name)
        path = self.files.setdefault(name, self._folder / f"{len(self.files)}.safetensors")
        save_file({name: tensor.detach().contiguous()}, path)

    def __delitem__(self, name: str) -> None:
        self.forget(name)
        self.files.pop(name).unlink()

    def read(self, name: str) -> torch.Tensor:
        """Read what was written."""
        return load_file(self.files[name])[name].clone()  # not a page of a mapped file


def saved_by_name(tensors: Mapping[str, torch.Tensor]) -> AbstractContextManager[Any]:
    """Have autograd remember tensors that are read lazily by their names, and read them again on its way back."""
    if not isinstance(tensors, Lazy):
        return nullcontext()

    def pack(tensor: torch.Tensor) -> Any:
        name = tensors.name_of(tensor)
        return tensor if name is None else (name, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(held: Any) -> torch.Tensor:
        return held if isinstance(held, torch.Tensor) else tensors[held[0]].detach().as_strided(*held[1:])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def reserve(model: nn.Module) -> None:
    """Give tensors on ``meta`` memory that is reserved, not used: nothing is ever written there, ties stay.

    A trace on ``meta`` would lose the numbers in the constants that it lifts.
    """
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.device.type == "meta":
                    made[id(tensor)] = made[id(tensor)] if id(tensor) in made else _reserved(tensor)
                    table[name] = made[id(tensor)]


def _reserved(tensor: torch.Tensor) -> torch.Tensor:
    own = torch.empty_like(tensor, device="cpu")
    return nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
