"""Proves a checkpoint: reloads it in a fresh process without `compress` and compares it with the model in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.errors import UserError
from compress.export.finite import refuse_not_finite
from compress.files import scratch as scratch_folder
from compress.models.placement import input_device
from compress.plan import Plan
from compress.runtime.modeling_compress import CACHE
from compress.runtime.span import PAGE
from compress.words import size

CHILD = Path(__file__).with_name("verify_child.py")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the largest logit


@dataclass(frozen=True)
class Checks:
    """What the fresh process reproduced.

    Attributes:
        probe_tokens: length of the probe.
        logit_difference: largest difference of a logit: alone, in a left-padded batch, and of a step on a cache.
        tolerance: what was allowed.
        text: the greedy continuation, equal in both processes.
        cache_bytes: bytes allocated by the reloaded model's cache after the probe.
        predicted_bytes: what the plan says for that length; where that depends on the text, what the model in memory
            held of the probe.
        dense_bytes: what transformers' own cache holds for the original model.
        loaded_as: class that AutoModelForCausalLM returned.
        native: whether it is a stock architecture, loaded without remote code.
    """

    probe_tokens: int
    logit_difference: float
    tolerance: float
    text: str
    cache_bytes: int
    predicted_bytes: int
    dense_bytes: int
    loaded_as: str
    native: bool = False

    def words(self) -> str:
        """What was proved, in a sentence."""
        return (
            f"a fresh process without `compress` loads it as {self.loaded_as}; largest logit difference "
            f"{self.logit_difference:.1e} (allowed {self.tolerance:.0e}); cache at {self.probe_tokens:,} tokens "
            f"{size(self.cache_bytes)} as predicted, dense {size(self.dense_bytes)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


def make_probe(model: Any, tokenizer: Any, length: int, *, alike: bool = False) -> dict[str, torch.Tensor]:
    """Two rows of the same tokens, the second left-padded over its first quarter; `[2, length]` ids and mask.

    With `alike` both rows are padded, for plans that refuse rows of different lengths. The ids are spread over the
    vocabulary by a fixed rule, so that the probe is the same on every machine.
    """
    vocabulary = int(model.config.vocab_size)
    ids = ((torch.arange(length) * 7919 + 104729) % vocabulary).repeat(2, 1)
    mask = torch.ones_like(ids)
    pad = tokenizer.pad_token_id if tokenizer is not None and tokenizer.pad_token_id is not None else 0
    padded = slice(0 if alike else 1, 2)
    ids[padded, : length // 4] = pad
    mask[padded, : length // 4] = 0
    return {"ids": ids, "mask": mask, "pad": torch.tensor(pad)}


def verify_checkpoint(
    folder: Path,
    planned: Any,
    tokenizer: Any,
    plan: Plan,
    *,
    native: bool = False,
    dense: Any = None,
    length: int = 1061,
) -> Checks:
    """Reload `folder` in a fresh process and compare with `planned`, the model in memory.

    Args:
        native: a stock architecture: it has to load without remote code, and its cache is transformers' own.
        dense: the model that the plan was made for; tells whether logits that are not finite are the plan's doing.
        length: tokens of the probe, cut to the model's context less 16; odd, and longer than a few pages.

    Raises:
        UserError: the model's own logits are not finite (it overflows), the checkpoint does not load, or not every
            weight of it, or logits, text or cache bytes differ.
    """
    length = min(length, int(planned.config.max_position_embeddings) - 16)
    probe = make_probe(planned, tokenizer, length, alike=plan.by_length)
    device = input_device(planned)
    ids, mask = probe["ids"].to(device), probe["mask"].to(device)
    with torch.inference_mode():
        padded = planned(ids, attention_mask=mask, logits_to_keep=4).logits.float().cpu()
        alone = planned(ids[:1], logits_to_keep=4)
        hidden = planned.base_model(ids[:1, :16]).last_hidden_state.float().cpu()
        # Not the last row of `alone`: a rule by length takes its windows from the prompt, without the step.
        before = getattr(planned(ids[:1, :-1], use_cache=True, logits_to_keep=1), CACHE)
        step = planned(ids[:1, -1:], **{CACHE: before}).logits.float().cpu()
        expected = alone.logits.float().cpu()
        if not all(bool(logits.isfinite().all()) for logits in (padded, expected, step, hidden)):
            refuse_not_finite(planned, dense, ids, mask)
        tokens = planned.generate(
            ids[:1], attention_mask=mask[:1], max_new_tokens=16, do_sample=False, pad_token_id=int(probe["pad"])
        ).cpu()
    result, facts = _run_child(folder, probe, native)
    if facts["not_loaded"]:
        raise UserError(
            "the weights of the checkpoint are not those of its architecture",
            where=str(folder),
            expected="no missing, unexpected or mismatched tensor",
            found=facts["not_loaded"],
        )
    if facts["generation"]:
        raise UserError(
            "the checkpoint does not generate with the generation config of its source",
            where=str(folder / "generation_config.json"),
            found=facts["generation"],
            fix="take the setting out of the source's generation_config.json",
        )
    pairs = ((result["logits"], expected), (result["padded_logits"], padded), (result["step_logits"], step))
    if not all(bool(result[name].isfinite().all()) for name in ("logits", "padded_logits", "step_logits", "hidden")):
        raise UserError(
            "the reloaded checkpoint's values are not finite, and those of the model in memory are",
            where=str(folder),
            expected="the weights that were written",
            found="infinite values, or values that are not a number",
            fix="check the disk, and export again",
        )
    difference = max(float((reloaded - wanted).abs().max()) for reloaded, wanted in pairs)
    relative = TOLERANCE[next(planned.parameters()).dtype]
    tolerance = relative * float(expected.abs().max())
    if not difference <= tolerance:
        raise UserError(
            "the reloaded checkpoint computes different logits than the model in memory",
            where=str(folder),
            expected=f"at most {tolerance:.2e} apart",
            found=f"{difference:.2e}",
        )
    if not torch.allclose(result["hidden"], hidden, rtol=0, atol=relative * float(hidden.abs().max())):
        raise UserError("AutoModel loads different weights than AutoModelForCausalLM", where=str(folder))
    if not torch.equal(result["tokens"], tokens):
        raise UserError(
            "the reloaded checkpoint generates a different text than the model in memory",
            where=str(folder),
            expected=str(tokens[0, length:].tolist()),
            found=str(result["tokens"][0, length:].tolist()),
        )
    itemsize = next(planned.parameters()).itemsize
    predicted = plan.cost(length, itemsize, form="native" if native else "patched").held_bytes
    if plan.in_expectation:
        predicted = before.held_bytes()
    slack = 0 if native else 2 * sum(plan.kept_heads) * PAGE * plan.unit(0, itemsize, "patched").token_bytes
    allocated = int(result["cache_bytes"])
    if abs(allocated - predicted) > slack:
        raise UserError(
            f"the reloaded checkpoint's cache does not hold the bytes that the plan predicts at {length} tokens",
            where=str(folder),
            expected=f"{predicted:,} bytes" + (", to within two pages a head group" if slack else ""),
            found=f"{allocated:,} bytes",
        )
    return Checks(
        probe_tokens=length,
        logit_difference=difference,
        tolerance=tolerance,
        text=facts["text"],
        cache_bytes=allocated,
        predicted_bytes=predicted,
        dense_bytes=plan.dense_cost(length, itemsize).held_bytes,
        loaded_as=facts["class"],
        native=native,
    )


def run_fresh(
    script: Path, arguments: Sequence[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a Python file to its end in a fresh process, which finds no module beside it or in `folder`."""
    command = [sys.executable, "-P", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def _run_child(
    folder: Path, probe: dict[str, torch.Tensor], native: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Run `verify_child.py` on the checkpoint with a code cache of its own; return its tensors and facts."""
    code, flag = ("stock", "") if native else ("remote", ", trust_remote_code=True")
    with scratch_folder("verify") as scratch:
        probe_file, result_file = scratch / "probe.safetensors", scratch / "result.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in probe.items()}, probe_file)
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": str(scratch / "modules"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment.pop("PYTHONPATH", None)
        arguments = [str(folder.resolve()), str(probe_file), str(result_file), str(torch.get_num_threads()), code]
        done = run_fresh(CHILD, arguments, environment, scratch)
        if done.returncode != 0 or not result_file.exists():
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(
                "the checkpoint does not load in a fresh process",
                where=str(folder),
                expected=f"AutoModelForCausalLM.from_pretrained(path{flag}) works without compress",
                found=lines[-1] if lines else f"exit status {done.returncode}",
            )
        with safe_open(result_file, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
        return load_file(result_file), facts
