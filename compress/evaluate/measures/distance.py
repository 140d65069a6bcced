"""Recall inside a window and beyond it: pass keys, and associations of words, by the distance of what is recalled.

What a window of keys has is told apart from what a model recalls without: a table of recall by depth mixes the two.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from compress.bench.file import MOST_TOKENS
from compress.data.associations import Associations, associations, words_of
from compress.data.passkey import PassKey
from compress.data.prompt import Prompt
from compress.errors import NotFiniteError, UserError
from compress.evaluate.cell import Cell, by_part
from compress.evaluate.logits import logits_in_slices
from compress.evaluate.measure import Inputs, Job, Measure, Reading, Result, Setting, Step, Subject
from compress.evaluate.measures.recall import WRITTEN, recall
from compress.evaluate.paired import wilson
from compress.files import text_key
from compress.limits import DOCUMENTS, ENTRIES, LONGEST
from compress.models.placement import input_device
from compress.plan import ModelShape
from compress.registry import measures
from compress.runtime.span import PAGE


class Recalled(BaseModel):
    """One thing that was asked for.

    Attributes:
        near: tokens from the answer's last query back to the first token of the evidence, both counted: a window of as
            many keys sees all of it.
        far: tokens from the answer's first query back to the last token of the evidence: a window of as many keys sees
            nothing of it.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    near: int = Field(ge=0)
    far: int = Field(ge=0)
    correct: bool


class DistanceResult(Result):
    """Recall of one kind at one length, by distance.

    Attributes:
        window: tokens that count as near.
    """

    measure: Literal["distance"] = "distance"
    task: str
    length: int = Field(ge=1, le=MOST_TOKENS)
    window: int = Field(ge=1)
    items: list[Recalled] = Field(min_length=1)

    def cells(self) -> list[Cell]:
        """What lies inside the window, what lies beyond it and a page, and the latter by distance."""
        inside = [item for item in self.items if item.near <= self.window]
        beyond = [item for item in self.items if item.far >= self.window + PAGE]
        cells = [self._cell(f"{self.task} inside {self.window}", inside)] if inside else []
        if beyond:
            whole = self._cell(f"{self.task} beyond {self.window}", beyond)
            edges = [float(self.window + PAGE)]
            while edges[-1] < self.length:
                edges.append(min(4 * edges[-1], float(self.length)))
            placed = [(float(item.far), float(item.correct)) for item in beyond]
            cells += [whole, *by_part(whole, "gap", placed, edges)]
        return cells

    def _cell(self, label: str, items: Sequence[Recalled]) -> Cell:
        right = sum(item.correct for item in items)
        return Cell(
            label,
            "right answers",
            right / len(items),
            "higher",
            length=self.length,
            interval=wilson(right, len(items)),
            interval_kind="Wilson's 95% interval",
            count=len(items),
            items=tuple(float(item.correct) for item in items),
            table="summary",
            note=f"{len(items)} answers",
        )

    def words(self) -> str:
        """What inside and beyond mean, and how many answers there are."""
        counts = ", ".join(f"{cell.count} {cell.label.split()[-2]}" for cell in self.cells() if cell.part is None)
        return (
            f"{self.task} at {self.length:,}: {counts}; inside: all of the evidence lies within {self.window} tokens "
            f"of the answer, beyond: all of it at least {self.window + PAGE} tokens before; Wilson's 95% interval"
        )


@dataclass(frozen=True)
class _Asked:
    """A prompt of a pass key with its distances."""

    task: PassKey
    prompts: list[Prompt]


