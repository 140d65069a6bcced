"""The effect of a target on the loss: against the true change of the loss, and against influence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import Field

from compress.errors import UserError
from compress.models.replaced import AttentionCall, replaced_attention
from compress.models.shape import shape_of
from compress.profile.heads.effect import Effect
from compress.profile.heads.influence import Influence
from compress.profile.key import Key, target_form
from compress.profile.run import run_profile
from compress.registry import targets
from compress.runtime.mixer import MIXERS, register
from compress.runtime.mixer_masked import MaskedMixer
from compress.runtime.span import Span
from compress.targets.cost import Cost
from compress.targets.full import FullGroup
from compress.targets.pruned import PrunedGroup
from compress.targets.target import Target
from compress.targets.window import SpanGrid, WindowGroup
from tests.profile.common import document, documents, measure
from tests.tiny import tiny_loaded, tiny_model

WINDOW = WindowGroup(sink=4, alpha=10, beta=0.125)
DOC = document(90)


class EveryThird(Target):
    """Sees itself and every third key."""

    target: Literal["third"] = "third"
    first: int = Field(0, description="the first of these keys")

    def cost(self, unit: Any, length: int) -> Cost:
        """Of no use here."""
        raise NotImplementedError

    def words(self, native: int | None = None) -> str:
        """For messages."""
        return "every third key"


def third(t: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return (j <= t) & ((j == t) | (j % 3 == 1))


@pytest.fixture
def example() -> Iterator[Target]:
    """A target that the project does not have, with its mixer."""
    targets.register("third")(EveryThird)

    @register("third")
    class Thirds(MaskedMixer):
        def visible(self, t: torch.Tensor, j: torch.Tensor, group: Any) -> torch.Tensor:
            return (j == t) | (j % 3 == group["first"])

    yield EveryThird(first=1)
    del targets._methods["third"], MIXERS["third"]


def masked(call: AttentionCall, seen: torch.Tensor) -> torch.Tensor:
    """Attention over the keys of an explicit mask `[T, T]`."""
    return torch.nn.functional.scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=seen, scale=call.scaling, enable_gqa=True
    )


def change_of(target: Target, call: AttentionCall) -> torch.Tensor:
    """O_target - O_full by hand, for the three targets of these tests."""
    t, j = torch.arange(DOC.length)[:, None], torch.arange(DOC.length)
    dense = call.dense()
    if isinstance(target, PrunedGroup):
        return -dense
    seen = third(t, j) if isinstance(target, EveryThird) else Span(4, 10, 0.125).visible(t, j)
    return masked(call, seen) - dense


def loss_at(model: Any, layer: int, group: int, target: Target, share: float) -> float:
    """Mean answer loss where one group's output has moved a share of the way to that of a target."""

    def attend(call: AttentionCall) -> torch.Tensor:
        output = call.dense()
        if call.layer == layer:
            queries = output.shape[1] // call.key.shape[1]
            heads = slice(group * queries, (group + 1) * queries)
            output[:, heads] += share * change_of(target, call)[:, heads]
        return output

    tokens = torch.tensor([DOC.tokens])
    with replaced_attention(model, "tests_effect", attend), torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0, DOC.answer[0] - 1 : DOC.answer[1] - 1]
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, DOC.answer[0] :]))


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_it_is_the_derivative_of_the_true_loss(family: str, example: Target) -> None:
    priced = (WINDOW, PrunedGroup(), example)
    found = measure(tiny_model(family), [Effect(targets=priced)], DOC)
    exact = tiny_model(family).double()
    shape = shape_of(exact)
    for target in priced:
        signed = found[f"effect.signed[{target_form(target)}].90"]
        assert bool((found[f"effect.absolute[{target_form(target)}].90"] >= signed.abs()).all())
        for layer in range(shape.layers):
            for group in range(shape.kv_heads):
                losses = [loss_at(exact, layer, group, target, share) for share in (-1e-3, 1e-3)]
                # Smaller steps drown in the float32 rounding of the losses, larger ones in curvature.
                slope = (losses[1] - losses[0]) / 2e-3
                assert float(signed[layer, group]) == pytest.approx(slope, rel=3e-3, abs=3e-4)


def test_of_windows_it_is_the_joint_influence() -> None:
    model, grid = tiny_model("llama-gqa"), SpanGrid(sinks=(4,), betas=(0.0, 0.125), alpha_min=64)
    windows = [WindowGroup(sink=4, alpha=64, beta=beta) for beta in grid.betas]
    found = measure(model, [Influence(grid=grid), Effect(targets=tuple(windows))], document(200))
    joint = found["influence.joint.200"]
    for number, window in enumerate(windows):
        effect = found[f"effect.absolute[{target_form(window)}].200"]
        torch.testing.assert_close(effect, joint[:, :, 0, number, 0], rtol=2e-4, atol=1e-7)
        assert bool(effect.any())


@pytest.mark.parametrize("family", ["gemma3", "mistral-sliding"])
def test_layers_that_slide_by_themselves_can_only_be_removed(family: str) -> None:
    model = tiny_model(family)
    found = measure(model, [Effect(targets=(WINDOW, PrunedGroup(), FullGroup()))], DOC)
    for layer, native in enumerate(shape_of(model).native_windows):
        window, pruned, full = (
            found[f"effect.absolute[{target_form(target)}].90"][layer]
            for target in (WINDOW, PrunedGroup(), FullGroup())
        )
        assert bool(pruned.all()) and not full.any() and bool(window.any()) is (native is None)


def test_a_profile_says_what_a_target_costs(tmp_path: Path, example: Target) -> None:
    loaded, statistic = tiny_loaded("llama-gqa"), Effect(targets=(WINDOW, example))
    profile = run_profile(loaded, documents(), [statistic], tmp_path, seed=0)
    for target in (WINDOW, example):
        assert torch.equal(profile.effect(target, 70), profile.tensor(Key("effect", "absolute", 70).to(target)))
        assert profile.effect(target, 133, "signed").shape == (3, 2)
    assert not profile.effect(FullGroup(), 70).any()
    with pytest.raises(UserError, match=r"no `effect\.absolute\[pruned\]\.70`"):
        profile.effect(PrunedGroup(), 70)


def test_what_has_no_output_to_compare_is_refused(tmp_path: Path, example: Target) -> None:
    mixer = MIXERS.pop("third")
    with pytest.raises(UserError, match="the runtime has no mixer for it"):
        run_profile(tiny_loaded("llama-gqa"), documents(), [Effect(targets=(example,))], tmp_path, seed=0)
    MIXERS["third"] = mixer
