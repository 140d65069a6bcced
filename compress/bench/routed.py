"""A layer of routed heads by itself, as tokens choose them and with all of them on: what the bench times."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.mixer_routed import RoutedMixer
from compress.runtime.pages import PagedState
from compress.runtime.step import Step
from compress.targets.routed import RoutedGroup

if TYPE_CHECKING:
    from compress.bench.kernel import Shape

# Named plans: what is chosen, and the share of it that a token uses. A quarter of all is chosen, the rest always on.
ROUTED: dict[str, tuple[Literal["group", "head"], float]] = {
    "R75": ("group", 0.75),
    "R50": ("group", 0.5),
    "R75h": ("head", 0.75),
    "R50h": ("head", 0.5),
}


def routed_groups(name: str, groups: int, query_heads: int) -> list[RoutedGroup]:
    """The named plan of one layer of so many groups with `query_heads` heads together, router `two_stage`.

    Of units that cannot be shared out so, one fewer than there are is on at the most.
    """
    unit, share = ROUTED[name]
    units = groups if unit == "group" else query_heads
    on = max(1, min(round(units * share), units - 1))
    active = min(on, max(1, units // 4))
    shared = range(on - active)
    return RoutedGroup.layer(groups, active, shared=shared, group_size=query_heads // groups, unit=unit)


class RoutedLayer:
    """The mixers of a layer under a named plan, whose router has random weights, so that tokens choose differently.

    Attributes:
        chosen: as tokens choose.
        whole: the same router with every unit on.
    """

    def __init__(self, name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        groups = routed_groups(name, shape.groups, shape.query_heads)
        self.width = shape.query_heads * shape.head_dim
        facts = LayerFacts(0, shape.head_dim, self.width, shape.query_heads // shape.groups, None)
        self.groups = shape.groups
        self.chosen, self.whole = (
            cast(RoutedMixer, Kinds([group.model_dump() for group in entries], facts).mixers[0])
            .to(device, dtype)
            .requires_grad_(False)
            for entries in (groups, [group.all_on for group in groups])
        )
        self.chosen.untie()
        self.whole.load_state_dict(self.chosen.state_dict())

    def prefill(
        self, mixer: RoutedMixer, qkv: list[torch.Tensor], hidden: torch.Tensor, impl: str
    ) -> Callable[[], torch.Tensor]:
        """The prefill of whole sequences without a cache, as a model runs it: the router, and attention.

        Args:
            qkv: as of `random_qkv`.
            hidden: `[B, T, H * D]`, what the router reads.
        """
        query, key, value = qkv
        step = self.step(query, hidden, impl)
        return lambda: mixer.prefill(query, key, value, None, step, scale=None, dropout=0.0)

    def computed_share(self, qkv: list[torch.Tensor], hidden: torch.Tensor, impl: str) -> float:
        """Of the causal pairs of query and key of all heads, those that are computed for what these tokens choose."""
        on = self.chosen.flags(qkv[0], self.step(qkv[0], hidden, impl))[0]
        pairs = torch.arange(1, on.shape[1] + 1, device=on.device, dtype=torch.float64)
        return float((on.double().mean(-1) * pairs).sum() / (pairs.sum() * on.shape[0]))

    def step(self, query: torch.Tensor, hidden: torch.Tensor, impl: str) -> Step:
        """The pass of these tokens."""
        step = Step.begin(None, None, query.shape[0], query.shape[2], query.device)
        step.impl, step.hidden = impl, hidden
        return step


class RoutedCache:
    """A decode step of such layers: one token a sequence behind `length` - 1 random ones in reserved pages."""

    def __init__(self, shape: Shape, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        make = lambda heads: torch.randn(batch, heads, 1, shape.head_dim, device=device, dtype=dtype)  # noqa: E731
        self.query, self.key, self.value = (make(heads) for heads in (shape.query_heads, shape.groups, shape.groups))
        self.hidden = torch.randn(batch, 1, shape.query_heads * shape.head_dim, device=device, dtype=dtype)
        self.lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        self.length, self.groups = length, shape.groups
        self.state: PagedState | None = None

    def decode(self, mixer: RoutedMixer, impl: str) -> torch.Tensor:
        """Choose, store the token's key and value, and attend; `[B, 1, H, D]`."""
        if self.state is None:
            self.state = mixer.state(self.length)
            self.state.begin(self.key, self.value)
            for pool in self.state.pools().values():
                pool.normal_()
        return mixer.decode(self.query, self.key, self.value, self.state, self.step(impl), scale=None)

    def read_share(self, mixer: RoutedMixer, impl: str) -> float:
        """Of the groups' keys and values, those that are read for what these tokens choose."""
        on: Any = mixer.flags(self.query, self.step(impl))[0]
        return float(on.unflatten(-1, (self.groups, -1)).any(-1).double().mean())

    def step(self, impl: str) -> Step:
        """The pass of its token."""
        return Step(None, None, None, self.lengths, None, 1, impl=impl, hidden=self.hidden)
