"""Cameras agree with their images; poses are rotations and translations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from PIL import ExifTags, Image

from wys_nerfstudio.utils.cameras import (
    check_cameras,
    check_positions,
    fit_cameras,
    is_scaled,
    nearest_camera,
    resize_cameras,
    rotation_fault,
)
from wys_nerfstudio.utils.errors import WysError


def cameras(width: "int | torch.Tensor", height: "int | torch.Tensor", count: int = 3, **changes) -> Cameras:
    """Return cameras on a line."""
    poses = torch.eye(4)[None, :3].repeat(count, 1, 1)
    poses[:, 0, 3] = torch.arange(count)
    values = {
        "fx": 50.0,
        "fy": 55.0,
        "cx": 21.0,
        "cy": 17.0,
        "width": width,
        "height": height,
        "camera_to_worlds": poses,
    }
    return Cameras(**{**values, **changes})


def write_images(folder: Path, *sizes: tuple[int, int], orientation: int = 1) -> list[Path]:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    files = [folder / f"{i}.jpg" for i in range(len(sizes))]
    for file, size in zip(files, sizes):
        Image.new("RGB", size).save(file, exif=exif)
    return files


def directions(views: Cameras, x: float, y: float) -> torch.Tensor:
    """Return the directions of rays at a position in [0, 1] from corner to corner."""
    coords = torch.stack([y * views.height[:, 0], x * views.width[:, 0]], dim=-1)
    return views.generate_rays(torch.arange(len(views))[:, None], coords=coords).directions


@given(st.integers(0, 2**32 - 1))
def test_the_nearest_camera_has_the_smallest_sum_of_distance_and_turn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rotations = torch.linalg.qr(torch.randn(6, 3, 3, generator=generator))[0]
    poses = torch.cat([rotations, torch.randn(6, 3, 1, generator=generator)], dim=-1)
    place = torch.randn(3, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0)
    sums = []
    for pose in poses.tolist():
        backward = [row[2] for row in pose]
        turn = math.dist([-value for value in backward], direction.tolist())
        sums.append(math.dist([row[3] for row in pose], place.tolist()) + turn)
    views = cameras(40, 30, count=6, camera_to_worlds=poses)
    assert nearest_camera(views, place, direction) == min(range(6), key=lambda i: sums[i])


@given(width=st.integers(40, 4000), height=st.integers(40, 4000), scale=st.floats(0.1, 1),
       rounding=st.sampled_from([math.floor, round, math.ceil]))  # fmt: skip
def test_scaled_and_rounded_sizes_are_recognized(width, height, scale, rounding):
    size = (rounding(width * scale), rounding(height * scale))
    assert is_scaled(size, (width, height)) and is_scaled((width, height), size)


@pytest.mark.parametrize("size", [(480, 640), (640, 500), (320, 244), (320, 236), (639, 482)])
def test_other_sizes_are_not_taken_for_scaled_ones(size):
    assert not is_scaled(size, (640, 480)) and not is_scaled((640, 480), size)


@pytest.mark.parametrize("size", [(80, 64), (20, 16), (60, 48), (13, 11), (401, 321)])
def test_cameras_are_rescaled_to_images_of_one_scale(tmp_path, size):
    views = cameras(40, 32)
    before = [directions(views, *position) for position in [(0, 0), (0.3, 0.9), (1, 1)]]
    line = fit_cameras(views, write_images(tmp_path, *[size] * 3), downscaled=False)
    assert line == f"The images are {size[0]}x{size[1]} and their cameras 40x32: the cameras are rescaled."
    assert views.width.flatten().tolist() == [size[0]] * 3 and views.height.flatten().tolist() == [size[1]] * 3
    torch.testing.assert_close(views.fx, torch.full((3, 1), 50.0 * size[0] / 40))
    torch.testing.assert_close(views.cy, torch.full((3, 1), 17.0 * size[1] / 32))
    after = [directions(views, *position) for position in [(0, 0), (0.3, 0.9), (1, 1)]]
    torch.testing.assert_close(after, before)


def test_cameras_that_agree_with_their_images_stay(tmp_path):
    views = cameras(40, 32)
    assert fit_cameras(views, write_images(tmp_path, *[(40, 32)] * 3), downscaled=False) is None
    assert views.fx.flatten().tolist() == [50.0] * 3


def test_the_crop_circle_of_fisheye_cameras_is_rescaled(tmp_path):
    views = cameras(40, 32, metadata={"fisheye_crop_radius": 15.0})
    fit_cameras(views, write_images(tmp_path, *[(80, 64)] * 3), downscaled=False)
    assert views.metadata == {"fisheye_crop_radius": 30.0}


@pytest.mark.parametrize("size", [(41, 32), (39, 32), (40, 33), (41, 33), (60, 32), (80, 60), (32, 40), (64, 80)])
def test_images_that_are_not_scaled_are_refused(tmp_path, size):
    files = write_images(tmp_path, *[size] * 3)
    with pytest.raises(WysError) as error:
        fit_cameras(cameras(40, 32), files, downscaled=False)
    assert str(error.value) == (
        f'The image "{files[0]}" is {size[0]}x{size[1]} and its camera 40x32: use the images that the cameras were computed '
        "from, or correct width and height of the cameras."
    )


@pytest.mark.parametrize("size", [(32, 40), (64, 80)])
def test_exif_rotation_is_named_where_it_explains_the_sizes(tmp_path, size):
    files = write_images(tmp_path, *[size] * 3, orientation=6)
    sentence = f'"{files[0]}" is {size[0]}x{size[1]} and its camera 40x32: its EXIF orientation.*mogrify -auto-orient'
    with pytest.raises(WysError, match=sentence):
        fit_cameras(cameras(40, 32), files, downscaled=False)


def test_one_camera_of_another_size_is_refused(tmp_path):
    widths = torch.tensor([[40], [80], [40]])
    views = cameras(widths, widths * 32 // 40)
    with pytest.raises(WysError, match='The image ".*1.jpg" is 40x32 and its camera 80x64'):
        fit_cameras(views, write_images(tmp_path, *[(40, 32)] * 3), downscaled=False)


def test_images_of_two_sizes_are_refused(tmp_path):
    with pytest.raises(WysError, match="All views must have one size, and 0.jpg is 40x32 while 2.jpg is 80x64"):
        fit_cameras(cameras(40, 32), write_images(tmp_path, (40, 32), (40, 32), (80, 64)), downscaled=False)


def test_exif_rotation_of_some_images_is_named(tmp_path):
    upright = write_images(tmp_path, *[(40, 32)] * 2)
    (tmp_path / "rotated").mkdir()
    files = [*upright, *write_images(tmp_path / "rotated", (32, 40), orientation=8)]
    sentence = "0.jpg is 40x32 while 0.jpg is 32x40: its EXIF orientation, which nerfstudio ignores"
    with pytest.raises(WysError, match=sentence):
        fit_cameras(cameras(40, 32), files, downscaled=False)


@pytest.mark.parametrize("size", [(41, 32), (40, 33), (41, 33)])
def test_downscaled_images_may_be_rounded_otherwise(tmp_path, size):
    views = cameras(40, 32)
    assert fit_cameras(views, write_images(tmp_path, *[size] * 3), downscaled=True) is None
    assert (int(views.width[0]), int(views.height[0]), float(views.fx[0])) == (*size, 50.0)


def rotation(seed: int = 0) -> torch.Tensor:
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return torch.from_numpy(q * np.linalg.det(q))


@given(seed=st.integers(0, 99))
def test_rotations_with_rounding_errors_are_accepted(seed):
    noise = torch.from_numpy(np.random.default_rng(seed).uniform(-1e-3, 1e-3, size=(3, 3)))
    assert rotation_fault(rotation(seed) + noise) is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda r: 0 * r, "zero"),
        (lambda r: -r, "mirrored"),
        (lambda r: r[[1, 0, 2]], "mirrored"),
        (lambda r: 2 * r, "scaled by 2"),
        (lambda r: 0.98 * r, "scaled by 0.98"),
        (lambda r: r @ r.new_tensor([[1, 0.1, 0], [0, 1, 0], [0, 0, 1]]), "sheared or stretched"),
        (lambda r: r @ torch.diag(r.new_tensor([1, 1, 1.1])), "sheared or stretched"),
        (lambda r: r * r.new_tensor([1, 1, 0]), "sheared or stretched"),
        (lambda r: r * math.nan, "not finite"),
    ],
)
def test_matrices_that_are_no_rotations_are_described(change, fault):
    assert rotation_fault(change(rotation())) == fault
    assert rotation_fault(change(rotation()).float()) == fault


def outputs(views: Cameras, **named) -> DataparserOutputs:
    return DataparserOutputs([Path(f"{i}.png") for i in range(len(views))], views, **named)


def test_invalid_cameras_are_refused_with_their_view():
    views = cameras(40, 32)
    check_cameras(outputs(views), "remedy")
    views.camera_to_worlds[1, :, 1] *= -1
    with pytest.raises(WysError, match='^The pose of the view "1.png" is mirrored: remedy$'):
        check_cameras(outputs(views), "remedy")
    views = cameras(40, 32)
    views.camera_to_worlds[2, 0, 3] = math.inf
    with pytest.raises(WysError, match='The pose of the view "2.png" is not finite: remedy'):
        check_cameras(outputs(views), "remedy")
    with pytest.raises(WysError, match='The camera of the view "0.png" has the focal lengths and center'):
        check_cameras(outputs(cameras(40, 32, fx=math.nan)), "remedy")


def test_cameras_in_one_place_are_refused():
    views = cameras(40, 32)
    check_positions(outputs(views))
    far = torch.cat([torch.eye(3), torch.full((3, 1), 1e4)], dim=1)
    check_positions(outputs(views, dataparser_transform=far))
    noise = outputs(views, dataparser_transform=far, dataparser_scale=1e6)  # a parser that scaled rounding errors up
    for found in (outputs(cameras(40, 32, count=1)), outputs(views[torch.tensor([1, 1, 1])]), noise):
        with pytest.raises(WysError, match="were all captured from one place, or there is one only"):
            check_positions(found)


def test_resizing_cameras_keeps_their_field_of_view():
    views = cameras(40, 32)
    before = directions(views, 0.2, 0.7)
    resize_cameras(views, 17, 90)
    torch.testing.assert_close(directions(views, 0.2, 0.7), before)
