"""Models to run along every path that a user takes: they span the constructs, drop nothing, lose units at random."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

import fxslim
from fxslim.plan import Plan

from agreement import random_plan, tolerance
from architectures import ARCHITECTURES, PAD, Architecture
from hard import HARD

ENTRIES: dict[str, Architecture] = {**ARCHITECTURES, **HARD}
DECODERS = ("gpt2", "llama_gqa", "phi3_gqa", "gpt_neox", "gemma3", "falcon_new", "bloom")
PAIRS = ("bart", "t5", "whisper")
GENERATING = (*DECODERS, *PAIRS)
NAMES = (*GENERATING, "bert")


@functools.cache
def built(name: str) -> Any:
    """Return a dense model in float64 and eager attention that drops nothing."""
    model: Any = ENTRIES[name].build(torch.float64, "eager")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, vars(module).get("config")):
            for field, value in list(vars(holder).items()) if holder is not None else ():
                if ("dropout" in field or "layerdrop" in field) and isinstance(value, float):
                    setattr(holder, field, 0.0)
    return model


@functools.cache
def narrowed(name: str, seed: int = 1) -> Any:
    """Return its narrowed form: units of every site are gone at random."""
    model = built(name)
    example = ENTRIES[name].inputs(2, 7, seed=0) if getattr(ENTRIES[name], "given", False) else None
    plan = random_plan(model, fxslim.inspect(model, example).sites, fraction=0.4 if seed == 1 else 0.6, seed=seed)
    small: Any = fxslim.slim(model, example, plan=plan)
    assert small.fxslim.plan.zeroed == ()
    assert {difference.path for difference in small.fxslim.report.verification.differences} >= {"training"}
    return small


@functools.cache
def fewer_groups(name: str) -> Any:
    """Return a narrowed form that keeps half of the key/value heads: its caches are smaller."""
    small: Any = fxslim.slim(built(name), kv_groups=0.5, ffn=0.25)
    assert any(len(part.keep) < part.site.units for part in small.fxslim.plan if part.site.groups is not None)
    return small


def plan_of(name: str) -> Plan:
    plan: Plan = narrowed(name).fxslim.plan
    return plan


def loose(name: str) -> float:
    """Return what rounding explains after some steps of generation, or of a backward pass."""
    return 20 * tolerance(name)


def prompt(name: str, batch: int = 3, length: int = 8, seed: int = 5, *, left: bool = False) -> dict[str, Tensor]:
    """Return a prompt; that of a decoder is padded on the left, or not at all."""
    made = {k: v for k, v in ENTRIES[name].inputs(batch, length, seed).items() if not k.startswith("decoder")}
    if name in DECODERS and left:
        shift = made["attention_mask"].sum(-1)
        for key, value in made.items():
            made[key] = torch.stack([row.roll(-int(n)) for row, n in zip(value, shift, strict=True)])
        assert bool((made["input_ids"][made["attention_mask"] == 0] == PAD).all())
    elif name in DECODERS:
        made["attention_mask"] = torch.ones_like(made["attention_mask"])
    return made


def forward_inputs(name: str, batch: int = 3, length: int = 9, seed: int = 2) -> dict[str, Any]:
    entry = ENTRIES[name]
    made: dict[str, Any] = entry.inputs(batch, length, seed)
    if name == "whisper":
        generator = torch.Generator().manual_seed(seed)
        made["decoder_input_ids"] = torch.randint(4, 90, (batch, length + 1), generator=generator)
    return {**made, "use_cache": False} if name in GENERATING else made
