"""The span grid: its alphas, its rules and their place in a table, and what it refuses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.runtime.span import FULL, PAGE
from compress.targets.window import SpanGrid

grids = st.builds(
    SpanGrid,
    sinks=st.lists(st.integers(0, 200), min_size=1, max_size=3, unique=True).map(sorted),
    betas=st.lists(st.integers(0, 16).map(lambda n: n / 16), min_size=1, max_size=4, unique=True).map(sorted),
    alpha_min=st.integers(-3, 4).map(lambda pages: pages * PAGE),
    alpha_step=st.integers(1, 5).map(lambda pages: pages * PAGE),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids, st.integers(1, 3000), st.integers(0, 2000))
def test_alphas_reach_the_length_and_extend_with_it(grid: SpanGrid, length: int, more: int) -> None:
    alphas = grid.alphas(length)
    assert alphas[0] == grid.alpha_min
    assert alphas[-1] >= length
    assert len(alphas) == 1 or alphas[-2] < length
    assert grid.alphas(length + more)[: len(alphas)] == alphas


@settings(max_examples=40, deadline=None, derandomize=True)
@given(grids, st.integers(1, 1500))
def test_rules_know_their_place_in_the_table(grid: SpanGrid, length: int) -> None:
    full, *windows = grid.rules(length)
    assert (full.span, full.index) == (FULL, None)
    alphas = grid.alphas(length)
    for rule in windows:
        assert rule.index is not None
        sink, beta, alpha = rule.index
        assert rule.span.sink == grid.sinks[sink]
        assert rule.span.beta == grid.betas[beta] < 1
        assert rule.span.alpha == alphas[alpha]
    growing = sum(beta < 1 for beta in grid.betas)
    assert len({rule.span for rule in windows}) == len(windows) == len(grid.sinks) * growing * len(alphas)


def test_alpha_max_cuts_the_list() -> None:
    assert SpanGrid(alpha_max=192).alphas(100) == [64, 128]
    assert SpanGrid(alpha_max=192).alphas(5000) == [64, 128, 192]
    assert SpanGrid(alpha_min=256).alphas(100) == [256]


def test_default_grid_goes_through_json() -> None:
    grid = SpanGrid()
    assert SpanGrid.model_validate_json(grid.model_dump_json(), strict=True) == grid
    assert grid.betas[0] == 0 and grid.betas[-1] == 1


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"betas": [0.1]}, "multiples of 1/1024, got 0.1; the nearest is 0.099609375"),
        ({"betas": [0, 1.5]}, "0 <= beta <= 1"),
        ({"betas": [0.5, 0.25]}, "ascending"),
        ({"betas": []}, "at least 1 item"),
        ({"sinks": [4, 4]}, "ascending"),
        ({"sinks": [-1]}, "tokens >= 0"),
        ({"alpha_step": 100}, "multiple of 64"),
        ({"alpha_step": 0}, "greater than or equal to 64"),
        ({"alpha_min": 10}, "multiple of 64"),
        ({"alpha_max": 100}, "multiple of 64"),
        ({"alpha_max": 0}, "at least alpha_min"),
        ({"gamma": 1}, "Extra inputs"),
    ],
)
def test_refuses_impossible_parameters(parameters: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SpanGrid(**parameters)
