"""What a case of the zoo has to pass, in both forms, and what came of it.

Found: every linear that the oracle calls prunable lies in a site, or the report says why not. Exact: with 40 % of the
units of every site removed at random, the narrowed models compute what the masked one does, on the traced inputs and on
others. Generates: greedy tokens are the same. Survives: the narrowed weights load into a skeleton that the plan made,
and what is saved loads back bit for bit; transformers alone loads it where the report says so, or refuses its sizes.
Never silent: every linear outside of the sites has a line in the report.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxslim
from benchmarks.zoo.cases import (
    Case,
    Dtypes,
    build,
    inputs_of,
    outputs,
    unmasked,
    variants,
    varies,
    without_caches,
)
from benchmarks.zoo.disturb import Oracle, Probe
from fxslim.errors import FxslimError
from fxslim.passes.narrow import replay
from fxslim.passes.prepare import settle
from fxslim.plan import Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from agreement import random_plan

REMOVED = 0.4
EXACT, INNER_FLOAT32, FLOAT32 = 1e-9, 1e-6, 1e-4
"""Largest difference relative to an output's scale: in float64, with float32 inside, and in float32."""
TOKENS = 6
SEEDS = 8
"""How many random weights and plans are tried until the outputs say something: a last ReLU may return only zeros."""


@dataclass
class Form:
    """What came of one form.

    Attributes:
        outcome: ``exact``, ``in place`` (exact, but units of some sites stay, zeroed and reported), ``refused`` (with a
            reason), ``wrong``, ``nothing`` (nothing that could be compared), or ``crash`` (an error that is not
            fxslim's own).
        reason: why it is not exact.
        worst: largest relative difference.
        narrowed: how many of the linears that the oracle calls prunable got smaller.
        compared: the inputs that were compared.
        outputs: the outputs in which a mistake would show: their numbers are not all the same.
        mute: the others.
    """

    outcome: str
    reason: str = ""
    worst: float = 0.0
    narrowed: int = 0
    compared: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    mute: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Form:
        """Read plain data."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


@dataclass
class Row:
    """What came of one case.

    Attributes:
        name, model: family and class.
        dtype: what it was run in.
        seed: which random weights and which random plan: the first with which the masked model's outputs say something.
        sites: how many sites there are of each kind.
        prunable: how many linears the oracle calls prunable.
        found: how many of these lie in a site.
        unexplained: those that lie in none and that the report does not mention.
        slim, compile: what came of the two forms.
        generates: ``equal``, ``differs: …`` or why it was not tried; empty where the model does not generate.
        survives: ``yes``, or what went wrong with the state dict.
        silent: linears without a site and without a line in the report.
        reasons: reason -> prunable linears that stay for it.
        error: what kept the case from being run at all.
        seconds: wall time.
    """

    name: str
    model: str
    dtype: str = ""
    seed: int = 0
    sites: dict[str, int] = field(default_factory=dict)
    prunable: int = 0
    found: int = 0
    unexplained: list[str] = field(default_factory=list)
    slim: Form = field(default_factory=lambda: Form("not run"))
    compile: Form = field(default_factory=lambda: Form("not run"))
    generates: str = ""
    survives: str = ""
    silent: list[str] = field(default_factory=list)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0

    def passes(self, form: str, *, in_place: bool = False) -> bool:
        """Say whether everything holds in one form, with units left in place allowed or not."""
        made: Form = getattr(self, form)
        good = ("exact", "in place") if in_place else ("exact",)
        own = form == "compile" or (self.generates in ("", "equal") and self.survives == "yes")
        return not self.error and made.outcome in good and own and not self.unexplained and not self.silent

    def failure(self) -> str:
        """Say in a line why a case does not pass everything, or nothing."""
        said = [self.error] if self.error else []
        forms = (("slim", self.slim), ("compile", self.compile))
        said += [f"{form}: {made.outcome}: {made.reason}" for form, made in forms
                 if made.outcome not in ("exact", "not run")]  # fmt: skip
        said += [f"generation: {self.generates}"] if self.generates not in ("", "equal") else []
        said += [f"state dict: {self.survives}"] if self.survives not in ("", "yes") else []
        said += [f"{len(self.unexplained)} without a reason: {self.unexplained[0]}"] if self.unexplained else []
        said += [f"{len(self.silent)} not in the report: {self.silent[0]}"] if self.silent else []
        return "; ".join(" ".join(line.split()) for line in said)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Read plain data."""
        forms = {form: Form.from_json(data[form]) for form in ("slim", "compile")}
        return cls(**{**data, **forms})


