"""The observer that writes down what each pass did."""

from __future__ import annotations

import torch
from torch import nn

import fxslim


def test_seconds_and_graph_text_before_and_after() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    transcript = fxslim.Transcript()
    graph = fxslim.compile(model, torch.randn(3, 6), ffn=0.5, observer=transcript)
    assert next(iter(transcript.seconds)) == "Trace"
    assert transcript.before["Trace"] == ""
    assert "aten.relu.default" in transcript.after["Trace"]
    assert transcript.changed() == ("Trace", "NarrowGraph")
    assert transcript.before["NarrowGraph"] == transcript.after["Trace"]
    assert transcript.after["NarrowGraph"] == graph.code.strip()
    assert sum(transcript.seconds.values()) > 0
    assert "NarrowGraph" in str(transcript) and "changed" in str(transcript)


def test_a_module_narrowing_leaves_the_traced_graph() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    transcript = fxslim.Transcript()
    fxslim.slim(model, torch.randn(3, 6), ffn=0.5, observer=transcript)
    assert transcript.changed() == ("Trace",)
