"""Calibration data from a text file: one sequence a line, tokenized as the model's own tokenizer does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from fxslim.errors import InputError

ROWS = 32
"""Sequences in a batch."""
LONGEST = 512
"""Tokens after which a line is cut, where the model does not take fewer."""


def batches(model: str, path: Path, config: Any) -> list[dict[str, torch.Tensor]]:
    """Read a text file and tokenize it.

    Args:
        model: folder or hub name of the tokenizer.
        path: the file.
        config: the model's config.

    Raises:
        InputError: the file cannot be read or holds too little, or the model has no tokenizer.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text in {path}: {error}") from error
    if len(lines) < 2:
        raise InputError(f"{path} holds {len(lines)} lines of text; calibration needs two sequences at least.")
    tokenizer = _tokenizer(model)
    longest = min(LONGEST, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or LONGEST)
    made = []
    for start in range(0, len(lines), ROWS):
        rows = lines[start : start + ROWS]
        batch = dict(tokenizer(rows, padding=True, truncation=True, max_length=longest, return_tensors="pt"))
        if getattr(config, "is_encoder_decoder", False):
            batch["labels"] = batch["input_ids"]
        made.append(batch)
    known = torch.cat([batch["input_ids"].flatten() for batch in made])
    if torch.isin(known, torch.tensor(tokenizer.all_special_ids)).all():
        raise InputError(f"the tokenizer of {model} knows no word of {path}: are its files there, is it the language?")
    return made


def _tokenizer(model: str) -> Any:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{model} has no tokenizer that can be read, and --calibration is text; give batches to fxslim.slim."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return tokenizer
