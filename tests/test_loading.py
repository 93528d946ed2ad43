"""Loading holds no tensor twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

import fxslim
from benchmarks.loading import measured

OWN = 32e6
"""Bytes of the process itself: modules that loading imports, memory that is kept. The benchmark has the figure."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason=f"{sys.platform} keeps no peak to reset")
def test_no_tensor_is_in_memory_twice(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=2000, hidden_size=1024, num_hidden_layers=6, num_attention_heads=8,
                        intermediate_size=4096)  # fmt: skip
    model: Any = BertModel(config).eval()
    small = fxslim.slim(model, ffn=0.25, heads=0.25)
    folder = fxslim.save_pretrained(small, tmp_path / "small", max_shard_size="60MB")
    found = measured(folder)
    assert found["bytes"] == sum(p.numel() * p.element_size() for p in small.parameters()) > 2e8
    assert found["bytes"] <= found["peak"] <= 1.1 * found["bytes"] + OWN
    half = measured(folder, dtype="bfloat16")
    assert half["bytes"] * 2 == found["bytes"]
    largest = max(p.numel() * p.element_size() for p in small.parameters())  # it is cast once it is read
    assert half["peak"] <= 1.1 * half["bytes"] + 2 * largest + OWN
