"""Models of transformers on disk: load a dense one, save a narrowed one, load that back.

A narrowed folder is an ordinary checkpoint plus ``fxslim_plan.json``. Loading it goes through the model class's own
``from_pretrained``, with one difference: the skeleton is narrowed by the plan before the weights are read into it. So
sharded files, dtypes, tied weights and buffers that are not saved are transformers' business, as always.
"""

from __future__ import annotations

import shutil
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.hub import cached_file

from fxslim.errors import InputError, PlanError, UnsupportedModelError, VerifyError
from fxslim.folder import replacing
from fxslim.inputs import bind
from fxslim.passes.express import set_fields
from fxslim.passes.narrow import replay
from fxslim.passes.prepare import settle
from fxslim.plan import Plan
from fxslim.report import Record

__all__ = ["PLAN_FILE", "from_pretrained", "load_dense", "model_class", "save_pretrained", "skeleton"]

PLAN_FILE = "fxslim_plan.json"

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template*",
    "*processor_config.json",
)
"""What tokenizers and processors of transformers keep beside a model."""

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where files come from."""
_LOADING = ("dtype", "quantization_config")
"""Arguments of ``from_pretrained`` that configs would take for theirs."""


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that a checkpoint's config names, or the bare model if it names none.

    Raises:
        UnsupportedModelError: transformers has no class of that name, or no model for this config.
    """
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
        raise UnsupportedModelError(
            f"the config asks for {name}, which transformers {transformers.__version__} does not have; load the model "
            "in Python with its own code and call fxslim.slim on it."
        )
    try:
        bare = MODEL_MAPPING[type(config)]
    except KeyError as error:
        raise UnsupportedModelError(f"transformers has no model for a {type(config).__name__}.") from error
    return cast("type[PreTrainedModel]", bare[0] if isinstance(bare, tuple | list) else bare)


def load_dense(name: str | PathLike[str], *, dtype: str = "auto") -> PreTrainedModel:
    """Load a model from a local folder or by its hub name, as the class that its config names.

    Args:
        name: folder or hub name.
        dtype: as in ``PreTrainedModel.from_pretrained``; ``auto`` is the dtype it was saved in.

    Raises:
        InputError: there is no such model, or its files cannot be read.
        UnsupportedModelError: see `model_class`.
    """
    config = _config(name)
    try:
        return model_class(config).from_pretrained(fspath(name), config=config, dtype=dtype)
    except OSError as error:
        raise InputError(f"cannot load {name}: {_first_line(error)}") from error


def skeleton(name: str | PathLike[str]) -> PreTrainedModel:
    """Build a model on the meta device from its config alone: enough to analyse it, and free of its weights."""
    config = _config(name)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{name} is quantized; narrow the original model and quantize the result.")
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)._from_config(config)
    model.eval()
    return model


