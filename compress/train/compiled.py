"""Decoder layers that are compiled while a model is trained: what lies between matrix products takes few kernels then.

Norms, RoPE, activations and residual sums move the hidden states through memory again and again, partly in float32; on
a GPU that takes longer than the matrix products of a small model. `torch.compile` fuses them. Attention over spans is
left alone (`runtime.attention`), and so are checkpoints: only the layers' `forward` is another one meanwhile. All
layers of a model share what is compiled, because their weights are its arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers.utils import logging

from compress.models.families import layers_of
from compress.models.placement import placement_of
from compress.models.stream import stream_of

logger = logging.get_logger(__name__)

# Tokens x layers x hidden size from which compiling pays: on an H100 it takes 16 s and saves .15 s of 65,536 tokens of
# a model of 30 x 576 (profiles/h100-training).
WORTH = 1.5e11
BACKEND = "inductor"
VARIANTS = 64  # of compiled code: with and without gradients, kinds of layers, shapes


def pays(model: Any, tokens: int) -> bool:
    """Whether a training on so many tokens in this process gains more by compiled layers than they cost."""
    size = model.get_input_embeddings().weight.shape[1]
    return placement_of(model).inputs.type == "cuda" and tokens * len(layers_of(model)) * size >= WORTH


def refusal(models: Sequence[Any]) -> str | None:
    """Why layers of these models are not compiled; None where they are."""
    if any(stream_of(model) is not None or len(placement_of(model).devices) > 1 for model in models):
        return "a model does not lie on one device"
    return None


@contextmanager
def compiled(
    models: Sequence[Any], rehearse: Callable[[], None], *, by_part: bool = False, say: Callable[[str], None]
) -> Iterator[bool]:
    """Compile the decoder layers of models until the context ends; yields whether they are compiled.

    A compiler that fails stops nothing: that is told in one line, and the layers are left as they were.

    Args:
        rehearse: runs passes as they will be, which is when the compiler works.
        by_part: compile attention, MLP and norms of a layer one by one: for layers that are computed again as wholes
            in the backward pass.
        say: takes a line for the user.
    """
    reason = refusal(models)
    if reason is not None:
        say(f"layers are not compiled: {reason}")
        yield False
        return
    from torch._dynamo import config  # which takes a second to import

    began = time.perf_counter()
    with ExitStack() as undo:
        undo.enter_context(config.patch(recompile_limit=VARIANTS))
        try:
            _compile(models, undo, by_part)
            say("compiling decoder layers")
            rehearse()
        except Exception as error:  # a compiler has many ways to fail, and none may end a training
            undo.close()
            reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
            logger.warning(f"decoder layers are trained as they are, because they cannot be compiled here: {reason}")
            yield False
            return
        undo.enter_context(
            config.patch(suppress_errors=True)
        )  # what comes later runs as it is where it does not compile
        say(f"compiled decoder layers in {time.perf_counter() - began:.0f} s")
        yield True


def _compile(models: Sequence[Any], undo: ExitStack, by_part: bool) -> None:
    for model in models:
        for layer in layers_of(model):
            for unit in layer.children() if by_part else (layer,):
                had = vars(unit).get("forward")
                undo.callback(_restore, unit, had)
                unit.forward = torch.compile(unit.forward, dynamic=False, backend=BACKEND)


def _restore(unit: Any, forward: Any) -> None:
    if forward is None:
        del unit.forward
    else:
        unit.forward = forward
