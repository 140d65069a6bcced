"""The metadata of a model card (YAML front matter), in the form that the Hugging Face hub accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # documented, and not in an __all__

from compress.models.load import DEMOS

SECONDS = 5.0
# OSError, and what the HTTP client below the hub's raises, which is another one by version.
UNREACHABLE: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)
)
UNREADABLE: tuple[type[Exception], ...] = (*UNREACHABLE, ValueError, yaml.YAMLError)
LICENSE = ("license", "license_name", "license_link")


def hub_id(name: str) -> str | None:
    """A model's name where its form is one of the hub's; None for a folder, a file or a demo model."""
    if name in DEMOS or name.endswith(".gguf") or Path(name).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def source_metadata(name: str, *, ours: bool = False) -> dict[str, Any]:
    """What a card takes over from that of the model it was made from: its license, and which model that is.

    Args:
        ours: the source is a checkpoint of this toolkit, so that its own `base_model` is this one's, too.

    Returns:
        `base_model`, `license`, `license_name` and `license_link`, as far as they are known.
    """
    repository = hub_id(name)
    theirs = _card_of(name, repository)
    taken = {key: theirs[key] for key in LICENSE if isinstance(theirs.get(key), str)}
    link = taken.get("license_link")
    if link is not None and "://" not in link:  # a file beside their card
        if repository is None:
            del taken["license_link"]
        else:
            taken["license_link"] = f"https://huggingface.co/{repository}/blob/main/{link}"
    base = theirs.get("base_model") if ours else repository
    if isinstance(base, str) and hub_id(base) is not None:
        taken["base_model"] = base
    return taken


def front_matter(source: dict[str, Any], tags: list[str]) -> str:
    """The block between two lines of dashes at the head of a card.

    Args:
        source: of `source_metadata`.
    """
    facts = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags, **source}
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---\n"


def _card_of(name: str, repository: str | None) -> dict[str, Any]:
    """The metadata of a model's own card; empty where none can be read, or where the hub is out of reach."""
    try:
        if repository is not None:
            # Asked once and not for long: a download would be tried again for half a minute without a network.
            data = HfApi().model_info(repository, timeout=SECONDS).card_data
            return {} if data is None else data.to_dict()
        folder = Path(name).expanduser()
        return metadata_load((folder if folder.is_dir() else folder.parent) / "README.md") or {}
    except UNREADABLE:
        return {}
