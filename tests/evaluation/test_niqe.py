"""NIQE, compared with a block-by-block reference in numpy and on degraded images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_ring_scene
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.io import savemat
from scipy.ndimage import correlate
from scipy.special import gamma

from wys_nerfstudio.evaluation.niqe import NiqeParams, check_niqe, features, niqe
from wys_nerfstudio.utils.errors import WysError


def natural_image(seed: int, height: int = 288, width: int = 384) -> torch.Tensor:
    """Return noise with a 1 / f spectrum, as photographs have."""
    draw = torch.Generator().manual_seed(seed)
    frequency = torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2
    frequency[0, 0] = math.inf
    spectrum = torch.randn(height, width // 2 + 1, 2, generator=draw)
    gray = torch.fft.irfft2(torch.view_as_complex(spectrum) / frequency.sqrt(), s=(height, width))
    return (0.5 + 0.15 * gray / gray.std()).clamp(0, 1)[..., None].expand(-1, -1, 3)


def fit_params(images: list[torch.Tensor]) -> NiqeParams:
    values = torch.cat([features(image) for image in images])
    return NiqeParams(values.mean(dim=0), values.t().cov())


@pytest.fixture(scope="module")
def natural() -> NiqeParams:
    return fit_params([natural_image(seed) for seed in range(6)])


def slow_gaussian(values: np.ndarray) -> tuple[float, float, float]:
    left, right = (np.sqrt(np.mean(side**2)) for side in (values[values < 0], values[values > 0]))
    r = np.mean(np.abs(values)) ** 2 / np.mean(values**2)
    expected = r * ((left / right) ** 3 + 1) * (left / right + 1) / ((left / right) ** 2 + 1) ** 2
    alpha = min(
        (abs(gamma(2 / a) ** 2 / (gamma(1 / a) * gamma(3 / a)) - expected), a) for a in np.arange(200, 10001) / 1000
    )[1]
    scale = math.sqrt(gamma(1 / alpha) / gamma(3 / alpha))
    return alpha, left * scale, right * scale


def slow_features(block: np.ndarray) -> list[float]:
    """Compute the 18 features of a normalized block with loops."""
    alpha, left, right = slow_gaussian(block)
    values = [alpha, (left + right) / 2]
    height, width = block.shape
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        products = np.array(
            [
                [block[y, x] * block[(y - down) % height, (x - across) % width] for x in range(width)]
                for y in range(height)
            ]
        )
        alpha, left, right = slow_gaussian(products)
        values += [alpha, (right - left) * gamma(2 / alpha) / gamma(1 / alpha), left, right]
    return values


def test_features_equal_their_slow_reference():
    image = natural_image(3, 97, 200)
    gray = np.round(np.round(image.double().numpy() * 255) @ [0.2989, 0.5870, 0.1140])[:96, :192]
    window = np.array([[math.exp(-(x * x + y * y) / (2 * (7 / 6) ** 2)) for x in range(-3, 4)] for y in range(-3, 4)])
    window /= window.sum()
    mean = correlate(gray, window, mode="nearest")
    deviation = np.sqrt(np.abs(correlate(gray**2, window, mode="nearest") - mean**2))
    normalized = (gray - mean) / (deviation + 1)
    expected = [slow_features(normalized[:, :96]), slow_features(normalized[:, 96:])]
    np.testing.assert_allclose(features(image)[:, :18].numpy(), expected, atol=2e-3)


def test_the_distance_equals_equation_10(natural: NiqeParams):
    image = natural_image(11)
    assert niqe(image, fit_params([image])) == pytest.approx(0, abs=1e-6)
    values = features(image).numpy()
    difference = natural.mean.numpy() - values.mean(axis=0)
    covariance = (natural.covariance.numpy() + np.cov(values, rowvar=False)) / 2
    assert niqe(image, natural) == pytest.approx(
        math.sqrt(difference @ np.linalg.inv(covariance) @ difference), rel=1e-4
    )


@hypothesis_settings(max_examples=5)
@given(seed=st.integers(100, 10**6))
def test_blur_and_noise_increase_niqe(natural: NiqeParams, seed: int):
    image = natural_image(seed)
    original = niqe(image, natural)
    channels = image.permute(2, 0, 1)[None]
    blurred = torch.nn.functional.avg_pool2d(channels, 5, stride=1, padding=2)[0].permute(1, 2, 0)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    assert niqe(blurred, natural) > original and niqe((image + 0.2 * noise).clamp(0, 1), natural) > original


def test_blocks_without_contrast_are_ignored(natural: NiqeParams):
    image = natural_image(5).clone()
    image[:96, :96] = 0.5
    assert math.isfinite(niqe(image, natural))


def write_parameters(path: Path, natural: NiqeParams) -> Path:
    savemat(path, {"mu_prisparam": natural.mean[None].numpy(), "cov_prisparam": natural.covariance.numpy()})
    return path


def test_parameters_are_read_from_a_mat_file(natural: NiqeParams, tmp_path: Path):
    read = NiqeParams.read(write_parameters(tmp_path / "modelparameters.mat", natural))
    assert torch.equal(read.mean, natural.mean) and torch.equal(read.covariance, natural.covariance)


@pytest.mark.parametrize("content", [None, b"", b"no matrices", "other names", "other sizes"])
def test_invalid_parameter_files_are_refused(content, tmp_path: Path):
    path = tmp_path / "x.mat"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        name = "mean" if content == "other names" else "mu_prisparam"
        savemat(path, {name: np.zeros((1, 3)), "cov_prisparam": np.zeros((3, 3))})
    with pytest.raises(
        WysError, match="The NIQE parameters cannot be read from .*modelparameters.mat of the authors' release"
    ):
        NiqeParams.read(path)


def test_images_without_contrast_give_nan(natural: NiqeParams):
    assert math.isnan(niqe(torch.full((96, 192, 3), 0.5), natural))


def test_small_views_are_refused(natural: NiqeParams, tmp_path: Path):
    parameters = write_parameters(tmp_path / "modelparameters.mat", natural)
    check_niqe(parameters, 96, 192)
    check_niqe(parameters, 200, 100)
    with pytest.raises(WysError, match="at least two blocks of 96x96 pixels, but the views have 190x100 pixels"):
        check_niqe(parameters, 100, 190)


def test_small_views_are_refused_before_the_first_step(natural, editor_folder, tmp_path):
    from test_pipeline import build_trainer, small_config

    scene = write_ring_scene(tmp_path / "scene")
    parameters = write_parameters(tmp_path / "modelparameters.mat", natural)
    config = small_config(scene, editor_folder, tmp_path / "out", niqe_params=parameters)
    with pytest.raises(SystemExit, match="omit --pipeline.niqe-params"):
        build_trainer(config)


def test_niqe_is_computed_for_every_view(natural, editor_folder, tmp_path, monkeypatch):
    from test_pipeline import build_trainer, small_config

    scene = write_ring_scene(tmp_path / "scene", width=192, height=96, views=3)
    parameters = write_parameters(tmp_path / "modelparameters.mat", natural)
    config = small_config(scene, editor_folder, tmp_path / "out", niqe_params=parameters)
    pipeline = build_trainer(config).pipeline
    pipeline.eval()
    monkeypatch.setattr(
        pipeline.scene_model, "render_colors", lambda _, view: natural_image(view, height=96, width=192)
    )
    computed = pipeline.evaluate_edit()["edit_niqe"]
    expected = [niqe(natural_image(view, 96, 192), natural) for view in range(pipeline.datamanager.num_views)]
    assert computed == pytest.approx(expected) and len(set(expected)) == 3
