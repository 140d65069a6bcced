"""How far decoding drifts: a state that takes in token after token, against the same sums in float64.

Sums in a short format stop growing: a bfloat16 normaliser of Hedgehog features is 44% low after 2,048 tokens, and the
outputs are 79% wrong. A state is float32 for that reason; this shows if that is enough on the model's own features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from compress.bench.file import MOST_TOKENS
from compress.errors import NotFiniteError
from compress.evaluate.cell import Cell
from compress.evaluate.measure import Inputs, Job, Result, Setting, Step, Subject
from compress.evaluate.text_measure import TextMeasure
from compress.files import text_key
from compress.limits import LONGEST
from compress.models.branches import QKV, Branched, beside, branched
from compress.models.placement import input_device
from compress.plan import ModelShape
from compress.registry import measures
from compress.runtime.reference import Rows
from compress.runtime.span import PAGE
from compress.runtime.step import Step as Pass


class DriftResult(Result):
    """Relative errors by layer, each the largest of all heads and pages; none for a model without states."""

    measure: Literal["drift"] = "drift"
    length: int = Field(ge=1, le=MOST_TOKENS)
    layers: dict[int, float] = Field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """The largest of all layers, and every layer's."""
        if not self.layers:
            return []
        whole = Cell(
            "decode drift",
            "relative error",
            max(self.layers.values()),
            "lower",
            length=self.length,
            table="summary",
            note=self.words(),
        )
        each = [
            Cell("decode drift", "relative error", value, "lower", length=self.length, place=(layer, None))
            for layer, value in sorted(self.layers.items())
        ]
        return [whole, *each]

    def words(self) -> str:
        """What the error is of."""
        return (
            f"decode drift: largest relative error of what a head reads from its float32 state in {self.length:,} "
            "decoded tokens, against float64"
        )


@measures.register("drift")
class Drift(TextMeasure):
    """Error that states gather in decoding a long text, against float64, layer by layer."""

    result: ClassVar[type[Result]] = DriftResult
    one_tokenizer: ClassVar[bool] = True

    length: int = Field(8192, ge=2 * PAGE, le=LONGEST, description="tokens that are decoded")

    def words(self) -> str:
        return f"drift over {self.length:,} tokens"

    def inputs(self, shape: ModelShape | None = None) -> list[Inputs]:
        """The pass, and the states of its layers twice more: at once in float64, and page by page with a step each."""
        return [Inputs(self.length, 3, self.length // (3 * PAGE), by_dense=False)]

    def passes(self) -> str:
        return "drift: 1 forward, and decoding of single layers"

    def jobs(self, setting: Setting) -> list[Job]:
        ids = self.read(setting)[: self.length]
        facts = ["drift", self.length, text_key(str(list(ids)))]
        return [Job("drift", facts, 1, partial(self._measured, ids))]

    @torch.inference_mode()
    def _measured(self, ids: Sequence[int], subject: Subject, step: Step) -> Result:
        model = subject.model
        layers: dict[int, float] = {}
        device = input_device(model)

        def look(place: Branched, qkv: QKV, step: Pass, options: dict[str, Any]) -> None:
            found = drift(place.mixer, *qkv, step, options["scale"])
            layers[place.layer] = max(found, layers.get(place.layer, 0.0))

        with beside(model, look):
            if branched(model):
                model.get_decoder()(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
        return DriftResult(length=self.length, layers=layers)


@torch.inference_mode()
def drift(
    mixer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Pass, scale: float | None
) -> float:
    """Largest relative error of what the heads of a mixer read from their states while tokens are decoded.

    The first token of every page is decoded, which takes in a page that leaves the window, and the rest of a page
    follows at once: the states are those of decoding every token, at a thirtieth of the calls. All is in float32 but
    for what it is compared with, one pass in float64 over the same queries, keys and values.

    Args:
        query: `[1, H, N, D]`; key, value: `[1, G, N, D]`.
        step: of the pass that they are from, without padding or cache.

    Raises:
        NotFiniteError: what is read is not finite.
    """
    exact, single = _copy(mixer).double(), _copy(mixer).float()
    exact.branches = single.branches = "linear"
    options: dict[str, Any] = {"scale": scale, "dropout": 0.0}
    count = query.shape[2]
    whole = pass_of(step, 0, count, torch.float64)
    right = exact.prefill(query.double(), key.double(), value.double(), None, whole, **options)[0]  # [N, H, V]
    query, key, value = query.float(), key.float(), value.float()
    state = single.state(None)
    state.begin(key, value)
    worst = 0.0
    for start in range(0, count, PAGE):
        part = slice(start, start + 1)
        one = pass_of(step, start, 1, torch.float32)
        read = single.decode(query[:, :, part], key[:, :, part], value[:, :, part], state, one, scale=scale)[0, 0]
        size = right[start].norm(dim=-1)  # [H]
        errors = (read.double() - right[start]).norm(dim=-1) / size
        worst = max(worst, _largest(errors[size > 0]))
        rest = slice(start + 1, min(start + PAGE, count))
        if rest.stop > rest.start:
            others = pass_of(step, rest.start, rest.stop - rest.start, torch.float32)
            single.prefill(query[:, :, rest], key[:, :, rest], value[:, :, rest], state, others, **options)
    return worst


def _copy(mixer: Any) -> Any:
    """A mixer of its own weights; not its facts, which know the whole model and would take it along."""
    return copy.deepcopy(mixer, {id(mixer.facts): mixer.facts})


def _largest(errors: torch.Tensor) -> float:
    """The largest of some errors, 0 of none."""
    if not errors.numel():
        return 0.0
    if not bool(torch.isfinite(errors).all()):
        raise NotFiniteError("what the heads read from their states is not finite")
    return float(errors.max())


def pass_of(step: Pass, start: int, count: int, dtype: torch.dtype) -> Pass:
    """The step of `count` of a pass's columns from `start` on, behind those before them; one column is decoded."""
    part = slice(start, start + count)
    impl = "reference" if dtype == torch.float64 else step.impl  # no kernel takes float64
    made = Pass(None, None, None, None, [count], count, impl=impl, scores=step.scores)
    if count > 1:
        made.rows = Rows((start,), (0,), (count,))
    else:
        made.lengths = torch.tensor([start + 1], dtype=torch.int32)
    if step.hidden is not None:
        made.hidden = step.hidden[:, part].to(dtype)
    if step.rotary is not None:
        cos, sin = (table[:, part].to(dtype) for table in step.rotary)
        made.rotary = cos, sin
    return made
