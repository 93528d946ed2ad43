"""What the records of a plan have in common: they never change, and what they take is bounded."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_UNITS = 1 << 22
MAX_FIELDS = 1 << 10
"""Most fields of one object of a plan."""

MAX_ROWS = 1 << 24
"""Most rows of one dimension of a tensor, those of all experts together."""
MAX_RANK = 64

Count = Annotated[int, Field(ge=0, le=1 << 40)]
Rows = Annotated[int, Field(ge=0, le=MAX_ROWS)]
Dim = Annotated[int, Field(ge=0, lt=MAX_RANK)]
Whole = Annotated[int, Field(ge=1, le=1 << 40)]
Attribute = Annotated[str, Field(max_length=256, pattern=r"^_?[A-Za-z][A-Za-z0-9_]*$")]
FieldPath = Annotated[str, Field(max_length=1024, pattern=r"^_?[A-Za-z][A-Za-z0-9_]*(\._?[A-Za-z][A-Za-z0-9_]*)*$")]
Name = Annotated[str, Field(max_length=1024, pattern=r"^[^/\\\x00]*$")]


Entry = TypeVar("Entry")
Many = Annotated[tuple[Entry, ...], Field(fail_fast=True)]
"""A sequence of which the first fault is told: millions of them would take minutes to collect."""


def _few(data: Any) -> Any:
    """Refuse an object with more fields than any has, before a fault is found in each of them."""
    if isinstance(data, dict) and len(data) > MAX_FIELDS:
        raise ValueError(f"an object has {len(data)} fields; {MAX_FIELDS} are the most")
    return data


Few = BeforeValidator(_few)


class Frozen(BaseModel):
    """A record that never changes and takes nothing it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        return _few(data)
