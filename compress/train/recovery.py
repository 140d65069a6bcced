"""Recovery of one model: adapters or all weights in, training, merged weights out, with a record of how."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from pydantic import BaseModel, ConfigDict

from compress.errors import UserError
from compress.files import key_of, write_text
from compress.json_file import read_model, sealed
from compress.models.backward import recomputed
from compress.models.context.processes import check_processes, check_shareable, part_of_sequence, shareable
from compress.models.families import context_of
from compress.models.fingerprint import fingerprint_of
from compress.models.placement import input_device
from compress.models.planned import has_routers, keeps_tokens, mixers_of, own_weights
from compress.models.trained import write_trained
from compress.models.vocabulary import check_tokens
from compress.runtime.shard import Shard
from compress.train.compiled import compiled, pays
from compress.train.curve import Curve
from compress.train.fading import FadingUnits
from compress.train.keeping import AnnealedDecisions, KeptShare, check_decisions, measure_again
from compress.train.loop import Progress, one_of_each_shape, rehearse, train
from compress.train.lora import attach, merge
from compress.train.objectives.objective import Objective
from compress.train.settings import RecoverSettings
from compress.train.state import Partial, whole_weights
from compress.train.student import Student, has_plain_head
from compress.train.window_dropout import DroppedWindows
from compress.train.windows import WindowBatches, Windows, check_windows
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
        kept: `[layers][groups that stay]`, what heads that keep tokens keep now; None where the plan has none.
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
    kept: list[list[KeptShare | None]] | None = None


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
    losses = _losses(model, settings)
    if all(objective.of_keeping for objective in losses):
        raise UserError(
            "nothing is minimised",
            where="recover.objectives",
            expected="a loss of the text or of the dense model's predictions beside those of routers",
            fix="add `{name: text}`",
        )
    follows = any(objective.needs_teacher for objective in losses)
    if follows and teacher is None:
        raise ValueError(f"loss {settings.loss!r} needs a teacher")
    teacher = teacher if follows else None
    check_windows(len(text_tokens), settings.length, context_of(model.config))
    check_decisions(model, settings.length)
    check_tokens(text_tokens, model.config, "the text of the recovery")
    windows = Windows(text_tokens, settings.length, seed)
    batches = WindowBatches(windows, settings.batch_size, settings.micro_batch, context=settings.context)
    steps, device = settings.step_count, input_device(model)
    accelerator = _accelerator(settings, device)
    _check_context(model, settings)
    check_processes(settings.context, accelerator.num_processes, "recover.context")
    batches.per_process(accelerator.num_processes)
    before, followed = _fingerprint(model), None if teacher is None else _fingerprint(teacher)
    digest = windows.digest(steps, settings.batch_size)
    saved = Partial(folder, key_of("recover", 1, settings.facts(), seed, before, followed, digest))
    curve = Curve(folder / "loss.jsonl")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)
        if saved.foreign and progress is not None:
            progress(
                0,
                steps,
                "starting again, because the saved state belongs to another training or an earlier version",
            )
    accelerator.wait_for_everyone()
    if settings.context == 1:
        _train_and_merge(model, settings, batches, saved, curve, accelerator, teacher, seed, progress)
    else:
        shared, dense = shareable(model), None if teacher is None else shareable(teacher)
        part = part_of_sequence(settings.length, settings.context)
        _train_and_merge(shared, settings, batches, saved, curve, accelerator, dense, seed, progress, part)
        weights = dict(shared.named_parameters())
        for name, weight in model.named_parameters():
            weight.data = weights[name].data
        model.eval()
    if accelerator.is_main_process:
        lines = curve.steps()
        kept = _kept_again(model, settings, windows)
        record = Recovered(
            settings=settings.model_dump(mode="json"),
            seed=seed,
            steps=steps,
            tokens=steps * batches.size,
            first_loss=lines[0]["loss"],
            last_loss=lines[-1]["loss"],
            seconds=round(sum(line["seconds"] for line in lines), 2),
            sha256=write_trained(model, folder),
            before=before,
            teacher=followed,
            batches=digest,
            processes=accelerator.num_processes,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            versions=versions("peft", "accelerate"),
            kept=kept,
        )
        unused = {"kept"} if kept is None else set()
        write_text(folder / RECORD, sealed(record.model_dump(mode="json", exclude=unused)))
        saved.remove()
    accelerator.wait_for_everyone()
    return read_recovered(folder)


def _check_context(model: Any, settings: RecoverSettings) -> None:
    """Check that the sequences of a model can be shared by processes, where the settings say so.

    Raises:
        UserError: a target of the plan cannot, or a loss that the plan brings.
    """
    if settings.context == 1:
        return
    check_shareable(model, settings.length, "recover.context")
    for objective in _losses(model, settings):
        if not objective.of_logits:
            raise UserError(
                "a loss needs all tokens of a sequence at once",
                where="recover.context",
                expected="`text` and `distill` alone where processes share a sequence",
                found=f"`{objective.registered}`",
                fix="set `recover.context` to 1, or take a plan without routers",
            )


def _losses(model: Any, settings: RecoverSettings) -> tuple[Objective, ...]:
    return settings.losses_of(routed=has_routers(model), keeps=keeps_tokens(model))


def _kept_again(model: Any, settings: RecoverSettings, windows: Windows) -> list[list[KeptShare | None]] | None:
    """What a trained model keeps, by thresholds that are measured again; None where it keeps no tokens."""
    if not keeps_tokens(model):
        return None
    start = settings.step_count * settings.batch_size // settings.keep_documents + 1
    documents = windows.batch(start, settings.keep_documents).to(input_device(model))
    loss = settings.kept_loss
    return measure_again(model, documents.unbind(), loss.by, loss.at)


def _accelerator(settings: RecoverSettings, device: torch.device) -> Accelerator:
    """The processes of this training. Precision is handled here: accelerate would replace the forward method."""
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        device_placement=False,
        fsdp_plugin=sharding_plugin() if settings.shard else None,
    )
    if settings.shard and accelerator.distributed_type == DistributedType.MULTI_CPU:
        raise UserError(
            "weights can only be spread over GPUs",
            where="recover.shard",
            expected="false where the processes run on a CPU",
            found="true",
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
    batches: WindowBatches,
    saved: Partial,
    curve: Curve,
    accelerator: Accelerator,
    teacher: Any,
    seed: int,
    progress: Progress | None,
    shard: Shard | None = None,
) -> None:
    """Train and leave plain modules behind. A model that is to be spread is trained as a copy: nothing undoes that."""
    spread = accelerator.distributed_type == DistributedType.FSDP
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    low = settings.low(input_device(model))
    kept = {each.get_input_embeddings().weight.dtype for each in (model, teacher) if each is not None}
    as_kept = not spread and kept == {low}
    losses = _losses(model, settings)
    whole = spread or not all(objective.of_logits or objective.of_record for objective in losses)
    whole = whole or not all(has_plain_head(each) for each in (model, teacher) if each is not None)
    copied = copy.deepcopy(model) if spread else model
    adapted = _prepare(copied, settings, seed)
    sequences = batches.per_process(accelerator.num_processes)
    tokens = min(settings.micro_batch or sequences, sequences) * settings.length // settings.context
    student = Student(copied, teacher, low, whole=whole, as_kept=as_kept, shard=shard)
    taught = _batches(batches, copied, settings, seed)
    idle = "" if settings.fade else "raise `recover.length` above the windows of the plan, or add a loss of the text"
    advice = "lower `recover.rate`, or set `recover.precision` to float32"
    loop = settings.loop(f"{seed}/recover", advice, idle)
    # Processes that share a sequence compute it together: none may decide by its own memory to compute a layer again.
    chosen = True if shard is not None and settings.checkpointing is None else settings.checkpointing
    measured = not spread and input_device(copied).type == "cuda"
    models = [each for each in (copied, teacher) if each is not None]

    def needs() -> int:
        """Bytes of activations, of the losses, and of gradients and moments."""
        part = one_of_each_shape(taught, accelerator)[0]
        trainable = sum(weight.nbytes for weight in copied.parameters() if weight.requires_grad)
        return student.kept_bytes(part, input_device(copied)) + 3 * trainable

    def say(line: str) -> None:
        if progress is not None and accelerator.is_main_process:
            progress(0, settings.step_count, line)

    with ExitStack() as undo:
        again = undo.enter_context(
            recomputed(
                copied,
                tokens,
                chosen=chosen,
                itemsize=4 if low is None else 2,
                trained=True,
                needs=needs if measured else None,
            )
        )
        share = settings.step_count * batches.size // accelerator.num_processes
        wanted = pays(copied, share) if settings.compile is None else settings.compile
        if wanted and not spread and shard is None:
            rehearsal = partial(rehearse, student, losses, taught, loop, accelerator)
            undo.enter_context(compiled(models, rehearsal, by_part=again, say=say))
        trained = train(
            student,
            losses,
            taught,
            loop,
            saved,
            accelerator,
            curve=curve,
            progress=progress,
            rates=_rates(copied, settings),
        )
    if spread:
        tensors = whole_weights(trained)
        del trained, copied
        adapted = _prepare(model, settings, seed)
        for name, weight in model.named_parameters():
            if name in tensors:
                weight.data = tensors[name].to(weight.device)
    if adapted is not None:
        merge(adapted)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtypes[name])
        weight.grad = None
    model.requires_grad_(True).eval()


def _batches(batches: WindowBatches, model: Any, settings: RecoverSettings, seed: int) -> Any:
    """Batches that say what is otherwise in their passes: windows left out, soft decisions, heads that fade."""
    made = DroppedWindows.of(batches, model, settings, f"{seed}/windows")
    return FadingUnits.of(AnnealedDecisions.of(made, model, settings), model, settings)


def _rates(model: Any, settings: RecoverSettings) -> dict[str, float]:
    """Factors on the learning rate by names of parameters: of what mixers and routers have of their own."""
    if settings.mixer_rate is None:
        return {}
    own = {id(weight) for weight in own_weights(model)}
    factor = settings.mixer_rate / settings.rate
    return {name: factor for name, weight in model.named_parameters() if id(weight) in own}


def _prepare(model: Any, settings: RecoverSettings, seed: int) -> Any:
    """Bring weights into the dtype they are trained in, and choose what takes gradients.

    Frozen bfloat16 weights stay so where products are bfloat16 anyway; everything else is float32.

    Returns:
        peft's model, or None where there are no adapters.

    Raises:
        UserError: nothing to train.
    """
    device = input_device(model)
    low = settings.low(device) if settings.train != "full" and not settings.shard else None
    own = own_weights(model)
    for weight in model.parameters():
        if weight.dtype != low:
            weight.data = weight.data.float()
    for weight in own if settings.train != "full" else model.parameters():
        weight.data = weight.data.float().clone()  # another model may hold the same tensor
    if settings.train == "full":
        model.requires_grad_(True)
        for mixer in mixers_of(model):
            mixer.requires_grad_(mixer.learns)
        return None
    if settings.train == "mixers":
        if not own:
            raise UserError(
                "the targets of the plan have no parameters of their own to train",
                where="recover.train: mixers",
                expected="`lora` or `full`, or a plan with targets that have some",
            )
        model.requires_grad_(False)
        for weight in own:
            weight.requires_grad_(True)
        return None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return attach(model, settings)


def _fingerprint(model: Any) -> str:
    """Of weights, class and plan."""
    plan = getattr(model.config, "compress_plan", None)
    return fingerprint_of(model, {"class": type(model).__name__, "plan": plan})
