"""Agreement of cameras with their image files, and rescaling of cameras."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from torch import Tensor

from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import image_size, orientation

Size = tuple[int, int]
"""Width and height in pixels."""
TOLERANCE = 1e-2
"""Largest deviation of a rotation from orthonormality. Captures contain rounding errors of about 1e-3."""

PRECISION = 1e-6
"""Relative precision of coordinates in single precision, with a margin."""
EXIF_REMEDY = (
    "its EXIF orientation, which nerfstudio ignores, swaps width and height; rotate the pixels of all images, for example with "
    "`magick mogrify -auto-orient`."
)
"""What to do about images that EXIF data rotate."""
ONE_PLACE = (
    "The training views were all captured from one place, or there is one only: a scene is reconstructed from views of "
    "different positions."
)
"""Why cameras in one place are refused."""


def is_scaled(size: Size, other: Size) -> bool:
    """Return whether one size is the other one scaled by one factor and rounded to pixels: down, to the nearest, or up."""
    small, large = sorted((size, other))
    return any(
        max((side - offset) / full for side, full in zip(small, large))
        < min((side - offset + 1) / full for side, full in zip(small, large))
        for offset in (0, 0.5, 1)
    )


def resize_cameras(cameras: Cameras, width: int, height: int) -> None:
    """Change the number of pixels of cameras in place; the field of view stays."""
    for side, focal, center, pixels in (("width", "fx", "cx", width), ("height", "fy", "cy", height)):
        given = getattr(cameras, side)
        for name in (focal, center):
            setattr(cameras, name, getattr(cameras, name) * pixels / given)
        setattr(cameras, side, torch.full_like(given, pixels))


def nearest_camera(cameras: Cameras, place: Float[Tensor, " 3"], direction: Float[Tensor, " 3"]) -> int:
    """Return the index of the camera nearest to a place and a viewing direction. A distance of the scene's size counts as much as
    a rotation by one radian.

    Args:
        cameras: The cameras.
        place: The place, in their coordinates.
        direction: The viewing direction, of length 1.
    """
    poses = cameras.camera_to_worlds.cpu()
    distances = (poses[:, :, 3] - place).norm(dim=-1) + (-poses[:, :, 2] - direction).norm(dim=-1)
    return int(distances.argmin())


def check_one_size(files: Sequence[Path]) -> list[Size]:
    """Return the sizes of image files, which are equal.

    Args:
        files: Files of the views.

    Raises:
        WysError: If they differ.
    """
    sizes = [image_size(path) for path in files]
    odd = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if odd is not None:
        swapped = sizes[odd] == sizes[0][::-1] and (orientation(files[0]) >= 5) != (orientation(files[odd]) >= 5)
        raise WysError(
            f"All views must have one size, and {files[0].name} is {_text(sizes[0])} while {files[odd].name} is "
            f"{_text(sizes[odd])}: {EXIF_REMEDY if swapped else 'crop them to one size before their poses are computed.'}"
        )
    return sizes


def fit_cameras(cameras: Cameras, files: Sequence[Path], downscaled: bool) -> Optional[str]:
    """Make cameras agree with their image files: if all differ by one scale, rescale the cameras in place.

    Args:
        cameras: The cameras.
        files: Image file of each.
        downscaled: Whether the files are downscaled ones, whose sizes may be rounded otherwise than the cameras'.

    Returns:
        A line that describes the change; None if all agree.

    Raises:
        WysError: If the images differ in size among themselves, or from their cameras by anything but one scale.
    """
    sizes = check_one_size(files)
    camera_sizes = [(int(width), int(height)) for width, height in zip(cameras.width, cameras.height)]
    wrong = next((i for i, size in enumerate(camera_sizes) if size != sizes[0]), None)
    if wrong is None:
        return None
    given, stored = camera_sizes[wrong], sizes[0]
    is_rounding = max(abs(given[0] - stored[0]), abs(given[1] - stored[1])) == 1
    if is_rounding and downscaled:
        cameras.width, cameras.height = (
            torch.full_like(cameras.width, stored[0]),
            torch.full_like(cameras.height, stored[1]),
        )
        return None
    if is_rounding or set(camera_sizes) != {given} or not is_scaled(given, stored):
        swapped = orientation(files[wrong]) >= 5 and is_scaled(given, (stored[1], stored[0]))
        remedy = (
            EXIF_REMEDY
            if swapped
            else "use the images that the cameras were computed from, or correct width and height of the cameras."
        )
        raise WysError(f'The image "{files[wrong]}" is {_text(stored)} and its camera {_text(given)}: {remedy}')
    resize_cameras(cameras, *stored)
    if cameras.metadata and "fisheye_crop_radius" in cameras.metadata:
        cameras.metadata["fisheye_crop_radius"] *= stored[0] / given[0]
    return f"The images are {_text(stored)} and their cameras {_text(given)}: the cameras are rescaled."


def check_cameras(outputs: DataparserOutputs, remedy: str) -> None:
    """Refuse the training or held-out cameras of a parser if a pose or an intrinsic parameter is invalid.

    Args:
        outputs: Output of the parser.
        remedy: What to do about an invalid pose.

    Raises:
        WysError: For the first such camera.
    """
    cameras = outputs.cameras
    if outputs.image_filenames and cameras.camera_to_worlds.ndim != 3:  # a fault of nerfstudio's parser of instant-ngp
        raise WysError(
            "nerfstudio cannot read a capture of this format with a single held-out view: hold out more, for example with "
            "--train-split-fraction 0.8."
        )
    for i, path in enumerate(outputs.image_filenames):
        pose = cameras.camera_to_worlds[i]
        fault = rotation_fault(pose[:, :3]) or (None if pose.isfinite().all() else "not finite")
        if fault is not None:
            raise WysError(f'The pose of the view "{path.name}" is {fault}: {remedy}')
        intrinsics = torch.cat([cameras.fx[i], cameras.fy[i], cameras.cx[i], cameras.cy[i]])
        if not (intrinsics.isfinite().all() and (intrinsics[:2] > 0).all()):
            raise WysError(
                f'The camera of the view "{path.name}" has the focal lengths and center {intrinsics.tolist()}: correct them '
                "in the capture."
            )


def check_positions(outputs: DataparserOutputs) -> None:
    """Refuse training cameras that are in one place, to the precision of their coordinates before the parser centered them.

    Args:
        outputs: Output of the parser for the training views.

    Raises:
        WysError: If they are, or if there is one view only.
    """
    origins = outputs.cameras.camera_to_worlds[:, :, 3]
    offset = outputs.dataparser_scale * outputs.dataparser_transform[:, 3].norm()
    spread = (origins - origins.mean(dim=0)).norm(dim=-1).max()
    if spread <= PRECISION * torch.maximum(origins.norm(dim=-1).max(), offset):
        raise WysError(ONE_PLACE)


def rotation_fault(rotation: Float[Tensor, "3 3"]) -> Optional[str]:
    """Return what is wrong with a matrix that should be a rotation; None if it is one."""
    if not rotation.isfinite().all():
        return "not finite"
    products = rotation.T @ rotation
    if (products - torch.eye(3).to(products)).abs().max() <= TOLERANCE:
        return None if torch.linalg.det(rotation) > 0 else "mirrored"
    scale = float(products.diagonal().mean().sqrt())
    if scale < TOLERANCE:
        return "zero"
    even = (products / scale**2 - torch.eye(3).to(products)).abs().max() <= TOLERANCE
    return f"scaled by {scale:.4g}" if even else "sheared or stretched"


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