def run(case: Case) -> Row:
    """Run one case, and say what came of it."""
    row, start = Row(case.name, case.model), time.perf_counter()
    try:
        _run(case, row)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the result
        row.error = _said(error)
    row.seconds = time.perf_counter() - start
    return row


def _run(case: Case, row: Row) -> None:
    model, inputs, tolerance = _dense(case, row)
    found = fxslim.inspect(model, inputs)
    plan = random_plan(model, found.sites, REMOVED)
    while not _shows(model, plan, inputs) and row.seed + 1 < SEEDS:
        row.seed += 1
        model, inputs, tolerance = _dense(case, row)
        plan = random_plan(model, found.sites, REMOVED, row.seed)
    if row.seed:
        found = fxslim.inspect(model, inputs)
    row.sites = dict(Counter(site.kind for site in found.sites))
    with without_caches(model):
        probes = _probes(model, inputs)
    _account(row, model, found, probes)
    producers = {probe.producer for probe in probes if probe.prunable}

    def form(make: Callable[..., Any]) -> tuple[Form, Any]:
        try:
            small = make(found, plan=plan)
        except FxslimError as error:
            return Form("refused", f"{type(error).__name__}: {_said(error)}"), None
        except Exception as error:  # noqa: BLE001
            return Form("crash", _said(error)), None
        graph = make is fxslim.compile
        return _compare(model, small, plan, inputs, tolerance, producers, graph=graph), small

    row.slim, small = form(fxslim.slim)
    row.compile, _ = form(fxslim.compile)
    if small is None:
        return
    row.generates = _generates(model, small, plan, inputs)
    try:
        row.survives = _survives(case, row.seed, small, inputs)
    except Exception as error:  # noqa: BLE001
        row.survives = _said(error)


