"""The images of one split of a capture in 8 bits, and the pixels of ray batches that are drawn from them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.pixel_samplers import PixelSampler
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.progress import track
from torch import Tensor

from wys_nerfstudio.utils.errors import WysError

READERS = 4
"""Images that are read at the same time."""


class ImageStack:
    """Images of one size in 8 bits, from which ray batches are drawn.

    Args:
        images: The images. They are changed in place by edits.
        masks: Pixels that may be drawn; None for all.
        device: Device of the ray batches.
    """

    def __init__(
        self, images: UInt8[Tensor, "n h w 3"], masks: Optional[Bool[Tensor, "n h w 1"]], device: "str | torch.device"
    ) -> None:
        self.images, self._device = images, torch.device(device)
        # Pixels are drawn in main memory, where nothing waits for a GPU: the sampler receives the images' shape only.
        self._drawn: dict[str, Tensor] = {
            "image": torch.empty(1, 1, 1, 1).expand(images.shape),
            "image_idx": torch.arange(len(images)),
            **({} if masks is None else {"mask": masks}),
        }

    def sample(self, sampler: PixelSampler) -> tuple[dict[str, Any], Int[Tensor, "rays 3"]]:
        """Draw pixels with nerfstudio's sampler.

        Returns:
            A ray batch on its device: `image` (rays, 3) in [0, 1] and `indices` (rays, 3) of view, row and column; and the same
            indices in main memory.
        """
        drawn = sampler.sample(self._drawn)["indices"]
        indices = to_device(drawn, self._device)
        pixels = self.images[(indices if self.images.device == indices.device else drawn).unbind(-1)]
        return {"image": to_device(pixels, self._device).float() / 255, "indices": indices}, drawn


def to_device(values: Shaped[Tensor, "..."], device: torch.device) -> Tensor:
    """Copy a small tensor from main memory to a device without waiting for the copy."""
    return values if values.device == device else values.pin_memory().to(device, non_blocking=True)


def read_images(
    dataset: InputDataset, background: float
) -> tuple[UInt8[Tensor, "n h w 3"], Optional[Bool[Tensor, "n h w 1"]], bool]:
    """Read all images of a split into main memory, one after the other.

    Args:
        dataset: The split.
        background: Gray in [0, 1] behind transparent pixels.

    Returns:
        The images, their masks (None without), and whether any image has an alpha channel.

    Raises:
        WysError: If the images differ in size.
    """
    _refuse_unequal_sizes(dataset)
    first = dataset.get_data(0)
    height, width = first["image"].shape[:2]
    images = torch.empty(len(dataset), height, width, 3, dtype=torch.uint8)
    masks = torch.empty(len(dataset), height, width, 1, dtype=torch.bool) if "mask" in first else None

    def read(index: int) -> bool:
        data = dataset.get_data(index)
        image, transparent = data["image"], data["image"].shape[-1] == 4
        if transparent:
            image = image[..., :3] * image[..., 3:] + background * (1 - image[..., 3:])
        images[index] = (image * 255).round().to(torch.uint8)
        if masks is not None:
            masks[index] = data["mask"] > 0
        return transparent

    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(read, range(len(dataset)))
        bar = track(parts, description="Reading images", total=len(dataset), console=CONSOLE, transient=True)
        return images, masks, any([*bar])


def _refuse_unequal_sizes(dataset: InputDataset) -> None:
    cameras, files = dataset.cameras, dataset.image_filenames
    camera_sizes = [(int(width), int(height)) for width, height in zip(cameras.width, cameras.height)]
    for sizes in ([_size(path) for path in files], camera_sizes):
        odd = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if odd is not None:
            (width, height), (other_width, other_height) = sizes[0], sizes[odd]
            raise WysError(
                f"All views must have one size, and {files[0].name} is {width}x{height} while {files[odd].name} is "
                f"{other_width}x{other_height}: crop or resize them, for instance with ns-process-data."
            )


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:  # reads the file's head only
        return image.size
