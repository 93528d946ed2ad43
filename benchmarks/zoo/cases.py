"""The cases of the zoo: what a line of the file says, made into a model and its inputs.

A case is one line of JSON: ``name`` (family), ``class``, ``config_class``, ``config``, and ``inputs``, each of which is
``{"t": kind}``: ``"f"`` a float tensor of a ``shape``, a name of an integer or bool dtype with values ``v`` and a
``shape``, ``"list"`` and ``"dict"`` of those, and ``"py"`` a plain value.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxslim.errors import InputError
from fxslim.passes.prepare import settle

CASES = Path(__file__).resolve().parent / "cases.jsonl"


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        name: its family.
        model: its class in transformers.
        config_class: class of its config.
        config: the config as plain data.
        inputs: keyword inputs as plain data.
    """

    name: str
    model: str
    config_class: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.name}:{self.model}"


def read_cases(path: Path = CASES) -> list[Case]:
    """Read a file of cases, one a line.

    Raises:
        InputError: the file cannot be read, or a line is no case.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the cases in {path}: {error}") from error
    cases = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            x = json.loads(line)
            cases.append(Case(x["name"], x["class"], x["config_class"], x["config"], x["inputs"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number} is no case: {type(error).__name__}: {error}") from error
    return cases


def build(case: Case, dtype: torch.dtype, seed: int = 0) -> Any:
    """Return a case's model in eval mode, with random weights, eager attention where it has it."""
    import transformers

    config: Any = getattr(transformers, case.config_class).from_dict(dict(case.config))
    kind = getattr(transformers, case.model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = kind._from_config(config, attn_implementation="eager", dtype=dtype)
        except (ValueError, NotImplementedError):
            model = kind(config)
    model = model.eval().to(dtype)
    settle(model)  # weights that are computed at every call (weight norm) could not be masked
    scatter(model, seed)
    return model


def scatter(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter and running statistic values of its own: zeros, ones and tiny weights hide mistakes."""
    generator = torch.Generator().manual_seed(1 + seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            parameter.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1e3, 1e3)
            wanted = 1 / math.sqrt(max(parameter.numel() // max(parameter.shape[0], 1), 1)) if parameter.ndim else 1.0
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise(parameter))
            elif not float(parameter.std(correction=0)) > wanted / 2:
                parameter.copy_(wanted * noise(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.add_(0.2 * noise(module.running_mean))
                assert module.running_var is not None
                module.running_var.mul_(1 + 0.2 * noise(module.running_var).abs())


def inputs_of(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Return a case's inputs; floats are drawn."""
    generator = torch.Generator().manual_seed(2)
    return {name: _value(value, dtype, generator) for name, value in case.inputs.items()}


def _value(value: Any, dtype: torch.dtype, generator: torch.Generator) -> Any:
    kind = value.get("t") if isinstance(value, dict) else None
    if kind == "f":
        return torch.randn(value["shape"], generator=generator, dtype=dtype)
    if kind == "list":
        return [_value(item, dtype, generator) for item in value["v"]]
    if kind == "dict":
        return {name: _value(item, dtype, generator) for name, item in value["v"].items()}
    if kind == "py":
        return value["v"]
    return torch.tensor(value["v"], dtype=getattr(torch, kind)).reshape(value["shape"]) if kind else value


def variants(inputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the inputs themselves, other values, another batch size, another length: a model may not take them all."""
    yield "as traced", dict(inputs)
    generator = torch.Generator().manual_seed(3)

    def other(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        rolls = tensor.dtype == torch.int64 and tensor.ndim == 2 and int(tensor.max()) > 1
        return tensor.roll(1, -1) if rolls else tensor

    varied = _each(other, inputs)
    yield "other values", varied
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    batches = Counter(tensor.shape[0] for tensor in tensors)
    if not batches:
        return
    batch = batches.most_common(1)[0][0]

    def another(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != batch:
            return tensor
        return tensor[: batch - 1] if batch > 1 else torch.cat([tensor, tensor])

    yield "other batch", _each(another, varied)
    lengths = Counter(t.shape[1] for t in tensors if t.ndim == 2 and not t.is_floating_point() and t.shape[0] == batch)
    if not lengths or (length := lengths.most_common(1)[0][0]) < 4:
        return
    shorter = length - 2

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:, :shorter] if tensor.ndim >= 2 and tensor.shape[:2] == (batch, length) else tensor

    yield "other length", _each(cut, varied)


def _each(change: Callable[[Tensor], Tensor], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)
        for name, value in inputs.items()
    }


class Dtypes(TorchDispatchMode):
    """Record which floating dtypes a model computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, tuple | list) else (result,):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
                self.seen.add(leaf.dtype)
        return result


def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run a model on copies of its inputs, drawing the same numbers every time; return its tensors by their places."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(4)
        result = model(**_each(torch.clone, inputs))
    return {
        pytree.keystr(path): leaf for path, leaf in pytree.tree_leaves_with_path(result) if isinstance(leaf, Tensor)
    }


def varies(value: Tensor) -> bool:
    """Tell whether a tensor has finite numbers that are not all the same: nothing would show in another one."""
    if not value.is_floating_point():
        return False
    return len(value[value.isfinite()].unique()) > 1


def unmasked(inputs: Mapping[str, Any], *, blind: bool = False) -> dict[str, Any]:
    """Return inputs whose masks (with ``blind``, those that hide everything) let everything through."""
    return {
        name: torch.ones_like(value)
        if "mask" in name and isinstance(value, Tensor) and not (blind and value.any())
        else value
        for name, value in inputs.items()
    }


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Turn key/value caches off: their shape follows the heads."""
    configs = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    on = [config for config in configs.values() if getattr(config, "use_cache", None)]
    for config in on:
        config.use_cache = False
    try:
        yield
    finally:
        for config in on:
            config.use_cache = True
