"""Masks of the edits: matched with their views, refused if they are ambiguous."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.view_masks import mask_names, read_masks

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


def read(folder: Path, views: Sequence[Path]) -> torch.Tensor:
    """Read masks of views whose names in the run's files are their stems."""
    return read_masks(folder, views, [view.stem for view in views], HEIGHT, WIDTH)


def write_masks(folder: Path, size: tuple[int, int] = (WIDTH, HEIGHT), value: int = 0) -> None:
    for name in NAMES:
        Image.new("L", size, value).save(folder / f"{name}.png")


def refusal(folder: Path, views: list[Path]) -> str:
    with pytest.raises(WysError) as error:
        read(folder, views)
    return str(error.value)


def test_masks_are_matched_by_name_and_resized_to_the_views(tmp_path, views):
    for view, name in enumerate(NAMES):
        pixels = np.zeros((2 * HEIGHT, 2 * WIDTH), dtype=np.uint8)
        pixels[: 2 * view + 2, :20] = 255
        Image.fromarray(pixels).save(tmp_path / f"{name}.{'png' if view % 2 else 'bmp'}")
    masks = read(tmp_path, views)
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
    assert read(tmp_path, views)[0, 0, :3].tolist() == [False, True, False]


def test_transparent_pixels_are_outside_a_scenes_masks(tmp_path, views):
    pixels = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)  # white everywhere, of which columns 3 to 6 are visible
    pixels[..., 3] = 0
    pixels[:, 3:7, 3] = 255
    for name in NAMES:
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    assert torch.equal(read(tmp_path, views)[2], torch.from_numpy(pixels[..., 3] > 0))


def test_masks_may_be_black_in_some_views(tmp_path, views):
    write_masks(tmp_path)
    Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / f"{NAMES[3]}.png")
    assert read(tmp_path, views).flatten(1).any(dim=1).tolist() == [name == NAMES[3] for name in NAMES]


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
    masks = read(tmp_path, views)
    assert torch.equal(masks[0], torch.from_numpy(pixels > 0).flip(0, 1))
    assert torch.equal(masks[1], torch.from_numpy(pixels > 0))


@pytest.fixture
def cameras(tmp_path: Path) -> list[Path]:
    """Views of two cameras with equal names."""
    files = [tmp_path / "scene" / "images" / camera / f"{number}.jpg" for camera in "ab" for number in range(2)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(file)
    return files


@pytest.mark.parametrize(
    "names",
    [
        ["a/0", "a/1", "b/0", "b/1"],
        ["images/a/0", "images/a/1", "images/b/0", "images/b/1"],
        ["00000_0", "00001_1", "00002_0", "00003_1"],
        ["a/0", "00001_1", "images/b/0", "b/1"],
    ],
)
def test_masks_of_views_with_equal_names_are_found(tmp_path, cameras, names):
    for view, name in enumerate(names):
        file = tmp_path / "masks" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        pixels[view] = 255
        Image.fromarray(pixels).save(file)
    run_names = [f"{i:05d}_{view.stem}" for i, view in enumerate(cameras)]
    masks = read_masks(tmp_path / "masks", cameras, run_names, HEIGHT, WIDTH)
    assert [mask.any(dim=1).nonzero().flatten().tolist() for mask in masks] == [[0], [1], [2], [3]]


def test_a_mask_of_two_views_is_refused(tmp_path, cameras):
    (tmp_path / "masks").mkdir()
    for number in range(2):
        Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "masks" / f"{number}.png")
    run_names = [f"{i:05d}_{view.stem}" for i, view in enumerate(cameras)]
    with pytest.raises(WysError) as error:
        read_masks(tmp_path / "masks", cameras, run_names, HEIGHT, WIDTH)
    assert str(error.value) == (
        f'"{tmp_path}/masks/0.png" is the mask of both "{cameras[0]}" and "{cameras[2]}": give each its own, with the view\'s '
        'folder, as in "b/0.png", or with its number, as in "00002_0.png".'
    )


def test_two_masks_of_a_view_are_refused(tmp_path, views):
    write_masks(tmp_path, value=255)
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / f"{NAMES[2]}.bmp")
    sentence = f'"{tmp_path}/{NAMES[2]}.bmp" and "{tmp_path}/{NAMES[2]}.png" are both masks of the view "{views[2]}"'
    assert refusal(tmp_path, views).startswith(sentence)


def test_other_files_in_the_folder_of_masks_are_ignored(tmp_path, views):
    write_masks(tmp_path, value=255)  # beside the folder of the views
    (tmp_path / "classes.txt").touch()
    (tmp_path / "old").mkdir()
    write_masks(tmp_path / "old")
    assert read(tmp_path, views).all()


def test_cut_outs_are_their_own_masks(tmp_path, views):
    pixels = np.full((HEIGHT, WIDTH, 4), 128, np.uint8)
    pixels[..., 3] = 0
    pixels[2:5, :, 3] = 255
    for file in views:
        Image.fromarray(pixels).save(file)
    assert torch.equal(read(tmp_path / "images", views)[1], torch.from_numpy(pixels[..., 3] > 0))


def test_a_missing_mask_is_reported_with_the_views_name(tmp_path, views):
    sentence = "There is no mask for the view {}.png in .*--pipeline.masks-dir requires one image per view.*{}.png; wys make-masks makes"
    with pytest.raises(WysError, match=sentence.format(*NAMES[:1] * 2)):
        read(tmp_path / "no folder", views)
    with pytest.raises(WysError, match=sentence.format(*NAMES[:1] * 2)):
        read(tmp_path / ("long" * 100), views)
    (tmp_path / "masks").mkdir()
    for name in NAMES[:3]:
        Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "masks" / f"{name}.png")
    with pytest.raises(WysError, match=sentence.format(*NAMES[3:4] * 2)):
        read(tmp_path / "masks", views)


@pytest.mark.parametrize(
    ("views", "names"),
    [
        (["s/images/0.jpg", "s/images/1.2.png"], ["0", "1.2"]),
        (["s/images/a/0.jpg", "s/images/b/0.jpg", "s/images/b/1.jpg"], ["a/0", "b/0", "b/1"]),
        (["s/train/0.png", "s/test/0.png"], ["train/0", "test/0"]),
    ],
)
def test_masks_are_named_by_what_views_do_not_share(tmp_path, views, names):
    files = [tmp_path / view for view in views]
    assert mask_names(files) == names
    for file, name in zip(files, names):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "masks" / f"{name}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(file)
    run_names = [f"{i:05d}_{view.stem}" for i, view in enumerate(files)]
    assert read_masks(tmp_path / "masks", files, run_names, HEIGHT, WIDTH).all()


@pytest.mark.parametrize(
    ("views", "name"), [(["images/0.jpg", "images/0.png"], "0"), (["images/0.png", "images/a/0.png"], "0")]
)
def test_views_that_would_find_one_mask_are_refused(views, name):
    with pytest.raises(WysError) as error:
        mask_names([Path(view) for view in views])
    first, second = sorted(views, key=lambda view: str(error.value).index(view))
    assert (
        str(error.value) == f'"{name}" would name the mask of both "{first}" and "{second}": rename one of these views.'
    )
