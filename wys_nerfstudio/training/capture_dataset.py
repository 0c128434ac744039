"""nerfstudio's dataset of one split of a capture, whose images are read as those of image edits are."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import Image

from wys_nerfstudio.utils.image_io import read_stored_image
from wys_nerfstudio.utils.view_masks import check_frame_masks


class CaptureDataset(InputDataset):
    """Images of one split, as they are stored: the cameras describe them before any EXIF rotation."""

    def get_numpy_image(self, image_idx: int) -> npt.NDArray[np.uint8]:
        """Return an image, (h, w, 3), or (h, w, 4) if it has transparency.

        Args:
            image_idx: Index of the image.

        Raises:
            WysError: As for `open_image`.
        """
        image = read_stored_image(self.image_filenames[image_idx])
        if self.scale_factor != 1.0:
            width, height = (int(side * self.scale_factor) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.array(image)

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        """Return an image and its frame mask as nerfstudio's dataset.

        Args:
            image_idx: Index of the image.
            image_type: Type of its values.

        Raises:
            WysError: As for `open_image`, or if the mask is damaged.
        """
        try:
            return super().get_data(image_idx, image_type)
        except (OSError, SyntaxError, ValueError):
            masks, here = self._dataparser_outputs.mask_filenames or [], slice(image_idx, image_idx + 1)
            check_frame_masks(self.image_filenames[here], masks[here], decode=True)
            raise