def _dense(case: Case, row: Row) -> tuple[Any, dict[str, Any], float]:
    """Build the model in float64, or in float32 where one of its kernels has no other; return the tolerance as well."""
    failure: Exception | None = None
    for dtype, masked in ((torch.float64, True), (torch.float32, True), (torch.float64, False)):
        model, inputs = build(case, dtype, row.seed), inputs_of(case, dtype)
        inputs = unmasked(inputs, blind=masked)  # rows that are all padding may make everything NaN
        try:
            with Dtypes() as dtypes, without_caches(model):
                made = outputs(model, inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            failure = failure or error
            continue
        void = sorted(key for key, value in made.items() if is_void(value))
        if void:  # NaN equals NaN: whatever the narrowed model computed there would be called right
            failure = failure or ValueError(
                f"{', '.join(void)} is NaN everywhere in {dtype}, so that nothing would show"
            )
            continue
        inner = dtypes.seen - {torch.float64}
        row.dtype = str(dtype).removeprefix("torch.")
        return model, inputs, FLOAT32 if dtype == torch.float32 else INNER_FLOAT32 if inner else EXACT
    assert failure is not None
    raise RuntimeError(f"the dense model does not run: {_said(failure)}")


def _shows(model: nn.Module, plan: Plan, inputs: Mapping[str, Any]) -> bool:
    """Tell whether some output of the masked model has numbers that are not all the same, where mistakes would show."""
    with without_caches(model), fxslim.masked(model, plan):
        return any(map(varies, outputs(model, inputs).values()))


def _probes(model: nn.Module, inputs: Mapping[str, Any]) -> list[Probe]:
    oracle = Oracle(model, inputs)
    return [oracle.probe(path) for path in oracle.called]


def _account(row: Row, model: nn.Module, found: fxslim.Inspection, probes: list[Probe]) -> None:
    """Count what the oracle calls prunable and the sites hold, and list what nobody speaks of."""
    canonical = _canonical(model)
    produced = {piece.tensor for site in found.sites for piece in site.slices if piece.role == "out"}
    consumed = {piece.tensor for site in found.sites for piece in site.slices if piece.role == "in"}
    said = {note.where: note.reason for note in (*found.pinned, *found.notes)}
    noted = {path: reason for where, reason in said.items() for path in where.split(", ")}
    inside = {piece.tensor: said[site.name] for site in found.sites for piece in site.slices if site.name in said}
    for probe in probes:
        weight = canonical.get(f"{probe.producer}.weight", f"{probe.producer}.weight")
        if weight not in consumed and not _spoken(probe.producer, weight, noted):
            row.silent.append(probe.producer)
        if not probe.prunable:
            continue
        row.prunable += 1
        if weight in produced:
            row.found += 1
            continue
        consumer = canonical.get(f"{probe.consumer}.weight", f"{probe.consumer}.weight")
        reason = inside.get(consumer) or _spoken(probe.consumer, consumer, noted)
        reason = reason or _spoken(probe.producer, weight, noted)
        if reason:
            row.reasons.setdefault(reason, []).append(probe.producer)
        else:
            row.unexplained.append(f"{probe.producer} -> {len(probe.columns)} inputs of {probe.consumer}")


def _spoken(path: str, weight: str, noted: Mapping[str, str]) -> str:
    """Return what the report says about a linear, or about the module that holds its weight."""
    return noted.get(path) or noted.get(weight.rpartition(".")[0]) or ""


def _canonical(model: nn.Module) -> dict[str, str]:
    """Return the first name of every parameter, by all of its names."""
    first: dict[int, str] = {}
    names = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in names.items():
        first.setdefault(id(parameter), name)
    return {name: first[id(parameter)] for name, parameter in names.items()}


def _compare(
    model: nn.Module,
    small: Any,
    plan: Plan,
    inputs: Mapping[str, Any],
    tolerance: float,
    producers: set[str],
    *,
    graph: bool,
) -> Form:
    """Compare a narrowed model with the masked one on every variant that the dense model takes."""
    compared, worst, telling, mute = [], 0.0, list[str](), list[str]()
    for name, varied in variants(inputs):
        try:
            with without_caches(model), fxslim.masked(model, plan):
                expected = outputs(model, varied)
        except Exception:
            if name == "as traced":
                raise
            continue
        if name == "as traced":
            with without_caches(model):
                dense = outputs(model, varied)
            shown = max((distance(value, expected[key]) for key, value in dense.items()), default=0.0)
            if not any(map(varies, expected.values())):
                return Form("nothing", "in every output all numbers are the same")
            if plan.sites and not shown > tolerance:
                return Form("nothing", "the masks change no output")
        try:
            with without_caches(small):
                have = outputs(small, varied)
        except FxslimError as error:
            if graph and name != "as traced":
                continue  # a graph says which sizes it takes
            return Form("wrong", f"{name}: {_said(error)}")
        except Exception as error:  # noqa: BLE001
            return Form("wrong", f"{name}: {_said(error)}")
        if not have.keys() <= expected.keys() or (not graph and have.keys() != expected.keys()) or not have:
            return Form("wrong", f"{name}: returns {sorted(have)} instead of {sorted(expected)}")
        if name == "as traced":
            telling = sorted(key for key in have if varies(expected[key]))
            mute = sorted(have.keys() - set(telling))
        for key, value in have.items():
            difference = distance(expected[key], value)
            worst = max(worst, difference)
            if not difference <= tolerance:
                return Form("wrong", f"{name}: {key} differs by {difference:.1e}", difference)
        compared.append(name)
    made = small.fxslim.plan
    stays = {part.site.name for part in made if part.site.name in made.zeroed}
    smaller = {
        piece.tensor
        for part in made
        if part.site.name not in stays
        for piece in part.site.slices
        if piece.role == "out"
    }
    canonical = _canonical(model)
    narrowed = sum(canonical.get(f"{path}.weight", f"{path}.weight") in smaller for path in producers)
    reported = {note.where: note.reason for note in small.fxslim.report.not_done}
    if stays - reported.keys():
        return Form("wrong", f"in place and not reported: {sorted(stays - reported.keys())}")
    reason = f"{len(stays)} of {len(made.sites)} sites: " if stays else ""
    reason += "; ".join(sorted({reported[name] for name in stays}))
    shows = tuple(compared), tuple(telling), tuple(mute)
    return Form("in place" if stays else "exact", reason, worst, narrowed, *shows)


def is_void(value: Tensor) -> bool:
    """Tell whether a tensor has elements, and all of them are NaN."""
    return bool(value.numel()) and bool(value.isnan().all())


def distance(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference relative to the expected tensor's scale; equal infinities and NaNs are equal."""
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return float("inf")
    if not expected.numel():
        return 0.0
    if expected.is_complex():
        expected, found = torch.view_as_real(expected), torch.view_as_real(found)
    a, b = expected.double(), found.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if not expected.is_floating_point():
        return 0.0 if bool(same.all()) else float("inf")
    usual = a[a.isfinite() & (a.abs() < torch.finfo(expected.dtype).max / 4)]
    scale = float(usual.abs().max()) if usual.numel() else 1.0
    difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(difference.max()) / max(scale, 1e-9)


def _generates(model: Any, small: Any, plan: Plan, inputs: Mapping[str, Any]) -> str:
    """Compare greedy tokens with a cache, where the dense model generates from these inputs."""
    if not (callable(getattr(model, "can_generate", None)) and model.can_generate()):
        return ""
    dropped = ("labels", "decoder_input_ids", "decoder_attention_mask", "use_cache", "return_dict")
    prompt = {k: v for k, v in inputs.items() if k not in dropped and not k.startswith("output_")}
    bare = {k: v for k, v in prompt.items() if k in ("input_ids", "attention_mask", "input_features", "pixel_values")}

    def greedy(which: Any, given: Mapping[str, Any]) -> Tensor:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(4)
            made = which.generate(
                **given, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, use_cache=True
            )
        made = made if isinstance(made, Tensor) else getattr(made, "sequences", made[0])
        return made if isinstance(made, Tensor) else made[0]

    failure = ""
    for given in (prompt, bare):
        try:
            with fxslim.masked(model, plan):
                expected = greedy(model, given)
        except Exception as error:  # noqa: BLE001
            failure = failure or _said(error)
            continue
        try:
            found = greedy(small, given)
        except Exception as error:  # noqa: BLE001
            return f"differs: {_said(error)}"
        same = expected.shape == found.shape and bool(torch.equal(expected, found))
        return "equal" if same else f"differs: {expected.flatten()[-TOKENS:]} {found.flatten()[-TOKENS:]}"
    return "" if failure else "not run"


def _survives(case: Case, seed: int, small: Any, inputs: Mapping[str, Any]) -> str:
    """Load the narrowed weights into a skeleton on meta that the plan, written and read again, was replayed on."""
    plan = Plan.from_json(small.fxslim.plan.to_json())
    with torch.device("meta"):
        skeleton = type(small)(_config(case))
    skeleton.eval()
    with torch.device("cpu"):
        settle(skeleton)
        replay(skeleton, plan)
    skeleton.load_state_dict(small.state_dict(), strict=True, assign=True)
    if _shapes(skeleton) != _shapes(small):
        return "shapes differ"
    loaded = build(case, next(p.dtype for p in small.parameters() if p.is_floating_point()), seed)
    replay(loaded, plan)
    loaded.load_state_dict(small.state_dict(), strict=True)
    with without_caches(small):
        expected = outputs(small, inputs)
    with without_caches(loaded):
        found = outputs(loaded, inputs)
    worst = max(distance(expected[key], found[key]) for key in expected)
    return _reloads(small, inputs) if worst <= EXACT else f"computes something else, by {worst:.1e}"


def _reloads(small: Any, inputs: Mapping[str, Any]) -> str:
    """Save a narrowed model, load it back, compare bit for bit; without fxslim it loads as promised, or not at all."""
    with tempfile.TemporaryDirectory() as place, without_caches(small):
        folder = fxslim.save_pretrained(small, Path(place) / "small")
        own = {"attn_implementation": small.config._attn_implementation}
        loaded = fxslim.from_pretrained(folder, **own)
        with without_caches(loaded):
            expected, found = outputs(small, inputs), outputs(loaded, inputs)
        if expected.keys() != found.keys() or any(distance(expected[key], found[key]) for key in expected):
            return "computes something else when it is loaded back"
        try:
            plain = type(small).from_pretrained(folder, **own)
        except RuntimeError as error:
            fails = "ignore_mismatched_sizes" in str(error) and not small.fxslim.report.plain.loads
            return "yes" if fails else f"without fxslim: {_said(error)}"
        with without_caches(plain):
            found = outputs(plain.eval(), inputs)
        worst = max(distance(expected[key], found[key]) for key in expected)
        return "yes" if worst <= INNER_FLOAT32 and small.fxslim.report.plain.loads else "loads wrong without fxslim"


def _config(case: Case) -> Any:
    import transformers

    return getattr(transformers, case.config_class).from_dict(dict(case.config))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, FxslimError) else f"{type(error).__name__}: {text}"
