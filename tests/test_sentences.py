"""A narrowed encoder in a folder of sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

import fxslim

sentences = pytest.importorskip("sentence_transformers")
parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
TEXTS = ["the cat sat", "on the mat", "a dog"]


@pytest.fixture
def dense(tmp_path: Path) -> Any:
    """Return a tiny sentence encoder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "a", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=32, max_position_embeddings=32)  # fmt: skip
    BertModel(config).eval().save_pretrained(tmp_path / "encoder")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "encoder")
    module = parts.Transformer(str(tmp_path / "encoder"))
    return sentences.SentenceTransformer(modules=[module, parts.Pooling(16)], device="cpu")


def test_where_the_config_says_the_sizes_the_folder_loads_by_itself(dense: Any, tmp_path: Path) -> None:
    before = dense.encode(TEXTS)
    dense[0].model = fxslim.slim(dense[0].model, ffn=0.5)
    expected = dense.encode(TEXTS)
    assert not np.allclose(expected, before, atol=1e-3)
    dense.save(str(tmp_path / "small"))
    loaded = sentences.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS), expected, rtol=1e-5, atol=1e-6)


def test_otherwise_the_encoder_is_put_into_its_place(dense: Any, tmp_path: Path) -> None:
    dense.save(str(tmp_path / "dense"))
    dense[0].model = fxslim.slim(dense[0].model, ffn=0.5, heads=0.5)
    expected = dense.encode(TEXTS)
    fxslim.save_pretrained(dense[0].model, tmp_path / "small", tokenizer_from=tmp_path / "dense")
    assert (tmp_path / "small" / "modules.json").exists() and (tmp_path / "small" / "1_Pooling").is_dir()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        sentences.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    loaded = sentences.SentenceTransformer(str(tmp_path / "dense"), device="cpu")
    loaded[0].model = fxslim.from_pretrained(tmp_path / "small")
    np.testing.assert_array_equal(loaded.encode(TEXTS), expected)
