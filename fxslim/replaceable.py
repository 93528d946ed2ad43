"""Which folders may be replaced: those of a model that fxslim or transformers wrote, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

CONFIG = "config.json"
CONTENT = re.compile(r"fxslim_plan\.json|.+\.(safetensors|bin|onnx|pt2|xml)(\.index\.json)?")
"""Files of which a model's folder holds at least one, beside its config."""
SUBFOLDER = re.compile(r"\d+_\w+")
"""Modules of sentence-transformers that follow an encoder: ``1_Pooling``."""


def foreign(folder: Path) -> str | None:
    """Return what keeps a folder from being replaced, or None: it holds a model, and nothing beside that."""
    entries = sorted(folder.iterdir())
    names = {path.name for path in entries}
    if CONFIG not in names:
        return f"it holds no {CONFIG}: it is no checkpoint"
    if not any(CONTENT.fullmatch(name) for name in names):
        return f"it holds a {CONFIG} and neither weights nor a plan: it is no checkpoint"
    known = {path.split("/")[0] for path in modules_of(folder)}
    for path in entries:
        if path.name == ".git" or (path.is_dir() and path.name not in known and not SUBFOLDER.fullmatch(path.name)):
            return f"it holds {path.name}, which is no part of a checkpoint"
    return None


def modules_of(folder: Path) -> list[str]:
    """Return the folders of the modules that follow an encoder of sentence-transformers; none outside its own."""
    try:
        named = json.loads((folder / "modules.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    paths = [one.get("path") for one in named if isinstance(one, dict)] if isinstance(named, list) else []
    return [path for path in paths if isinstance(path, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", path)]
