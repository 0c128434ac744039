"""Masks of the views; test_bad_input tests the validation of captures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wys_nerfstudio.utils.data_checks import read_masks
from wys_nerfstudio.utils.errors import WysError

HEIGHT, WIDTH = 12, 20
NAMES = [f"view_{number}" for number in range(5)]
VIEWS = [Path("images") / f"{name}.png" for name in NAMES]


def test_masks_are_matched_by_name_and_resized_to_the_views(tmp_path):
    for view, name in enumerate(NAMES):
        pixels = np.zeros((2 * HEIGHT, 2 * WIDTH), dtype=np.uint8)
        pixels[: 2 * view + 2, :20] = 255
        Image.fromarray(pixels).save(tmp_path / f"{name}.{'png' if view % 2 else 'bmp'}")
    masks = read_masks(tmp_path, VIEWS, HEIGHT, WIDTH)
    assert masks.shape == (len(NAMES), HEIGHT, WIDTH)
    assert masks.dtype == torch.bool
    for view, mask in enumerate(masks):
        expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        expected[: view + 1, :10] = True
        assert torch.equal(mask, expected)


def test_pixels_brighter_than_half_are_inside_a_mask(tmp_path):
    for name in NAMES:
        pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        pixels[:, 0], pixels[:, 1] = 127, 128
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    assert read_masks(tmp_path, VIEWS, HEIGHT, WIDTH)[0, 0, :3].tolist() == [False, True, False]


def test_a_missing_mask_is_reported_with_the_views_name(tmp_path):
    sentence = "There is no mask for the view {}.png in .*--pipeline.masks-dir requires one image per view.*{}.png"
    with pytest.raises(WysError, match=sentence.format(*NAMES[:1] * 2)):
        read_masks(tmp_path / "no folder", VIEWS, HEIGHT, WIDTH)
    for name in NAMES[:3]:
        Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / f"{name}.png")
    with pytest.raises(WysError, match=sentence.format(*NAMES[3:4] * 2)):
        read_masks(tmp_path, VIEWS, HEIGHT, WIDTH)
