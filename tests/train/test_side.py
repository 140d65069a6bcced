"""The objective `side`: what mixers report beside their outputs, summed over layers and counted by tokens."""

from typing import Any

import pytest
import torch

from compress.registry import objectives
from compress.runtime.step import Record


def test_a_side_loss_is_summed_over_layers_and_takes_gradients() -> None:
    weights = torch.tensor([2.0, 3.0], requires_grad=True)
    record = Record()
    for weight in weights:
        record.add_loss("balance", weight.square())
    inputs: dict[str, Any] = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    side = objectives["side"](loss_name="balance")
    loss = side.loss({"record": record}, None, inputs)
    assert side.count(inputs) == 10 and loss.item() == 10 * (4 + 9)
    loss.backward()
    assert weights.grad is not None and weights.grad.tolist() == [40.0, 60.0]
    with pytest.raises(ValueError, match="no mixer reports a loss 'entropy'; reported: balance"):
        objectives["side"](loss_name="entropy").loss({"record": record}, None, inputs)
