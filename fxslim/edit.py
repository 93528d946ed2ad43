"""Edits: what changes in modules so that they compute with narrowed tensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fxslim.record import Attribute, Count, Dim, Frozen, Many, Name, Whole


class SizeEdit(Frozen):
    """An integer that becomes smaller."""

    module: Name
    name: Attribute
    old: Whole
    new: Whole

    @model_validator(mode="after")
    def _sound(self) -> SizeEdit:
        if self.new > self.old:
            raise ValueError(f"{self.name} would grow from {self.old} to {self.new}")
        return self


class AttributeEdit(SizeEdit):
    """An integer attribute of a module that follows the narrowed sizes."""

    edit: Literal["attribute"] = "attribute"


class ConfigEdit(SizeEdit):
    """A config field that one module reads at run time, overlaid for that module alone."""

    edit: Literal["config"] = "config"


class GatherEdit(Frozen):
    """A tensor that a module takes and of which it needs some heads only: gathered before each call.

    Attributes:
        module: the module that takes it.
        name: the parameter of the module's ``forward``.
        axis: the axis that holds the heads.
        size: number of heads before; an axis of any other size is left alone.
        keep: the heads that are kept.
        rank: number of axes of the tensor that was seen; tensors of any other rank are left alone.
        runs: whether the axis holds batch times heads, every run of ``size`` one batch row.
    """

    edit: Literal["gather"] = "gather"
    module: Name
    name: Attribute
    axis: Dim
    size: Count
    keep: Many[Count]
    rank: Dim
    runs: bool = False


class AttentionEdit(Frozen):
    """A module whose attention function gets per-head tensors (biases, masks) of all heads: gathered just before it.

    Attributes:
        module: the module, which reads its attention implementation from its config.
        name: the config field that it reads.
        size: number of heads before.
        keep: the heads that are kept.
    """

    edit: Literal["attention"] = "attention"
    module: Name
    name: Attribute = "_attn_implementation"
    size: Count
    keep: Many[Count]


class MultiheadEdit(Frozen):
    """An ``nn.MultiheadAttention`` that computes with some of its heads.

    Attributes:
        module: the attention.
        name: the attribute that counts its heads.
        size: number of heads before.
        keep: the heads that are kept.
    """

    edit: Literal["multihead"] = "multihead"
    module: Name
    name: Literal["num_heads"] = "num_heads"
    size: Count
    keep: Many[Count]


class SpreadEdit(Frozen):
    """A linear that is narrowed by itself, while what reads or feeds it keeps the dense width.

    Attributes:
        module: the linear.
        name: ``output`` where zeros are put in the places of channels that it does not compute any more, ``input``
            where it takes the kept channels of what it is given.
        size: the width around it.
        keep: the channels that are kept.
    """

    edit: Literal["spread"] = "spread"
    module: Name
    name: Literal["input", "output"]
    size: Count
    keep: Many[Count]


AnyEdit = AttributeEdit | ConfigEdit | GatherEdit | AttentionEdit | MultiheadEdit | SpreadEdit
Edit = Annotated[AnyEdit, Field(discriminator="edit")]


def chained(first: tuple[AnyEdit, ...], second: tuple[AnyEdit, ...]) -> tuple[AnyEdit, ...]:
    """Return edits that do the first ones and then the second ones."""
    made = {(edit.edit, edit.module, edit.name): edit for edit in first}
    for edit in second:
        key = (edit.edit, edit.module, edit.name)
        before = made.get(key)
        if before is None:
            made[key] = edit
        elif isinstance(edit, GatherEdit | AttentionEdit | MultiheadEdit | SpreadEdit):
            assert isinstance(before, GatherEdit | AttentionEdit | MultiheadEdit | SpreadEdit)
            keep = tuple(before.keep[head] for head in edit.keep)
            made[key] = before.model_copy(update={"keep": keep})
        else:
            made[key] = before.model_copy(update={"new": edit.new})
    return tuple(made.values())
