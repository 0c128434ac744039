"""NIQE, a no-reference image quality metric; lower is better.

Mittal, Soundararajan and Bovik, "Making a 'Completely Blind' Image Quality Analyzer", 2013; equation numbers
refer to that paper. No maintained package provides NIQE under a compatible license; the parameters of natural images are read
from a file of the authors' release.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio.utils.errors import WysError

BLOCK = 96
"""Side of the image blocks in pixels."""
WINDOW = 7
"""Side of the Gaussian window in pixels."""
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Offsets of the neighbors in the products of coefficients (eq. 7)."""


@dataclass(frozen=True)
class NiqeParams:
    """Gaussian model of the features of natural images."""

    mean: Float[Tensor, "36"]
    """Mean of the features."""
    covariance: Float[Tensor, "36 36"]
    """Covariance of the features."""

    @staticmethod
    def read(path: Path) -> "NiqeParams":
        """Read `modelparameters.mat` of the authors' release.

        Raises:
            WysError: If the file cannot be read.
        """
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        try:
            data = loadmat(path)
            mean, covariance = (torch.from_numpy(data[f"{name}_prisparam"]).double() for name in ("mu", "cov"))
            return NiqeParams(mean.reshape(36), covariance.reshape(36, 36))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, MatReadError) as error:
            raise WysError(
                f'The NIQE parameters cannot be read from "{path}": --pipeline.niqe-params takes modelparameters.mat of the '
                'authors\' release, which contains "mu_prisparam" and "cov_prisparam".'
            ) from error


def check_niqe(parameters: Path, height: int, width: int) -> None:
    """Check that NIQE can be computed.

    Args:
        parameters: File of the parameters.
        height: Height of the views in pixels.
        width: Width of the views in pixels.

    Raises:
        WysError: If the parameters cannot be read, or the views are too small for a covariance.
    """
    NiqeParams.read(parameters)
    if (height // BLOCK) * (width // BLOCK) < 2:
        raise WysError(
            f"NIQE requires at least two blocks of {BLOCK}x{BLOCK} pixels, but the views have {width}x{height} pixels: omit "
            "--pipeline.niqe-params."
        )


def niqe(image: Float[Tensor, "h w 3"], natural: NiqeParams) -> float:
    """Compute the distance between the features of an image and those of natural images (eq. 10).

    Args:
        image: Image in [0, 1] with at least two blocks; incomplete blocks at the right and bottom are ignored.
        natural: Parameters of natural images.

    Returns:
        The distance; NaN if fewer than two blocks have contrast.
    """
    values = features(image)
    values = values[values.isfinite().all(dim=1)]
    if len(values) < 2:
        return math.nan
    difference = natural.mean - values.mean(dim=0)
    precision = torch.linalg.pinv((natural.covariance + values.t().cov()) / 2)
    return float((difference @ precision @ difference).sqrt())


def features(image: Float[Tensor, "h w 3"]) -> Float[Tensor, "blocks 36"]:
    """Compute the features of every block at full and at half resolution; NaN in blocks without contrast."""
    rows, columns = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    weights = torch.tensor([0.2989, 0.5870, 0.1140], dtype=torch.float64)
    gray = ((image.double() * 255).round() @ weights).round()[None, None, : rows * BLOCK, : columns * BLOCK]
    half = F.interpolate(gray, scale_factor=0.5, mode="bicubic", antialias=True)
    return torch.cat([_scale_features(gray, BLOCK), _scale_features(half, BLOCK // 2)], dim=1)


def _scale_features(gray: Float[Tensor, "1 1 h w"], side: int) -> Float[Tensor, "blocks 18"]:
    """Compute the features of every block at one resolution."""
    blocks = F.unfold(_normalize(gray), side, stride=side)[0].t().reshape(-1, side, side)
    alpha, left, right = _fit_asymmetric_gaussian(blocks)
    values = [alpha, (left + right) / 2]
    for shift in SHIFTS:
        alpha, left, right = _fit_asymmetric_gaussian(blocks * blocks.roll(shift, dims=(1, 2)))
        mean = (right - left) * ((2 / alpha).lgamma() - (1 / alpha).lgamma()).exp()  # eq. 8
        values += [alpha, mean, left, right]
    return torch.stack(values, dim=1)


def _normalize(gray: Float[Tensor, "1 1 h w"]) -> Float[Tensor, "1 1 h w"]:
    """Subtract the local mean and divide by the local standard deviation (eq. 1)."""
    offsets = torch.arange(WINDOW, dtype=gray.dtype) - WINDOW // 2
    gaussian = (-(offsets**2) / (2 * (WINDOW / 6) ** 2)).exp()
    window = (gaussian[:, None] * gaussian / gaussian.sum() ** 2)[None, None]

    def smooth(values: Tensor) -> Tensor:
        return F.conv2d(F.pad(values, [WINDOW // 2] * 4, mode="replicate"), window)

    mean = smooth(gray)
    return (gray - mean) / ((smooth(gray**2) - mean**2).abs().sqrt() + 1)


def _fit_asymmetric_gaussian(
    blocks: Float[Tensor, "blocks h w"],
) -> tuple[Float[Tensor, "blocks"], Float[Tensor, "blocks"], Float[Tensor, "blocks"]]:
    """Fit the asymmetric generalized Gaussian distribution to each block by moment matching (eq. 4).

    Returns:
        Shape, left scale and right scale.
    """
    values = blocks.flatten(1)
    left, right = (((values**2) * side).sum(dim=1).div(side.sum(dim=1)).sqrt() for side in (values < 0, values > 0))
    ratio = left / right
    moments = values.abs().mean(dim=1) ** 2 / (values**2).mean(dim=1)
    target = moments * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shapes = torch.arange(200, 10001, dtype=values.dtype) / 1000
    candidates = (2 * (2 / shapes).lgamma() - (1 / shapes).lgamma() - (3 / shapes).lgamma()).exp()
    alpha = shapes[(candidates - target[:, None]).abs().argmin(dim=1)]
    scale = (((1 / alpha).lgamma() - (3 / alpha).lgamma()) / 2).exp()
    return alpha, left * scale, right * scale
