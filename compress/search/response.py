"""The response loss: how well a model predicts the answers of documents, the measure that a search ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compress.data.sample import Sample
from compress.errors import UserError
from compress.models.placement import input_device


@torch.inference_mode()
def response_loss(model: Any, documents: Sequence[Sample]) -> float:
    """Mean over documents of the mean cross-entropy (nats) on a document's answer.

    Answers are the dense model's own where calibration made them, so this asks whether a model still says what
    the dense one says (MoA, arXiv 2406.14909, Section 5). Logits exist for the answer rows only.

    Args:
        model: dense or planned.
        documents: each is one forward pass without a cache.

    Raises:
        UserError: no documents, a document without an answer to predict, or a loss that is not finite.
    """
    if not documents:
        raise UserError("no held-out documents to measure the response loss on", where="calibration.held_out")
    device = input_device(model)
    losses = []
    for document in documents:
        start, end = document.rows
        if not 0 <= start < end < document.length:
            raise UserError(
                "a document has no answer that can be predicted",
                where="calibration.held_out",
                expected=f"rows that predict it within 0 to {document.length - 1}",
                found=f"rows {start} to {end}",
            )
        total, rows = document.loss(model(**document.inputs(device)))
        loss = float(total / rows)
        if not loss < float("inf"):
            raise UserError(
                "the response loss is not finite",
                where="calibration.held_out",
                found=str(loss),
                fix="run in float32 or bfloat16 instead of float16, and check the model's weights",
            )
        losses.append(loss)
    return sum(losses) / len(losses)
