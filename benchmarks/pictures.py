"""Measure HTML pictures in headless Chromium: ``python -m benchmarks.pictures``.

Draws a BERT-base and a 32-layer Llama-2-7B shape, both on ``meta``, with half of the FFN and a quarter of the heads
taken out. Measures the file's size, the time from navigation until the page can be used (wall clock, and the CPU time
of the page's process, which other work on the machine does not stretch), and the time from a click on a site until its
operations are drawn.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.browser import Browser, browser, chromium
from benchmarks.environment import write_result
from benchmarks.processes import fresh

RUNS = 7
LIMITS = {"bert_base": 2.0, "llama_32_layers": 4.0}
"""Seconds until a page can be used, at most."""
MOST_BYTES = 3_000_000


def drawn(case: str) -> dict[str, Any]:
    """Draw a shape on ``meta``, in a process of its own; return the file and the CPU seconds that drawing took."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    import fxslim

    with torch.device("meta"):
        model = BertModel(BertConfig()) if case == "bert_base" else LlamaForCausalLM(LlamaConfig())
    found = fxslim.inspect(model.eval())
    plan = fxslim.plan(found, ffn=0.5, heads=0.25)
    path = Path(tempfile.gettempdir()) / f"fxslim-{case}-{os.getpid()}.html"
    before = time.process_time()
    picture = fxslim.draw(found, path, after=plan)
    seconds = round(time.process_time() - before, 2)
    return {"path": str(path), "draw_cpu_seconds": seconds, "sites": len(picture.sites), "operations": len(picture.ops)}


def measured(page: Browser, path: Path) -> dict[str, Any]:
    """Open a picture several times, then a site in it."""
    rows = []
    for _ in range(RUNS):
        before = _cpu(page)
        ready = page.open(path)
        spent = _cpu(page) - before
        site = page.run(
            "(() => { const t = performance.now(); document.querySelector('#outline [data-site]').click();"
            " return new Promise(done => addEventListener('hashchange', () => requestAnimationFrame(() =>"
            " done(performance.now() - t)), { once: true })); })()"
        )
        rows.append((ready, spent, site / 1000))
    if page.errors or page.requests:
        raise RuntimeError(f"the page complains or asks for something: {page.errors} {page.requests}")
    ready, spent, opened = zip(*rows, strict=True)
    return {
        "bytes": path.stat().st_size,
        "ready_seconds": round(median(ready), 2),
        "ready_seconds_least": round(min(ready), 2),
        "ready_seconds_most": round(max(ready), 2),
        "ready_cpu_seconds": round(median(spent), 2),
        "site_seconds": round(median(opened), 2),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _cpu(page: Browser) -> float:
    """Return the CPU seconds that the page's process has taken."""
    page.send("Performance.enable", timeDomain="threadTicks")
    found = page.send("Performance.getMetrics")["metrics"]
    return next(float(metric["value"]) for metric in found if metric["name"] == "ProcessTime")


def table(cases: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    head = (
        "# Pictures in headless Chromium\n\n"
        "Seconds from navigation until an HTML picture can be used, and from a click on a site until its operations\n"
        f"are drawn; medians of {RUNS} runs. CPU seconds are those of the page's process. Load is how many processes\n"
        f"wanted one of {os.cpu_count()} cores meanwhile.\n\n"
        "| shape | sites | operations | file | ready: wall (least to most) | limit | ready: CPU | open a site "
        "| load |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
    )
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {c['sites']} | {c['operations']} | {c['bytes'] / 1e6:.2f} MB"
        f" | {c['ready_seconds']:.2f} s ({c['ready_seconds_least']:.2f} to {c['ready_seconds_most']:.2f})"
        f" | {LIMITS[name]:g} s | {c['ready_cpu_seconds']:.2f} s | {c['site_seconds']:.2f} s"
        f" | {c['load_average']} |"
        for name, c in cases.items()
    )
    return f"{head}{rows}\n"


def main() -> None:
    """Draw, open, measure, write."""
    if "--case" in sys.argv:
        print(json.dumps(drawn(sys.argv[sys.argv.index("--case") + 1])))
        return
    program = chromium()
    if program is None:
        raise SystemExit("no Chromium is installed: there is nothing to open pictures with")
    cases = {}
    for case in LIMITS:
        found = fresh("benchmarks.pictures", case)
        path = Path(found.pop("path"))
        try:
            with browser(program) as page:
                cases[case] = found | measured(page, path)
        finally:
            path.unlink()
        print(case, cases[case], flush=True)
        if cases[case]["bytes"] > MOST_BYTES:
            raise SystemExit(f"{case}: {cases[case]['bytes']} bytes are more than {MOST_BYTES}")
    write_result("pictures", payload={"runs": RUNS, "limits": LIMITS, "cases": cases}, markdown=table(cases))


if __name__ == "__main__":
    main()
