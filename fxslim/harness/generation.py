"""How fast a model reads a prompt, and how fast it writes: apart."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from fxslim.errors import InputError
from fxslim.harness.result import Generation
from fxslim.harness.sizes import batch_of, length_of
from fxslim.passes.paths import generates
from fxslim.timer import Estimate, Timing, compare, estimate_median


def generation(models: Mapping[str, nn.Module], inputs: Mapping[str, Any], tokens: int, **timing: Any) -> Generation:
    """Time greedy decoding with a cache: one new token, and so many more.

    The first token costs the prompt (prefill); the difference of the two, round by round, is what the others cost
    (decode).

    Args:
        models: the models, by name; those that cannot generate are left out.
        inputs: keyword inputs: the prompt.
        tokens: new tokens after the first.
        **timing: see `fxslim.timer.compare`.

    Raises:
        InputError: no model generates, or the inputs hold no tokens.
    """
    able = {name: model for name, model in models.items() if generates(model)}
    length = length_of(inputs)
    if not able or length is None:
        raise InputError("generate= is for models with .generate() and inputs with tokens; there is none among these.")
    calls = {}
    for name, model in able.items():
        for new in (1, 1 + tokens):
            calls[f"{name} {new}"] = partial(_generate, model, dict(inputs), new)
    measured = compare(calls, **timing)
    rows = batch_of(inputs)
    prefill = {name: _rate(measured, f"{name} 1", "", rows * length) for name in able}
    decode = {name: _rate(measured, f"{name} {1 + tokens}", f"{name} 1", rows * tokens) for name in able}
    return Generation(batch=rows, prompt=length, tokens=tokens, prefill=prefill, decode=decode, timing=measured)


def _generate(model: Any, inputs: dict[str, Any], new: int) -> object:
    return model.generate(**inputs, min_new_tokens=new, max_new_tokens=new, do_sample=False, num_beams=1)


def _rate(measured: Timing, name: str, less: str, tokens: int) -> Estimate:
    """Return tokens a second: of one call, or of what it takes longer than another, round by round."""
    seconds = measured[name].seconds
    if less:
        seconds = tuple(max(a - b, 1e-9) for a, b in zip(seconds, measured[less].seconds, strict=True))
    return estimate_median([tokens / one for one in seconds], confidence=measured.confidence)