def save_pretrained(
    small: nn.Module,
    folder: str | PathLike[str],
    *,
    tokenizer_from: str | PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Write a narrowed model, its config and its plan into a new folder, and load it back to check it.

    Everything is written beside ``folder`` first and moved into place only when it is complete, on disk, and found to
    be equal to ``small``: a failure leaves no half-written folder, and an old one as it was.

    Args:
        small: what `fxslim.slim` returned for a model of transformers.
        folder: where to; parents are made.
        tokenizer_from: folder or hub name to copy tokenizer and processor files from.
        force: replace a checkpoint that is there.

    Raises:
        InputError: ``small`` is not a narrowed model of transformers, or ``folder`` is taken.
        VerifyError: what was written does not load back as ``small``.
    """
    record = getattr(small, "fxslim", None)
    if not isinstance(small, PreTrainedModel) or record is None:
        raise InputError(
            f"save_pretrained takes what fxslim.slim returns for a model of transformers, not {type(small).__name__}"
            + (" without a plan." if record is None else "; save the state_dict and the plan's to_json() instead.")
        )
    dtypes = {p.dtype for p in small.parameters() if p.is_floating_point()}
    if len(dtypes) > 1:
        raise InputError(
            f"the model mixes {', '.join(sorted(map(str, dtypes)))}, which from_pretrained does not restore; cast it "
            "to one dtype first, for example with small.to(torch.float32)."
        )
    with replacing(Path(folder), force=force) as staging:
        small.save_pretrained(staging)
        (staging / PLAN_FILE).write_text(record.plan.to_json() + "\n", encoding="utf-8")
        if tokenizer_from is not None:
            _copy_tokenizer(tokenizer_from, staging)
        _check_saved(small, staging)
    return Path(folder)


def from_pretrained(folder: str | PathLike[str], **hf_kwargs: Any) -> PreTrainedModel:
    """Load a narrowed model that `save_pretrained` wrote, as the class it had.

    Args:
        folder: folder or hub name.
        hf_kwargs: as in ``PreTrainedModel.from_pretrained``: dtype, attn_implementation, revision, …

    Raises:
        InputError: there is no such folder, or it holds no plan.
        PlanError: plan and weights do not belong together.
    """
    where = {name: hf_kwargs.pop(name) for name in _HUB if name in hf_kwargs}
    loading = {name: hf_kwargs.pop(name) for name in _LOADING if name in hf_kwargs}
    plan = _read_plan(folder, where)
    config, rest = AutoConfig.from_pretrained(fspath(folder), return_unused_kwargs=True, **where, **hf_kwargs)
    original = model_class(config)
    narrowed: Any = _narrowed(original, plan)
    try:
        model, info = narrowed.from_pretrained(
            fspath(folder), config=config, output_loading_info=True, **where, **loading, **rest
        )
    except RuntimeError as error:
        raise PlanError(f"the weights in {folder} do not fit its {PLAN_FILE}: {_first_line(error)}") from error
    strangers = sorted([*info["missing_keys"], *info["unexpected_keys"]])
    if strangers:
        raise PlanError(f"the weights in {folder} do not fit its {PLAN_FILE}: missing or unknown {strangers[:5]}")
    model.__class__ = original
    model.fxslim = Record(plan)
    return cast(PreTrainedModel, model)


def _config(name: str | PathLike[str]) -> PreTrainedConfig:
    _check_there(name)
    if (Path(name) / PLAN_FILE).exists():
        raise InputError(f"{name} is narrowed already; load it with fxslim.from_pretrained.")
    try:
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(fspath(name)))
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read as a model: {_first_line(error)}") from error


def _check_there(name: str | PathLike[str]) -> None:
    """Raise InputError for what can only be a folder and is not there; hub names have at most one slash."""
    path = Path(name)
    local = isinstance(name, PathLike) or path.is_absolute() or len(path.parts) > 2 or fspath(name).startswith(".")
    if local and not path.is_dir():
        raise InputError(f"there is no folder {name}.")


def _read_plan(folder: str | PathLike[str], where: dict[str, Any]) -> Plan:
    _check_there(folder)
    try:
        path = cached_file(fspath(folder), PLAN_FILE, _raise_exceptions_for_missing_entries=False, **where)
    except OSError as error:
        raise InputError(f"cannot fetch {folder}: {_first_line(error)}") from error
    if path is None:
        raise InputError(f"{folder} holds no {PLAN_FILE}: it was not written by fxslim; load it with transformers.")
    return Plan.from_file(path)


def _narrowed(original: type[PreTrainedModel], plan: Plan) -> type[PreTrainedModel]:
    """Return a subclass whose skeletons come out narrowed, so that loading reads the saved tensors into place."""

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        set_fields(config, {path: old for path, (old, _) in plan.config.items()})
        original.__init__(self, config, *args, **kwargs)
        with torch.device("cpu"):  # indices are real even where weights are not
            settle(self)
            replay(self, plan)

    same = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), {"__init__": build, **same})


def _copy_tokenizer(source: str | PathLike[str], folder: Path) -> None:
    local = Path(source)
    if not local.is_dir():
        local = Path(snapshot_download(fspath(source), allow_patterns=list(TOKENIZER_FILES)))
    for pattern in TOKENIZER_FILES:
        for path in local.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _check_saved(small: PreTrainedModel, folder: Path) -> None:
    """Load a folder and compare every tensor, and what the model computes, with the model in memory, bit for bit."""
    implementation = small.config._attn_implementation
    loaded: nn.Module = from_pretrained(folder, dtype=small.dtype, attn_implementation=implementation)
    loaded.to(small.device)
    expected = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    for name in sorted(expected.keys() ^ found.keys()):
        raise VerifyError(name, float("inf"), 0.0, "saved folder: tensor missing, or tied otherwise")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape or not torch.equal(found[name].to(tensor.dtype), tensor):
            raise VerifyError(name, float("inf"), 0.0, "saved folder: tensor read back")
        found[name].data = tensor.data  # the same memory: kernels round by alignment
    _check_outputs(small, loaded)


def _check_outputs(small: nn.Module, loaded: nn.Module) -> None:
    """Run both models, which share their tensors now, on inputs made from the config."""
    try:
        candidates = bind(small, None)
    except InputError:  # no inputs can be made for it; its tensors are compared, and that has to do
        return
    training = small.training
    small.eval()
    loaded.eval()
    try:
        with torch.no_grad():
            expected = _tensors(small(**candidates[0]))
            found = _tensors(loaded(**candidates[0]))
    finally:
        small.train(training)
    for one, other in zip(expected, found, strict=True):
        if not torch.equal(one, other):
            difference = (one - other).abs().max().item()
            raise VerifyError("output", difference, 0.0, "saved folder, loaded back")


def _tensors(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
