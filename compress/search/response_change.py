"""What changing one head group's rule would do to the loss of a plan: to first order, for many rules at once.

One backward pass through the planned model gives dLoss/dO of every head. Then, for every group and every other rule,
the change of the loss is dLoss/dO . (O_rule - O), with both outputs computed exactly from the queries, keys and values
that the plan itself produces. Unlike influence, which is taken at the dense model, this knows what the other groups
hide already; what it does not know is how several changes act together, so a plan made from it has to be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from compress.models.replaced import causal_attention, replaced_attention, tapped
from compress.models.shape import ModelShape
from compress.runtime.attention import choose_impl
from compress.runtime.span import Span
from compress.search.problem import Decision

NAME = "compress_change"

Rules = Sequence[Sequence[Sequence[Span]]]


def predicted_changes(
    model: Any,
    shape: ModelShape,
    decision: Decision,
    rules: Rules,
    backward: Callable[[Any], None],
) -> torch.Tensor:
    """Predicted change of the loss, `[layers, groups, rules]` float64 on the CPU, in the loss's unit.

    Args:
        model: the dense model; its attention runs the plan's rules meanwhile.
        decision: the plan, `[layers][groups]`.
        rules: `[layers][rules][groups]` other rules; layers that slide by themselves are not asked.
        backward: given the model, runs it forwards and the loss backwards, in as many passes as it likes; what they
            give adds up.
    """
    device = next(model.parameters()).device
    changes = torch.zeros(shape.layers, shape.kv_heads, len(rules[0]), dtype=torch.float64, device=device)

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = int(module.layer_idx)
        window = shape.native_windows[layer]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if window is not None:
            return causal_attention(query, key, value, scaling, window).transpose(1, 2).contiguous(), None
        prefill = choose_impl("auto", query).prefill
        output = prefill(query, key, value, tuple(decision[layer]), scale=scaling)

        def add(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, slope: torch.Tensor) -> None:
            for number, spans in enumerate(rules[layer]):
                moved = prefill(q, k, v, tuple(spans), scale=scaling).sub_(o)
                change = torch.einsum("bhtd,bhtd->h", slope.float(), moved.float())
                changes[layer, :, number] += change.view(shape.kv_heads, -1).sum(1).double()

        return tapped(output, add, query, key, value, output).transpose(1, 2).contiguous(), None

    with replaced_attention(model, NAME, attention), torch.enable_grad():
        backward(model)
    return changes.cpu()
