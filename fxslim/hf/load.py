"""Load a narrowed model: the class's own ``from_pretrained``, with a skeleton that the plan has narrowed.

So sharded files, dtypes, devices, tied weights and buffers that are not saved are transformers' business, as always.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from fxslim.bounded import bounded
from fxslim.checkpoint.files import INDEX, MAX_INDEX, WEIGHTS, read_shard
from fxslim.errors import InputError, PlanError, UnsupportedModelError
from fxslim.express import check_fields, set_fields
from fxslim.hf.classes import PLAN_FILE, check_there, first_line, model_class, reading
from fxslim.hf.files import reading_whole
from fxslim.passes.narrow import replay
from fxslim.passes.prepare import settle
from fxslim.plan import Plan
from fxslim.report import Record

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where files come from."""
_LOADING = ("dtype", "torch_dtype")
"""Arguments of ``from_pretrained`` that configs would take for theirs."""
_REFUSED = {
    "quantization_config": "quantizing while loading would replace narrowed modules; load the model, then quantize it",
    "ignore_mismatched_sizes": "the plan says every size; weights that do not fit are refused",
    "state_dict": "weights are read from the folder, which the plan belongs to",
    "output_loading_info": "weights that are missing or unknown are refused, and nothing is left to tell",
    "config": "the folder's own config is used; change model.config afterwards",
}
"""Arguments of ``from_pretrained`` that make no sense for a narrowed model."""


def from_pretrained(folder: str | PathLike[str], **hf_kwargs: Any) -> PreTrainedModel:
    """Load a narrowed model, as the class it had; no tensor is in memory twice.

    The plan is read from ``fxslim_plan.json``, which `save_pretrained` writes, or from the config, in which it travels
    with any ``save_pretrained`` of transformers.

    Args:
        folder: folder or hub name.
        hf_kwargs: as in ``PreTrainedModel.from_pretrained``: dtype, device_map, attn_implementation, revision, …

    Raises:
        InputError: there is no such folder, it holds no plan, or an argument makes no sense here.
        StorageError: a file is missing or cut short.
        PlanError: plan and weights do not belong together.
        UnsupportedModelError: transformers does not have the class, or the checkpoint is quantized.
    """
    for name in _REFUSED.keys() & hf_kwargs.keys():
        if hf_kwargs.pop(name) not in (None, False):
            raise InputError(f"fxslim.from_pretrained does not take {name}=: {_REFUSED[name]}.")
    where = {name: hf_kwargs.pop(name) for name in _HUB if name in hf_kwargs}
    loading = {name: hf_kwargs.pop(name) for name in _LOADING if name in hf_kwargs}
    trusted = folder if hf_kwargs.get("trust_remote_code") else None
    written = _written_plan(folder, where)
    with reading(folder):
        try:
            config, rest = AutoConfig.from_pretrained(fspath(folder), return_unused_kwargs=True, **where, **hf_kwargs)
        except ValueError as error:
            raise InputError(f"{folder} cannot be read as a model: {first_line(error)}") from error
    plan = _one_plan(folder, written, getattr(config, "fxslim", None))
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{folder} was quantized after it was narrowed; save the narrowed model, load that, and quantize it then."
        )
    check_fields(config, plan)
    original = model_class(config, source=trusted, **where)
    usual = plan.config and rest.get("variant") is None and rest.get("use_safetensors") is not False
    narrowed: Any = _narrowed(original, plan, _stored(folder, where) if usual else None)
    with reading(folder), _fitting(folder, plan):
        model, info = narrowed.from_pretrained(
            fspath(folder), config=config, output_loading_info=True, **where, **loading, **rest
        )
    strangers = sorted([*info["missing_keys"], *info["unexpected_keys"]])
    if strangers:
        raise PlanError(f"the weights in {folder} do not fit its plan: missing or unknown {strangers[:5]}")
    model.__class__ = original
    model.config.fxslim = plan.model_dump(mode="json", exclude_none=True)
    model.fxslim = Record(plan)
    return cast(PreTrainedModel, model)


@contextmanager
def _fitting(folder: str | PathLike[str], plan: Plan) -> Iterator[None]:
    """Turn transformers' error about sizes into one about the plan."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        repaired = " The plan repaired weights: those of the dense model cannot stand in for them."
        raise PlanError(
            f"the weights in {folder} do not fit its plan: {first_line(error)}{repaired * plan.weights_changed}"
        ) from error


def _written_plan(folder: str | PathLike[str], where: Mapping[str, Any]) -> Plan | None:
    check_there(folder)
    try:
        path = cached_file(fspath(folder), PLAN_FILE, _raise_exceptions_for_missing_entries=False, **where)
    except OSError as error:
        raise InputError(f"cannot fetch {folder}: {first_line(error)}") from error
    return None if path is None else Plan.from_file(Path(path))


def _one_plan(folder: str | PathLike[str], written: Plan | None, carried: Any) -> Plan:
    """Return the plan of a folder, which may stand in a file, in the config, or in both."""
    if carried is not None and not isinstance(carried, dict):
        raise PlanError(f"the config of {folder} holds no valid fxslim plan.")
    plan = written if carried is None else Plan.from_json(carried)
    if plan is None:
        raise InputError(
            f"{folder} holds no {PLAN_FILE}, and its config no plan: it was not narrowed by fxslim; load it with "
            "transformers."
        )
    if written is not None and written != plan:
        raise PlanError(
            f"{folder} holds two plans, {PLAN_FILE} and another one in its config: it was saved over. Delete "
            f"{PLAN_FILE} if the model's own save_pretrained wrote the weights last."
        )
    return plan


def _stored(folder: str | PathLike[str], where: Mapping[str, Any]) -> int | None:
    """Return how many tensors a folder's files hold, about; None where they have other names than usual."""
    once = {name: value for name, value in where.items() if name != "force_download"}
    for name in (INDEX, WEIGHTS):
        with reading(folder):
            found = cached_file(fspath(folder), name, _raise_exceptions_for_missing_entries=False, **once)
        if found is not None and name == WEIGHTS:
            return len(read_shard(Path(found)).tensors)
        if found is not None and Path(found).stat().st_size <= MAX_INDEX:
            return Path(found).read_bytes().count(b".safetensors")  # an index names a file for every tensor
    return None


def _narrowed(original: type[PreTrainedModel], plan: Plan, stored: int | None) -> type[PreTrainedModel]:
    """Return a subclass whose skeletons come out narrowed, so that loading reads the saved tensors into place.

    Args:
        original: the class.
        plan: what was narrowed.
        stored: how many tensors are stored, where the plan says what the config was.
    """

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        set_fields(config, {path: old for path, (old, _) in plan.config.items()})
        with bounded(stored) if plan.config else nullcontext():
            original.__init__(self, config, *args, **kwargs)
        with torch.device("cpu"):  # indices are real even where weights are not
            settle(self)
            replay(self, plan)

    body = {"__init__": build, "_load_pretrained_model": reading_whole(original)}
    return type(original.__name__, (original,), {**body, "__module__": original.__module__,
                                                 "__qualname__": original.__qualname__})  # fmt: skip
