"""The images of a split in 8 bits: transparency, ray batches, edits."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_ring_scene
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.pixel_samplers import PixelSamplerConfig
from PIL import Image

from wys_nerfstudio.training.image_stack import ImageStack, blend, read_images


def write_cutouts(folder: Path, opaque: tuple[int, ...] = ()) -> InputDataset:
    """Write views with every alpha between 0 and 255 and arbitrary colors where they are transparent.

    Args:
        folder: Folder of the scene.
        opaque: Views without an alpha channel.
    """
    write_ring_scene(folder, views=4)
    rng = np.random.default_rng(0)
    for i, path in enumerate(sorted((folder / "images").iterdir())):
        pixels = rng.integers(0, 256, (32, 40, 3 if i in opaque else 4), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    parser = NerfstudioDataParserConfig(data=folder, load_3D_points=False).setup()
    return InputDataset(parser.get_dataparser_outputs("train"))


@pytest.mark.parametrize("opaque", [(), (0,), (2, 3), (0, 1, 2, 3)])
def test_an_alpha_channel_is_kept_if_any_image_has_one(tmp_path, opaque):
    dataset = write_cutouts(tmp_path / "scene", opaque)
    images, masks = read_images(dataset)
    assert masks is None and images.shape == (4, 32, 40, 3 if len(opaque) == 4 else 4)
    for image, path in zip(images, dataset.image_filenames):
        mode = "RGB" if images.shape[-1] == 3 else "RGBA"
        assert image.tolist() == np.array(Image.open(path).convert(mode)).tolist()


def test_ray_batches_are_nerfstudios_pixels_bit_for_bit(tmp_path):
    dataset = write_cutouts(tmp_path / "scene")
    stack = ImageStack(*read_images(dataset), "cpu")
    batch, _ = stack.sample(PixelSamplerConfig().setup(num_rays_per_batch=200))
    expected = [dataset.get_data(view)["image"][row, column] for view, row, column in batch["indices"].tolist()]
    assert torch.equal(batch["image"], torch.stack(expected))


@pytest.mark.parametrize("background", [0.0, 1.0])
def test_blending_rounds_to_the_nearest_color(background):
    colors, alphas = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    images = torch.stack([colors, colors, colors, alphas], dim=-1).to(torch.uint8)
    for color, alpha, blended in zip(
        colors.flatten().tolist(), alphas.flatten().tolist(), blend(images, background).view(-1, 3)
    ):
        exact = Fraction(color * alpha, 255) + int(255 * background) * (1 - Fraction(alpha, 255))
        assert abs(blended[0].item() - exact) <= Fraction(1, 2) and len(set(blended.tolist())) == 1
    assert blend(images[..., :3], background).data_ptr() == images.data_ptr()


@pytest.mark.parametrize("channels", [3, 4])
def test_a_replaced_image_is_opaque(channels):
    images, image = torch.randint(256, (2, 4, 5, channels), dtype=torch.uint8), torch.zeros(4, 5, 3, dtype=torch.uint8)
    before = images[0].clone()
    ImageStack(images, None, "cpu").replace(1, image)
    assert torch.equal(blend(images[1], 1.0), image) and torch.equal(images[0], before)
