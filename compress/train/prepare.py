"""Trains what targets have of their own before the search, layer by layer on the dense model's activations.

The dense model runs as it is, and every layer's mixer runs beside its attention on the same queries, keys, values and
hidden states. A layer's loss runs its backward pass before the next layer begins, so that the activations of one layer
are held at a time; no layer sees what another one's mixer does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from compress.errors import UserError
from compress.files import key_of
from compress.json_file import read_sealed
from compress.models.families import attentions_of, context_of, family_of, layers_of
from compress.models.placement import input_device
from compress.models.planned import planned_model
from compress.models.prepared import OPTION, TENSORS, Option, read_option, write_option, write_record
from compress.models.replaced import AttentionCall, causal_attention, replaced_attention
from compress.models.vocabulary import check_tokens
from compress.plan import ModelShape, uniform_plan
from compress.runtime.impl import choose_impl
from compress.runtime.mixer import Kinds
from compress.runtime.span import Span
from compress.runtime.step import Record, Step
from compress.runtime.widths import projections
from compress.targets.target import Target
from compress.train.compressed_states import forgetful
from compress.train.curve import Curve
from compress.train.loop import Learn, Progress, Settings, train
from compress.train.objectives.objective import Inputs, Objective
from compress.train.scorers import Pieces, Scorers
from compress.train.settings import PrepareSettings
from compress.train.state import Partial
from compress.train.windows import WindowBatches, Windows, check_windows
from compress.versions import versions

NAME = "compress_prepare"
MEASURED = 4  # batches that the errors are measured on


def prepare(
    model: Any,
    shape: ModelShape,
    settings: PrepareSettings,
    text_tokens: Sequence[int],
    folder: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    tokenizer: Any = None,
) -> dict[str, Option]:
    """Train every target of the settings for all head groups that may change; the dense model is left as it is.

    `folder` gets a folder for each target (see `models.prepared`), with `loss.jsonl`, and `prepare.json` at the end.
    A target that is finished, with the same settings, text and model, is not trained again, and an interrupted one
    goes on from its last saved state. In several processes each calls this alike, and the main one writes.

    Args:
        text_tokens: token ids, cut into windows; the same in all processes.
        seed: of the order of windows.
        progress: called with (steps done, steps in all, what) in the main process.
        tokenizer: the model's; for scorers, which are trained on texts that the model repeats.

    Returns:
        The records of the options by the names of their folders.

    Raises:
        UserError: a target without own parameters, or see `train`.
        KeyboardInterrupt: SIGTERM or SIGINT; the state is saved.
    """
    check_windows(len(text_tokens), settings.length, context_of(model.config), "prepare")
    check_tokens(text_tokens, model.config, "the text of the preparation")
    windows = Windows(text_tokens, settings.length, seed)
    batches = WindowBatches(windows, settings.batch_size, settings.micro_batch, "prepare.batch_size")
    accelerator = Accelerator(cpu=input_device(model).type == "cpu")
    digest = windows.digest(settings.step_count, settings.batch_size)
    common = {name: value for name, value in settings.facts().items() if name != "targets"}
    options = {}
    for number, named in enumerate(settings.targets):
        target = named.prepared_as if named.open else named  # what is open is what the preparation is to say
        key = key_of("prepare", 1, common, target.model_dump(mode="json"), seed, shape.fingerprint, digest)
        name = f"{target.target}-{key}"

        def report(done: int, total: int, what: str, before: int = number) -> None:
            if progress is not None:
                progress(before * total + done, len(settings.targets) * total, what)

        if not _finished(folder / name, key):
            job = _Job(model, shape, target, settings, batches, folder / name, key, seed, accelerator, report)
            if settings.objectives_of(target)[0].repeats:
                _train_scorers(job, tokenizer)
            else:
                _train_option(job)
        options[name] = read_option(folder / name)
    if accelerator.is_main_process:
        write_record(folder, options)
    accelerator.wait_for_everyone()
    return options


def _finished(folder: Path, key: str) -> bool:
    """Whether an option is there, with its tensors."""
    record = read_sealed(folder / OPTION)
    return record is not None and record.get("key") == key and (folder / TENSORS).is_file()


@dataclass(frozen=True)
class _Job:
    """One target that is to be trained: for which model, on what, where its option is kept, and in which processes."""

    model: Any
    shape: ModelShape
    target: Target
    settings: PrepareSettings
    batches: WindowBatches
    folder: Path
    key: str
    seed: int
    accelerator: Accelerator
    progress: Progress

    @property
    def low(self) -> torch.dtype | None:
        """The dtype of the dense model's matrix products below that of its weights, if any."""
        return self.settings.low(input_device(self.model))

    def loop(self, advice: str) -> Settings:
        """How the loop trains; `advice` as of `loop.Settings`."""
        return self.settings.loop(f"{self.seed}/prepare", advice)

    def opened(self) -> tuple[Partial, Curve]:
        """The saved state and the losses of the training; their folder is there in all processes afterwards."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        return Partial(self.folder, self.key), Curve(self.folder / "loss.jsonl")


def _train_option(job: _Job) -> None:
    """Train one target, and write its option."""
    settings, batches, accelerator = job.settings, job.batches, job.accelerator
    losses = settings.objectives_of(job.target)
    mixers = _Mixers(job.model, job.shape, job.target, losses, job.low)
    partial, curve = job.opened()
    loop = job.loop("lower `prepare.rate`, or run the model in float32")
    with mixers.beside_attention():
        train(mixers, losses, batches, loop, partial, accelerator, curve=curve, progress=job.progress)
        errors = mixers.errors(batches, min(MEASURED, settings.step_count), accelerator)
    if accelerator.is_main_process:
        lines = curve.steps()
        record = Option(
            key=job.key,
            target=job.target.model_dump(mode="json"),
            objective=_named(losses[0]) if len(losses) == 1 else {"objectives": [_named(one) for one in losses]},
            steps=settings.step_count,
            tokens=settings.step_count * batches.size,
            first_loss=lines[0]["loss"],
            last_loss=lines[-1]["loss"],
            errors=errors,
            seconds=round(sum(line["seconds"] for line in lines), 2),
            sha256="",
            versions=versions("accelerate"),
        )
        write_option(job.folder, record, mixers.tensors())
        partial.remove()
    accelerator.wait_for_everyone()


def _train_scorers(job: _Job, tokenizer: Any) -> None:
    """Fit or train the scorers of one target, measure their thresholds, and write its option."""
    model, shape, settings, accelerator = job.model, job.shape, job.settings, job.accelerator
    objective: Any = settings.objectives_of(job.target)[0]
    kinds = _kinds(model, shape, job.target)
    scorers = Scorers(model, tokenizer, {layer: each.mixers[0] for layer, each in kinds.items()}, objective, job.low)
    pieces = Pieces(job.batches, objective.lengths_within(settings.length))
    kind, steps = scorers.kind, settings.step_count
    partial, curve = job.opened()
    started, parts = time.perf_counter(), kind.fitted + kind.stepped
    rounds = parts + (settings.again is not None and parts > 0)
    loop, later = job.loop("lower `prepare.rate`"), Partial(job.folder / "again", job.key)

    def report(part: int) -> Progress:
        return lambda done, total, what: job.progress(part * total + done, rounds * total, what)

    with scorers.repeating(), ExitStack() as undo:
        if kind.fitted and partial.read() is None:
            scorers.fit(pieces, steps, accelerator, report(0))
        if kind.stepped:
            train(scorers, [objective], pieces, loop, partial, accelerator, curve=curve, progress=report(parts - 1))
        if settings.again is not None:
            retention = scorers.measure(pieces, steps, shape.kv_heads, shape.layers).retention()
            layers = {layer: scorers.scorer(layer) for layer in kinds}
            undo.enter_context(scorers.reading(forgetful(model, shape, job.target, settings.again, retention, layers)))
            if kind.stepped:
                again = Curve(job.folder / "again.jsonl")
                train(scorers, [objective], pieces, loop, later, accelerator, curve=again, progress=report(parts))
            elif kind.fitted:
                scorers.fit(pieces, steps, accelerator, report(parts))
        if accelerator.is_main_process:
            measured = scorers.measure(pieces, steps, shape.kv_heads, shape.layers)
    if accelerator.is_main_process:
        constant, wrong = measured.losses()
        errors = measured.errors().tolist()
        record = Option(
            key=job.key,
            target=job.target.model_dump(mode="json"),
            objective=_named(objective),
            steps=steps if parts else 0,
            tokens=steps * job.batches.size if parts else 0,
            first_loss=constant,
            last_loss=wrong,
            errors=[row if native is None else None for row, native in zip(errors, shape.native_windows, strict=True)],
            seconds=round(time.perf_counter() - started, 2),
            sha256="",
            versions=versions("accelerate"),
        )
        write_option(job.folder, record, scorers.tensors(), measured.retention())
        for state in (partial, later):
            state.remove()
    accelerator.wait_for_everyone()


def _kinds(model: Any, shape: ModelShape, target: Target) -> dict[int, Kinds]:
    """What a target runs in every layer that may change, by its number."""
    planned = planned_model(model, uniform_plan(shape, target), untrained=True)
    layers = zip(attentions_of(planned), shape.native_windows, strict=True)
    return {number: attention.compress_kinds for number, (attention, native) in enumerate(layers) if native is None}


def _named(objective: Objective) -> dict[str, Any]:
    return {"name": objective.registered, **objective.model_dump(mode="json")}


class _Mixers(nn.Module):
    """The mixers of one target in all layers that may change, and the dense model, which is no part of the module.

    Parameters, and what a mixer accumulates, are float32; queries, keys and values are what the model computes in.

    Args:
        losses: what is minimised, which says what of a layer it asks for.
        low: the dtype of the dense model's matrix products below that of its weights, if any.

    Raises:
        UserError: the target's mixer has no parameters, or has not what the losses ask for.
    """

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        target: Target,
        losses: Sequence[Objective] = (),
        low: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._kinds = _kinds(model, shape, target)
        self.layers = nn.ModuleDict()
        for layer, kinds in self._kinds.items():
            assert kinds.only is not None
            self.layers[str(layer)] = kinds.only.float()
        if not any(mixer.learns and list(mixer.parameters()) for mixer in self.layers.values()):
            raise UserError(
                f"the target `{target.target}` has nothing to train",
                where="prepare.targets",
                expected="a target whose mixer has parameters",
                fix="leave it out; a target without parameters of its own can be searched as it is",
            )
        self._apart = any(objective.needs_parts for objective in losses)
        self._features = any(objective.needs_features for objective in losses)
        choices = [objective.needs_choice or objective.of_routers for objective in losses]
        self._chosen_alone = bool(choices) and all(choices)
        hybrid = all(mixer.branches is not None for mixer in self.layers.values())
        chosen = all(mixer.chooses for mixer in self.layers.values())
        for needed, has, words in (
            (self._apart, hybrid, "the parts of hybrid heads"),
            (self._features, hybrid, "the features of hybrid heads"),
            (any(choices), chosen, "the choices of routed heads"),
        ):
            if needed and not has:
                raise UserError(
                    f"the objective asks for {words}, which `{target.target}` does not have",
                    where="prepare.objectives",
                    expected="`transfer`",
                )
        self.requires_grad_(True)
        self._projections: dict[int, torch.Tensor] = {}  # what reads the outputs of heads
        if any(choices):
            reader = family_of(model.config).reader("query")
            rows = enumerate(layers_of(model))
            self._projections = {number: projections(layer, model.config)[reader].weight for number, layer in rows}
        self._low = low
        self._model, self.shape = (model,), shape  # in a tuple, so that its weights are none of this module's
        self._inputs: dict[int, tuple[torch.Tensor, Any]] = {}
        self._learn: Learn | None = None

    @property
    def module(self) -> _Mixers:
        """See `Trainee`."""
        return self

    @contextmanager
    def beside_attention(self) -> Iterator[None]:
        """Run the mixers beside the dense model's attention while it is open."""
        model = self._model[0]
        with ExitStack() as undo:
            undo.enter_context(replaced_attention(model, NAME, self._attend))
            for layer, attention in enumerate(attentions_of(model)):
                hook = attention.register_forward_pre_hook(self._keep_inputs(layer), with_kwargs=True)
                undo.callback(hook.remove)
            yield

    def run(self, module: Any, inputs: Inputs, learn: Learn) -> None:
        """See `Trainee.run`; `learn` is called for one layer after the other."""
        self._learn = learn
        try:
            kind = inputs["input_ids"].device.type
            with torch.no_grad(), torch.autocast(kind, self._low or torch.bfloat16, enabled=self._low is not None):
                self._model[0].base_model(**inputs, use_cache=False)
        finally:
            self._learn = None
            self._inputs.clear()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was trained, as an option keeps it."""
        return {name.removeprefix("layers."): weight.detach() for name, weight in self.named_parameters()}

    def errors(self, batches: WindowBatches, count: int, accelerator: Accelerator) -> list[list[float] | None]:
        """See `Option.errors`, on the first `count` batches."""
        shape = self.shape
        device = next(self.parameters()).device
        sums = torch.zeros(2, shape.layers, shape.kv_heads, dtype=torch.float64, device=device)

        def add(student: Any, teacher: Any) -> None:
            outputs, dense = student["outputs"].detach().float(), teacher["outputs"].float()
            for place, values in ((0, outputs - dense), (1, dense)):
                heads = values.square().sum((0, 1, 3), dtype=torch.float64)
                sums[place, student["layer"]] += heads.view(shape.kv_heads, -1).sum(1).to(device)

        self.eval()
        self._apart = self._chosen_alone = False  # the outputs alone
        for step in range(count):
            for part in batches.passes(step, accelerator.num_processes)[accelerator.process_index]:
                self.run(self, {name: value.to(device) for name, value in part.items()}, add)
        sums = accelerator.reduce(sums, "sum")
        errors = (sums[0] / sums[1].clamp(min=1e-12)).tolist()
        return [row if native is None else None for row, native in zip(errors, shape.native_windows, strict=True)]

    def _keep_inputs(self, layer: int) -> Callable[..., None]:
        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self._inputs[layer] = hidden, kwargs.get("position_embeddings")

        return keep

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        hidden, rotary = self._inputs.pop(call.layer, (None, None))
        if self._learn is None or str(call.layer) not in self.layers:
            return call.dense()
        mixer: Any = self.layers[str(call.layer)]
        batch, _, columns, _ = call.query.shape
        with torch.autocast(call.query.device.type, enabled=False):
            dtype = call.value.dtype  # as in a planned model, whatever autocast and RoPE made of the others
            query, key, value = call.query.to(dtype), call.key.to(dtype), call.value
            step = Step.begin(None, None, batch, columns, query.device)
            step.input_length, step.record = columns, Record()
            if mixer.needs_inputs:
                step.hidden, step.rotary = hidden, rotary
            if call.scores is not None:
                self._kinds[call.layer].check_scores()
                step.scores = call.scores
            teacher = self._teacher(query, key, value, call)
            with torch.set_grad_enabled(self.training):
                student: dict[str, Any] = {"layer": call.layer, "record": step.record}
                options = {"scale": call.scaling, "dropout": 0.0}
                if self._apart:
                    student["parts"] = mixer.parts(query, key, value, None, step, **options)
                    if self._features:
                        student["features"] = mixer.features(query, key, step, scale=call.scaling)
                elif self._chosen_alone:
                    mixer.choose(query, step)  # the record has it
                else:
                    student["outputs"] = mixer.prefill(query, key, value, None, step, **options)
                self._learn(student, teacher)
        return teacher["outputs"].transpose(1, 2)

    def _teacher(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
    ) -> dict[str, Any]:
        """What the layer's own attention gives: outputs `[B, T, H, D]`, and what objectives of parts ask for beside."""
        if not self._apart:
            outputs = causal_attention(query, key, value, call.scaling, call.window, call.scores)
            return {"outputs": outputs.transpose(1, 2), "projection": self._projections.get(call.layer)}
        prefill = choose_impl("auto", query).prefill
        everything = (Span(),) * key.shape[1]
        outputs, lse = prefill(query, key, value, everything, scale=call.scaling, scores=call.scores, keep_lse=True)
        size = value.float().square().mean((2, 3)).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        beside = {"query": query, "key": key, "scaling": call.scaling}
        return {"outputs": outputs.transpose(1, 2), "lse": lse, "size": size, **beside}
