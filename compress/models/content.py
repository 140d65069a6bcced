"""What a named model is by content, known without loading it: results that are kept belong to that, not to a name."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from compress.files import file_key, key_of
from compress.models.load import DEMOS, demo_file

CARD = "README.md"  # changes with every evaluation, and computes nothing


def content_key(spec: str) -> str:
    """Hash of the files of a model, or of the commit of a hub id; reads all bytes of a local model once.

    Args:
        spec: what `load_model` takes, or any file.

    Raises:
        UserError: a file cannot be read.
    """
    path = (demo_file(spec) if spec in DEMOS else None) or Path(spec).expanduser()
    if path.is_file():
        return key_of([[path.name, file_key(path)]])
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name != CARD)
        return key_of([[file.name, file_key(file)] for file in files])
    return key_of([spec, _commit(spec)])


def _commit(spec: str) -> str | None:
    """The commit of a hub id: the hub's newest, or without a network the one that lies in the cache."""
    try:
        if not constants.HF_HUB_OFFLINE:
            return HfApi().model_info(spec, timeout=10).sha
    except (OSError, HfHubHTTPError, HFValidationError):
        pass  # no network, or no such model, which the loader tells of
    try:
        cached = try_to_load_from_cache(spec, "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent.name if isinstance(cached, str) else None
