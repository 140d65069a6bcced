"""Backward passes where memory is short or weights are float16: recomputed layers, and a scale of the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from compress.models.families import layers_of
from compress.models.placement import free_bytes, placement_of
from compress.runtime.families import head_size_of
from compress.runtime.widths import width_of

ACTIVATIONS_SHARE = 0.25  # share of the free memory that activations may take before layers are recomputed instead
ROOM = 0.6  # likewise where all is measured that will be taken; other processes on the GPU find the rest
HALF_SCALE = 2.0**12


def loss_scale(dtype: torch.dtype) -> float:
    """Factor on the loss of a model of that dtype: in float16 the smallest gradients would become zero without it."""
    return HALF_SCALE if dtype == torch.float16 else 1.0


@contextmanager
def recomputed(
    model: Any,
    tokens: int,
    *,
    chosen: bool | None = None,
    itemsize: int | None = None,
    trained: bool = False,
    needs: Callable[[], int] | None = None,
) -> Iterator[bool]:
    """Recompute decoder layers in the backward pass instead of keeping their activations, where memory is short.

    Wraps forward and backward pass; the gradients are the same. Yields whether layers are recomputed.

    Args:
        tokens: of a forward pass, over all its sequences.
        chosen: whether to recompute; None decides by an estimate and the free memory.
        itemsize: bytes of an activation; None is that of the model's weights.
        trained: the layers' weights take gradients, so their inputs are kept as well.
        needs: gives all bytes that will be taken beside those that are, in place of an estimate. Where they are there,
            they are claimed at once, so that another process on the same GPU does not count on them as well.
    """
    with ExitStack() as undo:
        if chosen is None and needs is not None:
            chosen = not _claimed(model, needs())
        elif chosen is None:
            weight = model.get_input_embeddings().weight
            needed = activation_bytes(model, tokens, itemsize or weight.dtype.itemsize, trained=trained)
            free = free_bytes(model)
            chosen = free is not None and needed > ACTIVATIONS_SHARE * free
        if chosen:
            _checkpoint_layers(model, undo)
        yield chosen


def kept_bytes(run: Callable[[], Any], held: Any) -> int:
    """Bytes that autograd would keep of what `run` computes, for its backward pass; nothing of it is kept.

    Args:
        held: a module whose weights are there anyway.
    """
    own = {weight.untyped_storage()._cdata for weight in held.parameters()}
    found: dict[int, tuple[StorageWeakRef, int]] = {}  # a storage that is only named cannot become another one

    def pack(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in found:
            found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def unpack(_: None) -> torch.Tensor:
        raise RuntimeError("a pass whose activations are only counted has no backward pass")

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        run()
    return sum(size for _, size in found.values())


def _claimed(model: Any, needed: int) -> bool:
    """Whether the devices of a model have room for so many bytes more, which this process's allocator holds then."""
    devices = placement_of(model).devices
    if any(device.type == "cuda" for device in devices):
        torch.cuda.empty_cache()
    free = free_bytes(model)
    if free is not None and needed > ROOM * free:
        return False
    try:
        blocks = [
            torch.empty(needed // len(devices), dtype=torch.uint8, device=device)
            for device in devices
            if device.type == "cuda"
        ]
    except torch.OutOfMemoryError:  # another process was faster
        return False
    del blocks
    return True


def activation_bytes(model: Any, tokens: int, itemsize: int, *, trained: bool = False) -> int:
    """Estimated bytes that autograd keeps of the decoder layers in a forward pass, on the safe side of what it does.

    Per token and layer: what the norms read, in float32 (below float32 some families keep more); Q, K, V and O
    with K and V repeated once per query head; and gate, activated gate and up projection. Trained weights need their
    inputs as well: norms what they have normalised (in float32 in some families), and projections the norms' outputs,
    the heads' outputs side by side and the product of gate and up projection.
    """
    total, head_dim, hidden = 0, head_size_of(model.config), model.config.hidden_size
    normed = 4 + (itemsize + 4 if trained else 0 if itemsize >= 4 else itemsize)
    for layer in layers_of(model):
        width = width_of(layer, model.config)
        attention = ((5 if trained else 4) * width.query_heads + 2 * width.groups) * head_dim
        read = {"q_norm": width.query_heads * head_dim, "k_norm": width.groups * head_dim}
        norms = [name.rpartition(".")[2] for name, _ in layer.named_modules() if name.endswith("norm")]
        states = sum(read.get(name, hidden) for name in norms) * normed
        total += tokens * (states + itemsize * (attention + (4 if trained else 3) * width.neurons))
    return total


def _checkpoint_layers(model: torch.nn.Module, undo: ExitStack) -> None:
    """Recompute decoder layers in the backward pass until `undo` closes.

    transformers checkpoints a layer whose own `training` flag is set. Only that flag is set: the modules inside
    stay in eval mode, so dropout is off whatever the configuration says.
    """
    function = functools.partial(checkpoint, use_reentrant=False)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            for name, value in (
                ("training", True),
                ("gradient_checkpointing", True),
                ("_gradient_checkpointing_func", function),
            ):
                if name in vars(module):
                    undo.callback(setattr, module, name, vars(module)[name])
                else:
                    undo.callback(delattr, module, name)
                setattr(module, name, value)
