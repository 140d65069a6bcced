"""Recovery of one model: adapters or all weights in, training, merged weights out, with a record of how."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from pydantic import BaseModel, ConfigDict

from compress.errors import UserError
from compress.files import key_of, write_text
from compress.json_file import read_model, sealed
from compress.models.fingerprint import fingerprint_of
from compress.models.recovered import write_recovered
from compress.models.vocabulary import check_tokens
from compress.recover.curve import Curve
from compress.recover.lora import attach, merge
from compress.recover.settings import RecoverSettings
from compress.recover.state import Partial, whole
from compress.recover.train import Progress, autocast_dtype, share_of, train
from compress.recover.windows import Windows, check_windows
from compress.versions import versions

RECORD = "recover.json"


class Recovered(BaseModel):
    """What a training was and what came of it: `recover.json`.

    Attributes:
        tokens: trained on, all steps together.
        first_loss, last_loss: of the first and the last step, nats a token.
        seconds: of all steps, those before an interrupt included.
        sha256: of the weights that came out.
        before, teacher: fingerprints of the model as it was and of the dense model that it followed, if any.
        batches: hash of all batches in order.
        processes: that shared the last part of the work.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[str, Any]
    seed: int
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    seconds: float
    sha256: str
    before: str
    teacher: str | None
    batches: str
    processes: int
    device: str
    versions: dict[str, str]


def read_recovered(folder: Path) -> Recovered:
    """The record of a finished recovery.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return read_model(Recovered, folder / RECORD, "the record of a recovery", fix="recover again", finite=False)


def recover(
    model: Any,
    settings: RecoverSettings,
    text_tokens: Sequence[int],
    folder: Path,
    *,
    teacher: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recovered:
    """Train a causal language model in place; it ends with merged weights of its own dtype, in eval mode.

    Weights that it shares with another model stay as they are there. In several processes (torchrun, accelerate
    launch) each calls this with an equal model; the main one writes. `folder` gets `model.safetensors`, `loss.jsonl`
    and `recover.json`, and while training a state from which the next call goes on, to the same weights on a CPU.
    After an error or an interrupt the model is not fit for use.

    Args:
        text_tokens: token ids, cut into windows; the same in all processes.
        teacher: the dense model, for `loss: distill` and `both`; in eval mode, on the model's device.
        seed: of the order of windows, of the adapters and of dropout.
        progress: called with (steps done, steps in all, what) in the main process.

    Raises:
        ValueError: a teacher is needed and not given.
        UserError: the text or the batch does not fit, weights cannot be spread here, or see `train`.
        KeyboardInterrupt: SIGTERM or SIGINT; the state is saved.
    """
    if settings.loss != "text" and teacher is None:
        raise ValueError(f"loss {settings.loss!r} needs a teacher")
    teacher = teacher if settings.loss != "text" else None
    check_windows(len(text_tokens), settings.length, getattr(model.config, "max_position_embeddings", None))
    check_tokens(text_tokens, model.config, "the text of the recovery")
    windows = Windows(text_tokens, settings.length, seed)
    steps, device = settings.step_count, next(model.parameters()).device
    accelerator = _accelerator(settings, device)
    share_of(settings, accelerator.num_processes)
    before, followed = _fingerprint(model), None if teacher is None else _fingerprint(teacher)
    batches = windows.digest(steps, settings.batch_size)
    partial = Partial(folder, key_of("recover", 1, settings.facts(), seed, before, followed, batches))
    curve = Curve(folder / "loss.jsonl")
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    _train_and_merge(model, settings, windows, partial, curve, accelerator, teacher, seed, progress)
    if accelerator.is_main_process:
        told = curve.steps()
        record = Recovered(
            settings=settings.model_dump(mode="json"),
            seed=seed,
            steps=steps,
            tokens=steps * settings.batch_size * settings.length,
            first_loss=told[0]["loss"],
            last_loss=told[-1]["loss"],
            seconds=round(sum(entry["seconds"] for entry in told), 2),
            sha256=write_recovered(model, folder),
            before=before,
            teacher=followed,
            batches=batches,
            processes=accelerator.num_processes,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            versions=versions("peft", "accelerate"),
        )
        write_text(folder / RECORD, sealed(record.model_dump(mode="json")))
        partial.remove()
    accelerator.wait_for_everyone()
    return read_recovered(folder)


def _accelerator(settings: RecoverSettings, device: torch.device) -> Accelerator:
    """The processes of this training. Precision is our own matter: accelerate's would replace the model's forward."""
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        device_placement=False,
        fsdp_plugin=sharding_plugin() if settings.shard else None,
    )
    if settings.shard and accelerator.distributed_type == DistributedType.MULTI_CPU:
        raise UserError(
            "weights are spread over GPUs only", where="recover.shard", expected="false", found="processes on a CPU"
        )
    return accelerator


def sharding_plugin() -> FullyShardedDataParallelPlugin:
    """How weights are spread: decoder layer by decoder layer (FSDP2)."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )


def _train_and_merge(
    model: Any,
    settings: RecoverSettings,
    windows: Windows,
    partial: Partial,
    curve: Curve,
    accelerator: Accelerator,
    teacher: Any,
    seed: int,
    progress: Progress | None,
) -> None:
    """Train and leave plain modules behind. A model that is to be spread is trained as a copy: nothing undoes that."""
    spread = accelerator.distributed_type == DistributedType.FSDP
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    trainee = copy.deepcopy(model) if spread else model
    adapted = _prepare(trainee, settings, seed)
    train(trainee, settings, windows, partial, curve, accelerator, teacher=teacher, seed=seed, progress=progress)
    if spread:
        trained = {name: whole(weight) for name, weight in trainee.named_parameters() if weight.requires_grad}
        del trainee
        adapted = _prepare(model, settings, seed)
        for name, weight in model.named_parameters():
            if name in trained:
                weight.data = trained[name].to(weight.device)
    if adapted is not None:
        merge(adapted)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtypes[name])
        weight.grad = None
    model.requires_grad_(True).eval()


def _prepare(model: Any, settings: RecoverSettings, seed: int) -> Any:
    """Bring weights into the dtype they are trained in, and choose what takes gradients.

    Frozen bfloat16 weights stay so where products are bfloat16 anyway; everything else is float32.

    Returns:
        peft's model, or None where all weights train.
    """
    device = next(model.parameters()).device
    low = autocast_dtype(settings, device) if settings.train == "lora" and not settings.shard else None
    for weight in model.parameters():
        if weight.dtype != low:
            weight.data = weight.data.float()
    if settings.train == "full":
        for weight in model.parameters():
            weight.data = weight.data.clone()  # another model may hold the same tensor
        model.requires_grad_(True)
        return None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return attach(model, settings)


def _fingerprint(model: Any) -> str:
    """Of weights, class and plan."""
    plan = getattr(model.config, "compress_plan", None)
    return fingerprint_of(model, {"class": type(model).__name__, "plan": plan})
