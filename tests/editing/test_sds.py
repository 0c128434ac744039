"""The gradient of eq. 13 and gradient descent with it, on toy denoisers with known predictions."""

import math

import pytest
import torch
from test_sampling import ALPHAS, level, levels_of

from wys_nerfstudio.editing.editor import NoiseLevel
from wys_nerfstudio.editing.sds import sds_gradient, sds_optimize

LATENTS = (2, 3, 4, 5)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(t: int) -> NoiseLevel:
    return level(float(ALPHAS[t]), t)


def toy_relevance(latents: torch.Tensor, at: NoiseLevel) -> torch.Tensor:
    """Signed relevance of a toy denoiser; nonlinear, so that its derivative would be detected."""
    return torch.sin(1.3 * latents + at.time / 250)


def encode(images: torch.Tensor) -> torch.Tensor:
    """A nonlinear toy encoder, (b, 6, 8, 10) to (b, 3, 4, 5)."""
    folded = images[:, ::2] * images[:, 1::2] + images[:, ::2].tanh()
    return torch.nn.functional.avg_pool2d(folded, 2)


@pytest.mark.parametrize("t", [20, 500, 980])
def test_the_gradient_on_latents_equals_its_formula(t):
    latents, noise = random(*LATENTS), random(*LATENTS, seed=1)
    alpha, sigma = math.sqrt(float(ALPHAS[t])), math.sqrt(1 - float(ALPHAS[t]))
    expected = alpha / sigma * toy_relevance(alpha * latents + sigma * noise, at(t))
    result = sds_gradient(latents, lambda x: x, toy_relevance, noise, at(t))
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def test_the_gradient_through_an_encoder_is_correct():
    images, noise, t, step = random(2, 6, 8, 10), random(*LATENTS, seed=1), 600, 1e-5
    alpha, sigma = math.sqrt(float(ALPHAS[t])), math.sqrt(1 - float(ALPHAS[t]))
    vector = alpha / sigma * toy_relevance(alpha * encode(images) + sigma * noise, at(t))
    result = sds_gradient(images, encode, toy_relevance, noise, at(t))
    assert result.shape == images.shape
    for index in [(0, 0, 0, 0), (0, 3, 5, 7), (1, 2, 4, 1), (1, 5, 7, 9)]:
        offset = torch.zeros_like(images)
        offset[index] = step
        slope = (encode(images + offset) - encode(images - offset)) / (2 * step)
        assert float(result[index]) == pytest.approx(float((vector * slope).sum()), rel=1e-6, abs=1e-9)


def test_the_gradient_is_detached():
    with torch.no_grad():
        latents = random(*LATENTS)
        result = sds_gradient(latents, lambda x: x, toy_relevance, latents, at(500))
    assert not result.requires_grad and not latents.requires_grad


def test_optimization_equals_its_slow_reference():
    start, noise, timesteps, reports = random(*LATENTS), random(3, *LATENTS, seed=1), [900, 500, 100], []
    result = sds_optimize(
        start, None, noise, levels_of(timesteps)[:-1], toy_relevance, 0.02, lambda *done: reports.append(done)
    )
    expected = start.clone()
    for t, step_noise in zip(timesteps, noise):
        alpha, sigma = math.sqrt(float(ALPHAS[t])), math.sqrt(1 - float(ALPHAS[t]))
        expected = expected - 0.02 * alpha / sigma * toy_relevance(alpha * expected + sigma * step_noise, at(t))
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
    assert reports == [(1, 3), (2, 3), (3, 3)]


def test_optimization_moves_the_input_to_the_target():
    """Exact denoisers of two images: the difference of their predictions points from one image to the other."""
    start, target = random(*LATENTS), random(*LATENTS, seed=1)
    timesteps = list(range(980, 20, -20))

    def signed(latents: torch.Tensor, at: NoiseLevel) -> torch.Tensor:
        return at.signal * (start - target) / at.noise

    total = sum(float(ALPHAS[t] / (1 - ALPHAS[t])) for t in timesteps)
    noise = random(len(timesteps), *LATENTS, seed=2)
    result = sds_optimize(start, None, noise, levels_of(timesteps)[:-1], signed, 1 / total)
    torch.testing.assert_close(result, target)


def test_latents_outside_the_mask_do_not_change():
    start, mask = random(*LATENTS), random(2, 4, 5, seed=3) > 0
    noise = random(2, *LATENTS, seed=1)
    result = sds_optimize(start, mask, noise, levels_of([900, 300])[:-1], toy_relevance, 0.1)
    inside = mask[:, None].expand_as(start)
    assert torch.equal(result[~inside], start[~inside])
    assert not torch.isclose(result[inside], start[inside]).any()
