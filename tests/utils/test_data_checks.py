"""Masks of the views; test_bad_input tests the validation of captures."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from wys_nerfstudio.utils.data_checks import read_masks
from wys_nerfstudio.utils.errors import WysError

HEIGHT, WIDTH = 12, 20
NAMES = [f"view_{number}" for number in range(5)]


@pytest.fixture
def views(tmp_path: Path) -> list[Path]:
    """Files of five views."""
    (tmp_path / "images").mkdir()
    files = [tmp_path / "images" / f"{name}.png" for name in NAMES]
    for file in files:
        Image.new("RGB", (WIDTH, HEIGHT)).save(file)
    return files


def write_masks(folder: Path, size: tuple[int, int] = (WIDTH, HEIGHT), value: int = 0) -> None:
    for name in NAMES:
        Image.new("L", size, value).save(folder / f"{name}.png")


def refusal(folder: Path, views: list[Path]) -> str:
    with pytest.raises(WysError) as error:
        read_masks(folder, views, HEIGHT, WIDTH)
    return str(error.value)


def test_masks_are_matched_by_name_and_resized_to_the_views(tmp_path, views):
    for view, name in enumerate(NAMES):
        pixels = np.zeros((2 * HEIGHT, 2 * WIDTH), dtype=np.uint8)
        pixels[: 2 * view + 2, :20] = 255
        Image.fromarray(pixels).save(tmp_path / f"{name}.{'png' if view % 2 else 'bmp'}")
    masks = read_masks(tmp_path, views, HEIGHT, WIDTH)
    assert masks.shape == (len(NAMES), HEIGHT, WIDTH)
    assert masks.dtype == torch.bool
    for view, mask in enumerate(masks):
        expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        expected[: view + 1, :10] = True
        assert torch.equal(mask, expected)


def test_pixels_brighter_than_half_are_inside_a_mask(tmp_path, views):
    for name in NAMES:
        pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        pixels[:, 0], pixels[:, 1] = 127, 128
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    assert read_masks(tmp_path, views, HEIGHT, WIDTH)[0, 0, :3].tolist() == [False, True, False]


def test_transparent_pixels_are_outside_a_scenes_masks(tmp_path, views):
    pixels = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)  # white everywhere, of which columns 3 to 6 are visible
    pixels[..., 3] = 0
    pixels[:, 3:7, 3] = 255
    for name in NAMES:
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    assert torch.equal(read_masks(tmp_path, views, HEIGHT, WIDTH)[2], torch.from_numpy(pixels[..., 3] > 0))


def test_masks_may_be_black_in_some_views(tmp_path, views):
    write_masks(tmp_path)
    Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / f"{NAMES[3]}.png")
    assert read_masks(tmp_path, views, HEIGHT, WIDTH).flatten(1).any(dim=1).tolist() == [
        name == NAMES[3] for name in NAMES
    ]


def test_masks_that_are_black_in_all_views_are_refused(tmp_path, views):
    write_masks(tmp_path)
    assert refusal(tmp_path, views).startswith(f'All masks in "{tmp_path}" are black: nothing would be edited.')


def test_a_0_1_mask_in_any_view_is_refused(tmp_path, views):
    write_masks(tmp_path, value=255)
    Image.new("L", (WIDTH, HEIGHT), 1).save(tmp_path / f"{NAMES[3]}.png")
    assert re.search(f'{NAMES[3]}.png" is a 0/1 mask: .*multiply a 0/1 mask by 255', refusal(tmp_path, views))


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (WIDTH, HEIGHT + 2), (2 * WIDTH, HEIGHT)])
def test_masks_of_another_shape_than_the_view_are_refused(tmp_path, views, size):
    write_masks(tmp_path, size, 255)
    sentence = f"view_0.png\" is {size[0]}x{size[1]} and its view {WIDTH}x{HEIGHT}: give a mask of the view's shape"
    assert sentence in refusal(tmp_path, views)


def rotated(file: Path, pixels: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(file, exif=exif)


def test_masks_are_aligned_with_views_as_they_are_stored(tmp_path, views):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[:4] = 255
    write_masks(tmp_path)
    rotated(tmp_path / f"{NAMES[0]}.png", pixels, 3)  # the view is stored upright
    rotated(views[1], pixels, 3)
    rotated(tmp_path / f"{NAMES[1]}.png", pixels, 3)  # mask and view are stored alike
    masks = read_masks(tmp_path, views, HEIGHT, WIDTH)
    assert torch.equal(masks[0], torch.from_numpy(pixels > 0).flip(0, 1))
    assert torch.equal(masks[1], torch.from_numpy(pixels > 0))


def test_ambiguous_names_of_masks_are_refused(tmp_path, views):
    write_masks(tmp_path, value=255)
    sentence = f'"{tmp_path}" has no single mask for the view "{{}}": rename views and masks'
    assert refusal(tmp_path, [*views, tmp_path / "other" / views[1].name]).startswith(sentence.format(views[1]))
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / f"{NAMES[2]}.bmp")
    assert refusal(tmp_path, views).startswith(sentence.format(views[2]))


def test_a_missing_mask_is_reported_with_the_views_name(tmp_path, views):
    sentence = "There is no mask for the view {}.png in .*--pipeline.masks-dir requires one image per view.*{}.png"
    with pytest.raises(WysError, match=sentence.format(*NAMES[:1] * 2)):
        read_masks(tmp_path / "no folder", views, HEIGHT, WIDTH)
    with pytest.raises(WysError, match=sentence.format(*NAMES[:1] * 2)):
        read_masks(tmp_path / ("long" * 100), views, HEIGHT, WIDTH)
    for name in NAMES[:3]:
        Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / f"{name}.png")
    with pytest.raises(WysError, match=sentence.format(*NAMES[3:4] * 2)):
        read_masks(tmp_path, views, HEIGHT, WIDTH)
