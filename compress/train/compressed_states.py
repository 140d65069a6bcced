"""What scorers are given in a model that already forgets: its layers' states differ from the dense model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from compress.models.placement import input_device
from compress.models.planned import planned_model
from compress.models.retention import Retention
from compress.plan import ModelShape, make_plan
from compress.runtime.scorers import Scorer
from compress.runtime.step import Step
from compress.targets.full import FullGroup
from compress.targets.target import Target

Given = dict[int, tuple[Any, ...]]  # by layer, the arguments of `Scorer.forward` of one text
States = Callable[[Sequence[int]], Given]


def forgetful(
    model: Any, shape: ModelShape, target: Target, share: float, retention: Retention, scorers: dict[int, Scorer]
) -> Any:
    """The dense model with heads that all keep such a share of the tokens, on the very tensors of `model`.

    Args:
        model: dense.
        target: that keeps tokens; its window counts.
        retention: which threshold keeps which share, of these scorers.
        scorers: by number of the layer; their parameters are copied.
    """
    asked = target.with_share(share)
    groups = [
        [asked.placed(retention, layer, group) if native is None else FullGroup() for group in range(shape.kv_heads)]
        for layer, native in enumerate(shape.native_windows)
    ]
    made = planned_model(model, make_plan(shape, groups), untrained=True).eval()
    for layer, scorer in scorers.items():
        mixer: Any = made.base_model.compress_kinds[layer].only
        mixer.float().scorer.load_state_dict(scorer.state_dict())
    return made


@contextmanager
def given_to_scorers(model: Any) -> Iterator[States]:
    """While it is open, the function it gives reads a text, and says what each layer's scorer was given."""
    found: Given = {}

    def note(layer: int, judge: Any, key: torch.Tensor, value: torch.Tensor, step: Step) -> torch.Tensor:
        found[layer] = step.hidden, key, value, step.positions(key.device)
        scores: torch.Tensor = judge(key, value, step)
        return scores

    # The mixer is listened to, not the scorer: a kernel reads the parameters of a scorer and never calls it.
    keepers = {
        layer: kinds.only for layer, kinds in enumerate(model.base_model.compress_kinds) if kinds.only is not None
    }
    keepers = {layer: mixer for layer, mixer in keepers.items() if mixer.keeps}
    for layer, mixer in keepers.items():
        mixer.judge = partial(note, layer, mixer.judge)

    @torch.no_grad()
    def read(tokens: Sequence[int]) -> Given:
        found.clear()
        model.base_model(input_ids=torch.tensor([list(tokens)], device=input_device(model)), use_cache=False)
        return dict(found)

    try:
        yield read
    finally:
        for mixer in keepers.values():
            del mixer.judge
