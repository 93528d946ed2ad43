"""Run every architecture of the tests in both forms and write the README's table.

``python -m benchmarks.architectures`` takes half of the FFN, and a third of the heads (half of the key/value groups
where groups have too few heads), out of small random models in float64, with eager and fused attention. The columns say
what came of it: the narrowed module and the narrowed graph against the masked model on inputs of another batch size and
length, and greedy tokens with and without a cache.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import fxslim
from fxslim.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from agreement import difference, outputs, tolerance  # noqa: E402
from architectures import ARCHITECTURES, Architecture  # noqa: E402

BEGIN, END = "<!-- architectures:begin -->", "<!-- architectures:end -->"
HEAD = ("model", "attention sites", "FFN sites", "`slim` = masked", "`compile` = masked", "`generate` = masked")


def request(found: fxslim.Inspection) -> dict[str, float]:
    """Return what to take out: heads where groups have at least three, whole groups otherwise."""
    attentions = [site for site in found.sites if site.kind == "attention"]
    each = min(site.units // (1 if site.groups is None else site.group_count) for site in attentions)
    return {"ffn": 0.5, "heads": 0.34} if each >= 3 else {"ffn": 0.5, "kv_groups": 0.5}


def agrees(entry: Architecture, model: Any, narrowed: Any, plan: Plan) -> bool:
    """Compare a narrowed model with the masked one on other sizes."""
    inputs: dict[str, Any] = dict(entry.inputs(5, 11, seed=4))
    inputs |= {"use_cache": False} if entry.generates or entry.decoder else {}
    with fxslim.masked(model, plan):
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
    for attention in ("eager", "sdpa")[: 1 + entry.sdpa]:
        model = entry.build(torch.float64, attention)  # type: ignore[arg-type]
        found = fxslim.inspect(model)
        small = fxslim.slim(model, **request(found))
        plan = small.fxslim.plan
        slim.append(agrees(entry, model, small, plan))
        graph.append(agrees(entry, model, fxslim.compile(model, plan=plan), plan))
        if entry.generates:
            generated.append(same_tokens(entry, model, small, plan))
        shape = sites(found, "attention"), sites(found, "ffn", "gated_ffn")
    return (f"`{entry.model}`", *shape, cell(slim), cell(graph), cell(generated))


def table() -> str:
    """Return the table in Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *(row(entry) for entry in ARCHITECTURES.values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def written(readme: str, inner: str) -> str:
    """Put a table between the README's markers."""
    if BEGIN not in readme or END not in readme:
        raise SystemExit(f"README.md lacks {BEGIN} and {END}")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{inner}\n{END}", readme, flags=re.DOTALL)


def main() -> None:
    """Run everything and rewrite the README."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    path = ROOT / "README.md"
    path.write_text(written(path.read_text(encoding="utf-8"), table()), encoding="utf-8")


if __name__ == "__main__":
    main()
