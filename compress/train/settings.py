"""What a recipe says under `prepare:` and `recover:`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from compress import registry
from compress.data.text import TextSource
from compress.limits import BATCH, DOCUMENTS, ENTRIES, FACTOR, LONGEST, PROCESSES, SEQUENCES, STEPS
from compress.models.context.layout import Layout
from compress.registry import Method
from compress.targets.layer_option import LayerOption
from compress.targets.target import Target
from compress.train.loop import Settings
from compress.train.objectives.distill import Distill
from compress.train.objectives.kept import Kept
from compress.train.objectives.objective import Objective
from compress.train.objectives.routing import Balance, RouterZ
from compress.train.objectives.text import Text
from compress.train.schedule import Schedule

Temperature = Annotated[float, Field(ge=1e-3, le=100)]


def _once(named: Sequence[Objective]) -> None:
    if len({objective.registered for objective in named}) < len(named):
        raise ValueError("expected each objective once")


class TrainSettings(Method):
    """What every training has: how much text, in which batches, and how fast it learns."""

    outside: ClassVar[frozenset[str]] = frozenset({"save_every"})  # fields that what is trained does not depend on
    # Fields that a training without them did not have yet, and what they are then: its key stays what it was.
    newer: ClassVar[dict[str, Any]] = {}

    length: int = Field(512, ge=2, le=LONGEST, description="tokens in a sequence")
    batch_size: int = Field(16, ge=1, le=BATCH, description="sequences in an optimiser step, over all processes")
    micro_batch: int | None = Field(
        None,
        ge=1,
        le=BATCH,
        description="sequences that a process passes through the model at once; null takes all that it has; fewer need "
        "less memory",
    )
    steps: int | None = Field(None, ge=1, le=STEPS, description="optimiser steps; this or `tokens`")
    tokens: int | None = Field(None, ge=1, description="tokens to train on, rounded up to whole steps")
    rate: float = Field(1e-3, gt=0, le=FACTOR, description="highest learning rate of AdamW")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate rises; then cosine")
    weight_decay: float = Field(0.0, ge=0, le=FACTOR, description="weight decay of AdamW")
    clip: float = Field(1.0, gt=0, le=FACTOR, description="largest norm of the gradient")
    text: TextSource | None = Field(
        None, description="text to train on, its calibration part; null takes the recipe's calibration text"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of matrix products; auto is bfloat16 on a GPU that has it; trained weights are float32",
    )
    save_every: int = Field(
        50, ge=1, le=STEPS, description="steps between saved states, from which an interrupted training resumes"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("expected either `steps` or `tokens`")
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(f"expected `micro_batch` to be at most `batch_size`, which is {self.batch_size}")
        if self.step_count > STEPS or self.step_count * self.batch_size > SEQUENCES:
            raise ValueError(
                f"expected at most {STEPS:,} steps and {SEQUENCES:,} sequences, got {self.step_count:,} steps of "
                f"{self.batch_size:,} sequences"
            )
        return self

    @property
    def step_count(self) -> int:
        """Optimiser steps."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.tokens or 0) / (self.batch_size * self.length))

    @property
    def second(self) -> Any:
        """A text source from which every other sequence comes; None where all come from one."""
        return None

    @property
    def text_tokens(self) -> int:
        """Tokens of text with which no sequence is trained on twice."""
        return self.step_count * self.batch_size * self.length

    def facts(self) -> dict[str, Any]:
        """All that the trained weights depend on, as plain values; newer fields only where they say something."""
        facts = self.model_dump(mode="json", exclude=set(self.outside))
        return {name: value for name, value in facts.items() if name not in self.newer or value != self.newer[name]}

    def low(self, device: torch.device) -> torch.dtype | None:
        """The dtype of matrix products below float32 on a device; None where all is float32."""
        if self.precision == "auto":
            return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
        return torch.bfloat16 if self.precision == "bfloat16" else None

    def loop(self, seed: str, advice: str, idle: str = "") -> Settings:
        """The same as the loop takes it; arguments as of `loop.Settings`."""
        return Settings(
            seed=seed,
            schedule=Schedule.cosine(self.rate, self.step_count, self.warmup),
            weight_decay=self.weight_decay,
            clip=self.clip,
            save_every=self.save_every,
            advice=advice,
            idle=idle,
        )


