"""Run models against one another, at every size and in every variant that is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import torch
from torch import nn

from fxslim import count, timer
from fxslim.errors import InputError
from fxslim.harness.agree import check_agreement
from fxslim.harness.generation import generation
from fxslim.harness.memory import peak_bytes
from fxslim.harness.result import Benchmark, Generation, Point, Size
from fxslim.harness.sizes import batch_of, length_of, resized
from fxslim.harness.variants import call_of, check_variants, prepared
from fxslim.inputs import bind


def benchmark(
    models: Mapping[str, nn.Module],
    inputs: Any = None,
    *,
    baseline: str | None = None,
    batches: Iterable[int] = (),
    lengths: Iterable[int] = (),
    variants: str | Iterable[str] = "eager",
    generate: int = 0,
    check: bool = True,
    target_ci: float = 0.02,
    max_seconds: float = 30.0,
    progress: bool = False,
) -> Benchmark:
    """Time models in turns, in one process, and count what they multiply and hold.

    Every point of the grid (variant, batch, length) is timed until all ratios to the baseline are known as well as is
    asked, or time is up, which the result says. See `fxslim.timer` for how, and `fxslim.count` for what is counted.

    Args:
        models: by name: dense ones, what `fxslim.slim` and `fxslim.compile` return, or others that take the same
            inputs. They are run in eval mode, and left as they are.
        inputs: as in `fxslim.inspect`; not needed where one of them is a model of transformers.
        baseline: name of the model that ratios refer to; the first by default.
        batches: sizes of the first axis; that of the inputs by default.
        lengths: tokens in a row; those of the inputs by default.
        variants: see `fxslim.harness.variants.VARIANTS`.
        generate: how many tokens to generate, to time prefill and decode apart; 0 for none.
        check: refuse to compare models that stand for the same plan and compute something else.
        target_ci: half-width of the 95 % interval of every ratio.
        max_seconds: time for each point.
        progress: show progress bars.

    Raises:
        InputError: names, sizes or inputs make no sense.
        VerifyError: models that should compute the same do not; see ``check``.
    """
    if not models or not all(isinstance(model, nn.Module) for model in models.values()):
        raise InputError("benchmark() takes a dict of names and models: {'dense': model, 'slim': small}.")
    first = next(iter(models)) if baseline is None else baseline
    if first not in models:
        raise InputError(f"baseline={first!r} is not among the models: {', '.join(models)}.")
    if isinstance(generate, bool) or generate < 0:
        raise InputError(f"generate={generate!r}: give a number of new tokens, or 0.")
    given = _bound(models, inputs)
    device = next((p.device for p in models[first].parameters()), torch.device("cpu"))
    kinds = (variants,) if isinstance(variants, str) else tuple(variants)
    check_variants(kinds, device)
    grid = [*product(_sizes("batches", batches), _sizes("lengths", lengths))]
    asked = {"baseline": first, "target_ci": target_ci, "max_seconds": max_seconds, "device": device,
             "progress": progress}  # fmt: skip
    modes = {name: model.training for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
        with torch.inference_mode():
            notes = check_agreement(models, given) if check else ()
            points = [point for kind in kinds for point in _points(models, given, grid, kind, device, asked)]
            written = _generations(models, given, grid, generate, asked) if generate else ()
    finally:
        for name, model in models.items():
            if model.training != modes[name]:
                model.train(modes[name])
    dtypes = {name: _dtype(model) for name, model in models.items()}
    sizes = {name: Size(count.parameters(model), count.weight_bytes(model)) for name, model in models.items()}
    return Benchmark(first, dtypes, sizes, tuple(points), tuple(written), notes)


def _bound(models: Mapping[str, nn.Module], inputs: Any) -> Mapping[str, Any]:
    """Return keyword inputs; without an example, those of the first model that says what it takes."""
    refused: list[InputError] = []
    for model in models.values():
        try:
            return bind(model, inputs)[0]
        except InputError as error:
            refused.append(error)
    raise refused[0]


def _points(
    models: Any, given: Any, grid: Any, variant: str, device: torch.device, asked: dict[str, Any]
) -> list[Point]:
    """Measure one variant at every size."""
    modules = {name: prepared(model, variant) for name, model in models.items()}
    points = []
    for batch, length in grid:
        own = resized(given, batch=batch, length=length)
        calls = {name: call_of(module, variant, own) for name, module in modules.items()}
        points.append(Point(
            variant, batch_of(own), length_of(own),
            {name: count.macs_of(model, **own) for name, model in models.items()},
            {name: peak_bytes(call_of(model, "eager", own), device) for name, model in models.items()},
            timer.compare(calls, **asked),
        ))  # fmt: skip
    return points


def _generations(models: Any, given: Any, grid: Any, tokens: int, asked: dict[str, Any]) -> list[Generation]:
    timing = {**asked, "baseline": None}
    return [generation(models, resized(given, batch=b, length=s), tokens, **timing) for b, s in grid]


def _sizes(name: str, given: Iterable[int]) -> tuple[int | None, ...]:
    sizes = tuple(given)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"{name}={size!r}: give whole numbers of at least 1.")
    return sizes or (None,)


def _dtype(model: nn.Module) -> str:
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return ", ".join(sorted(kinds)) or "-"