@measures.register("distance")
class Distance(Measure):
    """Recall of pass keys and of associated words, inside a window and beyond it.

    Pass keys are asked for by generation; words by one prefill, at the second mention of each key (`associations.py`).
    """

    result: ClassVar[type[Result]] = DistanceResult
    one_tokenizer: ClassVar[bool] = True

    lengths: tuple[Annotated[int, Field(ge=1, le=LONGEST)], ...] = Field(
        (2048,), min_length=1, max_length=ENTRIES, strict=False, description="tokens of the inputs"
    )
    window: int = Field(
        64,
        ge=1,
        le=LONGEST,
        description="tokens before the answer that count as near: the window of the plan; a page of 64 more is neither",
    )
    count: int = Field(50, ge=1, le=DOCUMENTS, description="pass keys inside and beyond the window each")
    texts: int = Field(8, ge=0, le=DOCUMENTS, description="texts with associated words; 0 leaves them out")
    pairs: int = Field(32, ge=1, le=DOCUMENTS, description="associations in a text")

    @property
    def input_lengths(self) -> tuple[int, ...]:
        return self.lengths

    def words(self) -> str:
        return "\n".join(
            f"distance: 2 x {self.count} pass keys, {self.texts} x {self.pairs} words at {length:,} tokens"
            for length in self.lengths
        )

    def inputs(self, shape: ModelShape | None = None) -> list[Inputs]:
        """Pass keys, and texts of words, at every length."""
        each = [(Inputs(length, 2 * self.count, WRITTEN), Inputs(length, self.texts)) for length in self.lengths]
        return [inputs for pair in each for inputs in pair]

    def passes(self) -> str:
        lengths = len(self.lengths)
        return f"{2 * self.count * lengths} generations, {self.texts * lengths} forward"

    def readings(self, seed: int) -> list[Reading]:
        """Haystacks of the pass keys, and the words of the tokenizer."""
        return [
            Reading(None, length, partial(self._check, seed, length), f".lengths[{number}]")
            for number, length in enumerate(self.lengths)
        ]

    def _check(self, seed: int, length: int, tokenizer: Any, tokens: Sequence[int], context: int | None) -> None:
        self._keys(seed, length, tokenizer, tokens, context)
        self._texts(seed, length, tokenizer)

    def jobs(self, setting: Setting) -> list[Job]:
        """For every length one job of pass keys and one of words, the same for all variants."""
        tokens = setting.tokens(setting.text, max(self.lengths))
        jobs = []
        for length in self.lengths:
            asked = self._keys(setting.seed, length, setting.reader.tokenizer, tokens, setting.context)
            prompts = [prompt for group in asked for prompt in group.prompts]
            for prompt in prompts:
                setting.check(prompt.tokens, "a prompt of the distances")
            facts = self._facts(
                "passkey", length, text_key(str([(prompt.tokens, prompt.budget) for prompt in prompts]))
            )
            run = partial(self._pass_keys, length, asked, setting.batch_size)
            jobs.append(Job(f"pass keys by distance {length}", [*facts, setting.batch_size], len(prompts), run))
            texts = self._texts(setting.seed, length, setting.reader.tokenizer)
            if texts:
                for text in texts:
                    setting.check(text.tokens, "a text of the distances")
                facts = self._facts("words", length, text_key(str([text.tokens for text in texts])))
                jobs.append(Job(f"words by distance {length}", facts, len(texts), partial(self._words, length, texts)))
        return jobs

    def _facts(self, kind: str, length: int, asked: str) -> list[Any]:
        return ["distance", kind, length, self.window, asked]

    def _keys(self, seed: int, length: int, tokenizer: Any, text: Sequence[int], context: int | None) -> list[_Asked]:
        """Pass keys just before the question, and pass keys that no window of the size reaches, evenly spread.

        Raises:
            UserError: a pass key and its question are longer than the window, or the length has no place beyond it.
        """

        def made(depth: tuple[float, float], count: int, name: str) -> _Asked:
            task = PassKey(length=length, count=count, depth=depth)
            return _Asked(task, task.make(tokenizer, text, f"{seed}/evaluation/{name}", context=context))

        closest = max(_distances(prompt)[0] for prompt in made((1.0, 1.0), self.count, "inside").prompts)
        hay = length - closest
        if closest > self.window or hay <= 0:
            raise UserError(
                "a pass key and its question do not fit into the window",
                where=f"distance.window, at {length} tokens",
                expected=f"at least {closest} tokens, and inputs of more than {2 * closest}",
                found=f"{self.window}",
            )
        # A page at the start stays in sight where a plan has tokens of a sink.
        first, last = (PAGE + 1) / hay, 1 - (self.window + PAGE) / hay
        if first >= last:
            raise UserError(
                "the inputs have no place beyond the window",
                where="distance.lengths",
                expected=f"more than {self.window + 2 * PAGE + closest} tokens",
                found=f"{length}",
            )
        nearest = max(0.0, 1 - (self.window - closest) / hay)
        return [made((nearest, 1.0), self.count, "inside"), made((first, last), self.count, "beyond")]

    def _texts(self, seed: int, length: int, tokenizer: Any) -> list[Associations]:
        if not self.texts:
            return []
        rng = random.Random(f"{seed}/evaluation/associations/{length}")
        return associations(tokenizer, words_of(tokenizer), length, self.pairs, self.texts, rng, before=PAGE)

    def _pass_keys(self, length: int, asked: Sequence[_Asked], batch_size: int, subject: Subject, step: Step) -> Result:
        items: list[Recalled] = []
        for group in asked:
            before = len(items)

            def progress(done: int, total: int, before: int = before) -> None:
                step(before + done, total)

            found = recall(
                subject.model, subject.sizer, group.task, group.prompts, batch_size=batch_size, progress=progress
            )
            for prompt, item in zip(group.prompts, found.items, strict=True):
                near, far = _distances(prompt)
                items.append(Recalled(near=near, far=far, correct=item.correct))
        return DistanceResult(task="pass key", length=length, window=self.window, items=items)

    @torch.inference_mode()
    def _words(self, length: int, texts: Sequence[Associations], subject: Subject, step: Step) -> Result:
        device = input_device(subject.model)
        items: list[Recalled] = []
        for number, text in enumerate(texts):
            ids = torch.tensor(text.tokens, device=device)
            written: dict[int, int] = {}
            asked = {query.position: query for query in text.queries}
            for part, logits in logits_in_slices(subject.model, ids, range(min(asked), max(asked) + 1)):
                if not bool(torch.isfinite(logits).all()):
                    raise NotFiniteError("the model's logits are not finite")
                written |= dict(zip(part, logits.argmax(dim=-1).tolist(), strict=True))
            for position, query in asked.items():
                right = written[position] == query.value
                items.append(Recalled(near=query.gap + 2, far=query.gap, correct=right))
            step(number + 1, len(texts))
        return DistanceResult(task="words", length=length, window=self.window, items=items)


def _distances(prompt: Prompt) -> tuple[int, int]:
    """`near` and `far` of a pass key, as in `Recalled`."""
    start, end = prompt.evidence[0]
    return prompt.length - start, len(prompt.tokens) - end
