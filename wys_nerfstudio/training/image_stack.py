"""The images of one split of a capture in 8 bits, and the pixels of ray batches that are drawn from them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.pixel_samplers import PixelSampler
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.progress import track

MIN_SHARE = 0.25
"""Share of drawable pixels at which nerfstudio's sampler, in 100 attempts, draws any number of them with repetitions."""
READERS = 4
"""Images that are read at the same time."""


class ImageStack:
    """Images of one size in 8 bits, from which ray batches are drawn.

    Args:
        images: The images, RGB or, if any of them is transparent, RGBA. They are changed in place by edits.
        masks: Pixels that may be drawn; None for all.
        device: Device of the ray batches.
    """

    def __init__(
        self, images: UInt8[Tensor, "n h w c"], masks: Optional[Bool[Tensor, "n h w 1"]], device: "str | torch.device"
    ) -> None:
        self.images, self._device = images, torch.device(device)
        # Pixels are drawn in main memory, where nothing waits for a GPU: the sampler receives the images' shape only.
        self._drawn: dict[str, Tensor] = {
            "image": torch.empty(1, 1, 1, 1).expand(images.shape),
            "image_idx": torch.arange(len(images)),
            **({} if masks is None else {"mask": masks}),
        }

    def check_drawable(self, rays: int, split: str, patch_size: int = 1) -> None:
        """Refuse masks that leave too few pixels: nerfstudio's sampler draws at random first, and then each pixel once.

        Args:
            rays: Rays per batch.
            split: Name of the split, for the error message.
            patch_size: Side of square patches, which lie within the masks.

        Raises:
            WysError: If a batch could not be drawn.
        """
        needed, found = rays // patch_size**2, 0
        masks: Sequence[Tensor] = self._drawn["mask"] if "mask" in self._drawn else []  # type: ignore
        for mask in masks:  # one after the other: floats take much memory
            reach = patch_size // 2
            outside = F.pad(1 - mask[None, :, :, 0].float(), (reach,) * 4, value=1.0)
            found += int((F.max_pool2d(outside, 2 * reach + 1, stride=1) == 0).sum())
            if found >= needed:
                return
        if len(masks) and found < MIN_SHARE * self.images[..., 0].numel():
            what = "pixels" if patch_size == 1 else f"places for patches of {patch_size} pixels"
            raise WysError(
                f"The frame masks (mask_path) of the {split} views leave {found} {what} and a batch has {needed}: pixels "
                "that are trained on must not be 0 in the masks."
            )

    def replace(self, index: int, image: UInt8[Tensor, "h w 3"]) -> None:
        """Replace an image by an opaque one."""
        self.images[index, ..., :3] = image.to(self.images.device)
        self.images[index, ..., 3:] = 255

    def sample(self, sampler: PixelSampler) -> tuple[dict[str, Any], Int[Tensor, "rays 3"]]:
        """Draw pixels with nerfstudio's sampler.

        Returns:
            A ray batch on its device: `image` (rays, 3 or 4) in [0, 1] and `indices` (rays, 3) of view, row and column; and the same
            indices in main memory.
        """
        drawn = sampler.sample(self._drawn)["indices"]
        indices = to_device(drawn, self._device)
        pixels = self.images[(indices if self.images.device == indices.device else drawn).unbind(-1)]
        return {"image": to_device(pixels, self._device).float() / 255, "indices": indices}, drawn


def to_device(values: Shaped[Tensor, "..."], device: torch.device) -> Tensor:
    """Copy a small tensor from main memory to a device without waiting for the copy."""
    return values if values.device == device else values.pin_memory().to(device, non_blocking=True)


def blend(images: UInt8[Tensor, "*shape c"], background: float) -> UInt8[Tensor, "*shape 3"]:
    """Blend images with a background; RGB images are returned as they are.

    Args:
        images: RGB or RGBA images, whose colors are not multiplied by alpha.
        background: Gray in [0, 1] behind transparent pixels.
    """
    if images.shape[-1] == 3:
        return images
    alpha = images[..., 3:].float() / 255
    return (images[..., :3] * alpha + 255 * background * (1 - alpha)).round().to(torch.uint8)


def read_images(
    dataset: InputDataset, channels: Optional[int] = None
) -> tuple[UInt8[Tensor, "n h w c"], Optional[Bool[Tensor, "n h w 1"]]]:
    """Read all images of a split into main memory, one after the other.

    Args:
        dataset: The split; its images have one size.
        channels: 3 for RGB, 4 for RGBA. Default: RGBA if any image has an alpha channel.

    Returns:
        The images, and their masks (None without).
    """
    first = dataset.get_data(0)
    height, width = first["image"].shape[:2]
    images = torch.full((len(dataset), height, width, channels or first["image"].shape[-1]), 255, dtype=torch.uint8)
    masks = torch.empty(len(dataset), height, width, 1, dtype=torch.bool) if "mask" in first else None

    def read(index: int) -> int:
        data = dataset.get_data(index)
        image = data["image"][..., : images.shape[-1]]
        images[index, ..., : image.shape[-1]] = (image * 255).round().to(torch.uint8)
        if masks is not None:
            masks[index] = data["mask"] > 0
        return data["image"].shape[-1]

    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(read, range(len(dataset)))
        bar = track(parts, description="Reading images", total=len(dataset), transient=True)
        most_channels = max(bar)
    # Only some images have an alpha channel, and the first has none.
    return (images, masks) if most_channels <= images.shape[-1] else read_images(dataset, most_channels)
