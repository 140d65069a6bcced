"""Linear heads by the package flash-linear-attention, where it computes the same function; else by the kernels here.

Those are prompts of heads without a window whose state has no normaliser: plain sums, with a fixed decay, and the gated
delta rule. Its normaliser is a running sum in the dtype of the keys, which saturates in bfloat16, so heads with one are
not for it. Its scale is 1 / sqrt(D) unless it is told otherwise, and it wants keys and values for every query head.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from .linear_layout import Layout
from .linear_states import Rule
from .reference import Rows
from .span import PAGE
from .triton_linear_decode import read_one
from .triton_linear_heads import absorb, pass_features, query_features, takes
from .triton_linear_heads import read_new as read_by_kernels


def refusal(device: torch.device) -> str | None:
    """Why the package does not run on this device; None when it does."""
    if device.type != "cuda":
        return f"flash-linear-attention needs a GPU and the model is on {device.type}"
    if find_spec("fla") is None:
        return "flash-linear-attention is not installed (pip install fla-core)"
    return None


@lru_cache(maxsize=1)
def _operations() -> tuple[Any, Any]:
    """Sums with a decay, and the gated delta rule; imported when they are first needed, which takes seconds."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ImportError(f"flash-linear-attention is installed and cannot be imported: {error}") from error
    return chunk_simple_gla, chunk_gated_delta_rule


def read_new(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    held: torch.Tensor | None,
    layout: Layout,
    rows: Rows,
    *,
    rule: Rule,
    alone: bool,
    log_decay: torch.Tensor | None,
    strength: torch.Tensor | None,
    mean: bool,
    mass: bool,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `triton_linear_heads.read_new`."""
    columns = query.shape[2]
    whole = rows.is_whole(columns) and not any(rows.past)
    by_token = rule == "add" and log_decay is not None and log_decay.dim() > 1
    if not alone or mean or mass or not whole or by_token or key.shape[-1] > 256:
        given: dict[str, Any] = {"rule": rule, "alone": alone, "log_decay": log_decay, "strength": strength}
        return read_by_kernels(query, key, value, held, layout, rows, mean=mean, mass=mass, **given, **others)
    sums, delta = _operations()
    share, dtype = query.shape[1] // key.shape[1], value.dtype
    edge = (columns - 1) // PAGE * PAGE  # the state stands for whole pages, the last of which is only read

    def heads(x: torch.Tensor) -> torch.Tensor:
        """`[B, G, M, ...]` as `[B, T, H, ...]`."""
        return x[:, :, :columns].repeat_interleave(share, 1).transpose(1, 2).contiguous()

    q, k, v = query.to(dtype).transpose(1, 2).contiguous(), heads(key.to(dtype)), heads(value)
    options: dict[str, Any] = {"scale": 1.0}
    by_column: dict[str, torch.Tensor] = {}
    if rule == "delta":
        decay = key.new_zeros(key.shape[:3], dtype=torch.float32) if log_decay is None else log_decay.float()
        decay = (decay[:, None] if decay.dim() == 1 else decay).expand(key.shape[:3])
        by_column = {"g": heads(decay), "beta": heads(torch.ones_like(decay) if strength is None else strength.float())}
    elif log_decay is not None:
        options["g_gamma"] = log_decay.float().repeat_interleave(share)
    call, outs, state = (delta if rule == "delta" else sums), [], None
    for part in (slice(0, edge), slice(edge, columns)):
        if part.start == part.stop:
            continue
        own: dict[str, Any] = {name: x[:, part] for name, x in by_column.items()}
        own |= {"initial_state": state, "output_final_state": part.stop == edge}
        out, state = call(q[:, part], k[:, part], v[:, part], **own, **options)
        outs.append(out)
        if part.stop == edge:
            held = state[:, ::share]
            if rule == "add":  # the column that nothing here divides by
                late = torch.arange(edge - 1, -1, -1, device=key.device)
                fade = 1 if log_decay is None else torch.exp(log_decay.float()[:, None] * late)[..., None]
                held = torch.cat([held, (key[:, :, :edge].float() * fade).sum(2)[..., None]], dim=-1)
    if held is None:
        columns_of = value.shape[-1] + (rule == "add")
        held = value.new_zeros(*key.shape[:2], key.shape[-1], columns_of, dtype=torch.float32)
    return torch.cat(outs, dim=1).transpose(1, 2).float(), held


FLA = (takes, query_features, pass_features, read_new, absorb, read_one)
