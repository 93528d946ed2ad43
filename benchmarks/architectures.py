"""Run every architecture of the tests in both forms and write the README's tables.

``python -m benchmarks.architectures`` takes half of the FFN, and a third of the heads (half of them where groups are
small, half of the value channels where heads cannot go), out of small random models in float64, with eager and fused
attention. The columns say what came of it: the narrowed module and the narrowed graph against the masked model on
inputs of another batch size and length, and greedy tokens with and without a cache. With names of entries it prints
their rows instead.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import fxslim
from benchmarks.readme import README, written
from fxslim.errors import FxslimError
from fxslim.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from agreement import FIXED, difference, outputs, plain_kernels, tolerance  # noqa: E402
from architectures import ARCHITECTURES, Architecture  # noqa: E402
from hard import HARD  # noqa: E402

BEGIN, END = "<!-- architectures:begin -->", "<!-- architectures:end -->"
STAYS = ", some units zeroed in place"
"""What the module form cannot express; the graph form takes it out."""
HARD_BEGIN, HARD_END = "<!-- hard:begin -->", "<!-- hard:end -->"
HEAD = ("model", "attention sites", "FFN sites", "`slim` = masked", "`compile` = masked", "`generate` = masked")


def request(found: fxslim.Inspection) -> dict[str, float]:
    """Return what to take out: half of the FFN, and heads or, where heads cannot go, value channels."""
    attentions = [site for site in found.sites if site.kind == "attention"]
    if not attentions:
        return {"ffn": 0.5, "value": 0.5}
    each = min(site.units // (1 if site.groups is None else site.group_count) for site in attentions)
    return {"ffn": 0.5, "heads": 0.34 if each >= 3 else 0.5}


def agrees(entry: Architecture, model: Any, narrowed: Any, plan: Plan, batch: int = 5) -> bool:
    """Compare a narrowed model with the masked one on other sizes."""
    inputs: dict[str, Any] = dict(entry.inputs(batch, 11, seed=4))
    inputs |= {"use_cache": False} if entry.generates or entry.decoder else {}
    with fxslim.masked(model, plan), plain_kernels():
        expected = outputs(model, inputs)
    return difference(expected, outputs(narrowed, inputs)) <= tolerance(entry.name)


def same_tokens(entry: Architecture, model: Any, small: Any, plan: Plan) -> bool:
    """Compare greedy tokens with and without a cache."""
    prompt = {key: value for key, value in entry.inputs(2, 6, seed=7).items() if not key.startswith("decoder")}

    def run(which: Any, cache: bool) -> Any:
        return which.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=cache)

    with fxslim.masked(model, plan):
        expected = [run(model, cache) for cache in (True, False)]
    return all(torch.equal(want, run(small, cache)) for want, cache in zip(expected, (True, False), strict=True))


def holds(question: Callable[[], bool]) -> bool:
    """Ask; where fxslim, or the model that it made, refuses, the answer is no."""
    try:
        return question()
    except (FxslimError, AssertionError, RuntimeError, ValueError):
        return False


def sites(found: fxslim.Inspection, *kinds: str) -> str:
    """Return how many sites of these kinds there are, and of what kind."""
    chosen = [site for site in found.sites if site.kind in kinds and not site.task_head]
    kind = "gated" if any(site.kind == "gated_ffn" for site in chosen) else ""
    kind = "grouped" if any(site.groups is not None for site in chosen) else kind
    return f"{len(chosen)} {kind}".strip()


def cell(answers: list[bool]) -> str:
    """Return yes if every answer is, and an eyesore otherwise; nothing where nothing was asked."""
    return ("yes" if all(answers) else "**no**") if answers else ""


def row(entry: Architecture) -> tuple[str, ...]:
    """Run one architecture, with every attention implementation that it has."""
    slim: list[bool] = []
    graph: list[bool] = []
    generated: list[bool] = []
    shape = ("", "")
    example = entry.inputs(2, 7) if getattr(entry, "given", False) else None
    for attention in ("eager", "sdpa")[: 1 + entry.sdpa]:
        model = entry.build(torch.float64, attention)  # type: ignore[arg-type]
        found = fxslim.inspect(model, example)
        shape = sites(found, "attention"), sites(found, "ffn", "gated_ffn")
        plan = fxslim.plan(model, example, **request(found))
        made: list[Any] = []
        slim.append(holds(lambda: narrowed(entry, model, example, plan, made)))  # noqa: B023
        batch = FIXED.get(entry.name, 5)
        graph.append(holds(lambda: agrees(entry, model, fxslim.compile(model, example, plan=plan), plan, batch)))  # noqa: B023
        if entry.generates:
            generated.append(bool(made) and holds(lambda: same_tokens(entry, model, made[0], plan)))  # noqa: B023
        stays = bool(made and made[0].fxslim.plan.zeroed)
    label = f"`{entry.model}`" + (f" ({entry.name})" if entry.name in HARD else "")
    return (label, *shape, cell(slim) + (STAYS if stays else ""), cell(graph), cell(generated))


def narrowed(entry: Architecture, model: Any, example: Any, plan: Plan, made: list[Any]) -> bool:
    """Narrow a module, put it into a list, and say whether it agrees."""
    made.append(fxslim.slim(model, example, plan=plan))
    with plain_kernels():
        return agrees(entry, model, made[0], plan)


def table(entries: Iterable[Architecture]) -> str:
    """Return a table in Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *(row(entry) for entry in entries)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> None:
    """Run everything and rewrite the README, or print the rows of the entries that are named."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if names := sys.argv[1:]:
        print(table({**ARCHITECTURES, **HARD}[name] for name in names))
        return
    readme = written(README.read_text(encoding="utf-8"), table(ARCHITECTURES.values()), BEGIN, END)
    README.write_text(written(readme, table(HARD.values()), HARD_BEGIN, HARD_END), encoding="utf-8")


if __name__ == "__main__":
    main()
