"""Measures against their definitions, written out."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.metrics import average_precision, intersection_over_union, psnr, roc_auc


def maps_and_truths(values: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[torch.Tensor, torch.Tensor]]:
    pairs = st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=24)
    return pairs.map(lambda p: (torch.tensor([[v for v, _ in p]]), torch.tensor([[t for _, t in p]])))


ties = st.integers(0, 8).map(lambda n: n / 8)


def slow_average_precision(relevance: list[float], truth: list[bool]) -> float:
    """Sum of precision times the gain in recall, over the thresholds from high to low; ties enter together."""
    total, recall = 0.0, 0.0
    for tau in sorted(set(relevance), reverse=True):
        chosen = [t for r, t in zip(relevance, truth) if r >= tau]
        total += (sum(chosen) / sum(truth) - recall) * sum(chosen) / len(chosen)
        recall = sum(chosen) / sum(truth)
    return total


def slow_roc_auc(relevance: list[float], truth: list[bool]) -> float:
    """Share of pairs (changed, unchanged) in which the changed pixel has more; ties count half."""
    changed = [r for r, t in zip(relevance, truth) if t]
    unchanged = [r for r, t in zip(relevance, truth) if not t]
    return sum((a > b) + 0.5 * (a == b) for a in changed for b in unchanged) / (len(changed) * len(unchanged))


def test_psnr_equals_its_formula():
    torch.manual_seed(0)
    a, b = torch.rand(5, 4, 3), torch.rand(5, 4, 3)
    squares = [(x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist())]
    assert psnr(a, b) == pytest.approx(-10 * math.log10(sum(squares) / len(squares)), abs=1e-9)


def test_psnr_of_a_tenth_of_the_range_is_20_decibels():
    assert psnr(torch.full((2, 3, 3, 3), 0.5), torch.full((2, 3, 3, 3), 0.4)) == pytest.approx(20, abs=1e-5)


def test_psnr_of_equal_pictures_is_infinite():
    image = torch.rand(4, 4, 3)
    assert psnr(image, image) == math.inf


def test_psnr_counts_the_masks_pixels_only():
    torch.manual_seed(0)
    a, b, mask = torch.rand(2, 6, 5, 3), torch.rand(2, 6, 5, 3), torch.rand(2, 6, 5) > 0.5
    squares = [
        float(a[i, y, x, c].double() - b[i, y, x, c].double()) ** 2
        for i, y, x in mask.nonzero().tolist()
        for c in range(3)
    ]
    assert psnr(a, b, mask) == pytest.approx(-10 * math.log10(sum(squares) / len(squares)), abs=1e-9)


def test_psnr_of_an_empty_mask_is_nan():
    assert math.isnan(psnr(torch.rand(3, 3, 3), torch.rand(3, 3, 3), torch.zeros(3, 3, dtype=torch.bool)))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_intersection_over_union_equals_its_count(pairs):
    a, b = (torch.tensor([[p[i] for p in pairs]]) for i in range(2))
    either = sum(x or y for x, y in pairs)
    wanted = sum(x and y for x, y in pairs) / either if either else 1.0
    assert intersection_over_union(a, b) == pytest.approx(wanted, abs=1e-6)


@given(maps_and_truths(ties))
def test_average_precision_equals_its_twin(pair):
    relevance, truth = pair
    result = average_precision(relevance, truth)
    if not truth.any():
        assert math.isnan(result)
    else:
        assert result == pytest.approx(slow_average_precision(relevance[0].tolist(), truth[0].tolist()), abs=1e-5)


@given(maps_and_truths(ties))
def test_roc_auc_equals_its_twin(pair):
    relevance, truth = pair
    result = roc_auc(relevance, truth)
    if truth.all() or not truth.any():
        assert math.isnan(result)
    else:
        assert result == pytest.approx(slow_roc_auc(relevance[0].tolist(), truth[0].tolist()), abs=1e-5)


def test_a_perfect_map_scores_one_and_a_constant_map_scores_chance():
    truth = torch.zeros(2, 8, 8, dtype=torch.bool)
    truth[:, 2:6, 3:5] = True
    assert average_precision(truth.float(), truth) == pytest.approx(1)
    assert roc_auc(truth.float(), truth) == pytest.approx(1)
    constant = torch.full((2, 8, 8), 0.3)
    assert average_precision(constant, truth) == pytest.approx(float(truth.float().mean()))
    assert roc_auc(constant, truth) == pytest.approx(0.5)


def test_the_ranking_is_all_that_counts():
    values = [random.Random(0).random() for _ in range(40)]
    relevance, truth = torch.tensor([values]), torch.rand(1, 40, generator=torch.Generator().manual_seed(1)) > 0.6
    assert average_precision(relevance**3, truth) == pytest.approx(average_precision(relevance, truth), abs=1e-6)
    assert roc_auc(relevance**3, truth) == pytest.approx(roc_auc(relevance, truth), abs=1e-6)
