"""Save a narrowed model: weights, config, tokenizer, plan and model card, checked before they appear."""

from __future__ import annotations

import shutil
import tempfile
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its __all__
from torch import nn
from transformers import PreTrainedModel

from fxslim.errors import InputError, StorageError
from fxslim.folder import replacing
from fxslim.hf.card import CARD, card
from fxslim.hf.classes import PLAN_FILE, check_there, first_line, reading
from fxslim.hf.reread import check_saved
from fxslim.replaceable import modules_of
from fxslim.report import Record

BESIDE_THE_MODEL = (
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
    "additional_chat_templates/*",
    "*processor_config.json",
    "modules.json",
    "*sentence_*.json",
    "*_Pooling/*",
    "*_Normalize/*",
)
"""What tokenizers and processors of transformers, and sentence-transformers, keep beside a model."""


def save_pretrained(
    small: nn.Module,
    folder: str | PathLike[str],
    *,
    tokenizer_from: str | PathLike[str] | None = None,
    max_shard_size: int | str | None = None,
    force: bool = False,
) -> Path:
    """Write a narrowed model, its config, its plan and a model card into a new folder, and load it back to check it.

    Everything is written beside ``folder`` first and moved into place only when it is complete, on disk, and found to
    be equal to ``small``: a failure leaves no half-written folder, and an old one as it was.

    Args:
        small: what `fxslim.slim` returned for a model of transformers.
        folder: where to; parents are made.
        tokenizer_from: folder or hub name to copy tokenizer and processor files from; the text of its model card is
            kept below what is said of the narrowed model.
        max_shard_size: see ``PreTrainedModel.save_pretrained``; its default unless given.
        force: replace a checkpoint that is there.

    Raises:
        InputError: ``small`` is not a narrowed model of transformers, or ``folder`` is taken.
        StorageError: the files cannot be written.
        VerifyError: what was written does not load back as ``small``.
    """
    model, record = _narrowed(small)
    if tokenizer_from is not None:
        _check_source(tokenizer_from)
    sharding: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with replacing(Path(folder), force=force) as staging:
        model.save_pretrained(staging, **sharding)
        (staging / PLAN_FILE).write_text(record.plan.to_json() + "\n", encoding="utf-8")
        if tokenizer_from is not None:
            copy_beside(tokenizer_from, staging)
        (staging / CARD).write_text(card(model, record, source=tokenizer_from), encoding="utf-8")
        check_saved(model, staging)
    return Path(folder)


def push_to_hub(
    small: nn.Module,
    repo_id: str,
    *,
    tokenizer_from: str | PathLike[str] | None = None,
    max_shard_size: int | str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a model narrowed by fxslim",
    create_pr: bool = False,
) -> CommitInfo:
    """Upload what `save_pretrained` writes to a repository of the hub, which is made if it is not there.

    Args:
        small: what `fxslim.slim` returned for a model of transformers.
        repo_id: ``NAME`` or ``ORGANISATION/NAME``.
        tokenizer_from: see `save_pretrained`.
        max_shard_size: see `save_pretrained`.
        private: whether a repository that is made is private; the hub's default unless given.
        token: what to log in with; that of ``hf auth login`` unless given.
        commit_message: what the commit says.
        create_pr: open a pull request instead of committing to the main branch.

    Raises:
        InputError: ``small`` is not a narrowed model of transformers, or ``repo_id`` is no name.
        StorageError: the hub cannot be reached, or refuses.
    """
    _narrowed(small)
    hub = HfApi(token=token)
    with tempfile.TemporaryDirectory() as place:
        folder = save_pretrained(
            small, Path(place) / "model", tokenizer_from=tokenizer_from, max_shard_size=max_shard_size
        )
        try:
            repository = hub.create_repo(repo_id, private=private, exist_ok=True)
            return hub.upload_folder(
                repo_id=repository.repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr
            )
        except HFValidationError as error:
            raise InputError(f"{repo_id!r} is no name of a repository: {first_line(error)}") from error
        except OSError as error:
            raise StorageError(f"cannot upload to {repo_id}: {first_line(error)}") from error


def copy_beside(source: str | PathLike[str], folder: Path) -> None:
    """Copy tokenizer and processor files of a folder or of a repository of the hub, none of its weights."""
    local, hub = Path(source), not Path(source).is_dir()
    if hub:
        with reading(source):
            local = Path(snapshot_download(fspath(source), allow_patterns=list(BESIDE_THE_MODEL)))
    modules = [f"{path}/**/*" for path in modules_of(local)]
    if hub and modules:
        with reading(source):
            local = Path(snapshot_download(fspath(source), allow_patterns=[*BESIDE_THE_MODEL, *modules]))
    for pattern in (*BESIDE_THE_MODEL, *modules):
        for path in local.glob(pattern):
            if path.is_file():
                copied = folder / path.relative_to(local)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied)


def _check_source(source: str | PathLike[str]) -> None:
    """Raise InputError for what is neither a folder nor a name of the hub, before anything is written."""
    check_there(source)
    if not Path(source).is_dir():
        try:
            validate_repo_id(fspath(source))
        except HFValidationError as error:
            raise InputError(f"tokenizer_from= names no folder, nor a repository: {first_line(error)}") from error


def _narrowed(small: nn.Module) -> tuple[PreTrainedModel, Record]:
    """Return a model and its record, or raise InputError where it could not be loaded back."""
    record: Any = getattr(small, "fxslim", None)
    if not isinstance(small, PreTrainedModel) or not isinstance(record, Record):
        raise InputError(
            f"save_pretrained takes what fxslim.slim returns for a model of transformers, not {type(small).__name__}"
            + (" without a plan." if record is None else "; save the state_dict and the plan's to_json() instead.")
        )
    if getattr(small, "_hf_peft_config_loaded", False):
        raise InputError(
            "the model has adapters of peft: merge them first (peft's merge_and_unload()), or save them by themselves "
            "with small.save_pretrained, and the narrowed model before adapters are added."
        )
    if any(tensor.is_meta for tensor in small.parameters()):
        raise InputError(
            "some of the model's weights are on meta: accelerate keeps them elsewhere. Load it without offloading to "
            "save it, or narrow its files with fxslim.slim_checkpoint."
        )
    return small, record
