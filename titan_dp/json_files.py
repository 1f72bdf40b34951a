"""JSON from elsewhere, checked against a schema before anything uses it: manifests, run.json, sweep.json.

One check instead of many: what a schema has accepted has the types it says, and everything else ends in one UserError. Nothing
is converted ("8" is no number), infinities and NaN are refused, unknown entries are kept. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from titan_dp.errors import UserError
from titan_dp.files import shorten, shown

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
Natural = Annotated[int, Field(ge=0, lt=2**62)]
"""A count: the sum of two fits in 64 bits."""


class JsonObject(BaseModel):
    """A JSON object with some known entries."""

    model_config = ConfigDict(**STRICT, extra="allow")


Schema = TypeVar("Schema", bound=JsonObject)


def parse_json(schema: type[Schema], raw: bytes | str, path: Path, what: str, remedy: str) -> Schema:
    """`raw`, the contents of `path`, as `schema`. Raises UserError: "`path` is no `what` (the first mistake); `remedy`"."""
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        raise UserError(f"{path} is no {what} ({first_mistake(error)}); {remedy}") from error


def first_mistake(error: ValidationError) -> str:
    """The first thing that is wrong: "shards.0.tokens = -1: Input should be greater than or equal to 0"."""
    first = error.errors(include_url=False)[0]
    key, message = shorten(".".join(map(str, first["loc"])), 80), shorten(first["msg"])
    if not key:
        return message
    return f"{key}: {message}" if first["type"] == "missing" else f"{key} = {shown(first['input'])}: {message}"
