"""What a kind of head group does in a layer: the base of all mixers and of what they keep, and their registry.

A mixer is the runtime of a target. A file of this folder registers it under the target's name in the plan; every layer
that has groups of that target gets one mixer for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from .ranks import Part
from .span import cached_table

if TYPE_CHECKING:
    from .scores import Scores
    from .step import Step

Branches = Literal["both", "window", "linear", "none"]


@dataclass(frozen=True)
class LayerFacts:
    """What a mixer may ask about its layer.

    Attributes:
        index: number of the layer in the model.
        head_dim: size of a query and a key.
        hidden_size: size of the layer's input.
        group_size: query heads of a head group.
        native_window: the sliding window in tokens that the architecture itself gives the layer; None without one.
        frequencies: gives the angles a token by which RoPE turns the first numbers of queries and keys (`rope.turns`);
            None where nobody knows.
    """

    index: int
    head_dim: int
    hidden_size: int
    group_size: int
    native_window: int | None
    frequencies: Callable[[], tuple[float, ...]] | None = field(default=None, compare=False)


class State:
    """What a mixer keeps of a batch of sequences from one pass to the next.

    Tensors in `tensors` have the sequence as their first axis; the methods here reorder, drop and count them as they
    stand. Padding is never a part of a state, so every sequence has a length of its own.

    Args:
        max_length: tokens a sequence to reserve for, so that a decode step needs nothing from the host and a CUDA graph
            can hold it: what changes then changes in place. None lets the state grow.

    Attributes:
        lengths: tokens of each sequence so far, as the host knows it.
        tensors: what is kept, by name, each `[B, ...]`. What accumulates over tokens is kept in float32.
        slack: last tokens of a sequence that can always be taken back by `crop`.
        one_way: why none can be, and what that would need; None where some can.
    """

    slack: int = 0
    one_way: ClassVar[str | None] = (
        "their state takes tokens in for good; that would need a copy of it as it was before each of the last ones"
    )

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self.reset()

    def reset(self) -> None:
        """Forget everything, and free the memory."""
        self.lengths: list[int] = []
        self.tensors: dict[str, torch.Tensor] = {}

    def begin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make room for the sequences whose first tokens are given, `[B, G, T, D]` with all groups of the layer.

        Their dtype is the cache's, and their device is where the state is to lie.
        """
        self.lengths = [0] * key.shape[0]

    def resolve(self, length: int) -> None:
        """Fix what depends on the length of the input in tokens, before the first of them is stored."""

    def advance(self, gains: Sequence[int]) -> None:
        """Count `gains` more tokens of each sequence."""
        self.lengths = [length + gain for length, gain in zip(self.lengths, gains, strict=True)]

    def hold(self, slack: int) -> None:
        """Keep from now on what taking back `slack` tokens needs; no less than before, and only without a `one_way`."""
        self.slack = slack

    @property
    def is_croppable(self) -> bool:
        """Whether the last token of a sequence can always be taken back."""
        return self.one_way is None and self.slack > 0

    def crop_refusal(self, counts: Sequence[int]) -> str | None:
        """Why `counts` last tokens of each sequence cannot be taken back; None where they can be."""
        return self.one_way

    def crop(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of each sequence, for which there is no `crop_refusal`."""
        self.lengths = [length - count for length, count in zip(self.lengths, counts, strict=True)]

    def assume(self, length: int) -> None:
        """Say that every sequence holds `length` tokens, as `PagedCache.assume` does."""
        self.lengths = [length] * len(self.lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Make the batch the given sequences, in this order; one that is named twice is copied."""
        self.lengths = [self.lengths[row] for row in rows]
        self.tensors = {
            name: tensor[torch.tensor(rows, dtype=torch.long, device=tensor.device)]
            for name, tensor in self.tensors.items()
        }

    def fill(self, row: int, single: State) -> None:
        """Copy the one sequence of a state of the same kind, also a reserved one, into place `row` of this batch."""
        for name, tensor in self.tensors.items():
            tensor[row] = single.tensors[name][0]

    def allocated_bytes(self) -> int:
        """Bytes of memory that the state takes."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def held_bytes(self) -> int:
        """Bytes of what is in use, which the plan predicts; the rest of `allocated_bytes` is free for more tokens."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())


class Mixer(nn.Module):
    """What the head groups of one kind do in one layer, in prefill and in decoding.

    A subclass has `@register("name of the target")`. Its parameters are those of the target: they are in the model's
    state dict as `...self_attn.mixers.<name>.<parameter>`, are saved with the checkpoint, and may be trained.
    Where a target converts them from the dense weights, their first axis is the mixer's groups.

    Outputs may depend on the token and those before it alone, so that prefill in one pass, in chunks and token by token
    give the same; columns that are no token (`Step.positions` is -1) may hold anything and take part in nothing.

    Args:
        groups: the plan's entries of the groups that this mixer runs, `{"target": name, ...}`.
        facts: about the layer.

    Attributes:
        targets: names that the plan knows it by.
        needs_inputs: whether it reads `Step.hidden` and `Step.rotary`.
        heads: the query heads of the layer that it runs.
        knows_scores: whether it does what `Step.scores` says; a layer that has any refuses mixers that do not.
        chooses: whether every token chooses what it uses of it, by a method `choose` (`mixer_routed.py`), and
            `Record.routing` has the choices.
        keeps: whether it decides which tokens it keeps, and `Record.keeping` has the decisions.
        learns: whether its parameters are for training; else they stay as they are.
        by_length: whether what it computes depends on the length of the input (`State.resolve`, `Step.input_length`).
        left: what units that a token does not use are multiplied by in passes with gradients, 0 but where a training
            lets them fade; None where all are used.
        branches: which of a window and a state behind it count, in all groups or in each, for measurements; saved
            nowhere. None where groups have no such branches; where they do, `parts` gives what each of them does, and
            `features` what the state is made of (`mixer_linear.py`), for trainings.
        by_query: names of the parameters that have an entry for every query head of a group, behind the groups'.
        one_place: why it has to have all tokens of a sequence in one process, and cannot do what `Step.shard` says;
            None where it can.
    """

    targets: ClassVar[tuple[str, ...]] = ()
    needs_inputs: bool = False
    knows_scores: bool = False
    learns: bool = True
    chooses: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    by_length: bool = False
    left: float | None = None
    branches: Branches | tuple[Branches, ...] | None = None
    by_query: tuple[str, ...] = ()
    one_place: ClassVar[str | None] = "nothing is known of what its tokens need of those in other processes"
    heads: tuple[int, ...] = ()

    @classmethod
    def form(cls, group: Mapping[str, Any]) -> str:
        """A name, of letters, digits and `_`, for what a group's entry in the plan says about parameters and code.

        Groups of a layer with different forms get mixers of their own. Empty where there is one form only.
        """
        return ""

    @property
    def name(self) -> str:
        """What the layer knows this mixer by: its target and the form of its groups."""
        return "_".join(filter(None, (self.targets[0], self.form(self.groups[0]))))

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.facts = facts

    @property
    def splits(self) -> bool:
        """Whether a process may run some of its groups alone: no tokens choose among them, and no parameters are for
        all of them."""
        return not self.chooses and next(self.parameters(), None) is None

    def reset_parameters(self) -> None:
        """Give the mixer's parameters their first values, as its constructor has to; those of modules in it are reset
        by themselves. Called where the memory of the parameters is new."""
        for module in self.children():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def untie(self) -> bool:
        """Give parameters by whose first values all tokens choose alike random values, for measurements of a plan that
        nobody has trained; whether there were any."""
        return False

    def state(self, max_length: int | None) -> State:
        """An empty state of this mixer's groups, for one cache; see `State` for `max_length`."""
        return State(max_length)

    def scores(self, step: Step) -> Scores | None:
        """What the layer does to the scores of this mixer's heads; None where that is a plain softmax."""
        return None if step.scores is None else step.scores.of(self.heads)

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: Any,
        step: Step,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """Outputs of T new columns, differentiable in all but the state; writes their tokens into the state.

        Args:
            query: `[B, H, T, D]` after RoPE, the query heads of this mixer's groups, group by group.
            key, value: `[B, G, T, D]` of its groups; they are no part of the state yet.
            state: what `state` made, with the tokens before. None in a pass without a cache, and in one that computes
                a layer again for its gradient.
            step: about the pass; `step.rows` says which columns are tokens.
            scale: factor on the scores, 1 / sqrt(D) when None.
            dropout: probability of leaving out an attention weight.

        Returns:
            `[B, T, H, D]` in the dtype of `query`; zero where a column is no token.
        """
        raise NotImplementedError

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: Any,
        step: Step,
        *,
        scale: float | None,
    ) -> torch.Tensor:
        """As `prefill` for one token a sequence (T = 1) and a state, without gradients.

        `step.lengths` has the tokens of each sequence with the new one, 0 where there is none; `step.gains` is None
        where only the device knows how many there are, and a CUDA graph may hold the step.
        """
        raise NotImplementedError


