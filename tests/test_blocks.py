"""Blocks as vision and diffusion libraries write them: found, named, and in both forms equal to the masked model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.site import removed_rows

import blocks
import diffusion
from agreement import EXACT, difference, outputs, random_plan
from blocks import D


def drawn(seed: int, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)


def tokens(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, length, D))


def seven(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, 7, D))


def images(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, 3, 4, 4))


def maps(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, D, 6, 5))


def places(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, 4, 4, D))


def unet(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    x, context = drawn(seed, (batch, 4, 4, 6), (batch, length, 6))
    return x, torch.arange(1, batch + 1).double() * 7, context


def steps(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return *drawn(seed, (batch, length, 6)), torch.arange(1, batch + 1).double() * 7, torch.arange(batch) % 5


def streams(batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    return drawn(seed, (batch, length, D), (batch, 3, D), (batch, D))


@dataclass(frozen=True)
class Case:
    """A model, its inputs for a batch and a length, ``kind units[/groups]`` of its sites, how many are spread.

    Spread are those whose class says their width nowhere: it reshapes to the width of its input, or has one head width
    for keys and values.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], tuple[Tensor, ...]]
    sites: tuple[str, ...]
    spread: int = 0


CASES: dict[str, Case] = {
    "vit": Case(blocks.Vit, images, ("attention 3", "ffn 10") * 2),
    "vit, width of the input": Case(lambda: blocks.Vit(width="input"), images, ("attention 3", "ffn 10") * 2, 2),
    "eva": Case(lambda: blocks.Vit(lambda: blocks.SwiGlu(False)), images, ("attention 3", "gated_ffn 10") * 2),
    "eva, a norm over hidden channels": Case(
        lambda: blocks.Vit(lambda: blocks.SwiGlu(True)), images, ("attention 3",) * 2
    ),
    "swin": Case(blocks.Swin, places, ("attention 3", "ffn 10") * 2),
    "unet, convolutions": Case(
        lambda: diffusion.UnetStage(False),
        unet,
        ("ffn 14", "ffn 9", "generic 3", "generic 3", "attention 3", "attention 3", "gated_ffn 10", "generic 12"),
        1,
    ),
    "unet, linears": Case(
        lambda: diffusion.UnetStage(True),
        unet,
        ("ffn 14", "ffn 9", "generic 3", "generic 3", "attention 3", "attention 3", "gated_ffn 10", "generic 12"),
        1,
    ),
    "mixer": Case(blocks.Mixer, seven, ("ffn 8", "ffn 10")),
    "convnext": Case(blocks.ConvNext, maps, ("ffn 10",)),
    "convnext, convolutions": Case(lambda: blocks.ConvNext(conv=True), maps, ("ffn 10",)),
    "convnext v2": Case(lambda: blocks.ConvNext(grn=True), maps, ()),
    "dit": Case(
        diffusion.Dit,
        steps,
        ("ffn 14", "generic 12", "generic 12", "attention 3", "generic 12", "ffn 10", "generic 12"),
        3,
    ),
    "mm-dit": Case(diffusion.MmDit, streams, ("generic 12", "generic 12", "attention 3", "ffn 10", "ffn 10"), 2),
    "perceiver": Case(diffusion.Perceiver, lambda b, n, s: drawn(s, (b, n, 6)), ("attention 3", "gated_ffn 10") * 2),
    "mbconv": Case(blocks.MbConv, maps, ("generic 10", "ffn 5")),
    "gmlp": Case(lambda: blocks.Gmlp(False), seven, ("gated_ffn 10",)),
    "gmlp, a norm of the gate": Case(lambda: blocks.Gmlp(True), seven, ("gated_ffn 10",), 1),
    "talking heads": Case(blocks.TalkingHeads, tokens, ("generic 3", "generic 5", "generic 12/3"), 1),
    "class attention": Case(blocks.ClassAttention, tokens, ("attention 3",)),
    "einsums": Case(lambda: blocks.Einsums(4), tokens, ("generic 4", "generic 4", "gated_ffn 10")),
    "einsums, shared keys": Case(lambda: blocks.Einsums(2), tokens, ("generic 4/2", "generic 4", "gated_ffn 10")),
    "parallel": Case(blocks.Parallel, tokens, ("generic 10", "generic 3")),
    "reduced keys": Case(blocks.Reduced, maps, ("attention 3", "generic 10")),
    "scale and shift": Case(diffusion.ScaleShift, lambda b, n, s: (*maps(b, n, s), *drawn(s, (b, 9))), ("generic 5",)),
}


def built(case: Case) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.build().double().eval()
        for tensor in model.parameters():
            nn.init.normal_(tensor, std=0.5 if tensor.ndim > 1 else 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


def written(found: fxslim.Inspection) -> tuple[str, ...]:
    return tuple(f"{s.kind} {s.units}" + (f"/{s.group_count}" if s.groups is not None else "") for s in found.sites)


@pytest.mark.parametrize("name", CASES)
def test_both_forms_compute_what_the_masked_model_does(name: str) -> None:
    case = CASES[name]
    model, given = built(case), case.inputs(2, 6, 0)
    found = fxslim.inspect(model, given)
    assert written(found) == case.sites
    assert found.pinned  # what stays says why
    plan = random_plan(model, found.sites, seed=1)
    small, graph = fxslim.slim(model, given, plan=plan), fxslim.compile(model, given, plan=plan)
    assert small.fxslim.plan.zeroed == ()
    assert len(small.fxslim.plan.spread) == case.spread
    assert [note.where for note in small.fxslim.report.not_done] == list(small.fxslim.plan.spread)
    assert graph.fxslim.report.not_done == ()
    for form, parts in ((graph, plan.sites), (small, small.fxslim.plan.cut())):
        dense, narrow = model.state_dict(), form.state_dict()
        for (tensor, dim), gone in removed_rows(parts).items():
            assert narrow[tensor].shape[dim] == dense[tensor].shape[dim] - int(gone.sum())
    for other in (given, case.inputs(1, 5, 1), case.inputs(4, 9, 2)):
        with fxslim.masked(model, plan):
            expected = outputs(model, other)
        assert difference(expected, outputs(model, other)) > 1e-3 or not case.sites
        for form in (small, graph):
            assert difference(expected, outputs(form, other)) < EXACT
