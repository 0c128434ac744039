"""Demo scene: files in nerfstudio's format and ground truth."""

import json

import numpy as np
import pytest
from PIL import Image

from wys_nerfstudio.demo.scene import GROUND_TRUTH, write_demo_scene


@pytest.fixture(scope="module")
def portrait(tmp_path_factory):
    return write_demo_scene(tmp_path_factory.mktemp("scene"), seed=7, width=32, height=48, num_views=5)


def read(path):
    return np.array(Image.open(path))


def test_nerfstudio_parses_the_scene(portrait):
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    outputs = NerfstudioDataParserConfig(data=portrait, eval_mode="all").setup().get_dataparser_outputs("train")
    assert len(outputs.image_filenames) == 5
    assert (int(outputs.cameras.width[0]), int(outputs.cameras.height[0])) == (32, 48)
    assert read(outputs.image_filenames[0]).shape == (48, 32, 3)


def test_masks_are_the_changed_pixels(portrait):
    ground_truth = portrait / "ground_truth"
    edits = json.loads((ground_truth / "edits.json").read_text())
    assert {edit["slug"] for edit in edits} == set(GROUND_TRUTH)
    for edit in edits:
        assert edit["instruction"] and edit["caption_before"] and edit["caption_after"]
        for number in range(1, 6):
            name = f"frame_{number:05d}.png"
            before, after = read(portrait / "images" / name), read(ground_truth / edit["slug"] / "images" / name)
            mask = read(ground_truth / edit["slug"] / "masks" / name)
            assert np.array_equal(mask == 255, (before != after).any(-1))
            assert set(np.unique(mask)) <= {0, 255}
    assert not read(ground_truth / "no-change" / "masks" / "frame_00001.png").any()
    assert any(read(ground_truth / "panda" / "masks" / f"frame_{n:05d}.png").any() for n in range(1, 6))


def test_views_surround_the_scene(portrait):
    frames = json.loads((portrait / "transforms.json").read_text())["frames"]
    centers = np.array([np.array(frame["transform_matrix"])[:3, 3] for frame in frames])
    centers = centers[:, :2] - centers[:, :2].mean(0)
    angles = np.sort(np.arctan2(centers[:, 1], centers[:, 0]))
    gaps = np.diff([*angles, angles[0] + 2 * np.pi])
    assert gaps.max() < 0.7 * np.pi


@pytest.mark.parametrize(("options", "message"), [({"width": 30}, "multiples of 8"), ({"seed": -1}, "seed")])
def test_invalid_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_demo_scene(tmp_path, **options)
