"""Agreement of two corpora: known rankings, and a profile of both."""

from pathlib import Path

import pytest
import torch

from compress.profile.run import run_profile
from compress.profile.stability import agreement, both_kept, number_kept, rank_correlation, stabilities
from compress.profile.units.amp import Amp
from compress.profile.units.magnitude import Magnitude
from tests.profile.common import document, documents
from tests.tiny import tiny_loaded


def test_rank_correlation_of_known_rankings() -> None:
    rising = torch.arange(5.0)
    assert rank_correlation(rising, rising.exp()) == pytest.approx(1)
    assert rank_correlation(rising, -rising) == pytest.approx(-1)
    swapped = torch.tensor([1.0, 0.0, 2.0, 3.0, 4.0])
    assert rank_correlation(rising, swapped) == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert rank_correlation(rising, torch.ones(5)) is None
    assert rank_correlation(torch.ones(1), torch.ones(1)) is None


def test_what_both_keep() -> None:
    rising = torch.arange(10.0)
    assert both_kept(rising, rising * 2) == 1
    # Of eight kept each, six are the same.
    assert both_kept(rising, -rising) == 6 / 8
    assert [number_kept(units) for units in (1, 2, 3, 5, 10)] == [1, 1, 2, 4, 8]


def test_layers_are_compared_one_by_one_and_groups_by_their_mean() -> None:
    first = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]]])
    second = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[4.0, 3.0], [2.0, 1.0]]])
    found = agreement(first.repeat(1, 5, 1), second.repeat(1, 5, 1), groups=True)
    assert found.mean == pytest.approx(0) and found.lowest is not None
    assert found.lowest[0] == pytest.approx(-1) and found.lowest[1] == 1
    # Eight of ten groups: all five high ones and three low ones; the order turned round, six of them stay.
    assert found.kept == pytest.approx((1 + 6 / 8) / 2) and found.chance == pytest.approx(0.8)


def test_a_profile_of_two_corpora_says_how_they_agree(tmp_path: Path) -> None:
    loaded, statistics = tiny_loaded("llama-mha"), [Amp(), Magnitude()]
    alike = run_profile(loaded, documents(), statistics, tmp_path / "a", seed=0, second=documents())
    found = stabilities(alike)
    assert list(found) == ["amp"]
    assert found["amp"].neurons.mean == pytest.approx(1) and found["amp"].neurons.kept == 1
    other = {64: [document(64, seed=30)]}
    differing = stabilities(run_profile(loaded, documents(), statistics, tmp_path / "b", seed=0, second=other))["amp"]
    assert differing.neurons.mean is not None and 0 < differing.neurons.mean < 1
    assert "rank correlation within a layer, heads" in differing.line()
    assert not stabilities(run_profile(loaded, documents(), statistics, tmp_path / "c", seed=0))
