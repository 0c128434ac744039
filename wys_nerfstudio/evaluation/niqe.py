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
                f'NIQE\'s parameters cannot be read from "{path}": --pipeline.niqe-params takes modelparameters.mat of the '
                'authors\' release, with "mu_prisparam" and "cov_prisparam" in it.'
            ) from error


def check_niqe(parameters: Path, height: int, width: int) -> None:
    """Refuses parameters that cannot be read, and views that are too small for a covariance.

    Raises:
        WysError: If they are.
    """
    NiqeParams.read(parameters)
    if (height // BLOCK) * (width // BLOCK) < 2:
        raise WysError(
            f"NIQE looks at blocks of {BLOCK}x{BLOCK} pixels and needs two of them, and the views are {width}x{height}: leave "
            "out --pipeline.niqe-params."
        )


def niqe(image: Float[Tensor, "h w 3"], natural: NiqeParams) -> float:
    """Distance of a picture's features from those of natural pictures (eq. 10).

    Args:
        image: A picture in [0, 1] with at least two blocks; what is left over of one at its right and bottom is not seen.
        natural: What natural pictures are like.

    Returns:
        The distance; NaN if fewer than two blocks have contrast.
    """
    found = features(image)
    found = found[found.isfinite().all(dim=1)]
    if len(found) < 2:
        return math.nan
    away = natural.mean - found.mean(dim=0)
    together = torch.linalg.pinv((natural.covariance + found.t().cov()) / 2)
    return float((away @ together @ away).sqrt())


def features(image: Float[Tensor, "h w 3"]) -> Float[Tensor, "blocks 36"]:
    """Features of every block, at full and at half size; NaN in blocks without contrast."""
    rows, columns = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    weights = torch.tensor([0.2989, 0.5870, 0.1140], dtype=torch.float64)
    gray = ((image.double() * 255).round() @ weights).round()[None, None, : rows * BLOCK, : columns * BLOCK]
    half = F.interpolate(gray, scale_factor=0.5, mode="bicubic", antialias=True)
    return torch.cat([_of_scale(gray, BLOCK), _of_scale(half, BLOCK // 2)], dim=1)


def _of_scale(gray: Float[Tensor, "1 1 h w"], side: int) -> Float[Tensor, "blocks 18"]:
    parts = F.unfold(_normalized(gray), side, stride=side)[0].t().reshape(-1, side, side)
    alpha, left, right = _asymmetric_gaussian(parts)
    found = [alpha, (left + right) / 2]
    for shift in SHIFTS:
        alpha, left, right = _asymmetric_gaussian(parts * parts.roll(shift, dims=(1, 2)))
        mean = (right - left) * ((2 / alpha).lgamma() - (1 / alpha).lgamma()).exp()  # eq. 8
        found += [alpha, mean, left, right]
    return torch.stack(found, dim=1)


def _normalized(gray: Float[Tensor, "1 1 h w"]) -> Float[Tensor, "1 1 h w"]:
    """Differences from the local mean, in local standard deviations (eq. 1)."""
    steps = torch.arange(WINDOW, dtype=gray.dtype) - WINDOW // 2
    bell = (-(steps**2) / (2 * (WINDOW / 6) ** 2)).exp()
    window = (bell[:, None] * bell / bell.sum() ** 2)[None, None]

    def smooth(values: Tensor) -> Tensor:
        return F.conv2d(F.pad(values, [WINDOW // 2] * 4, mode="replicate"), window)

    mean = smooth(gray)
    return (gray - mean) / ((smooth(gray**2) - mean**2).abs().sqrt() + 1)


def _asymmetric_gaussian(
    parts: Float[Tensor, "blocks h w"],
) -> tuple[Float[Tensor, "blocks"], Float[Tensor, "blocks"], Float[Tensor, "blocks"]]:
    """Shape and left and right scale of the generalized Gaussian with a block's moments (eq. 4)."""
    values = parts.flatten(1)
    left, right = (((values**2) * side).sum(dim=1).div(side.sum(dim=1)).sqrt() for side in (values < 0, values > 0))
    ratio = left / right
    moments = values.abs().mean(dim=1) ** 2 / (values**2).mean(dim=1)
    wanted = moments * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shapes = torch.arange(200, 10001, dtype=values.dtype) / 1000
    offered = (2 * (2 / shapes).lgamma() - (1 / shapes).lgamma() - (3 / shapes).lgamma()).exp()
    alpha = shapes[(offered - wanted[:, None]).abs().argmin(dim=1)]
    scale = (((1 / alpha).lgamma() - (3 / alpha).lgamma()) / 2).exp()
    return alpha, left * scale, right * scale
