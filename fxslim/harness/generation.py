"""How fast a model reads a prompt, and how fast it writes: apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from fxslim.errors import InputError
from fxslim.harness.result import Generation
from fxslim.harness.sizes import batch_of, length_of
from fxslim.passes.paths import generates
from fxslim.timer import Estimate, compare, estimate_median


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
    left_out = tuple(name for name in models if name not in able)
    length = length_of(inputs)
    if not able or length is None:
        raise InputError("generate= is for models with .generate() and inputs with tokens; there is none among these.")
    calls = {}
    for name, model in able.items():
        for new in (1, 1 + tokens):
            calls[f"{name} {new}"] = partial(_generate, model, dict(inputs), new)
    measured = compare(calls, **timing)
    rows = batch_of(inputs) or 1
    prefill = {name: rate(measured[f"{name} 1"].seconds, (), rows * length, measured.confidence) for name in able}
    decode = {
        name: rate(measured[f"{name} {1 + tokens}"].seconds, measured[f"{name} 1"].seconds, rows * tokens,
                   measured.confidence)
        for name in able
    }  # fmt: skip
    return Generation(rows, length, tokens, prefill, decode, measured, left_out)


def _generate(model: Any, inputs: dict[str, Any], new: int) -> object:
    return model.generate(**inputs, min_new_tokens=new, max_new_tokens=new, do_sample=False, num_beams=1,
                          use_cache=True)  # fmt: skip


def rate(longer: Sequence[float], shorter: Sequence[float], tokens: int, confidence: float) -> Estimate:
    """Return tokens a second: of calls, or of what they take longer than others, round by round.

    Where noise is larger than the difference, the value is NaN and its interval open.
    """
    seconds = [a - b for a, b in zip(longer, shorter, strict=True)] if shorter else list(longer)
    found = estimate_median(seconds, confidence=confidence)
    value = tokens / found.value if found.value > 0 else math.nan
    return Estimate(value, tokens / found.high if found.high > 0 else 0.0,
                    tokens / found.low if found.low > 0 else math.inf)  # fmt: skip
