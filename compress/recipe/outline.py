"""The outline of a recipe: the keys that need no method to be known, and the names of the sections."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.limits import SEED
from compress.registry import PathText

Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Frozen; unknown keys are refused, and so is `true` or `"4"` where a number belongs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Outline(Section):
    """The keys of the top level that hold one value each."""

    schema_: Literal[1] = Field(1, alias="schema", description="version of this form")
    model: PathText = Field(description="demo/smollm2-135m, a hub id, a folder, or a .gguf file")
    dtype: Dtype = Field("float32", description="dtype of the weights in memory")
    device: str = Field(
        "auto",
        pattern=r"^(auto|balanced|cpu|mps|cuda(:\d{1,3})?)$",
        description="auto, cpu, mps, cuda, cuda:N, or balanced over all GPUs",
    )
    seed: int = Field(0, ge=0, le=SEED, description="of documents, sampling and evaluation")
    output: PathText = Field(description="the run folder, relative to the current folder")


# The sections behind these keys; `schema.Recipe` has their fields.
SECTIONS = {
    "calibration": "the documents that heads are measured on",
    "profile": "what is measured",
    "prepare": "training of targets that cannot be priced untrained; leave it out where there are none",
    "upcycle": "several models become one, in place of a profile, a search and a preparation; leave it out for one "
    "model",
    "search": "how the plan is decided",
    "recover": "training of the plan's model; leave it out to train nothing",
    "export": "the form of the checkpoint",
    "evaluate": "what the checkpoint is compared on",
}
REQUIRED = ("search",)
# What has no place beside `upcycle`, which stands for it.
REPLACED = ("profile", "prepare", "search")
