"""What is in a patched checkpoint besides weights and tokenizer, and how to tell it from a native one."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from compress import runtime
from compress.json_file import read_object
from compress.plan import Form
from compress.runtime.families import Family
from compress.targets.target import load_runtime

RUNTIME = Path(str(runtime.__file__)).parent
MODELING = "modeling_compress"

# Flat, because transformers copies a checkpoint's code file by file: imports are `from .name import ...` only. Where a
# mixer's file lies in another package, its imports of the runtime are made relative to the checkpoint.
_RELATIVE = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", flags=re.MULTILINE)
_OF_RUNTIME = re.compile(r"^(\s*from\s+)compress\.runtime(\.\w+\s+import\b)", flags=re.MULTILINE)
_OTHER = re.compile(
    r"^\s*(?:from\s+compress[\s.]|import\s+compress\b|from\s+\.\s+import|from\s+\.\.)", flags=re.MULTILINE
)

_LISTED = """
# Written by the exporter: mixers and MLPs of the plan, and every other file of the checkpoint by name, because out of a
# local folder transformers up to 5.8 copies only the files that this one names.
from typing import TYPE_CHECKING

{loaded}

if TYPE_CHECKING:
{others}
"""


@cache
def _source(path: Path) -> str:
    """The text of a file of the runtime as it stands in a checkpoint.

    Raises:
        ValueError: it imports what a checkpoint cannot carry.
    """
    text = _OF_RUNTIME.sub(r"\1\2", path.read_text(encoding="utf-8"))
    if wrong := _OTHER.search(text):
        raise ValueError(
            f"{path}: `{wrong[0].strip()}`: a file that checkpoints carry imports torch, transformers and, as "
            "`from .name import ...` or `from compress.runtime.name import ...`, what lies beside it or in the runtime"
        )
    return text


def runtime_files(plan: dict[str, Any]) -> dict[str, str]:
    """Names and texts of the code files of a checkpoint: of the runtime, and of the plan's mixers and MLPs.

    Raises:
        ValueError: a mixer's file imports what a checkpoint cannot carry, or has the name of another file.
    """
    loaded = {}
    for module in load_runtime(plan):
        path = Path(str(import_module(module).__file__))
        loaded[path.stem] = path
    paths = {MODELING: RUNTIME / f"{MODELING}.py"}
    waiting = [*paths.values(), *loaded.values()]
    texts: dict[str, str] = {}
    while waiting:
        path = waiting.pop()
        if paths.setdefault(path.stem, path) != path:
            raise ValueError(f"{path}: a file that checkpoints carry has the name of {paths[path.stem]}; rename one")
        if path.stem in texts:
            continue
        texts[path.stem] = _source(path)
        for name in _RELATIVE.findall(texts[path.stem]):
            beside = path.with_name(f"{name}.py")
            waiting.append(beside if beside.is_file() else RUNTIME / f"{name}.py")
    named = lambda names: [f"from .{name} import __name__ as _{name}  # noqa" for name in sorted(names)]  # noqa: E731
    texts[MODELING] += _LISTED.format(
        loaded="\n".join(named(loaded)),
        others="\n".join(f"    {line}" for line in named(texts.keys() - loaded.keys() - {MODELING})),
    )
    return {f"{name}.py": text for name, text in sorted(texts.items())}


def copy_runtime(folder: Path) -> None:
    """Write the code into a checkpoint whose config.json is there, and says which targets its plan has."""
    config = read_object(folder / "config.json", "the checkpoint's config.json")
    for name, text in runtime_files(config["compress_plan"]).items():
        (folder / name).write_text(text, encoding="utf-8")


def checkpoint_form(folder: Path) -> Form | None:
    """The form of the checkpoint in a folder; None where there is none."""
    config = folder / "config.json"
    if not config.is_file():
        return None
    return "patched" if brings_code(folder) else "native"


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
