"""Which implementations there are, for all heads and for those of one kind, and what refuses them."""

from __future__ import annotations

import pytest
import torch

from compress.runtime import impl
from compress.runtime.impl import IMPLS, WITH_KERNELS, explain_impl, needs
from compress.runtime.impl_linear import LINEAR_IMPLS
from compress.runtime.impl_retain import RETAIN_IMPLS
from compress.runtime.impl_routed import ROUTED_IMPLS
from compress.runtime.linear_fla import refusal

WHERE = (torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32, 16)


def test_every_kind_of_heads_knows_all_names() -> None:
    assert {name: one.name for name, one in IMPLS.items()} == {name: name for name in impl.WORDS}
    assert set(RETAIN_IMPLS) == set(ROUTED_IMPLS) == set(IMPLS)
    assert set(LINEAR_IMPLS) == set(WITH_KERNELS) == set(IMPLS) - {"reference"}
    assert LINEAR_IMPLS["fla"].read_new is not LINEAR_IMPLS["triton"].read_new


def test_what_a_kind_of_heads_needs_is_asked_for_where_there_are_such_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal in impl._NEEDS["fla"]  # linear heads are here
    monkeypatch.setattr(impl, "_NEEDS", {})
    explain_impl.cache_clear()
    try:
        assert explain_impl("fla", *WHERE) == ("fla", "as asked for")
        needs("fla", lambda device: f"a library is not there for {device.type}")
        why = f"compress_impl: fla was asked for, but a library is not there for {WHERE[0].type}; use auto or reference"
        with pytest.raises(ValueError, match=why):
            explain_impl("fla", *WHERE)
        assert explain_impl("triton", *WHERE) == ("triton", "as asked for")
    finally:
        explain_impl.cache_clear()
