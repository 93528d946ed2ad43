"""Example inputs: what the user gave, bound to ``forward``'s names, or made from the model's own config.

Nothing here imports ``transformers``: a model that carries ``config`` and ``main_input_name`` describes itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.errors import InputError
from fxslim.program import Program, forward_parameters, hint, is_symbolic

BATCH = 2
LENGTH = 7


def bind(model: nn.Module, given: Any) -> tuple[dict[str, Any], ...]:
    """Return candidates for the example inputs: keyword arguments in the order of ``forward``'s signature.

    Inputs that the user gave are the only candidate; inputs made from a config may leave open whether the model wants
    decoder inputs, so the caller takes the first candidate that the model runs on.

    Args:
        model: the model that will be called.
        given: a dict of keyword inputs, a tuple or list of positional ones, one tensor, or None for inputs made from
            the model's config.

    Raises:
        InputError: the inputs do not fit ``forward``, or none were given and none can be made.
    """
    names, defaults, trailing = forward_parameters(model)
    if given is None:
        return tuple(_ordered(names, made) for made in from_config(model, names))
    if isinstance(given, torch.Tensor):
        kwargs = _positional(model, (given,), names)
    elif isinstance(given, Mapping):
        kwargs = dict(given)
        unknown = [name for name in kwargs if name not in names]
        if unknown and not trailing:
            for name in unknown:  # tokenizers return more than some models take
                del kwargs[name]
        if not kwargs:
            raise InputError(
                f"example_inputs name none of the inputs of {type(model).__name__}.forward: got {sorted(unknown)}, "
                f"forward takes {list(names)}."
            )
    elif isinstance(given, tuple | list):
        kwargs = _positional(model, tuple(given), names)
    else:
        raise InputError(
            f"example_inputs must be a dict of keyword inputs, a tuple of positional ones or one tensor, "
            f"not {type(given).__name__}. A plan goes into plan=."
        )
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(kwargs)):
        raise InputError("example_inputs hold no tensor; give the inputs that the model is called with.")
    missing = [name for name in names if defaults[name] is inspect.Parameter.empty and name not in kwargs]
    if missing:
        raise InputError(f"{type(model).__name__}.forward needs {missing}; add them to example_inputs.")
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        """Export takes one tensor given twice for one input."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        twice = id(leaf) in seen
        seen.add(id(leaf))
        return leaf.clone() if twice else leaf

    return (_ordered(names, pytree.tree_map(own, kwargs)),)