class RecoverSettings(TrainSettings):
    """Training of the compressed model. The defaults are those of AMP (arXiv 2504.21174) and its code."""

    outside: ClassVar[frozenset[str]] = frozenset(
        {"save_every", "shard", "context", "checkpointing", "compile", "control", "window_control"}
    )
    newer: ClassVar[dict[str, Any]] = {
        "objectives": [],
        "mixer_rate": None,
        "window_dropout": [],
        "balance": 0.01,
        "router_z": 0.0,
        "fade": 0.0,
        "kept": 0.3,
        "keep_temperature": [0.5, 0.05],
        "keep_noise": True,
        "keep_hard": 0.25,
        "keep_documents": 16,
    }

    train: Literal["lora", "full", "mixers"] = Field(
        "lora",
        description="low-rank updates of the linear projections, merged at the end; all weights; or only what targets "
        "of the plan, and routers of experts, have of their own, which `lora` trains, too",
    )
    rank: int = Field(8, ge=1, le=65_536, description="rank of the updates (lora)")
    alpha: float = Field(16.0, gt=0, le=FACTOR, description="the updates are scaled by alpha / rank (lora)")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout before the updates (lora)")
    loss: Literal["text", "distill", "both"] = Field(
        "text", description="next-token cross entropy, KL(dense || trained) at every token, or the weighted sum of both"
    )
    temperature: float = Field(
        1.0, ge=0.01, le=100, description="of both distributions in the KL, which is scaled by its square"
    )
    distill_weight: float = Field(0.5, ge=0, le=1, description="weight of the KL in `both`; the text has the rest")
    objectives: tuple[Annotated[Objective, registry.objectives], ...] = Field(
        (),
        max_length=ENTRIES,
        description="losses in place of `loss`, each with its weight: `[{name: text}, {name: distill, weight: 2}]`",
    )
    balance: float = Field(
        0.01,
        ge=0,
        le=FACTOR,
        description="weight of the load balance of routed heads, where the plan has any (objective `balance`, which "
        "`objectives` may name with other settings)",
    )
    router_z: float = Field(
        0.0, ge=0, le=FACTOR, description="weight of the squared log-sum-exp of their routers' logits, likewise"
    )
    fade: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the steps, the first ones, in which routed heads that a token does not use are not off "
        "yet: what multiplies them falls evenly from 1 to 0",
    )
    kept: float = Field(
        0.3,
        ge=0,
        le=FACTOR,
        description="weight of the loss that holds what `retain` heads keep at what the plan expects, where it has any "
        "(objective `kept`, which `objectives` may name with other settings)",
    )
    keep_temperature: tuple[Temperature, Temperature] = Field(
        (0.5, 0.05),
        description="of the decisions of `retain` heads, in the unit of their scores: at the first and at the last "
        "step in which tokens are kept softly; between them it falls by the same factor in every step",
    )
    keep_noise: bool = Field(True, description="draw soft decisions (Gumbel-sigmoid); false takes them as they are")
    keep_hard: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of the steps, the last ones, in which `retain` heads keep tokens by the rule itself, caps "
        "included; scorers then learn straight through, and the model learns what it will do",
    )
    keep_documents: int = Field(
        16,
        ge=2,  # one sequence has no spread
        le=DOCUMENTS,
        description="sequences of the text on which thresholds and shares of `retain` heads are measured again at the "
        "end",
    )
    rate: float = Field(3e-4, gt=0, le=FACTOR, description="highest learning rate of AdamW")
    mixer_rate: float | None = Field(
        None,
        ge=0,
        le=FACTOR,
        description="highest learning rate of what targets of the plan have of their own; null takes `rate`, 0 leaves "
        "it as it is",
    )
    window_dropout: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (),
        max_length=ENTRIES,
        description="how often a layer's linear heads are trained without their window, so that the state has to do "
        "its work: shares of the passes, each for an equal part of the training, for instance `[0.2, 0.1, 0]`",
    )
    checkpointing: bool | None = Field(
        None,
        description="recompute layers in the backward pass; null does so if memory is short, and where processes share "
        "sequences",
    )
    compile: bool | None = Field(
        None,
        description="compile the decoder layers for the training (`torch.compile`); null does so on a GPU where the "
        "training is long enough to gain by it",
    )
    shard: bool = Field(
        False, description="spread the weights over the GPUs (FSDP2); otherwise every GPU holds all of them"
    )
    context: int = Field(
        1,
        ge=1,
        le=PROCESSES,
        description="processes that share each sequence, for sequences that one GPU cannot hold: each has two parts of "
        "it, and gets of the others what its heads need; `length` divides into 2 x `context` parts of whole pages of "
        "64 tokens",
    )
    control: bool = Field(
        False,
        description="also train the dense model on the same batches, as a comparison; on the text where all losses are "
        "distances to the dense model, which has none to itself",
    )
    window_control: bool = Field(
        False,
        description="also train the plan without the states of its linear heads on the same batches, as a comparison: "
        "what their windows are worth by themselves",
    )

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        _once(self.objectives)
        if self.context > 1 and self.length % (multiple := Layout.multiple(self.context)):
            raise ValueError(
                f"expected `length` to be a multiple of {multiple} where {self.context} processes share a sequence "
                f"(`context`), got {self.length}"
            )
        for objective in self.objectives:
            if self.context > 1 and not objective.of_logits:
                raise ValueError(
                    f"`{objective.registered}` is a loss over all tokens of a sequence at once, which processes that "
                    "share it (`context`) do not have"
                )
            if objective.of_layer:
                raise ValueError(f"`{objective.registered}` is a loss of single layers, which `prepare` takes")
        if self.keep_temperature[0] < self.keep_temperature[1]:
            raise ValueError(
                f"expected `keep_temperature` to fall, got {self.keep_temperature[0]:g} first and "
                f"{self.keep_temperature[1]:g} at the end"
            )
        if self.control and self.train == "mixers":
            raise ValueError("the dense model has no mixers to train, so `train: mixers` has no `control`")
        if self.window_control and (self.train == "mixers" or any(self.window_dropout)):
            raise ValueError(
                "windows by themselves have no mixers to train, and cannot be left out: no `window_control`"
            )
        return self

    @property
    def soft_steps(self) -> int:
        """The first steps, in which `retain` heads keep tokens softly; none where their scorers are not trained."""
        return 0 if self.mixer_rate == 0 else self.step_count - math.ceil(self.keep_hard * self.step_count)

    @property
    def decisions(self) -> str:
        """How `retain` heads keep tokens meanwhile, in words."""
        first, last = self.keep_temperature
        soft = f"softly in {self.soft_steps:,} steps, temperature {first:g} to {last:g}, then "
        return f"tokens kept {soft if self.soft_steps else ''}by the rule"

    @property
    def controls(self) -> list[str]:
        """What is trained beside the plan, as a comparison: the dense model, and the plan without its states."""
        return ["control"] * self.control + ["windows"] * self.window_control

    @property
    def of_control(self) -> Self:
        """The same for the dense model as a comparison, without what is of a plan's targets.

        Its distance to itself is zero and moves nothing. Where nothing else is minimised it is trained on the text, so
        that it shows what these tokens bring.
        """
        own = tuple(loss for loss in self.losses if not loss.of_mixers)
        if all(loss.needs_teacher or loss.of_record or not loss.weight for loss in own):
            return self.model_copy(update={"loss": "text", "objectives": ()})
        return self if own == self.losses else self.model_copy(update={"objectives": own})

    def losses_of(self, *, routed: bool = False, keeps: bool = False) -> tuple[Objective, ...]:
        """What is minimised, and what is only recorded beside it (weight 0).

        Args:
            routed: whether the model that is trained has routers, whose losses every other model goes without.
            keeps: likewise, whether it has heads that keep tokens.
        """
        asked = [
            objective
            for objective in self.losses
            if not objective.of_record or (objective.of_routers and routed) or (objective.of_keeping and keeps)
        ]
        named = {objective.registered for objective in self.losses}
        beside: list[Objective] = [Balance(weight=self.balance), RouterZ(weight=self.router_z)] if routed else []
        beside += [self.kept_loss] if keeps else []
        return (*asked, *(objective for objective in beside if objective.registered not in named))

    @property
    def kept_loss(self) -> Any:
        """What holds the share that is kept (`Kept`): the one that `objectives` names, or that of `kept`."""
        named = [objective for objective in self.objectives if objective.of_keeping]
        return named[0] if named else Kept(weight=self.kept)

    @property
    def losses(self) -> tuple[Objective, ...]:
        """The same, as the recipe names them."""
        if self.objectives:
            return self.objectives
        kl = {"text": 0.0, "distill": 1.0, "both": self.distill_weight}[self.loss]
        text = Text(weight=1 - kl)
        return (text,) if self.loss == "text" else (text, Distill(weight=kl, temperature=self.temperature))


