"""Which folders may be replaced: those of a model that fxslim or transformers wrote, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

CONFIG = "config.json"
CONTENT = re.compile(
    r"fxslim_plan\.json|.+\.(safetensors|onnx|pt2)|"
    r"(pytorch|adapter|openvino)_(.+_)?model(-.+)?\.bin|openvino_(.+_)?model\.xml"
)
"""Files of which a model's folder holds at least one, beside its config."""
BESIDE = re.compile(
    r".+\.(json|jinja|model|spm|tiktoken)|(vocab|merges|special_tokens_map).*\.txt|\.git(attributes|ignore)|"
    r"(README|LICENSE|LICENCE|NOTICE|USE_POLICY|MODEL_CARD)\b.*|.+\.onnx(\.data|_data)|training_args\.\w+|"
    r"(modeling|configuration|tokenization|(image_|video_)?processing|feature_extraction)_\w+\.py|"
    r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|\.DS_Store"
)
"""Files that may stand beside it: of tokenizers, processors, a Trainer, and the hub."""
SUBFOLDER = re.compile(
    r"additional_chat_templates|\d+_(Transformer|Pooling|Normalize|Dense|LayerNorm|Dropout|WeightedLayerPooling)"
)
"""Folders of tokenizers, and of the modules that follow an encoder of sentence-transformers."""


def foreign(folder: Path) -> str | None:
    """Return what keeps a folder from being replaced, or None: it holds a model, and nothing beside that."""
    names = {path.name for path in folder.iterdir()}
    if CONFIG not in names:
        return f"it holds no {CONFIG}: it is no checkpoint"
    if not any(CONTENT.fullmatch(name) for name in names):
        return f"it holds a {CONFIG} and neither weights nor a plan: it is no checkpoint"
    known = {path.split("/")[0] for path in modules_of(folder)}
    for path in sorted(folder.iterdir()):
        within = path.name in known or SUBFOLDER.fullmatch(path.name)
        inside = sorted(path.rglob("*")) if within and path.is_dir() else [path]
        for one in inside:
            if not (one.is_dir() and within) and not (CONTENT.fullmatch(one.name) or BESIDE.fullmatch(one.name)):
                return f"it holds {one.relative_to(folder)}, which is no part of a checkpoint"
    return None


def modules_of(folder: Path) -> list[str]:
    """Return the folders of the modules that follow an encoder of sentence-transformers; none outside its own."""
    try:
        named = json.loads((folder / "modules.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    paths = [one.get("path") for one in named if isinstance(one, dict)] if isinstance(named, list) else []
    return [path for path in paths if isinstance(path, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", path)]