def _ordered(names: tuple[str, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    ordered = {name: kwargs[name] for name in names if name in kwargs}
    return ordered | {name: value for name, value in kwargs.items() if name not in ordered}


def _positional(model: nn.Module, given: tuple[Any, ...], names: tuple[str, ...]) -> dict[str, Any]:
    if not names:
        raise InputError(
            f"{type(model).__name__}.forward names no inputs (it takes *args); wrap it in a module whose forward does."
        )
    if len(given) > len(names):
        raise InputError(
            f"{type(model).__name__}.forward takes {list(names)}, but {len(given)} positional inputs were given; "
            "use a dict of keyword inputs."
        )
    return dict(zip(names, given, strict=False))


def from_config(model: nn.Module, names: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    """Make small inputs for a model that describes itself through ``config`` and ``main_input_name``."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str) or main not in names:
        raise InputError(
            f"{type(model).__name__} does not say what its inputs look like (no config and main_input_name); "
            "give example_inputs: a dict of keyword inputs, a tuple of positional ones, or one tensor."
        )
    device, dtype = _placement(model)
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {}
    wanted = [main] + [name for name in ("input_ids", "pixel_values") if name in names and name != main]
    for name in wanted:
        # A second modality is required exactly where the config describes a second tower.
        if name != main and not _has_tower(config, name):
            continue
        made[name] = _make(name, config, generator).to(device)
        if made[name].is_floating_point():
            made[name] = made[name].to(dtype)
    if "input_ids" in made and "attention_mask" in names:
        made["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.int64, device=device)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        plain, made = made, made | {"decoder_input_ids": _make("decoder_input_ids", config, generator).to(device)}
        generates = getattr(model, "can_generate", None)
        return (made, plain) if callable(generates) and generates() else (plain, made)
    return (made,)


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    floating = [p for p in model.parameters() if p.is_floating_point()]
    if not floating:
        raise InputError(f"{type(model).__name__} has no floating-point parameters: there is nothing to narrow.")
    return floating[0].device, floating[0].dtype


def _has_tower(config: Any, name: str) -> bool:
    tower = {"input_ids": "text_config", "pixel_values": "vision_config"}[name]
    return getattr(config, tower, None) is not None


def _text_config(config: Any) -> Any:
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


def _make(name: str, config: Any, generator: torch.Generator) -> torch.Tensor:
    if "ids" in name:
        vocabulary = int(getattr(_text_config(config), "vocab_size", 0) or 0)
        if vocabulary < 2:
            raise InputError(f"cannot make {name}: the config has no vocab_size; give example_inputs.")
        length = LENGTH - 2 if name.startswith("decoder") else LENGTH
        ids = torch.randint(0, vocabulary, (BATCH, length), generator=generator)
        ids = _without_special(ids, config, vocabulary)
        return ids
    if name == "pixel_values":
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", None)
        if size is None:
            raise InputError("cannot make pixel_values: the config has no image_size; give example_inputs.")
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = int(getattr(vision, "num_channels", 3))
        return torch.randn(BATCH, channels, height, width, generator=generator)
    raise InputError(f"cannot make {name!r} from the config; give example_inputs, a dict of keyword inputs.")


def _without_special(ids: torch.Tensor, config: Any, vocabulary: int) -> torch.Tensor:
    """Keep special tokens out of the body and end every row with the end token, as a tokenizer would."""
    text = _text_config(config)
    special = set()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(text, name, None)
        special |= set(value) if isinstance(value, list | tuple) else {value}
    free = [token for token in range(min(vocabulary, 64)) if token not in special]
    if free:
        table = torch.tensor(free)
        bad = torch.isin(ids, torch.tensor([token for token in special if isinstance(token, int)], dtype=torch.int64))
        ids = torch.where(bad, table[ids % len(free)], ids)
    eos = getattr(text, "eos_token_id", None)
    if isinstance(eos, int) and 0 <= eos < vocabulary:
        ids[:, -1] = eos
    return ids


def fresh(
    program: Program,
    *,
    seed: int,
    batch: int | None = None,
    length: int | None = None,
    integers: bool = True,
    at: int = 0,
    whole: bool = True,
) -> dict[str, Any]:
    """Make inputs like the traced ones with other values, and other sizes where the trace left them open.

    Integer inputs draw from the values that the example holds at the same place in the sequence (so that end tokens
    stay at the end), floating-point ones from a normal distribution with the example's mean and deviation, masks (two
    values) get padding on the right in every second row. Where the model is traced in regions, nothing says which sizes
    are open: the batch is the first size of every tensor, if they agree, and lengths stay.

    Args:
        program: the traced model.
        seed: equal seeds give equal inputs.
        batch: another batch, where the trace left it open.
        length: another length, where the trace left it open.
        integers: whether integers vary; some models count them (placeholders of images). Where they do not, longer ones
            repeat one position of the example, and more of them rows.
        at: the position that is repeated.
        whole: whether rows are repeated as they are; else further rows hold nothing but that position.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves, spec = pytree.tree_flatten(dict(program.call.example))
    shapes = _batches(leaves, batch) if program.regions else _shapes(program, leaves, batch, length)

    def made(leaf: Any, shape: list[int]) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return (
            _like(leaf, shape, generator) if integers or leaf.is_floating_point() else _repeated(leaf, shape, at, whole)
        )

    inputs: dict[str, Any] = pytree.tree_unflatten(list(map(made, leaves, shapes)), spec)
    return inputs


def countable(program: Program) -> int:
    """Return how long integer inputs are where their length is open; 0 where none is."""
    values = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in program.inputs]
    whole = [v for v in values if isinstance(v, torch.Tensor) and not v.is_floating_point() and v.dtype != torch.bool]
    return max((hint(size) for v in whole for size in v.shape[1:2] if is_symbolic(size)), default=0)


def _repeated(leaf: torch.Tensor, shape: list[int], at: int, whole: bool) -> torch.Tensor:
    """Return a tensor with other sizes, in which one position is repeated, and rows from the first one on."""
    for axis, size in enumerate(shape[1:], 1):
        first = torch.arange(min(leaf.shape[axis], size))
        again = torch.full((size - len(first),), min(at, len(first) - 1))
        leaf = leaf.index_select(axis, torch.cat([first, again]).sort().values.to(leaf.device))
    rows = torch.arange(shape[0] if shape else 0, device=leaf.device)
    if not shape or len(rows) == leaf.shape[0]:
        return leaf
    made = leaf.index_select(0, rows % leaf.shape[0])
    if not whole and leaf.ndim > 1:
        made[leaf.shape[0] :] = made[leaf.shape[0] :, min(at, leaf.shape[1] - 1), None]
    return made


def _shapes(program: Program, leaves: list[Any], batch: int | None, length: int | None) -> list[list[int]]:
    """Return another shape for every tensor, where the trace left sizes open."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    shapes: list[list[int]] = []
    sizes: dict[str, int] = {}  # a length may stand in several axes: pairs of places
    for name in program.inputs:
        for axis, size in enumerate(getattr(nodes[name].meta.get("val"), "shape", ())[:2]):
            if is_symbolic(size):
                sizes.setdefault(str(size.node.expr), _resize(size, axis, batch, length))
    for leaf, name in zip(leaves, program.inputs, strict=True):
        if not isinstance(leaf, torch.Tensor):
            shapes.append([])
            continue
        shape = [
            sizes.get(str(size.node.expr), hint(size)) if is_symbolic(size) else hint(size)
            for size in nodes[name].meta["val"].shape
        ]
        for limit in program.ranges:
            if limit.input == name:
                high = shape[limit.axis] if limit.high is None else limit.high
                shape[limit.axis] = max(limit.low, min(shape[limit.axis], high))
        shapes.append(shape)
    return shapes


def _batches(leaves: list[Any], batch: int | None) -> list[list[int]]:
    """Return every tensor's shape with another batch, where all tensors have the same first size."""
    shapes = [list(leaf.shape) if isinstance(leaf, torch.Tensor) else [] for leaf in leaves]
    if batch is not None and len({shape[0] for shape in shapes if shape}) == 1:
        shapes = [[batch, *shape[1:]] if shape else [] for shape in shapes]
    return shapes


def _resize(size: Any, axis: int, batch: int | None, length: int | None) -> int:
    if not is_symbolic(size):
        return hint(size)
    if axis == 0 and batch is not None:
        return batch
    return length + hint(size) - LENGTH if axis == 1 and length is not None else hint(size)


def _like(leaf: torch.Tensor, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if leaf.device.type == "meta":
        return torch.empty(shape, dtype=leaf.dtype, device="meta")
    values = leaf.detach().cpu()
    if leaf.is_floating_point():
        wide = values.double()
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (wide.mean() + noise * (wide.std() if wide.numel() > 1 else 1.0)).to(leaf)
    if values.numel() == 0:
        return torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)
    binary = bool(((values == 0) | (values == 1)).all())
    if binary and bool((values == 1).any()):
        at_padding = values.ndim > 0 and values.shape[-1] > 0 and not bool(values[..., 0].any())  # torch's own masks
        mask = torch.full(shape, not at_padding, dtype=leaf.dtype)
        if mask.ndim >= 2 and shape[-1] > 3:
            mask[1::2, ..., -(shape[-1] // 3) :] = at_padding
        return mask.to(leaf.device)
    flat = values.reshape(-1)
    drawn = flat[torch.randint(0, flat.numel(), shape, generator=generator)]
    if values.ndim == 2 and len(shape) == 2 and bool((values[:, -1] == values[0, -1]).all()):
        body = values[:, :-1].reshape(-1)
        if body.numel():
            drawn = body[torch.randint(0, body.numel(), shape, generator=generator)]
            drawn[:, -1] = values[0, -1]
    return drawn.to(leaf.device)
