#!/usr/bin/env python3
"""Loads small checkpoints of every architecture in many versions of transformers, and compares what they compute.

    scripts/transformers_versions.py FOLDER [VERSION ...]

Every version is installed with its own dependencies into FOLDER/VERSION (a few hundred MB each) and is put before this
environment's packages, of which it takes torch. The checkpoints, a patched and a native one of each family, are written
once, with the transformers that is installed here. The table is printed, and is written to
compress/export/transformers_versions.json, from which the cards of checkpoints say what was tried.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "compress" / "export" / "transformers_versions.json"
VERSIONS = [
    *("5.0.0", "5.1.0", "5.2.0", "5.4.0", "5.6.2", "5.8.1", "5.10.4"),
    *("5.12.1", "5.14.1", "5.16.1", "5.17.0", "5.20.2", "5.23.0", "5.24.0"),
]
MODELS = (
    "gemma3",
    "llama-gqa",
    "ministral",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
)  # of tests/tiny.py, beside those of MORE
CLOSE = 1e-4  # of the largest logit, in float32
TOKENS, NEW = 301, 24


def write_checkpoints(folder: Path) -> list[Path]:
    """A checkpoint in each form of a tiny random model of every family, with what it computes beside it."""
    import torch

    from compress.errors import UserError
    from compress.export.export import export_checkpoint
    from compress.models.load import LoadedModel
    from compress.models.shape import shape_of
    from compress.plan import make_plan
    from compress.targets.full import FullGroup
    from compress.targets.window import WindowGroup
    from tests.tiny import MORE, mixed_plan, tiny_model, tiny_tokenizer

    torch.set_num_threads(1)
    written = []
    for family in (*MODELS, *MORE):
        loaded = LoadedModel(tiny_model(family), tiny_tokenizer(), family)
        shape = shape_of(loaded.model)
        slides = [WindowGroup(sink=0, alpha=50, beta=0.0), FullGroup(), FullGroup()]
        rows = zip(slides, shape.native_windows, strict=True)
        layered = make_plan(
            shape, [[target if native is None else FullGroup()] * shape.kv_heads for target, native in rows]
        )
        for form, plan in (("patched", mixed_plan(shape)), ("native", layered)):
            path = folder / f"{family}-{form}"
            try:
                export_checkpoint(loaded, plan, path, form=form, overwrite=True)  # type: ignore[arg-type]
            except UserError as error:
                print(f"{path.name}: no such checkpoint, {error.problems[0].what}", file=sys.stderr)
                continue
            written.append(path)
    return written


def install(version: str, folder: Path) -> str | None:
    """Put a version with its dependencies into FOLDER/VERSION; what went wrong, else None."""
    if (folder / version / "transformers").is_dir():
        return None
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(folder / version)]
    done = subprocess.run([*command, f"transformers=={version}"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"not installed: {done.stderr.strip().splitlines()[-1]}"


def run_in(packages: Path | None, checkpoints: list[Path], scratch: Path) -> dict[str, Any]:
    """What `child` says in a fresh process with these packages before the environment's own."""
    scratch.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(packages) if packages is not None else "",
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    out = scratch / "out.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-P", __file__, "child", str(out), *map(str, checkpoints)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
    if not out.exists():
        lines = (done.stderr or done.stdout).strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(out.read_text(encoding="utf-8"))


def child(out: Path, checkpoints: list[Path]) -> None:
    """Load and run checkpoints without `compress`; logits and greedy tokens of each, or its error, as JSON."""
    sys.modules["compress"] = None  # type: ignore[assignment] # an import of it raises ModuleNotFoundError
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    ids = ((torch.arange(TOKENS) * 7919 + 104729) % 93 + 4)[None]
    found: dict[str, Any] = {}
    for path in checkpoints:
        word = {"trust_remote_code": True} if path.name.endswith("patched") else {}
        try:
            model = AutoModelForCausalLM.from_pretrained(path, **word).eval()
            AutoTokenizer.from_pretrained(path, **word)  # only that it loads: the tiny one is of no family's kind
            with torch.inference_mode():
                logits = model(ids).logits[0, -8:].double()
                tokens = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
                )
            found[path.name] = {
                "class": type(model).__name__,
                "logits": logits.tolist(),
                "tokens": tokens[0, TOKENS:].tolist(),
            }
        except Exception as error:  # whatever a version does with it is what the table is for
            found[path.name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    out.write_text(json.dumps({"transformers": transformers.__version__, "found": found}), encoding="utf-8")


def compare(version: str, name: str, here: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: one version's run of a checkpoint beside that of this environment."""
    row = {"transformers": version, "checkpoint": name, "architecture": here["class"], "same": False}
    if "failed" in there:
        return {**row, "difference": None, "message": there["failed"]}
    import torch

    ours, theirs = torch.tensor(here["logits"]), torch.tensor(there["logits"])
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    if not difference <= CLOSE:
        message = f"other logits, {difference:.1e} of the largest apart"
    elif there["tokens"] != here["tokens"]:
        message = "the same logits, and other greedy tokens"
    else:
        message = ""
    return {**row, "same": not message, "difference": difference, "message": message}


def main() -> int:
    """Run all versions, print and write the table; 1 where a checkpoint does not do the same in one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where environments and checkpoints are kept")
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="of transformers")
    parser.add_argument("--out", type=Path, default=TABLE, help="where the table goes")
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"  # before it is read: nothing here is the hub's
    import torch
    import transformers
    from rich.console import Console
    from rich.table import Table

    from compress.runtime.attention import NAME

    folder = chosen.folder.resolve()
    checkpoints = write_checkpoints(folder / "checkpoints")
    here = run_in(None, checkpoints, folder / "scratch" / "here")["found"]
    rows: list[dict[str, Any]] = []
    for version in chosen.versions:
        problem = install(version, folder)
        told: dict[str, Any] = (
            {"failed": problem} if problem else run_in(folder / version, checkpoints, folder / "scratch" / version)
        )
        for path in checkpoints:
            there = told["found"][path.name] if "found" in told else told
            rows.append(compare(version, path.name, here[path.name], there))
        wrong = [row for row in rows if row["transformers"] == version and not row["same"]]
        print(f"{version}: {len(checkpoints) - len(wrong)} of {len(checkpoints)} the same", file=sys.stderr)
    table = Table("transformers", "checkpoint", "class", "largest difference", "result")
    for row in rows:
        gap = "" if row["difference"] is None else f"{row['difference']:.1e}"
        result = "same logits and tokens" if row["same"] else row["message"]
        table.add_row(row["transformers"], row["checkpoint"], row["architecture"], gap, result)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    facts = {"written_with": transformers.__version__, "torch": torch.__version__, "runtime": NAME}
    lines = ",\n".join(json.dumps(row) for row in rows)
    chosen.out.write_text(f'{json.dumps(facts)[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
    else:
        sys.exit(main())
