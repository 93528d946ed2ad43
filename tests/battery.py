"""What the tests of all architectures share: sites in words, slices by their blocks, the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fxslim
from fxslim.plan import Plan
from fxslim.site import Site, Slice

from oracle import Channel, disturb


@contextmanager
def quiet() -> Iterator[None]:
    """Run on one thread, without the warnings of transformers."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


def layers(*sites: str, at: str = "") -> list[str]:
    """Write the sites of two layers: ``#`` stands for the layer's number."""
    return [f"{at}{site}".replace("#", str(layer)) for layer in range(2) for site in sites]


def written(site: Site) -> str:
    """Say what a site is: ``name units[/groups] [head]``."""
    groups = "" if site.groups is None else f"/{site.group_count}"
    return f"{site.name} {site.units}{groups}{' head' if site.task_head else ''}"


def removed(model: nn.Module, plan: Plan) -> dict[str, int]:
    """Count the parameters that a plan takes out, from the kept units and the slices alone."""
    lost: dict[tuple[str, int, int], set[int]] = {}
    for part in plan:
        gone = np.isin(np.arange(part.site.units), part.keep, invert=True)
        for piece in part.site.slices:
            own = rows(piece, np.flatnonzero(gone).tolist())
            lost.setdefault((piece.tensor, piece.dim, piece.experts), set()).update(own)
    keep: dict[str, list[int]] = {}
    for (tensor, dim, experts), every in lost.items():
        keep.setdefault(tensor, list(model.get_parameter(tensor).shape))[dim] -= len(every) // experts
    return {name: model.get_parameter(name).numel() - int(np.prod(shape)) for name, shape in keep.items()}


def rows(piece: Slice, units: list[int]) -> set[int]:
    """Return the rows of a slice (of all experts) that go with these units, read off its blocks."""
    if piece.groups is not None:
        left = {group for unit, group in enumerate(piece.groups) if unit not in units}
        units = sorted(set(piece.groups) - left)
    return {
        block.start + i * block.step + offset
        for block in piece.blocks
        for i in range(block.count)
        if block.first + i in units
        for offset in range(block.width)
    }


def units_of(piece: Slice, row: int, site: Site) -> list[int]:
    """Return the units that have to go for a row to go."""
    if piece.groups is None:
        return [unit for unit in range(site.units) if row in rows(piece, [unit])]
    number = next(group for group in set(piece.groups) if row in rows(piece, _of_group(piece, group)))
    return _of_group(piece, number)


def _of_group(piece: Slice, number: int) -> list[int]:
    assert piece.groups is not None
    return [unit for unit, group in enumerate(piece.groups) if group == number]


def columns_of(site: Site, units: list[int]) -> dict[str, set[int]]:
    """Return the columns of every consumer that go with these units."""
    return {piece.tensor: rows(piece, units) for piece in site.slices if piece.role == "in"}


