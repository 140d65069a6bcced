"""What the routers of an upcycled model start with: chance, or what tells the experts' texts apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from compress.models.families import family_of, layers_of
from compress.models.placement import input_device

STD = 0.02  # of random routers, as of the linear layers of most models
RIDGE = 1e-2  # of the mean square of the inputs
PASSES = 2
AT_ONCE = 8  # windows of a text in a pass
SHARPNESS = 4.0  # difference of the logits of experts whose texts are told apart without an error


def routers_of(model: Any) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Every router of an upcycled model, and the module whose input it reads: the attention or the MLP of its layer."""
    family = family_of(model.config)
    for layer in layers_of(model):
        attention, mlp = family.attention_of(layer), layer.get_submodule("mlp")
        for mixer in attention.compress_kinds.mixers:
            router = getattr(mixer, "router", None)
            if isinstance(router, nn.Parameter):
                yield attention, router
        yield mlp, mlp.get_parameter("router")


@torch.no_grad()
def random_routers(model: Any, seed: int) -> None:
    """Draw all routers, as published: the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _, router in routers_of(model):
        router.copy_(STD * torch.randn(router.shape, generator=generator))


@torch.no_grad()
def fitted_routers(model: Any, texts: Sequence[torch.Tensor]) -> None:
    """Let all routers start with what tells the experts' texts apart where they read it.

    The logits of a router are a linear fit, by ridge regression, of which text a token is from: W minimises
    sum |W x - s (e_j - 1/N)|^2 over the tokens x of all texts, e_j the text's number of N and s a sharpness. The first
    pass takes inputs with equal gates, the second with those that the first gave; nothing is trained.

    Args:
        model: an upcycled model in eval mode.
        texts: token ids of every expert's text, `[windows, length]`, in the order of the experts.
    """
    places = list(routers_of(model))
    for _, router in places:
        router.zero_()
    for _ in range(PASSES):
        sums = [_Sums(router) for _, router in places]
        with ExitStack() as undo:
            for (module, _), each in zip(places, sums, strict=True):
                undo.callback(module.register_forward_pre_hook(each.take, with_kwargs=True).remove)
            for number, windows in enumerate(texts):
                for each in sums:
                    each.number = number
                for several in windows.split(AT_ONCE):
                    model.base_model(input_ids=several.to(input_device(model)), use_cache=False)
        for (_, router), each in zip(places, sums, strict=True):
            router.copy_(each.fitted())


class _Sums:
    """Sums over the inputs of one router, `x x^T` over all texts and `x` over each, every text weighing the same.

    Attributes:
        number: of the text that is read.
    """

    def __init__(self, router: nn.Parameter) -> None:
        experts, size = router.shape
        self.number = 0
        self.squares = torch.zeros(experts, size, size, device=router.device)
        self.sums = torch.zeros(experts, size, device=router.device)
        self.counts = [0] * experts

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward hook before the module: add the input of a pass without padding."""
        x = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).flatten(0, -2).float()
        self.squares[self.number] += x.T @ x
        self.sums[self.number] += x.sum(0)
        self.counts[self.number] += len(x)

    def fitted(self) -> torch.Tensor:
        """The router, `[experts, hidden size]`."""
        counts = torch.tensor(self.counts, device=self.sums.device)
        square = (self.squares.double() / counts[:, None, None]).mean(0)
        means = self.sums.double() / counts[:, None]
        targets = (means - means.mean(0)) * SHARPNESS / len(means)
        ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
        return torch.linalg.solve(square + ridge, targets.T).T.float()
