"""The plan that a patched checkpoint's configuration carries, checked before the runtime trusts it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import UserError
from compress.json_file import validated
from compress.plan import Group
from compress.targets.expert import MOST_EXPERTS

FIX = "export the checkpoint again, or take the config.json that it was exported with"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Kept(_Strict):
    kept: int = Field(ge=1)


class _Experts(_Strict):
    experts: int = Field(ge=2, le=MOST_EXPERTS)
    top: int = Field(ge=1, le=MOST_EXPERTS)
    weight: Literal["one", "p"]


class _Layer(_Strict):
    groups: list[Group] = Field(min_length=1)
    query_heads: int | None = Field(default=None, ge=1)
    mlp: _Kept | _Experts | None = None


class _Carried(_Strict):
    schema_: Literal[1] = Field(alias="schema")
    layers: list[_Layer]


def check_carried(plan: Any, layers: Any, where: str) -> None:
    """Check what config.json says in `compress_plan`.

    Args:
        plan: the value.
        layers: of the model, as the configuration says.
        where: the file, for the message.

    Raises:
        UserError: everything in it that no export writes.
    """
    what = "the plan that the checkpoint carries is damaged"
    read = validated(_Carried, plan, what, f"{where}: compress_plan", fix=FIX)
    if len(read.layers) != layers:
        raise UserError(
            f"{what}: wrong number of layers",
            where=f"{where}: compress_plan.layers",
            expected=str(layers),
            found=str(len(read.layers)),
            fix=FIX,
        )
