"""Validation of captures in nerfstudio's format before its parser reads them, and masks of their views."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from jaxtyping import Bool
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE
from PIL import Image
from torch import Tensor

from wys_nerfstudio.utils.cameras import TOLERANCE, image_size, is_scaled, orientation, rotation_fault
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import load_mask

INTRINSICS = ("fl_x", "fl_y", "cx", "cy", "w", "h")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


def check_capture(data: Path, downscale_factor: Optional[int] = None) -> None:
    """Validate a `transforms.json` and the image files that it lists.

    Args:
        data: Folder of the scene, or its .json file.
        downscale_factor: As in nerfstudio's parser: views are read from `images_2` and so on.

    Raises:
        WysError: For the first error.
    """
    file = data if data.suffix == ".json" else data / "transforms.json"
    if not os.path.isfile(file):
        raise WysError(
            f'There is no "{file}": ns-process-data writes it. For data in another format, append its name to the command, for '
            "example colmap."
        )
    meta = _read(file)
    frames = meta.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise WysError(f'"{file}" has no list of "frames": create it again with ns-process-data.')
    if len(frames) == 1:
        raise WysError(f'"{file}" has a single frame: a scene is reconstructed from views of different positions.')
    model = meta.get("camera_model", "OPENCV")
    if not isinstance(model, str) or model not in CAMERA_MODEL_TO_TYPE:
        raise WysError(f'"{file}" has the unknown camera_model {model}. Supported: {", ".join(CAMERA_MODEL_TO_TYPE)}.')
    for number, frame in enumerate(frames):
        _check_frame(file, number, meta, frame)
    folder = file.parent
    for name in (frame["file_path"] for frame in frames):
        path = folder / (f"images_{downscale_factor}/{Path(name).name}" if (downscale_factor or 1) > 1 else name)
        check_image(path, f'"{file}"')


def check_image(path: Path, source: str, decode: bool = False) -> None:
    """Check that a file is an image.

    Args:
        path: The file.
        source: File or option that refers to it, for the error message.
        decode: Decode the image instead of reading its header only.

    Raises:
        WysError: If the file is missing or cannot be read.
    """
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long
        raise WysError(f'There is no image "{path}", which is listed in {source}.')
    if path.suffix == ".npy":  # supported by nerfstudio
        return
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        size = path.stat().st_size
        raise WysError(
            f'"{path}" ({size} bytes) cannot be read as an image: replace it with an undamaged file.'
        ) from error


def check_names(files: Sequence[Path]) -> None:
    """Refuse file names that cannot be written in UTF-8.

    Args:
        files: Files of the views.

    Raises:
        WysError: For the first such name.
    """
    for path in files:
        try:
            path.name.encode()
        except UnicodeEncodeError as error:
            raise WysError(f"The file name {ascii(path.name)} is not valid UTF-8: rename the file.") from error


def check_frame_masks(files: Sequence[Path], masks: Sequence[Path]) -> None:
    """Validate the masks of pixels that are trained on, `mask_path` in nerfstudio's format.

    Args:
        files: Files of the views.
        masks: Mask of each view; none if there are no masks.

    Raises:
        WysError: If a mask is missing, damaged, of another size than its view, or not in gray.
    """
    for path, mask in zip(files, masks):
        check_image(mask, "the capture")
        with Image.open(mask) as image:
            if image.mode not in ("1", "L", "I;16"):
                raise WysError(
                    f'The frame mask "{mask}" is not a grayscale image: convert it, for example with `magick {mask.name} '
                    "-alpha remove -colorspace gray MASK.png`."
                )
            if image.size != image_size(path):
                (width, height), (other_width, other_height) = image.size, image_size(path)
                raise WysError(
                    f'The frame mask "{mask}" is {width}x{height} and its view {other_width}x{other_height}: give a mask '
                    "of the view's size."
                )


def read_masks(folder: Path, views: Sequence[Path], height: int, width: int) -> Bool[Tensor, "n h w"]:
    """Read one mask per view from a folder. Masks are named like the views; `image_io.load_mask` defines their inside.

    Args:
        folder: Folder of the masks.
        views: Files of the views.
        height: Height of the views in pixels; masks of other sizes are resized.
        width: Width of the views in pixels.

    Raises:
        WysError: If a view has no mask or not one of its own, a mask is not a scaled view or invalid as in `load_mask`, or nothing is inside any mask.
    """
    masks = []
    files = sorted(folder.iterdir()) if os.path.isdir(folder) else []
    for path in views:
        matches = [file for file in files if file.stem == path.stem]
        if len(matches) > 1 or sum(other.stem == path.stem for other in views) > 1:
            raise WysError(
                f'"{folder}" has no single mask for the view "{path}": rename views and masks so that each has its own name.'
            )
        if not matches:
            raise WysError(
                f'There is no mask for the view {path.name} in "{folder}": --pipeline.masks-dir requires one image per view, '
                f"named like the view, for example {path.stem}.png."
            )
        mask_file = matches[0]
        check_image(mask_file, "--pipeline.masks-dir")
        mask = load_mask(mask_file, upright=orientation(mask_file) != orientation(path))
        if not is_scaled((mask.shape[1], mask.shape[0]), (width, height)):
            raise WysError(
                f'The mask "{mask_file}" is {mask.shape[1]}x{mask.shape[0]} and its view {width}x{height}: give a mask of '
                "the view's shape as it is stored, before any EXIF rotation."
            )
        resized = Image.fromarray(mask.numpy()).resize((width, height), Image.Resampling.NEAREST)
        masks.append(torch.from_numpy(np.array(resized)))
    stack = torch.stack(masks)
    if not stack.any():
        raise WysError(
            f'All masks in "{folder}" are black: nothing would be edited. White pixels mark the region to edit.'
        )
    return stack


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text("utf8")
        if text.startswith("\ufeff"):
            raise WysError(
                f'"{file}" begins with a byte order mark, which nerfstudio cannot read: save it as UTF-8 without one.'
            )
        meta = json.loads(text)
    except OSError as error:
        raise WysError(f'"{file}" cannot be read: {error.strerror}.') from error
    except (ValueError, RecursionError) as error:
        raise WysError(f'"{file}" is not valid JSON: {str(error).splitlines()[0]}.') from error
    if not isinstance(meta, dict):
        raise WysError(f'"{file}" is not a capture: it has no "frames".')
    return meta


def _check_frame(file: Path, number: int, meta: dict[str, Any], frame: dict[str, Any]) -> None:
    name = frame.get("file_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise WysError(f'In "{file}" frame {number} has no "file_path".')
    matrix = frame.get("transform_matrix")
    if not _is_matrix(matrix):
        raise WysError(f'In "{file}" the "transform_matrix" of {name} is not 4 x 4 finite numbers.')
    pose = torch.tensor(matrix, dtype=torch.float64)
    fault = rotation_fault(pose[:3, :3])
    if fault is None and (pose[3] - pose.new_tensor([0, 0, 0, 1])).abs().max() > TOLERANCE:
        fault = f"without a last row of 0 0 0 1 (it is {' '.join(f'{value:g}' for value in pose[3].tolist())})"
    if fault is not None:
        raise WysError(
            f'In "{file}" the "transform_matrix" of {name} is {fault}: it must be a rotation and a translation; create the '
            "file again with ns-process-data."
        )
    for key in INTRINSICS:
        value = meta.get(key, frame.get(key))
        if value is None:
            raise WysError(f'In "{file}" neither the top level nor the frame of {name} has "{key}".')
        if not _is_number(value) or (value <= 0 and key not in ("cx", "cy")):
            raise WysError(f'In "{file}" the "{key}" of {name} has the invalid value {json.dumps(value)[:40]}.')
    for key in DISTORTION:
        value = meta.get(key, frame.get(key, 0))
        if not _is_number(value):
            raise WysError(f'In "{file}" the "{key}" of {name} has the invalid value {json.dumps(value)[:40]}.')


def _is_number(value: Any) -> bool:
    # Larger numbers would overflow in float32 arithmetic.
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30 and math.isfinite(value)
    )


def _is_matrix(matrix: Any) -> bool:
    rows = isinstance(matrix, list) and len(matrix) == 4 and all(isinstance(row, list) for row in matrix)
    return rows and all(len(row) == 4 and all(map(_is_number, row)) for row in matrix)
