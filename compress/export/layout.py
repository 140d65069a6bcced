"""What is in a patched checkpoint besides weights and tokenizer, and how to tell it from a native one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from compress import runtime
from compress.json_file import read_object
from compress.runtime.families import Family

# Flat, because transformers copies a checkpoint's code file by file: one file with configuration and model, and
# the files that it imports. It names every one of them itself, since older versions follow its imports only.
RUNTIME = Path(str(runtime.__file__)).parent
RUNTIME_FILES = tuple(sorted(path.name for path in RUNTIME.glob("*.py") if path.name != "__init__.py"))
MODELING = "modeling_compress"


def copy_runtime(folder: Path) -> None:
    """Copy the runtime's files into a checkpoint, unchanged."""
    for name in RUNTIME_FILES:
        shutil.copyfile(RUNTIME / name, folder / name)


def brings_code(folder: Path) -> bool:
    """Whether a checkpoint loads with `trust_remote_code=True` only."""
    return "auto_map" in read_object(folder / "config.json", "the checkpoint's config.json")


def open_permissions(folder: Path) -> None:
    """Give every file the permissions that the user's umask asks for; safetensors writes files only the owner reads."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def point_to_runtime(folder: Path, family: Family) -> None:
    """Make the checkpoint's config.json name its own code for AutoConfig, AutoModel and AutoModelForCausalLM.

    `save_pretrained` writes no entry for AutoModel, which some engines build from, so all are written here.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["architectures"] = [f"{family.planned}ForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": f"{MODELING}.{family.planned}Config",
        "AutoModel": f"{MODELING}.{family.planned}Model",
        "AutoModelForCausalLM": f"{MODELING}.{family.planned}ForCausalLM",
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
