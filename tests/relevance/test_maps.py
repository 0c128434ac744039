"""Relevance maps, compared with slow references in numpy and plain loops."""

import math
from typing import Optional

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wys_nerfstudio import relevance

OVER = pytest.mark.parametrize("over", ["view", "scene"])


def stacks(max_views: int = 3, low: float = 0.0, high: float = 4.0) -> st.SearchStrategy[torch.Tensor]:
    """Raw float64 maps; the values have few digits, so that ties and flat maps occur."""
    shape = st.tuples(st.integers(1, max_views), st.integers(1, 6), st.integers(1, 7))
    numbers = st.integers(0, 64).map(lambda n: low + (high - low) * n / 64)
    return shape.flatmap(lambda s: hnp.arrays(np.float64, s, elements=numbers)).map(torch.from_numpy)


def slow_normalize(raw: np.ndarray, factor: Optional[float]) -> np.ndarray:
    """Clamp at the upper Tukey fence (none without a factor), then min-max, over all values."""
    q1, q3 = np.percentile(raw, [25, 75])
    clamped = np.array([v if factor is None else min(v, q3 + factor * (q3 - q1)) for v in raw.ravel()])
    low, high = min(clamped), max(clamped)
    if high - low <= 1e-6 * max(abs(high), 1e-6):
        return np.zeros_like(raw)
    return np.array([(v - low) / (high - low) for v in clamped]).reshape(raw.shape)


def slow_normalize_stack(raw: np.ndarray, over: str, factor: Optional[float] = 1.5) -> np.ndarray:
    return np.stack([slow_normalize(view, factor) for view in raw]) if over == "view" else slow_normalize(raw, factor)


def test_noise_difference_is_the_absolute_mean_over_channels():
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    result = relevance.noise_difference(a, b)
    for i in range(2):
        for y in range(3):
            for x in range(5):
                expected = sum(abs(float(a[i, c, y, x]) - float(b[i, c, y, x])) for c in range(4)) / 4
                assert float(result[i, y, x]) == pytest.approx(expected, rel=1e-5)


def test_noise_difference_of_fp16_is_computed_in_fp32():
    a = torch.full((1, 4, 1, 1), 1.0, dtype=torch.float16)
    b = torch.tensor([0.0, 1 / 1024, 2 / 1024, 3 / 1024]).half().reshape(1, 4, 1, 1)
    result = relevance.noise_difference(a, b)
    assert result.dtype == torch.float32
    assert float(result) == 1 - 1.5 / 1024  # not representable in half precision


def test_noise_difference_is_symmetric_and_zero_for_equal_inputs():
    a, b = torch.rand(1, 4, 2, 2), torch.rand(1, 4, 2, 2)
    assert torch.equal(relevance.noise_difference(a, b), relevance.noise_difference(b, a))
    assert not relevance.noise_difference(a, a).any()


@given(hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-100, 100)))
def test_clamp_outliers_clamps_at_the_upper_tukey_fence(values):
    q1, q3 = np.percentile(values, [25, 75])
    expected = np.minimum(values, q3 + 1.5 * (q3 - q1))
    np.testing.assert_allclose(relevance.clamp_outliers(torch.from_numpy(values)), expected, rtol=1e-9, atol=1e-9)


def test_clamp_outliers_clamps_large_values_only():
    values = torch.tensor([-1000.0, 0.0, 1.0, 2.0, 3.0, 4.0, 1000.0])
    # Quartiles 0.5 and 3.5, so the fence is 3.5 + 1.5 * 3.
    assert relevance.clamp_outliers(values).tolist() == [-1000.0, 0.0, 1.0, 2.0, 3.0, 4.0, 8.0]


def test_clamp_outliers_treats_rows_independently():
    rows = torch.tensor([[0.0, 1.0, 2.0, 3.0, 100.0], [0.0, 10.0, 20.0, 30.0, 1000.0]])
    together = relevance.clamp_outliers(rows)
    assert torch.equal(together, torch.stack([relevance.clamp_outliers(row) for row in rows]))
    assert torch.equal(together[1], 10 * together[0])


@OVER
@given(raw=stacks(), factor=st.sampled_from([0.0, 0.3, 1.5, 1000.0, None]))
def test_normalize_equals_its_slow_reference(over, raw, factor):
    result = relevance.normalize(raw, over, factor)
    np.testing.assert_allclose(result, slow_normalize_stack(raw.numpy(), over, factor), atol=1e-9)
    assert torch.equal(relevance.normalize(raw, over), relevance.normalize(raw, over, 1.5))


