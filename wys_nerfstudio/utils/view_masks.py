"""Masks of a capture's views: of the pixels that are trained on, and of the region that is edited."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from wys_nerfstudio.utils.cameras import is_scaled
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import image_size, load_mask


def check_frame_masks(views: Sequence[Path], masks: Sequence[Path], decode: bool = False) -> None:
    """Validate the masks of pixels that are trained on, `mask_path` in nerfstudio's format.

    Args:
        views: Files of the views.
        masks: Mask of each view; none if there are no masks.
        decode: Decode the masks instead of reading their headers only.

    Raises:
        WysError: If a mask is missing, damaged, of another size than its view, or not in gray.
    """
    for view, mask in zip(views, masks):
        if not mask.is_file():
            raise WysError(f'There is no "{mask}", the frame mask of {view.name}: all views have a mask, or none.')
        try:
            with Image.open(mask) as image:
                mode, size = image.mode, image.size
                if decode:
                    image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise WysError(
                f'The frame mask "{mask}" cannot be read as an image: replace it with an undamaged file.'
            ) from error
        if mode not in ("1", "L", "I;16"):
            raise WysError(
                f'The frame mask "{mask}" is not a grayscale image: convert it, for example with `magick {mask.name} -alpha '
                "remove -colorspace gray MASK.png`."
            )
        if size != image_size(view):
            (width, height), (other_width, other_height) = size, image_size(view)
            raise WysError(
                f'The frame mask "{mask}" is {width}x{height} and its view {other_width}x{other_height}: give a mask of '
                "the view's size."
            )


def read_masks(
    folder: Path,
    views: Sequence[Path],
    names: Sequence[str],
    height: int,
    width: int,
    source: str = "--pipeline.masks-dir",
) -> Bool[Tensor, "n h w"]:
    """Read one mask per view from a folder and its sub-folders; `image_io.load_mask` defines their inside.

    Args:
        folder: Folder of the masks. Each is named as its view is in the run's own files, or by the end of the view's path, both
            with any suffix: `0.png`, `a/0.png` or `images/a/0.png` for `images/a/0.jpg`.
        views: Files of the views.
        names: Name of each view in the run's own files.
        height: Height of the views in pixels; masks of other sizes are resized.
        width: Width of the views in pixels.
        source: Option that the folder came from, for error messages.

    Raises:
        WysError: If a view has no mask or not one of its own, a mask is not a scaled view or invalid as in `load_mask`, or nothing is inside any mask.
    """
    masks = []
    for view, mask_file in zip(views, match_files(folder, views, names, "mask", source)):
        mask = load_mask(mask_file, view)
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


def mask_names(views: Sequence[Path]) -> list[str]:
    """Return the name, without suffix, under which `read_masks` finds the mask of each view, whatever other views there are.

    Args:
        views: Files of the views.

    Returns:
        The path of each view below the folder that all views share: its stem, or `a/0` for `images/a/0.jpg` beside
        `images/b/0.jpg`.

    Raises:
        WysError: If two views would find the same mask.
    """
    shared = os.path.commonpath([view.parent for view in views])
    names = [view.relative_to(shared).with_suffix("").as_posix() for view in views]
    owners = dict(zip(names, views))
    for view in views:
        for name in _path_ends(view) & owners.keys():
            if owners[name] != view:
                raise WysError(
                    f'"{name}" would name the mask of both "{view}" and "{owners[name]}": rename one of these views.'
                )
    return names


def _path_ends(view: Path) -> set[str]:
    """Return the ends of a view's path without its suffix, of all lengths."""
    parts = view.with_suffix("").parts
    return {"/".join(parts[-length:]) for length in range(1, len(parts))}


def match_files(
    folder: Path, views: Sequence[Path], names: Sequence[str], kind: str, source: str, suffixes: Sequence[str] = ()
) -> list[Path]:
    """Return the file of each view in a folder and its sub-folders.

    Args:
        folder: The folder.
        views: Files of the views.
        names: Name of each view in the run's own files.
        kind: What the files are, for error messages: "mask".
        source: What requires them, for error messages.
        suffixes: Suffixes, in lower case, of the files that are considered; by default all.

    Raises:
        WysError: If a view has no file, several, or not one of its own.
    """
    maker = "; wys make-masks makes those that are missing" if kind == "mask" else ""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")) if os.path.isdir(folder) else []:
        if not suffixes or file.suffix.lower() in suffixes:
            files.setdefault(file.relative_to(folder).with_suffix("").as_posix(), []).append(file)
    by_view, by_file = [], {}
    for view, name in zip(views, names):
        keys = {name, *_path_ends(view)}
        named = [file for key in keys for file in files.get(key, []) if file.is_file()]
        found = [file for file in named if file != view] or named  # a cut-out can be its own mask
        if not found:
            raise WysError(
                f'There is no {kind} for the view {view.name} in "{folder}": {source} requires one image per view, '
                f"named like the view, for example {name}.png{maker}."
            )
        if len(found) > 1:
            raise WysError(
                f'"{min(found)}" and "{max(found)}" are both {kind}s of the view "{view}": remove or rename one of them.'
            )
        other = by_file.setdefault(found[0], view)
        if other != view:
            raise WysError(
                f'"{found[0]}" is the {kind} of both "{other}" and "{view}": give each its own, with the view\'s folder, as '
                f'in "{view.parent.name}/{view.stem}.png", or with its number, as in "{name}.png".'
            )
        by_view.append(found[0])
    return by_view
