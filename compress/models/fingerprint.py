"""What tells one model from another: a digest of its sizes, its rules and every value of every weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from compress.models.stream import each_weight

PREFIX = "v2:"  # of every value; `sha256:`, which plans had before, is of a sample
PATTERN = r"^(v2|sha256):[0-9a-f]{64}$"

LANES = 4  # bfloat16 values in a word of 64 bits
BLOCK = 8192  # words that are summed to one
BLOCKS = 64  # blocks that are read at once, 4 MiB
# What a configuration says beside sizes and weights that changes what a model computes.
RULES = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_act",
    "hidden_activation",
    "layer_norm_eps",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
)
DEFAULTS = (("rope_type", "default"), ("partial_rotary_factor", 1.0))  # which a configuration may say or leave out


def fingerprint_of(model: torch.nn.Module, sizes: Mapping[str, Any]) -> str:
    """`v2:` and 64 hexadecimal digits of the sizes, the configuration's rules and all values of all parameters.

    Values are rounded to bfloat16 first, so that a model has one fingerprint in float32 and in bfloat16; a change that
    no value keeps when it is rounded is not seen. Names are sorted, so the order of registration does not matter.
    Weights are read at the speed of memory, on the device where they are.
    """
    digest = hashlib.sha256(repr(sorted(sizes.items())).encode())
    digest.update(json.dumps(_rules(getattr(model, "config", None)), sort_keys=True).encode())
    for name, weight in each_weight(model):
        digest.update(f"{name}:{tuple(weight.shape)}".encode())
        for sums in block_sums(weight):
            digest.update(sums.cpu().numpy().tobytes())
    return f"{PREFIX}{digest.hexdigest()}"


def sampled_fingerprint_of(model: torch.nn.Module, sizes: Mapping[str, Any]) -> str:
    """The fingerprint of plans and profiles that were written before: of at most 256 values of every parameter.

    It is only compared with theirs: two models that differ in other values have the same.
    """
    digest = hashlib.sha256(repr(sorted(sizes.items())).encode())
    for name, weight in each_weight(model):
        flat = weight.reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].cpu().bfloat16().float()
        digest.update(f"{name}:{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def block_sums(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Weighted sums, modulo 2^64, over consecutive blocks of the values in bfloat16, int64.

    The factors are odd, so one value that changes always changes the sum of its block; several that change together
    leave it as it is in one case of about 2^64.
    """
    flat, factors = weight.reshape(-1), _factors(weight.device)
    step = BLOCKS * BLOCK * LANES
    # One piece of memory for all: what is asked for anew every time costs more than the sum.
    values = torch.empty(min(step, _whole_blocks(flat.numel())), dtype=torch.bfloat16, device=weight.device)
    for start in range(0, flat.numel(), step):
        count = min(step, flat.numel() - start)
        padded = values[: _whole_blocks(count)]
        padded[:count].copy_(flat[start : start + count])
        padded[count:] = 0
        words = padded.view(torch.int64).view(-1, BLOCK)
        # Matrix times vector is many times faster on a CPU, and not there for whole numbers on a GPU.
        yield words.mv(factors) if words.device.type == "cpu" else (words * factors).sum(1)


def _whole_blocks(count: int) -> int:
    """A number of values, rounded up to whole blocks."""
    return -(-count // (BLOCK * LANES)) * BLOCK * LANES


def _factors(device: torch.device) -> torch.Tensor:
    """Odd numbers of 64 bits, the same everywhere: SplitMix64 of 0, 1, 2 ..."""
    state = (torch.arange(1, BLOCK + 1, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15)).numpy().view("uint64")
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> shift)) * factor
    state = (state ^ (state >> 31)) | 1
    return torch.from_numpy(state.view("int64")).to(device)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _rules(config: Any) -> dict[str, Any]:
    """The rules of a configuration in one form, whichever file it came from: no defaults, no whole numbers."""
    rules = {key: _plain(getattr(config, key, None)) for key in RULES}
    return {key: value for key, value in rules.items() if value not in (None, {})}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        fields = {str(key): _plain(part) for key, part in value.items()}
        return {key: part for key, part in fields.items() if part not in (None, {}) and (key, part) not in DEFAULTS}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