MIXERS: dict[str, type[Mixer]] = {}  # by the name of the target in the plan
AnyMixer = TypeVar("AnyMixer", bound=type[Mixer])


def register(*targets: str) -> Callable[[AnyMixer], AnyMixer]:
    """Class decorator: the mixer runs these targets."""

    def add(mixer: AnyMixer) -> AnyMixer:
        mixer.targets = targets
        MIXERS.update(dict.fromkeys(targets, mixer))
        return mixer

    return add


class Kinds:
    """The mixers of one layer, and which of its head groups each of them runs.

    Args:
        groups: the plan's entry of every head group of the layer.
        facts: about the layer.
        before: the layer's mixers under another plan; those that stay as they are keep their parameters.

    Raises:
        ValueError: a target that this runtime does not have.

    Attributes:
        mixers: in the order of their first groups.
        members: for every mixer, the numbers of its groups.
        count: head groups of the layer.
        only: the mixer of all groups; None where there are several.
        key: equal for layers that compute the same function of their inputs and parameters.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts, before: Sequence[Mixer] = ()) -> None:
        members: dict[tuple[type[Mixer], str], list[int]] = {}
        for number, group in enumerate(groups):
            if group["target"] not in MIXERS:
                raise ValueError(f"layer {facts.index} group {number}: this runtime has no target {group['target']!r}")
            kind = MIXERS[group["target"]]
            members.setdefault((kind, kind.form(group)), []).append(number)
        self.groups, self.facts = tuple(groups), facts
        self.count = len(groups)
        self.members = tuple(map(tuple, members.values()))
        self.mixers: tuple[Mixer, ...] = tuple(
            _unchanged(before, kind, [groups[number] for number in numbers], facts)
            or kind([groups[number] for number in numbers], facts)
            for (kind, _), numbers in members.items()
        )
        for mixer, numbers in zip(self.mixers, self.members, strict=True):
            mixer.heads = tuple(heads_of(numbers, facts.group_size))
        self.only = self.mixers[0] if len(self.mixers) == 1 else None
        self.group_size = facts.group_size
        self.key = json.dumps([list(groups), facts.native_window], sort_keys=True)

    def part(self, part: Part) -> Kinds:
        """What a process does that has a part of the head groups (tensor parallel).

        Raises:
            ValueError: the groups do not divide among the processes, or a mixer runs only as a whole.
        """
        where = f"layer {self.facts.index}"
        if self.count % part.ranks:
            raise ValueError(
                f"tensor parallel: {where} has {self.count} head groups, which do not divide among {part.ranks} "
                "processes; take fewer processes, or a plan that leaves a multiple of them in every layer"
            )
        for mixer in self.mixers:
            if not mixer.splits:
                raise ValueError(
                    f"tensor parallel: {where} has heads with the target {mixer.targets[0]!r}, which cannot be split "
                    'over processes; use device_map="auto", FSDP, or a plan of other targets'
                )
        return Kinds([self.groups[number] for number in part.of(self.count)], self.facts)

    @property
    def needs_inputs(self) -> bool:
        """Whether a mixer reads the layer's input or its rotary tables."""
        return any(mixer.needs_inputs for mixer in self.mixers)

    def check_scores(self) -> None:
        """Raise ValueError where a layer does more with its scores than a softmax, and a mixer knows no more."""
        for mixer in self.mixers:
            if not mixer.knows_scores:
                raise ValueError(
                    f"a layer of this model caps its scores or has an extra logit in the softmax, which heads with the "
                    f"target {mixer.targets[0]!r} do not"
                )

    def check_shard(self) -> None:
        """Raise ValueError where a mixer cannot run on a part of a sequence, with its reason."""
        for mixer in self.mixers:
            if mixer.one_place is not None:
                raise ValueError(
                    f"layer {self.facts.index} has heads with the target {mixer.targets[0]!r}, whose sequences cannot "
                    f"be spread over processes: {mixer.one_place}"
                )

    def states(self, max_length: int | None) -> tuple[State, ...]:
        """Empty states, one for every mixer."""
        return tuple(mixer.state(max_length) for mixer in self.mixers)

    def mix(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        states: Sequence[State] | None,
        run: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Gather the heads of every mixer, `run(mixer, query, key, value, state)` it, and put the outputs in order.

        Args:
            query: `[B, H, T, D]`.
            key, value: `[B, G, T, D]`.

        Returns:
            `[B, T, H, D]`.
        """
        outputs = []
        for place, (mixer, groups) in enumerate(zip(self.mixers, self.members, strict=True)):
            heads = heads_of(groups, self.group_size)
            state = None if states is None else states[place]
            outputs.append(run(mixer, take(query, heads, 1), take(key, groups, 1), take(value, groups, 1), state))
        order = heads_of([group for groups in self.members for group in groups], self.group_size)
        back = sorted(range(len(order)), key=order.__getitem__)
        return take(torch.cat(outputs, dim=2), back, 2)


def _unchanged(
    before: Sequence[Mixer], kind: type[Mixer], groups: list[Mapping[str, Any]], facts: LayerFacts
) -> Mixer | None:
    return next(
        (mixer for mixer in before if (type(mixer), list(mixer.groups), mixer.facts) == (kind, groups, facts)), None
    )


def heads_of(groups: Sequence[int], group_size: int) -> list[int]:
    """The query heads of head groups, in their order."""
    return [group * group_size + head for group in groups for head in range(group_size)]


def take(tensor: torch.Tensor, numbers: Sequence[int], dim: int) -> torch.Tensor:
    """The given entries of one axis: a view where they follow each other, else a copy."""
    first = numbers[0]
    if list(numbers) == list(range(first, first + len(numbers))):
        return tensor if len(numbers) == tensor.shape[dim] else tensor.narrow(dim, first, len(numbers))
    return tensor.index_select(dim, cached_table(tuple(numbers), tensor.device))