@OVER
@given(raw=stacks(), factor=st.sampled_from([0.0, 0.3, 1.5, 1000.0]))
def test_upsample_normalizes_before_resizing(over, raw, factor):
    height, width = 2 * raw.shape[1], 3 * raw.shape[2]
    normalized = torch.from_numpy(slow_normalize_stack(raw.numpy(), over, factor))
    result = relevance.upsample(raw, height, width, over, factor)
    torch.testing.assert_close(result, relevance.resize(normalized, height, width), atol=1e-9, rtol=0)
    assert torch.equal(relevance.upsample(raw, height, width), relevance.upsample(raw, height, width, "view", 1.5))


@OVER
@given(raw=stacks())
def test_normalize_returns_values_in_the_unit_range(over, raw):
    result = relevance.normalize(raw.float(), over)
    assert result.shape == raw.shape
    assert bool(torch.isfinite(result).all())
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1


@OVER
def test_normalize_reaches_both_ends_of_the_range(over):
    torch.manual_seed(0)
    result = relevance.normalize(torch.rand(3, 8, 8), over)
    ends = [(float(v.min()), float(v.max())) for v in (result if over == "view" else result[None])]
    assert ends == [(0.0, 1.0)] * len(ends)


@OVER
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.37, 1e6])
def test_flat_maps_become_zeros(over, value):
    result = relevance.normalize(torch.full((2, 4, 5), value), over)
    assert torch.equal(result, torch.zeros(2, 4, 5))


def test_maps_that_differ_by_rounding_are_flat():
    flat = torch.full((1, 4, 4), 0.1)
    flat[0, :2] = torch.nextafter(
        flat[0, :2], torch.tensor(1.0)
    )  # half of the map, so that the fence does not clamp it
    assert not relevance.normalize(flat).any()


@OVER
def test_a_flat_view_does_not_affect_other_views(over):
    torch.manual_seed(0)
    raw = torch.stack([torch.full((6, 6), 0.25), torch.rand(6, 6)])
    result = relevance.normalize(raw, over)
    assert bool(torch.isfinite(result).all())
    assert (result[0] == result[0, 0, 0]).all()
    assert float(result[1].max()) == 1


def test_a_view_without_the_object_is_empty_over_the_scene():
    torch.manual_seed(0)
    noise = 0.01 * torch.rand(2, 8, 8)
    noise[1, 1:7, 1:7] += 1.0  # more than a quarter of all pixels, so that the fence does not clamp them
    assert float(relevance.normalize(noise, "scene")[0].max()) < 0.05
    assert float(relevance.normalize(noise, "view")[0].max()) == 1.0


@OVER
@given(raw=stacks(), scale=st.sampled_from([0.125, 0.5, 3.0, 16.0]), offset=st.sampled_from([0.0, 0.5, 2.0]))
def test_normalize_is_invariant_to_scale_and_offset(over, raw, scale, offset):
    plain, scaled = relevance.normalize(raw, over), relevance.normalize(scale * raw + offset, over)
    torch.testing.assert_close(scaled, plain, atol=1e-6, rtol=0)


@OVER
@given(raw=stacks(max_views=4), random=st.randoms(use_true_random=False))
def test_normalize_is_equivariant_to_the_order_of_views(over, raw, random):
    order = list(range(len(raw)))
    random.shuffle(order)
    assert torch.equal(relevance.normalize(raw[order], over), relevance.normalize(raw, over)[order])


@given(raw=stacks())
def test_normalize_over_view_treats_views_independently(raw):
    assert torch.equal(relevance.normalize(raw), torch.cat([relevance.normalize(view[None]) for view in raw]))


@given(raw=stacks())
def test_normalize_is_monotonic(raw):
    flat, result = raw.flatten(1), relevance.normalize(raw).flatten(1)
    order = flat.argsort(dim=1)
    assert (result.gather(1, order).diff(dim=1) >= 0).all()


@given(
    pairs=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=12),
    expectile=st.sampled_from([0.1, 0.5, 0.75, 0.9]),
)
def test_expectile_loss_equals_its_formula(pairs, expectile):
    rendered, maps = (torch.tensor(side, dtype=torch.float64) / 8 for side in zip(*pairs))
    expected = 0.0
    for a, b in pairs:
        weight = expectile if a > b else 1 - expectile
        expected += 2 * weight * (a / 8 - b / 8) ** 2 / len(pairs)
    assert float(relevance.expectile_loss(rendered, maps, expectile)) == pytest.approx(expected, abs=1e-6)


