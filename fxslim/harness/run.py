"""Run models against one another, at every size and in every variant that is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import product
from typing import Any

import torch
from torch import nn

from fxslim import count, timer
from fxslim.errors import FxslimError, InputError
from fxslim.harness.agree import check_agreement
from fxslim.harness.generation import generation
from fxslim.harness.memory import peak_bytes
from fxslim.harness.result import Benchmark, Generation, Point, Size
from fxslim.harness.sizes import batch_of, length_of, resized
from fxslim.harness.variants import call_of, check_variants, compiling, counted, prepared
from fxslim.inputs import bind
from fxslim.passes.paths import Path
from fxslim.sharing import evaluating


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
        DisagreementError: models that should compute the same do not; see ``check``.
    """
    if not models or not all(isinstance(model, nn.Module) for model in models.values()):
        raise InputError("benchmark() takes a dict of names and models: {'dense': model, 'slim': small}.")
    first = next(iter(models)) if baseline is None else baseline
    if first not in models:
        raise InputError(f"baseline={first!r} is not among the models: {', '.join(models)}.")
    if isinstance(generate, bool) or generate < 0:
        raise InputError(f"generate={generate!r}: give a number of new tokens, or 0.")
    device = _device(models)
    kinds = (variants,) if isinstance(variants, str) else tuple(variants)
    check_variants(kinds, device)
    grid = [*product(_sizes("batches", batches), _sizes("lengths", lengths))]
    asked = {"baseline": first, "target_ci": target_ci, "max_seconds": max_seconds, "device": device,
             "progress": progress}  # fmt: skip
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
        given = _bound(models, inputs)
        notes = [*(check_agreement(models, given, first) if check else ())]
        ways = {kind: _prepared(models, kind, first, notes) for kind in kinds}
        with torch.inference_mode():
            points = [point for kind, own in ways.items() for point in _points(own, models, given, grid, kind, asked)]
            written = _generations(models, given, grid, generate, asked) if generate else ()
    dtypes = {name: _dtype(model) for name, model in models.items()}
    sizes = {name: Size(count.parameters(model), count.weight_bytes(model)) for name, model in models.items()}
    return Benchmark(first, dtypes, sizes, tuple(points), tuple(written), tuple(notes))


def _device(models: Mapping[str, nn.Module]) -> torch.device:
    """Return where all models are."""
    places = {tensor.device for model in models.values() for tensor in (*model.parameters(), *model.buffers())}
    if len({place.type for place in places}) > 1 or torch.device("meta") in places:
        raise InputError(f"models are compared on one device, with weights; these are on {sorted(map(str, places))}.")
    return places.pop() if len(places) == 1 else torch.device("cpu")


def _bound(models: Mapping[str, nn.Module], inputs: Any) -> Mapping[str, Any]:
    """Return keyword inputs; without an example, the first that a model makes of its config and runs on."""
    refused: list[Exception] = []
    for model in models.values():
        try:
            candidates = bind(model, inputs)
        except InputError as error:
            refused.append(error)
            continue
        for made in candidates:
            try:
                if len(candidates) > 1:
                    Path("as given", made).run(model)
            except Exception as error:  # noqa: BLE001 - the model says what is wrong with them
                refused.append(error)
            else:
                return made
    raise InputError(f"no inputs for these models: {refused[0]}") from refused[0]


def _prepared(models: Mapping[str, nn.Module], variant: str, first: str, notes: list[str]) -> dict[str, nn.Module]:
    """Return the modules that a variant calls; those that cannot be had are noted."""
    made = {}
    for name, model in models.items():
        try:
            made[name] = prepared(model, variant)
        except FxslimError as error:
            notes.append(f"{name}, {variant}: {error}")
    if first not in made:
        raise InputError(f"variants={variant!r} cannot be had for {first}, which ratios refer to: {notes[-1]}")
    return made


def _points(
    modules: Mapping[str, nn.Module], models: Any, given: Any, grid: Any, variant: str, asked: dict[str, Any]
) -> Iterator[Point]:
    """Measure one variant at every size."""
    device = asked["device"]
    for batch, length in grid:
        own = resized(given, batch=batch, length=length)
        with compiling(variant):
            calls = {name: call_of(module, variant, own) for name, module in modules.items()}
            peaks = {name: peak_bytes(calls[name], device) if counted(module, variant, device) else None
                     for name, module in modules.items()}  # fmt: skip
            macs = {name: count.macs_of(models[name], **own) for name in modules}
            yield Point(variant, batch_of(own), length_of(own), macs, peaks, timer.compare(calls, **asked))


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