class PrepareSettings(TrainSettings):
    """Training of what targets have of their own, before the search, on the dense model's activations."""

    newer: ClassVar[dict[str, Any]] = {"objectives": [], "precision": "auto", "beside": None, "again": None}
    outside: ClassVar[frozenset[str]] = TrainSettings.outside | {"effect", "layers", "options"}

    targets: tuple[Annotated[Target, registry.targets], ...] = Field(
        min_length=1, max_length=ENTRIES, description="what to train, for every head group that may become it"
    )
    rate: float = Field(0.01, gt=0, le=FACTOR, description="highest learning rate of AdamW")
    objectives: tuple[Annotated[Objective, registry.objectives], ...] = Field(
        (),
        max_length=ENTRIES,
        description="losses of a layer in place of the targets' own, each with its weight: `[{name: weights}]`",
    )

    beside: TextSource | None = Field(
        None,
        description="a second text, from which half of the sequences come, its calibration part; for instance "
        "`{source: generated}` beside prose, so that what is learnt is not the topics of one text",
    )

    again: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="one more round for scorers, on the states of the model whose heads all keep this share of the "
        "tokens by them: what a layer sees changes once layers before it forget; null is without",
    )

    @property
    def second(self) -> Any:
        """See `TrainSettings.second`."""
        return self.beside

    @field_validator("objectives")
    @classmethod
    def _of_layers(cls, named: tuple[Objective, ...]) -> tuple[Objective, ...]:
        _once(named)
        for objective in named:
            if not (objective.of_layer or objective.of_routers):
                known = ", ".join(
                    f"`{name}`" for name, kind in registry.objectives.items() if kind.of_layer or kind.of_routers
                )
                raise ValueError(f"`{objective.registered}` is no loss of a layer; expected one of {known}")
        return named

    def objectives_of(self, target: Target) -> tuple[Objective, ...]:
        """What is minimised for a target."""
        return self.objectives or (registry.objectives[str(target.objective)](),)

    effect: bool = Field(
        False,
        description="afterwards measure what each target, so trained, costs the loss to first order on the calibration "
        "documents, as the statistic `effect` does for others; needs a backward pass",
    )

    layers: tuple[Annotated[LayerOption, registry.layer_options], ...] = Field(
        (),
        max_length=ENTRIES,
        description="options of whole layers that are priced with them, whose routers are those trained here, for "
        "instance `{option: routed, router: two_stage, shared: 1, active: 1}`; for `effect: true`",
    )
    options: dict[str, dict[str, Any] | None] = Field(
        {},
        description="likewise all options of a grid, by the name of the target, as of the statistic `effect`",
    )

    @model_validator(mode="after")
    def _suited(self) -> Self:
        repeated = [objective.repeats for objective in self.objectives]
        if any(repeated) and len(repeated) > 1:
            raise ValueError("a loss of scorers stands alone in `objectives`")
        for target in self.targets if repeated else ():
            if registry.objectives[str(target.objective)].repeats != repeated[0]:
                raise ValueError(f"`{self.objectives[0].registered}` trains nothing of `{target.target}`")
        if self.again is not None:
            for target in self.targets:
                if target.objective is None or not registry.objectives[target.objective].repeats:
                    raise ValueError(f"`again` is a round for scorers, and `{target.target}` has none")
        return self

    def pricing(self) -> Any:
        """The statistic that measures what the targets, so trained, and what is named with them cost the loss."""
        return registry.statistics["effect"](targets=self.targets, layers=self.layers, options=self.options)

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if (self.layers or self.options) and not self.effect:
            raise ValueError("`layers` and `options` are priced, so write `effect: true`, or leave them out")
        if self.options:  # refused as there, if they are none
            self.pricing()
        return self

    @property
    def measured(self) -> dict[str, str]:
        """What a solver may read of it, with its form, as of a statistic (`gives`)."""
        return {"error": "prepared"} | (self.pricing().gives if self.effect else {})

    @field_validator("targets")
    @classmethod
    def _trainable(cls, named: tuple[Target, ...]) -> tuple[Target, ...]:
        if len(set(named)) < len(named):
            raise ValueError("expected each target once")
        for target in named:
            if not target.learns:
                raise ValueError(f"`{target.target}` has nothing to train ({target.words()}); it is searched as it is")
        return named
