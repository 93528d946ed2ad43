"""Find what can be taken out, and take out what is zero."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

import fxslim.api
from fxslim.errors import InputError, RequestError
from fxslim.inc.config import known_keys
from fxslim.inc.data import check_loader, check_model
from fxslim.inc.standing import take_off
from fxslim.inc.translate import Finder, consumers, missing
from fxslim.passes.choose import FFN, merged
from fxslim.plan import Plan
from fxslim.training.hooks import Hook
from fxslim.training.pruner import unwrapped

LOG = logging.getLogger("fxslim")


def parse_auto_slim_config(
    model: nn.Module,
    dataloader: Any = None,
    ffn2_sparsity: float = 0.0,
    mha_sparsity: float = 0.0,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Return a dict for each pruner, to be given to `fxslim.inc.WeightPruningConfig`.

    One masks input columns of the linears that read the hidden channels of feed-forward blocks (``op_names``,
    ``channelx1``), one masks heads (``mha``).

    Args:
        model: any model that `fxslim.inspect` takes. It is not changed.
        dataloader: batches to trace it with; not needed for models of transformers.
        ffn2_sparsity: fraction of the hidden channels that goes.
        mha_sparsity: fraction of the heads that goes.
        **kwargs: more keys for every dict.

    Raises:
        RequestError: nothing of the kind is found, with the reasons, or an argument means nothing.
    """
    check_model(model, "parse_auto_slim_config(model)")
    check_loader(dataloader, "ffn2_sparsity= and mha_sparsity=")
    fractions = {"ffn2_sparsity": ffn2_sparsity, "mha_sparsity": mha_sparsity}
    for name, value in fractions.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise RequestError(f"{name}={value!r}: give a fraction, a number from 0 up to (but not) 1.")
    known_keys({name: value for name, value in kwargs.items() if name not in fractions}, "parse_auto_slim_config")
    finder = Finder(unwrapped(model), dataloader)
    made: list[dict[str, Any]] = []
    if ffn2_sparsity:
        sites = [site for site in finder.ffn() if not site.task_head]
        if not sites:
            raise RequestError(f"ffn2_sparsity: no feed-forward block was found. {missing(finder.found)}")
        names = list(dict.fromkeys(path for site in sites for path in consumers(site)))
        made.append({"op_names": names, "pattern": "channelx1", "target_sparsity": ffn2_sparsity})
    if mha_sparsity:
        if all(site.task_head for site in finder.attention()):
            raise RequestError(f"mha_sparsity: no heads were found. {missing(finder.found)}")
        made.append({"pattern": "mha", "target_sparsity": mha_sparsity})
    return [{**own, **{name: _copied(value) for name, value in kwargs.items()}} for own in made]


def model_slim(model: nn.Module, dataloader: Any = None, round_multiplier: int = 32) -> nn.Module:
    """Take out of a model what does nothing: channels and heads whose columns in every consumer are zero.

    The model itself becomes smaller, verified against what it was, and stays as it is when anything fails. Its
    ``.fxslim`` holds the plan and the report; what is left where it could go is logged and in the report's notes. Masks
    of pruners that are still on the model are taken off first.

    Args:
        model: the model.
        dataloader: batches to trace it with; not needed for models of transformers.
        round_multiplier: the kept width of feed-forward blocks is rounded up to a multiple: with 40 zero columns of
            128, 32 go (at 32); with 31, none. The same ones go every time. Heads are not rounded. 1 (or 0) takes out
            all that is zero.

    Returns:
        The model.

    Raises:
        VerifyError: the smaller model does not compute the same; otherwise as `fxslim.slim`.
    """
    check_model(model, "model_slim(model)")
    check_loader(dataloader, "round_multiplier=")
    if isinstance(round_multiplier, bool) or not isinstance(round_multiplier, int) or round_multiplier < 0:
        raise RequestError(f"round_multiplier={round_multiplier!r}: give a whole number, 1 to take out all zeros.")
    inner = unwrapped(model)
    take_off(inner)
    _check_free(inner)
    found = Finder(inner, dataloader).found
    plan = _rounded(fxslim.api.plan(found), fxslim.api.plan(found, round_to=max(round_multiplier, 1)))
    for note in plan.notes:
        LOG.warning("model_slim: %s: %s", note.where, note.reason)
    if not plan.sites:
        LOG.warning("model_slim: nothing is zero that could be taken out; the model is as it was.")
        return model
    fxslim.api.slim(found, plan=plan, inplace=True)
    return model


def _rounded(plan: Plan, multiple: Plan) -> Plan:
    """Take feed-forward sites from the plan that rounds, and all others from the one that does not."""
    sites = (
        *(part for part in plan if part.site.kind not in FFN),
        *(part for part in multiple if part.site.kind in FFN),
    )
    order = {part.site.name: place for place, part in enumerate((*plan, *multiple))}
    names = {part.site.name for part in plan if part.site.kind not in FFN}
    rounded = [note for note in multiple.notes if note not in plan.notes and note.where.split(" and ")[0] not in names]
    requested = {**plan.requested, **multiple.requested}
    chosen = tuple(sorted(sites, key=lambda part: order[part.site.name]))
    notes = tuple(merged([*plan.notes, *rounded]))
    return plan.model_copy(update={"sites": chosen, "notes": notes, "requested": requested})


def _check_free(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if any(isinstance(hook, Hook) and not hook.inert for hook in module._forward_pre_hooks.values()):
            raise InputError(
                f"there are still masks on {path}: call on_train_end() of the callbacks, or finish() of the Pruner, "
                "before model_slim."
            )


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
