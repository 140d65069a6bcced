"""Scores of KVzip and KVzip+ against whole attention matrices, and the request in the words of a chat template."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from compress.errors import UserError
from compress.models.reconstruction import FIRST, SINKS, Repetition, Request, TokenScores, reconstructing
from compress.profile.heads.reconstruction import Reconstruction, keys_needed
from tests.tiny import random_ids, shape_of, tiny_model, tiny_tokenizer

TEXT = random_ids(1, 57, 5)[0].tolist()
CHUNK = 25


def scores_of(model: Any, tokens: list[int], chunk: int = CHUNK) -> list[TokenScores]:
    found: list[TokenScores] = []
    with reconstructing(model, tiny_tokenizer(), chunk) as reconstruct:
        reconstruct(tokens, found.append)
    return found


@torch.no_grad()
def naive(model: Any, plan: Repetition, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both scores of one layer, `[groups, end]` float64: the text and one repetition a pass, with whole matrices."""
    seen: dict[str, torch.Tensor] = {}

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **others: Any) -> Any:
        groups = key.shape[1]
        wide = (tensor.repeat_interleave(query.shape[1] // groups, 1) for tensor in (key, value))
        keys, values = wide
        logits = query.double() @ keys.double().mT * others["scaling"]
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
        if module.layer_idx == layer:
            seen.update(logits=logits[0], values=values[0].double())
        return (logits.softmax(-1) @ values.double()).float().transpose(1, 2), None

    AttentionInterface.register("naive_repetition", attention)
    model.set_attn_implementation("naive_repetition")
    module = model.base_model.layers[layer].self_attn
    hook = module.register_forward_pre_hook(
        lambda _, given, named: seen.update(hidden=named["hidden_states"][0]), with_kwargs=True
    )
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    weight, moved = torch.zeros(2, heads, plan.end, dtype=torch.double)
    for chunk in plan.chunks:
        ids = plan.tokens[: plan.end] + plan.tokens[slice(*chunk.rows)]
        model.base_model(torch.tensor([ids]), use_cache=False)
        columns = [*range(min(SINKS, chunk.keys[0])), *range(*chunk.keys), *range(plan.end, len(ids))]
        weights = torch.zeros(heads, len(ids) - plan.end, len(ids), dtype=torch.double)
        weights[..., columns] = seen["logits"][:, plan.end :, columns].softmax(-1)
        projection = module.o_proj.weight.double().view(-1, heads, seen["values"].shape[-1])
        size = torch.einsum("ohd,htd->hto", projection, seen["values"]).norm(dim=-1)
        relative = weights * size[:, None] / seen["hidden"][plan.end :].double().norm(dim=-1)[:, None]
        for table, values in ((weight, weights), (moved, relative)):
            table[:, slice(*chunk.keys)] = values.amax(1)[:, slice(*chunk.keys)]
    hook.remove()
    return weight.view(groups, -1, plan.end).amax(1), moved.view(groups, -1, plan.end).amax(1)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_scores_are_those_of_whole_matrices(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.models.reconstruction.STRIP_BYTES", {"cpu": 12_000})  # several strips of odd heights
    model = tiny_model(family)
    found = scores_of(model, TEXT)
    plan = Request(tiny_tokenizer(), CHUNK).of(TEXT)
    assert [scores.layer for scores in found] == [0, 1, 2] and len(plan.chunks) == 3
    for scores in found:
        weight, moved = naive(model, plan, scores.layer)
        torch.testing.assert_close(scores.weight.double(), weight[:, SINKS:], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(scores.moved.double(), moved[:, SINKS:], rtol=1e-4, atol=1e-7)
        assert scores.positions.tolist() == list(range(SINKS, len(TEXT)))
        assert len(scores.hidden) == scores.key.shape[1] == len(TEXT) - SINKS


def test_layers_that_slide_by_themselves_have_none_and_the_text_runs_as_it_does_alone() -> None:
    model = tiny_model("gemma3")
    (scores,) = scores_of(model, TEXT)
    kept: list[torch.Tensor] = []
    hook = model.base_model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, given, named: kept.append(named["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model.base_model(torch.tensor([TEXT]))
    hook.remove()
    assert scores.layer == 1
    torch.testing.assert_close(scores.hidden, kept[0][0, SINKS:], rtol=1e-5, atol=1e-5)


def test_one_repetition_is_read_as_the_model_reads_what_follows_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows see the text and themselves, in layers that slide by themselves what their windows show of both."""
    monkeypatch.setattr("compress.models.reconstruction.STRIP_BYTES", {"cpu": 12_000})
    model, read = tiny_model("gemma3"), list[torch.Tensor]()
    hook = model.base_model.norm.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    scores_of(model, TEXT, chunk=len(TEXT))
    with torch.no_grad():
        model.base_model(torch.tensor([Request(tiny_tokenizer(), len(TEXT)).of(TEXT).tokens]))
    hook.remove()
    torch.testing.assert_close(*read, rtol=1e-4, atol=1e-4)


def test_positions_that_a_model_has_no_rows_for_are_refused() -> None:
    with pytest.raises(UserError, match="more positions than the model"):
        scores_of(tiny_model("gpt2"), random_ids(1, 520, 5)[0].tolist(), chunk=520)


def test_the_request_has_the_words_of_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    plain = Request(tokenizer, CHUNK).of(TEXT)
    assert plain.start == 0 and plain.tokens[: plain.end] == tuple(TEXT) and plain.first == SINKS
    first, second, third = plain.chunks
    asked = len(tokenizer(FIRST, add_special_tokens=False)["input_ids"])
    assert plain.tokens[first.rows[0] + asked : first.rows[1]] == tuple(TEXT[:CHUNK])
    assert plain.tokens[slice(*second.rows)][-CHUNK - 8 :] == tuple(TEXT[CHUNK - 8 : 2 * CHUNK])
    assert plain.tokens[slice(*third.rows)][-7:] == tuple(TEXT[-7:])
    assert int(plain.positions().max()) + 1 == plain.end + max(end - start for start, end in (second.rows, first.rows))

    tokenizer.chat_template = "w40 w41 w42 w43 w44 {{ messages[0]['content'] }} w50 w51"
    framed = Request(tokenizer, CHUNK).of(TEXT)
    assert framed.tokens[: framed.end] == (40, 41, 42, 43, 44, *TEXT) and framed.first == framed.start == 5
    assert framed.tokens[slice(*framed.chunks[0].rows)][asked:][:2] == (50, 51)
    assert Request(tokenizer, CHUNK).of([40, 41, 42, 43, 44, *TEXT]) == framed

    tokenizer.chat_template = "w40"
    with pytest.raises(UserError, match="cannot ask for a text to be repeated"):
        Request(tokenizer)


def test_keys_needed_are_the_fewest_that_hold_a_share() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.25, 0.5, 1.0], [0.5, 1.0, 1.0], [0.25, 0.25, 0.25]], dtype=torch.double)
    assert torch.equal(keys_needed(scores, (0.5, 0.8, 0.95)), expected)


def test_the_statistic_has_curves_of_both_scores_and_shares_over_levels_of_kvzip_plus() -> None:
    weight = torch.tensor([[0.5, 0.25, 0.2, 0.05], [0.1, 0.4, 0.4, 0.1]])
    moved = torch.tensor([[0.02, 0.5, 0.4, 0.08], [0.3, 0.3, 0.3, 0.1]])
    place = torch.arange(4)
    scores = TokenScores(1, torch.randn(4, 6), torch.randn(2, 4, 8), torch.randn(2, 4, 8), place, weight, moved)
    statistic, shape = (
        Reconstruction(share=0.55, shares=(0.45, 0.78), levels=(-3, -1)),
        shape_of(tiny_model("llama-gqa")),
    )
    sums: Any = {
        name: torch.zeros(shape.layers, 2, *([2] if name else []), dtype=torch.float64)
        for name in statistic.tables(shape, 4)
    }
    for _ in range(2):
        statistic.add_scores(sums, scores)
    assert sums[""][1].tolist() == [2 * 0.5, 2 * 0.5]
    assert sums["weight"][1].tolist() == [[2 * 0.25, 2 * 0.75], [2 * 0.5, 2 * 0.5]]
    assert sums["moved"][1].tolist() == [[2 * 0.25, 2 * 0.5], [2 * 0.5, 2 * 0.75]]
    assert sums["above"][1].tolist() == [[2 * 0.75, 2 * 0.5], [2.0, 0.0]]  # e^-3 is .05, and e^-1 .37
    assert not any(total[[0, 2]].any() for total in sums.values())
