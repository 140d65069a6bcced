"""The response loss equals the plain formula, on dense and planned models."""

import pytest
import torch

from compress.data.sample import TextSample
from compress.errors import UserError
from compress.models.planned import planned_model
from compress.plan import uniform_plan
from compress.search.response import response_loss
from compress.targets.full import FullGroup
from tests.tiny import mixed_plan, random_ids, shape_of, tiny_model


def document(length: int, answer: tuple[int, int]) -> TextSample:
    return TextSample(tuple(random_ids(1, length)[0].tolist()), answer)


def test_it_is_the_mean_cross_entropy_of_the_answer() -> None:
    model = tiny_model("llama-gqa")
    documents = [document(40, (30, 40)), document(25, (1, 4)), document(33, (20, 30))]
    expected = []
    for each in documents:
        ids = torch.tensor(each.tokens)[None]
        with torch.inference_mode():
            logs = model(ids).logits[0].log_softmax(-1)
        start, end = each.answer
        expected.append(-sum(float(logs[t - 1, ids[0, t]]) for t in range(start, end)) / (end - start))
    assert response_loss(model, documents) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_a_plan_changes_it_and_a_full_plan_does_not() -> None:
    model = tiny_model("llama-gqa")
    documents = [document(300, (280, 300))]
    dense = response_loss(model, documents)
    full = planned_model(model, uniform_plan(shape_of(model), FullGroup()))
    assert response_loss(full, documents) == pytest.approx(dense, rel=1e-4)
    assert abs(response_loss(planned_model(model, mixed_plan(shape_of(model))), documents) - dense) > 1e-3


@pytest.mark.parametrize("answer", [(0, 3), (5, 5), (8, 12)])
def test_an_answer_that_cannot_be_predicted_is_an_error(answer: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="no answer"):
        response_loss(tiny_model("llama-gqa"), [TextSample(tuple(range(4, 14)), answer)])


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(UserError, match="no held-out documents"):
        response_loss(tiny_model("llama-gqa"), [])


def test_a_broken_model_is_an_error() -> None:
    model = tiny_model("llama-gqa")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        response_loss(model, [document(20, (10, 20))])
