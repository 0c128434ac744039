"""Metrics, compared with slow references."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.evaluation.metrics import (
    average_precision,
    direction_consistency,
    direction_similarity,
    frame_consistency,
    image_similarity,
    intersection_over_union,
    psnr,
    roc_auc,
    ssim,
    text_image_similarity,
)


def maps_and_targets(values: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[torch.Tensor, torch.Tensor]]:
    pairs = st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=24)
    return pairs.map(lambda p: (torch.tensor([[v for v, _ in p]]), torch.tensor([[t for _, t in p]])))


ties = st.integers(0, 8).map(lambda n: n / 8)


def slow_average_precision(relevance: list[float], target: list[bool]) -> float:
    """Sum of precision times the increase of recall over descending thresholds; ties are added together."""
    total, recall = 0.0, 0.0
    for tau in sorted(set(relevance), reverse=True):
        chosen = [t for r, t in zip(relevance, target) if r >= tau]
        total += (sum(chosen) / sum(target) - recall) * sum(chosen) / len(chosen)
        recall = sum(chosen) / sum(target)
    return total


def slow_roc_auc(relevance: list[float], target: list[bool]) -> float:
    """Share of pairs (changed, unchanged) in which the changed pixel scores higher; ties count one half."""
    changed = [r for r, t in zip(relevance, target) if t]
    unchanged = [r for r, t in zip(relevance, target) if not t]
    return sum((a > b) + 0.5 * (a == b) for a in changed for b in unchanged) / (len(changed) * len(unchanged))


def test_psnr_equals_its_formula():
    torch.manual_seed(0)
    a, b = torch.rand(5, 4, 3), torch.rand(5, 4, 3)
    squares = [(x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist())]
    assert psnr(a, b) == pytest.approx(-10 * math.log10(sum(squares) / len(squares)), abs=1e-9)


def test_psnr_of_a_difference_of_one_tenth_is_20_db():
    assert psnr(torch.full((2, 3, 3, 3), 0.5), torch.full((2, 3, 3, 3), 0.4)) == pytest.approx(20, abs=1e-5)


def test_psnr_of_equal_images_is_infinite():
    image = torch.rand(4, 4, 3)
    assert psnr(image, image) == math.inf


def test_psnr_is_restricted_to_the_mask():
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
def test_intersection_over_union_equals_its_reference(pairs):
    a, b = (torch.tensor([[p[i] for p in pairs]]) for i in range(2))
    either = sum(x or y for x, y in pairs)
    expected = sum(x and y for x, y in pairs) / either if either else 1.0
    assert intersection_over_union(a, b) == pytest.approx(expected, abs=1e-6)


@given(maps_and_targets(ties))
def test_average_precision_equals_its_reference(pair):
    relevance, target = pair
    result = average_precision(relevance, target)
    if not target.any():
        assert math.isnan(result)
    else:
        assert result == pytest.approx(slow_average_precision(relevance[0].tolist(), target[0].tolist()), abs=1e-5)


@given(maps_and_targets(ties))
def test_roc_auc_equals_its_reference(pair):
    relevance, target = pair
    result = roc_auc(relevance, target)
    if target.all() or not target.any():
        assert math.isnan(result)
    else:
        assert result == pytest.approx(slow_roc_auc(relevance[0].tolist(), target[0].tolist()), abs=1e-5)


def test_perfect_maps_score_one_and_constant_maps_chance():
    target = torch.zeros(2, 8, 8, dtype=torch.bool)
    target[:, 2:6, 3:5] = True
    assert average_precision(target.float(), target) == pytest.approx(1)
    assert roc_auc(target.float(), target) == pytest.approx(1)
    constant = torch.full((2, 8, 8), 0.3)
    assert average_precision(constant, target) == pytest.approx(float(target.float().mean()))
    assert roc_auc(constant, target) == pytest.approx(0.5)


def test_ranking_metrics_are_invariant_to_monotonic_maps():
    values = [random.Random(0).random() for _ in range(40)]
    relevance, target = torch.tensor([values]), torch.rand(1, 40, generator=torch.Generator().manual_seed(1)) > 0.6
    assert average_precision(relevance**3, target) == pytest.approx(average_precision(relevance, target), abs=1e-6)
    assert roc_auc(relevance**3, target) == pytest.approx(roc_auc(relevance, target), abs=1e-6)


def test_psnr_does_not_overflow_on_large_differences():
    bright, dark = torch.full((4, 4, 3), 251 / 255), torch.full((4, 4, 3), 10 / 255)
    assert psnr(bright, dark) == pytest.approx(-20 * math.log10(241 / 255), abs=1e-5)
    wrapped = (251 - 10) ** 2 % 256
    assert psnr(bright, dark) < 10 * math.log10(255**2 / wrapped) - 20


def slow_ssim(x: list[list[float]], y: list[list[float]]) -> float:
    """Mean over all positions of an 11 x 11 Gaussian window (sigma 1.5); images are reflected at their borders."""
    kernel = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weight = [[a * b / sum(kernel) ** 2 for a in kernel] for b in kernel]
    n = len(x)

    def reflect(i: int) -> int:
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    total = 0.0
    for row in range(n):
        for column in range(n):
            window = [
                (weight[i][j], x[reflect(row + i - 5)][reflect(column + j - 5)], y[reflect(row + i - 5)][reflect(column + j - 5)])
                for i in range(11) for j in range(11)
            ]  # fmt: skip
            mx, my = sum(w * a for w, a, _ in window), sum(w * b for w, _, b in window)
            xx, yy = sum(w * a * a for w, a, _ in window) - mx**2, sum(w * b * b for w, _, b in window) - my**2
            xy = sum(w * a * b for w, a, b in window) - mx * my
            c1, c2 = 0.01**2, 0.03**2
            total += (2 * mx * my + c1) * (2 * xy + c2) / ((mx**2 + my**2 + c1) * (xx + yy + c2))
    return total / n**2


def test_ssim_equals_its_reference():
    torch.manual_seed(3)
    x = torch.rand(16, 16)
    y = (x + 0.3 * torch.rand(16, 16)).clamp(0, 1)
    first, second = (image[..., None].expand(-1, -1, 3) for image in (x, y))
    assert ssim(first, second) == pytest.approx(slow_ssim(x.tolist(), y.tolist()), abs=2e-3)
    assert ssim(first, first) == pytest.approx(1.0)


def slow_cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(v * w for v, w in zip(a, b)) / lengths if lengths else 0.0


def subtract(a: list[float], b: list[float]) -> list[float]:
    return [v - w for v, w in zip(a, b)]


@given(st.integers(0, 1000))
def test_similarities_equal_their_references(seed: int):
    draw = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, 4, 5, generator=draw)
    text_before, text_after = torch.randn(2, 5, generator=draw)
    b, a, tb, ta = before.tolist(), after.tolist(), text_before.tolist(), text_after.tolist()
    expected = {
        "image": ([slow_cosine(x, y) for x, y in zip(a, b)], image_similarity(before, after)),
        "text": ([slow_cosine(x, ta) for x in a], text_image_similarity(after, text_after)),
        "direction": (
            [slow_cosine(subtract(x, y), subtract(ta, tb)) for x, y in zip(a, b)],
            direction_similarity(before, after, text_before, text_after),
        ),
        "consistency": (
            [slow_cosine(subtract(a[k], b[k]), subtract(a[k + 1], b[k + 1])) for k in range(3)],
            direction_consistency(before, after),
        ),
        "frames": ([slow_cosine(a[k], a[k + 1]) for k in range(3)], frame_consistency(after)),
    }
    for name, (slow, fast) in expected.items():
        assert fast.tolist() == pytest.approx(slow, abs=1e-5), name
        assert bool((fast.abs() <= 1 + 1e-6).all())


def test_similarities_of_known_vectors():
    same = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    captions = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    assert image_similarity(same, same).tolist() == pytest.approx([1.0, 1.0])
    assert direction_similarity(same, same, *captions).tolist() == [0.0, 0.0], (
        "the change of an unchanged view is a zero vector"
    )
    shifted = same + torch.tensor([0.5, -0.5])
    assert direction_similarity(same, shifted, *captions).tolist() == pytest.approx([1.0, 1.0])
    assert direction_similarity(shifted, same, *captions).tolist() == pytest.approx([-1.0, -1.0])
    assert direction_consistency(same, shifted).tolist() == pytest.approx([1.0])