def reached(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, list[Channel]]:
    """Ask the oracle about every output channel of every linear that the model calls."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, path=path: called.add(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return {path: disturb(model, inputs, path) for path in sorted(called)}


def output_dim(module: nn.Module) -> int:
    return 1 if isinstance(module, Conv1D) else 0


def assert_labels_say_what_the_oracle_sees(
    model: nn.Module, found: fxslim.Inspection, reached: Mapping[str, list[Channel]]
) -> None:
    """Compare sites with what disturbing every channel of every linear shows."""
    names: dict[int, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), path)
    canonical = {path: names[id(p)] for path, p in model.named_parameters(remove_duplicate=False)}
    pinned = {note.where: note.reason for note in found.pinned}
    whole: dict[str, int] = {}
    single: dict[str, int] = {}
    covered: set[tuple[str, int, str]] = set()
    for producer, channels in reached.items():
        weight = canonical[f"{producer}.weight"]
        dim = output_dim(model.get_submodule(producer))
        pieces = [(site, p) for site in found.sites for p in site.slices if (p.tensor, p.dim) == (weight, dim)]
        for channel in channels:
            owners = [
                (site, piece) for site, piece in pieces if channel.channel in rows(piece, list(range(site.units)))
            ]
            assert len(owners) <= 1, f"{producer} {channel.channel} lies in two slices"
            consumers = {canonical[f"{c}.weight"]: set(columns) for c, columns in channel.consumers.items()}
            if not owners:
                if channel.prunable:
                    where = [consumer.removesuffix(".weight") for consumer in consumers]
                    noted = all(pinned.get(path) for path in where) or one_in_every_head(found, consumers)
                    assert noted, f"{producer} {channel.channel}: {channel.reason}"
                continue
            ((site, piece),) = owners
            assert channel.prunable, f"{site.name} removes {producer} {channel.channel}, which {channel.reason}"
            covered.add((weight, channel.channel, site.name))
            expected = columns_of(site, units_of(piece, channel.channel, site))
            assert consumers.keys() == expected.keys(), f"{producer} {channel.channel}"
            if consumers == expected:
                whole[site.name] = whole.get(site.name, 0) + 1
                continue
            assert site.kind == "attention", f"{producer} {channel.channel} reaches {consumers}, not {expected}"
            (columns,), (head,) = consumers.values(), expected.values()
            heads = units_of(piece, channel.channel, site)
            assert columns < head, f"{producer} {channel.channel}"
            assert len(columns) == len(heads)  # one value column in every head that reads it
            for unit in heads:
                assert len(columns & columns_of(site, [unit])[next(iter(expected))]) == 1
            single[site.name] = single.get(site.name, 0) + 1
    for site in found.sites:
        promised = {
            (piece.tensor, row, site.name)
            for piece in site.slices
            if piece.role == "out" and piece.tensor.endswith(".weight") and _is_linear(model, piece.tensor)
            for row in rows(piece, list(range(site.units)))
        }
        assert promised <= covered, f"{site.name}: the oracle never saw {sorted(promised - covered)[:3]}"
        if not promised:  # convolutions, and tensors that nothing but a function of torch reads
            continue
        if site.kind == "attention":
            width = len(next(iter(columns_of(site, [0]).values())))
            shared = any(piece.groups is not None for piece in site.slices)
            groups = site.group_count if shared else site.units
            groups = groups if site.units * width < len(promised) else 0  # nothing of a key that all share
            gates = site.units * width if "gate" in site.roles else 0
            assert single.get(site.name, 0) == groups * width + gates
            assert whole[site.name] == len(promised) - groups * width - gates >= (site.units + groups) * width
        else:
            producers = {tensor for tensor, _, _ in promised}
            assert whole[site.name] == len(promised) >= site.units * len(producers)
        _biases_follow_their_weights(model, site)


def one_in_every_head(found: fxslim.Inspection, consumers: Mapping[str, set[int]]) -> bool:
    """Say whether these are the columns of one value channel that all heads share: no site takes out part of a head."""
    for site in found.sites:
        heads = [columns_of(site, [unit]) for unit in range(site.units)] if site.kind == "attention" else []
        if heads and heads[0].keys() == consumers.keys():
            return all(len(head[name] & columns) == 1 for head in heads for name, columns in consumers.items())
    return False


def _is_linear(model: nn.Module, tensor: str) -> bool:
    return isinstance(model.get_submodule(tensor.rpartition(".")[0]), nn.Linear | Conv1D)


def _biases_follow_their_weights(model: nn.Module, site: Site) -> None:
    for piece in site.slices:
        path, _, leaf = piece.tensor.rpartition(".")
        module = model.get_submodule(path)
        if (
            piece.role == "out"
            and leaf == "weight"
            and isinstance(module, nn.Linear | Conv1D)
            and module.bias is not None
        ):
            bias = [p for p in site.slices if p.tensor == f"{path}.bias" and p.groups == piece.groups]
            assert [p.blocks for p in bias] == [piece.blocks], path
