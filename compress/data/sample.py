"""One input of a model with a loss over its outputs: what is profiled, searched and refined on. Text today."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.repeats import pairs, repeats, spread
from compress.files import key_of

if TYPE_CHECKING:
    import torch


class Sample(ABC):
    """What all samples have in common; positions are those of the model's own sequence (tokens, patches).

    Attributes:
        noun, unit: what a sample and a position are called in messages.
        evidence: half-open ranges of positions that the right outputs have to be read from; may be empty.
        task: name of the task that made it.
    """

    noun: ClassVar[str]
    unit: ClassVar[str]
    evidence: tuple[tuple[int, int], ...]
    task: str

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of positions."""

    @property
    @abstractmethod
    def rows(self) -> tuple[int, int]:
        """Half-open range of the positions whose outputs the loss is taken on."""

    @property
    @abstractmethod
    def facts(self) -> list[Any]:
        """JSON values that say what the input is and what the loss is taken on."""

    @property
    def key(self) -> str:
        """A hash that identifies the input and its loss."""
        return key_of(*self.facts)

    @abstractmethod
    def body(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the model without its head, for a batch of this sample alone."""

    @abstractmethod
    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the model, for a batch of this sample alone."""

    @abstractmethod
    def logits(self, output: Any) -> torch.Tensor:
        """`[rows, classes]`: of the model's output for `inputs`, what the loss is taken on."""

    @abstractmethod
    def targets(self, device: torch.device) -> torch.Tensor:
        """`[rows]`: the right class of each row of `logits`."""

    @classmethod
    @abstractmethod
    def together(cls, samples: Sequence[Any], device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the model for a batch of samples of one length; `logits_of` reads its output."""

    @classmethod
    @abstractmethod
    def logits_of(cls, samples: Sequence[Any], output: Any) -> list[torch.Tensor]:
        """`logits` of each sample of a batch."""

    def pairs(self) -> Mapping[tuple[int, int], int]:
        """How often each pair of neighbouring tokens is in it; of what is no text nothing."""
        return {}

    def repeats(self, elsewhere: Mapping[tuple[int, int], int], most: int) -> Sample | None:
        """The same input with the loss on what can be looked up in it (`data.repeats`); of what is no text, itself.

        Args:
            elsewhere: pairs of other samples.

        Returns:
            None where nothing can be looked up.
        """
        return self

    def loss(self, output: Any) -> tuple[torch.Tensor, int]:
        """Cross-entropy in nats over the rows of a model's output, summed, and the number of rows."""
        from torch.nn import functional

        logits = self.logits(output)
        return functional.cross_entropy(logits.float(), self.targets(logits.device), reduction="sum"), len(logits)


@dataclass(frozen=True)
class TextSample(Sample):
    """Tokens with an answer at the end, which the loss is taken on.

    Attributes:
        tokens: token ids of prompt and answer together.
        answer: half-open token range [start, end) of the answer.
        expected: the right answer as text, None where there is none (plain continuation).
        depth: where the evidence lies, 0 at the start to 1 just before the question; None without evidence.
    """

    noun: ClassVar[str] = "document"
    unit: ClassVar[str] = "tokens"

    tokens: tuple[int, ...]
    answer: tuple[int, int]
    evidence: tuple[tuple[int, int], ...] = ()
    task: str = "text"
    expected: str | None = None
    depth: float | None = None

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def rows(self) -> tuple[int, int]:
        """The positions that predict the answer, each one before its token."""
        return self.answer[0] - 1, self.answer[1] - 1

    @property
    def facts(self) -> list[Any]:
        return [self.tokens, self.answer]

    def body(self, device: torch.device) -> dict[str, Any]:
        import torch

        return {"input_ids": torch.tensor([self.tokens], device=device), "use_cache": False}

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """All tokens, and logits for the rows that predict the answer only.

        The rows are plain numbers: the last hidden states, which they choose from, may be on another device than the
        tokens, and accelerate would bring a tensor to that of the tokens.
        """
        return self.body(device) | {"logits_to_keep": list(range(*self.rows))}

    def logits(self, output: Any) -> torch.Tensor:
        logits: torch.Tensor = output.logits[0]
        return logits

    def targets(self, device: torch.device) -> torch.Tensor:
        import torch

        return torch.tensor(self.tokens[self.answer[0] : self.answer[1]], device=device)

    def pairs(self) -> Mapping[tuple[int, int], int]:
        return pairs(self.tokens)

    def repeats(self, elsewhere: Mapping[tuple[int, int], int], most: int) -> Sample | None:
        places = spread(repeats(self.tokens, elsewhere, most))
        return Repeats(self.tokens, self.answer, places=places) if places else None

    @classmethod
    def together(cls, samples: Sequence[TextSample], device: torch.device) -> dict[str, Any]:
        """All tokens, and logits from the first row that predicts an answer on."""
        import torch

        tokens = torch.tensor([sample.tokens for sample in samples], device=device)
        keep = samples[0].length - min(sample.rows[0] for sample in samples)
        return {"input_ids": tokens, "logits_to_keep": keep, "use_cache": False}

    @classmethod
    def logits_of(cls, samples: Sequence[TextSample], output: Any) -> list[torch.Tensor]:
        length = samples[0].length
        return [output.logits[i, sample.rows[0] - length : sample.rows[1] - length] for i, sample in enumerate(samples)]


@dataclass(frozen=True)
class Repeats(TextSample):
    """A text with the loss on some of its tokens, wherever they stand; it is run alone.

    Attributes:
        places: positions of these tokens, all above 0.
    """

    places: tuple[int, ...] = ()

    @property
    def facts(self) -> list[Any]:
        return [self.tokens, self.places]

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """All tokens, and logits for the rows before those tokens, as plain numbers."""
        return self.body(device) | {"logits_to_keep": [place - 1 for place in self.places]}

    def targets(self, device: torch.device) -> torch.Tensor:
        import torch

        return torch.tensor([self.tokens[place] for place in self.places], device=device)
