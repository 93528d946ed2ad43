"""What the rows of the comparison say: two tables, what was done by hand, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.peers import inc, torch_ao, torch_pruning
from benchmarks.peers.cell import SECONDS
from fxslim.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXACT = 1e-6
"""Largest relative difference that counts as rounding: norms and angles of some models are float32 in any dtype."""
LONGEST = 160
"""Characters of an error that the table shows; the JSON has all of its first line."""
Row = Mapping[str, Any]
HEAD = ("model", "tool", "FFN gone#", "heads gone#", "runs", "exact", "difference#", "CPU s#", "wall s#", "peak GiB#",
        "how it failed")  # fmt: skip


MODELS = f"""Two layers, random weights, half of the FFN channels and half of the heads asked; each cell in a process
of its own. What went is counted from the columns of the weights that read channels and heads; a head is gone if none
of its columns is left. Exact: in float64, on inputs of another size, the outputs are those of the dense model with
just those columns zeroed (relative difference at most {EXACT:g}); where nothing went, exact is left empty, and a
difference means that the tool changed weights and took none out. Time is that of pruning, without imports and without
building the model; fxslim verifies its result in it, no other tool does. The peak is that of the process, imports
included."""
BASE = """Half of the FFN, half of the heads, float32: one run of each, in a process of its own. Grown is the peak above
what stood before, the dense model among it. fxslim prunes a copy and verifies it; others change the model.
Wall seconds hold what the machine did besides."""


def exact(row: Row) -> bool | None:
    """Say whether a pruned model computes what the masked one does; None where nothing was compared."""
    if "difference" not in row or not (row["channels"] or row["heads"] or row["cut"]):
        return None
    return bool(row["difference"] <= EXACT)


def cells(row: Row) -> tuple[str, ...]:
    """Return one row of the table of models."""
    verdict = {True: "yes", False: "**no**", None: ""}[exact(row)]
    part = [f"{row[name]:.0%}" if name in row else "" for name in ("channels", "heads")]
    if row.get("cut"):
        part[1] += f", {row['cut']} cut apart"
    runs = ("yes" if row.get("runs") else "**no**") if "channels" in row else ""
    difference = f"{row['difference']:.0e}" if "difference" in row else ""
    took = [f"{row[name]:.2f}" if name in row else "" for name in ("cpu_seconds", "wall_seconds", "peak_gib")]
    error = row["error"].replace("killed by SIGXCPU", f"no end after {SECONDS} s of processor time")
    error = error if len(error) <= LONGEST else error[: LONGEST - 1] + "…"
    return row["model"], row["tool"], *part, runs, verdict, difference, *took, error


def models_text(rows: Sequence[Row]) -> list[str]:
    """Return the table of models, and what it means."""
    by_hand = {"Torch-Pruning": torch_pruning.HELP, "torch.ao": torch_ao.HELP, "INC": inc.HELP}
    helped = [f"* {tool}: {' '.join(text.split())}." for tool, text in by_hand.items()]
    versions = sorted({f"{row['tool']} {row['version']}" for row in rows if "version" in row})
    return [
        "## Who can do which model",
        MODELS,
        Table(HEAD, [cells(row) for row in rows]).markdown(),
        "Versions: " + ", ".join(versions) + ".",
        "Done by hand, from one description of each model (which linear is what, how many heads); fxslim needs none:",
        "\n".join(helped),
    ]


def base_text(base: Mapping[str, Any]) -> list[str]:
    """Return the tables of BERT-base."""
    rows = [(r["tool"], f"{r['cpu_seconds']:.1f}", f"{r['wall_seconds']:.1f}", f"{r['peak_gib']:.2f}",
             f"{r['grown_gib']:.2f}", r["error"]) if "wall_seconds" in r else (r["tool"], "", "", "", "", r["error"])
            for r in base["time"]]  # fmt: skip
    head = ("tool", "CPU s#", "wall s#", "peak GiB#", "grown GiB#", "how it failed")
    text = ["## BERT-base at the same widths", BASE, Table(head, rows).markdown()]
    if found := base.get("latency"):
        point = found["points"][0]
        ratio = next(s["ratio"] for s in point["timing"]["samples"] if s["name"] == "fxslim")
        text.append(f"One forward, batch {point['batch']}, length {point['length']}, interleaved; every linear has the "
                    f"same shape in both. The forward of fxslim's takes {ratio['value']:.3f} times as long as that of "
                    f"Torch-Pruning's (95 % interval {ratio['low']:.3f} .. {ratio['high']:.3f}).")  # fmt: skip
        text.append(base["latency_table"])
    return text


def figure(rows: Sequence[Row]) -> Figure:
    """Draw what part of what was asked went, per model and tool; hatched where the model is wrong or does not run."""
    from matplotlib.figure import Figure

    models, tools = [*dict.fromkeys(r["model"] for r in rows)], [*dict.fromkeys(r["tool"] for r in rows)]
    made = Figure(figsize=(9, 4.5), layout="constrained")
    panels = made.subplots(2, 1, sharex=True)
    for axes, part, label in zip(panels, ("channels", "heads"), ("FFN gone", "heads gone"), strict=True):
        for place, tool in enumerate(tools):
            own = {row["model"]: row for row in rows if row["tool"] == tool}
            at = [x + 0.8 * (place + 0.5) / len(tools) - 0.4 for x in range(len(models))]
            heights = [own.get(model, {}).get(part, 0.0) for model in models]
            bars = axes.bar(at, heights, 0.8 / len(tools), label=tool)
            for bar, model in zip(bars, models, strict=True):
                if bar.get_height() and not exact(own[model]):
                    bar.set_hatch("////")
        axes.axhline(0.5, color="black", linestyle=":", linewidth=1)
        axes.set(ylabel=label, ylim=(0, 0.6))
    panels[0].legend(fontsize="small", ncols=len(tools), title="hatched: not exact, or does not run")
    panels[1].set_xticks(range(len(models)), models)
    return made