@given(raw=stacks(), seed=st.integers(0, 99))
def test_expectile_loss_of_one_half_is_the_squared_error(raw, seed):
    maps = relevance.normalize(raw)
    rendered = torch.rand(maps.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(
        relevance.expectile_loss(rendered, maps, 0.5),
        torch.nn.functional.mse_loss(rendered, maps),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("expectile", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("relevant", [0, 3, 10, 15, 18, 20])
def test_expectile_loss_has_the_documented_minimum(expectile, relevant):
    maps = torch.tensor([1.0] * relevant + [0.0] * (20 - relevant), dtype=torch.float64)
    values = torch.arange(1001, dtype=torch.float64) / 1000
    losses = [float(relevance.expectile_loss(value.expand(20), maps, expectile)) for value in values]
    best = float(values[losses.index(min(losses))])
    share = relevant / 20
    expected = share * (1 - expectile) / (share * (1 - expectile) + (1 - share) * expectile)
    assert best == pytest.approx(expected, abs=1e-3)
    assert (expected >= 0.5 - 1e-9) == (share >= expectile)


def test_resize_is_bilinear_between_pixel_centers():
    torch.manual_seed(0)
    small = torch.rand(1, 3, 4)
    result = relevance.resize(small, 6, 10)
    assert result.shape == (1, 6, 10)
    for y in range(6):
        for x in range(10):
            sy, sx = (min(max((p + 0.5) * n / m - 0.5, 0), n - 1) for p, n, m in ((y, 3, 6), (x, 4, 10)))
            y0, x0 = math.floor(sy), math.floor(sx)
            y1, x1 = min(y0 + 1, 2), min(x0 + 1, 3)
            top = (1 - (sx - x0)) * float(small[0, y0, x0]) + (sx - x0) * float(small[0, y0, x1])
            bottom = (1 - (sx - x0)) * float(small[0, y1, x0]) + (sx - x0) * float(small[0, y1, x1])
            assert float(result[0, y, x]) == pytest.approx((1 - (sy - y0)) * top + (sy - y0) * bottom, abs=1e-5)


def test_resize_to_the_same_size_is_the_identity():
    maps = torch.rand(2, 5, 7)
    assert torch.equal(relevance.resize(maps, 5, 7), maps)


@given(raw=stacks())
def test_threshold_zero_selects_every_pixel(raw):
    assert relevance.threshold(relevance.normalize(raw), 0.0).all()


@given(raw=stacks(), taus=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_higher_threshold_selects_a_subset(raw, taus):
    maps = relevance.normalize(raw)
    wide, narrow = relevance.threshold(maps, min(taus)), relevance.threshold(maps, max(taus))
    assert not (narrow & ~wide).any()


def test_threshold_is_inclusive():
    maps = torch.tensor([[0.25, 0.5, 0.75]])
    assert relevance.threshold(maps, 0.5).tolist() == [[False, True, True]]


@settings(max_examples=60)
@given(mask=st.tuples(st.just(2), st.integers(1, 9), st.integers(1, 9)).flatmap(lambda s: hnp.arrays(np.bool_, s)))
def test_dilate_adds_the_eight_neighbors(mask):
    expected = mask.copy()
    for view, y, x in zip(*mask.nonzero()):
        expected[view, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = True
    assert relevance.dilate(torch.from_numpy(mask)).tolist() == expected.tolist()


@settings(max_examples=60)
@given(
    mask=st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda s: hnp.arrays(np.bool_, s)),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_latent_mask_equals_its_slow_reference(mask, size):
    height, width = mask.shape
    h, w = size
    expected = np.zeros((h, w), dtype=bool)
    for y in range(height):
        for x in range(width):
            for j in range(h):
                for i in range(w):
                    # Pixel [y, y + 1) overlaps latent [j, j + 1) * height / h, compared in whole numbers.
                    overlaps = y * h < (j + 1) * height and j * height < (y + 1) * h
                    overlaps &= x * w < (i + 1) * width and i * width < (x + 1) * w
                    expected[j, i] |= overlaps and mask[y, x]
    result = relevance.latent_mask(torch.from_numpy(mask)[None], h, w)
    assert result.dtype == torch.bool
    assert result[0].tolist() == expected.tolist()


def test_latent_mask_includes_latents_with_one_edited_pixel():
    mask = torch.zeros(1, 32, 48, dtype=torch.bool)
    mask[0, 15, 16] = True
    assert relevance.latent_mask(mask, 4, 6)[0].nonzero().tolist() == [[1, 2]]


@given(raw=stacks(max_views=2), seed=st.integers(0, 99))
def test_composite_is_bit_exact_inside_and_outside_the_mask(raw, seed):
    generator = torch.Generator().manual_seed(seed)
    edited, reference = (torch.rand(*raw.shape, 3, generator=generator) for _ in range(2))
    mask = relevance.normalize(raw) >= 0.5
    result = relevance.composite(edited, reference, mask)
    assert torch.equal(result[mask], edited[mask])
    assert torch.equal(result[~mask], reference[~mask])


def test_composite_excludes_nan_outside_the_mask():
    edited, reference = torch.full((1, 2, 2, 3), float("nan")), torch.rand(1, 2, 2, 3)
    assert torch.equal(relevance.composite(edited, reference, torch.zeros(1, 2, 2, dtype=torch.bool)), reference)
