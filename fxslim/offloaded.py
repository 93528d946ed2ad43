"""Models whose weights accelerate keeps on disk or elsewhere: a skeleton to trace, and the weights, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxslim.errors import UnsupportedModelError
from fxslim.lazy import Lazy, reserve
from fxslim.program import Program, named_tensors
from fxslim.sharing import named_once, offloading, share

Place = tuple[Mapping[str, torch.Tensor], str]
"""Where a tensor is: a mapping of accelerate's, and its name there."""


def is_offloaded(model: nn.Module) -> bool:
    """Tell whether accelerate keeps any of a model's weights elsewhere between calls."""
    return any(next(offloading(module), None) is not None for module in model.modules())


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of an offloaded model without hooks, whose offloaded weights are memory that nobody has written to.

    Raises:
        UnsupportedModelError: the model runs elsewhere than on the CPU, or nobody knows where its weights are.
    """
    from accelerate.hooks import ModelHook, remove_hook_from_module

    hooks = [hook for module in model.modules() for hook in offloading(module)]
    places = {torch.device("cpu" if hook.execution_device is None else hook.execution_device).type for hook in hooks}
    places |= {tensor.device.type for tensor in named_tensors(model).values()} - {"meta"}
    if places != {"cpu"}:
        raise UnsupportedModelError(
            f"{type(model).__name__} is offloaded by accelerate, and runs on {', '.join(sorted(places - {'cpu'}))}: "
            "offloaded models are planned on the CPU. Load it with device_map={'': 'disk'} and offload_folder=."
        )
    without = {id(module._hf_hook): ModelHook() for module in model.modules() if hasattr(module, "_hf_hook")}
    made: nn.Module = remove_hook_from_module(share(model, instead=without), recurse=True)
    for module in made.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward  # as accelerate found it
    tie: Any = getattr(made, "tie_weights", None)
    if callable(tie):
        tie()  # accelerate unties what it has offloaded when the model has run
    _check(model, made)
    reserve(made)
    return made


def _check(model: nn.Module, made: nn.Module) -> None:
    """Raise UnsupportedModelError where a tensor of the copy is nowhere."""
    tensors, aliases = named_once(made)
    known = {aliases.get(name, name) for name, _ in _places(model)}
    lost = [name for name, tensor in tensors.items() if tensor.is_meta and name not in known]
    if lost:
        raise UnsupportedModelError(f"{lost[0]} is on meta, and no hook of accelerate knows its numbers.")


class Offloaded(Lazy):
    """The tensors of an offloaded model, under the names that its skeleton's program has for them."""

    def __init__(self, model: nn.Module, program: Program) -> None:
        """Read what is not there through the hooks of ``model``, which stays as it is."""
        super().__init__(program.tensors)
        self._program = program
        self._places = {program.aliases.get(name, name): place for name, place in _places(model)}

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own: pages of a mapped file would stay with it."""
        like = self._program.tensors[name]
        if name not in self._places:
            return like
        tensors, leaf = self._places[name]
        own = torch.empty_like(like).copy_(tensors[leaf])
        return nn.Parameter(own, requires_grad=False) if isinstance(like, nn.Parameter) else own


def _places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Yield the names of a model's offloaded tensors, and where they are."""
    for path, module in model.named_modules():
        for hook in offloading(module):
            own = {**module._parameters, **module._buffers}
            for leaf, tensor in (named_tensors(module) if hook.place_submodules else own).items():
                if tensor is not None and tensor.is_meta:
                    yield f"{path}.{leaf}" if path else leaf, (hook.weights_map, leaf)
