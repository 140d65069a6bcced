"""Models that are read layer by layer: only what surrounds the layers stays in memory, and one layer at a time.

All samples pass one layer before the next one is read, so that weights are read once for all of them, and what waits
meanwhile are hidden states, in the memory of the host. Backwards likewise: the inputs of all layers were kept, and each
layer is read again, runs again on its input, and hands its gradient to the layer before. So the numbers are those of a
whole model, of whose weights one layer's are held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from torch import nn

from compress.errors import UserError
from compress.models.families import family_of, layers_of
from compress.models.memory import available_bytes
from compress.models.weights import read_header, weight_files

if TYPE_CHECKING:
    from compress.data.sample import Sample

SHARE = 0.5  # of the host's free memory, what kept inputs of layers may take
NAME = "compress_stream"


class Weights(Protocol):
    """Where tensors come from, by their names in the model."""

    def __contains__(self, name: object) -> bool: ...

    def tensor(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape of `like`, wherever it lies."""


class StoredWeights:
    """The tensors of a folder's safetensors files.

    Raises:
        UserError: see `weight_files`.
    """

    def __init__(self, folder: Path, named: Any = None) -> None:
        self.files = {name: path for path in weight_files(folder, named) for name in read_header(path)}

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def tensor(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """See `Weights`."""
        with safe_open(self.files[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
            return found


class RandomWeights:
    """Tensors that are drawn anew whenever they are asked for, the same for a name: for shapes without weights."""

    def __init__(self, std: float, device: torch.device, seed: int = 0) -> None:
        self.std, self.device, self.seed = std, device, seed

    def __contains__(self, name: object) -> bool:
        return True

    def tensor(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """See `Weights`; norms are 1, and biases 0."""
        if like.dim() < 2:
            return torch.full(like.shape, float(not name.endswith("bias")), device=self.device)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(digest[:7], "big"))
        empty = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        return empty.normal_(std=self.std, generator=generator)


class Stream:
    """Reads the layers of a model that was made without weights, when they are wanted.

    Args:
        model: on meta, of a supported family. What surrounds its layers is read at once.
        device: where everything is computed.

    Raises:
        UserError: weights under other names or in another form than the model has them.

    Attributes:
        read: bytes that were read so far.
    """

    def __init__(self, model: Any, weights: Weights, device: torch.device) -> None:
        self.model, self.weights, self.device, self.read = model, weights, device, 0
        self.layers = layers_of(model)
        body = f"{model.base_model_prefix}.{family_of(model.config).layers}."
        self._names = {id(layer): f"{body}{number}." for number, layer in enumerate(self.layers)}
        self._held: int | None = None
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        names = {name for name, _ in model.named_parameters()}
        lacking = sorted(name for name in names if name not in weights and name not in tied)
        kept = sorted(name for layer in self.layers for name, _ in layer.named_buffers())
        if lacking or kept:
            raise UserError(
                "the weights of this model cannot be read layer by layer",
                where="profile.stream",
                expected="files that hold each weight under the name that the model has for it",
                found=f"without {', '.join(lacking[:3])}" if lacking else f"layers with {', '.join(kept[:3])}",
                fix="profile the whole model: `profile.stream: false`, with a device that holds it",
            )
        for path, module in model.named_modules():
            if not f"{path}.".startswith(body):
                self._place(path, module, {name for name in tied if name not in weights})
        model.tie_weights()
        model.compress_stream = self

    def _place(self, path: str, module: nn.Module, without: set[str]) -> None:
        """Give a module beside the layers its own weights and buffers."""
        buffers = [*module.named_buffers(recurse=False)]
        for name, buffer in buffers:
            module._buffers[name] = torch.empty_like(buffer, device=self.device)
        if buffers:
            self.model._init_weights(module)  # such as the frequencies of RoPE, which no file has
        for name, empty in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if full not in without:
                module._parameters[name] = self._parameter(full, empty)

    def _parameter(self, name: str, empty: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(self.tensor(name, empty), requires_grad=empty.requires_grad)

    def tensor(self, name: str, empty: torch.Tensor) -> torch.Tensor:
        """A weight by its name, on the device, in the dtype of the model."""
        found = self.weights.tensor(name, empty).to(self.device, empty.dtype)
        self.read += found.nbytes
        return found

    @contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """While it is open, the weights of one layer are there; those of the one that is, are not read again."""
        if self._held == number:
            yield
            return
        layer, places = self.layers[number], list[tuple[nn.Module, str, nn.Parameter]]()
        assert self._held is None, "one layer at a time"
        try:
            for path, module in layer.named_modules():
                for name, empty in [*module.named_parameters(recurse=False)]:
                    places.append((module, name, empty))
                    module._parameters[name] = self._parameter(
                        f"{self._names[id(layer)]}{path}{'.' if path else ''}{name}", empty
                    )
            self._held = number
            yield
        finally:
            self._held = None
            for module, name, empty in places:
                module._parameters[name] = empty


def stream_of(model: Any) -> Stream | None:
    """What reads the layers of a model; None of a model that is whole."""
    stream: Stream | None = getattr(model, NAME, None)
    return stream


def holding(model: Any, layer: int) -> Any:
    """A context in which the weights of a layer are there, as those of a whole model always are."""
    stream = stream_of(model)
    return nullcontext() if stream is None else stream.holding(layer)


def each_weight(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights by name, in the order of the names, one after the other."""
    stream = stream_of(model)
    for name, weight in sorted(model.named_parameters()):
        yield name, weight.detach() if stream is None or not weight.is_meta else stream.tensor(name, weight)


def refuse_streamed(model: Any, what: str, where: str, fix: str) -> None:
    """Raise UserError for work that needs the whole model, where its layers are read one by one."""
    if stream_of(model) is not None:
        raise UserError(
            f"{what} needs the whole model, and `profile.stream: true` reads it layer by layer",
            where=where,
            expected="work that one layer after the other can do",
            fix=fix,
        )


class _Passed(Exception):  # no error: the one layer that was wanted has run
    """Ends a forward pass behind a layer."""


class LayerByLayer:
    """Passes samples through the layers of a streamed model, whose attention may be another meanwhile.

    The model's own forward pass gives every layer what it takes beside hidden states; layers that are not there hand
    these on, and the one that is there has its own.

    Args:
        tell: called with (layers done, layers in all, what).
    """

    def __init__(self, model: Any, tell: Callable[[int, int, str], None] = lambda *_: None) -> None:
        stream = stream_of(model)
        assert stream is not None
        self.model, self.stream, self.tell = model, stream, tell
        self._wanted, self._state, self._out = 0, torch.empty(0), torch.empty(0)
        self._is_tuple = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While it is open, the model's layers can be passed one by one."""
        for number, layer in enumerate(self.stream.layers):
            layer.forward = partial(self._forward, number, layer.forward)
        try:
            yield
        finally:
            for layer in self.stream.layers:
                del layer.forward

    def group(self, samples: Sequence[Sample], gradient: bool) -> int:
        """How many of the samples pass together: all, or so many that the kept inputs of all layers fit in memory."""
        free, numbers = available_bytes(torch.device("cpu")), len(self.stream.layers) if gradient else 1
        weight = self.model.get_input_embeddings().weight
        row = self.model.config.hidden_size * weight.element_size() * (numbers + 1)
        if free is None:
            return len(samples)
        count, total = 0, 0
        for sample in samples:
            total += row * sample.length
            if count and total > SHARE * free:
                break
            count += 1
        return count

    def forward(self, samples: Sequence[Sample], begin: Callable[[int], None], keep: bool = False) -> Any:
        """Pass samples forward, without gradients.

        Args:
            begin: called with the number of a sample before it passes a layer.
            keep: keep the inputs of all layers.

        Returns:
            The last layer's outputs `[1, T, hidden size]` of each sample on the CPU, and the inputs of every layer,
            where they are kept.
        """
        states: list[torch.Tensor | None] = [None] * len(samples)
        inputs: list[list[torch.Tensor]] = []
        for layer in range(len(self.stream.layers)):
            taken: list[torch.Tensor] = []
            with torch.no_grad(), self.stream.holding(layer):
                for number, sample in enumerate(samples):
                    begin(number)
                    given, out = self._through(layer, sample, states[number])
                    taken.append(given.cpu())
                    states[number] = out.cpu()
            inputs += [taken] if keep else []
            self.tell(layer + 1, len(self.stream.layers), "layers, forward")
        return states, inputs

    def backward(
        self,
        samples: Sequence[Sample],
        loss: Callable[[Sample, Any], torch.Tensor],
        states: Sequence[torch.Tensor],
        inputs: Sequence[Sequence[torch.Tensor]],
        begin: Callable[[int], None],
        after: Callable[[int, int], None] = lambda layer, number: None,
    ) -> None:
        """Pass gradients back, layer by layer.

        Args:
            loss: a number of a sample and the model's output for it, of which gradients are taken.
            states, inputs: of `forward`.
            after: called with the layer and the number of a sample whose backward pass through it has run.
        """
        count, slopes = len(self.stream.layers), list[torch.Tensor]()
        for number, sample in enumerate(samples):
            begin(number)
            leaf = states[number].to(self.stream.device).requires_grad_()
            self._wanted, self._state = count, leaf
            with torch.enable_grad():
                loss(sample, self.model(**sample.inputs(self.stream.device))).backward()
            assert leaf.grad is not None
            slopes.append(leaf.grad.cpu())
        for layer in reversed(range(count)):
            with self.stream.holding(layer):
                for number, sample in enumerate(samples):
                    begin(number)
                    leaf = inputs[layer][number].to(self.stream.device).requires_grad_()
                    with torch.enable_grad():
                        _, out = self._through(layer, sample, leaf)
                        out.backward(slopes[number].to(self.stream.device))
                    assert leaf.grad is not None
                    slopes[number] = leaf.grad.cpu()
                    after(layer, number)
            self.tell(count - layer, count, "layers, backward")

    def _through(self, layer: int, sample: Sample, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer takes and what it makes of it; without a state, the model's own input of its layers."""
        self._wanted, self._state = layer, state  # type: ignore[assignment]
        if state is not None:
            self._state = state.to(self.stream.device)
        try:
            self.model.base_model(**sample.body(self.stream.device))
        except _Passed:
            given, out = self._state, self._out
            self._state = self._out = torch.empty(0)
            return given, out
        raise RuntimeError(f"layer {layer} was not called")

    def _forward(self, number: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the forward method of a layer."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if number != self._wanted:
            if number == 0 and self._wanted == len(self.stream.layers):  # behind all layers: the head and the loss
                hidden = self._state
            return (hidden,) if self._is_tuple else hidden
        self._state = hidden if self._state is None else self._state
        if args:
            out = own(self._state, *args[1:], **kwargs)
        else:
            out = own(**{**kwargs, "hidden_states": self._state})
        self._is_tuple = isinstance(out, tuple)
        self._out = out[0] if isinstance(out, tuple) else out
        raise _Passed
