"""Encodings of images that are edited many times, such as a scene's captured views."""

from collections.abc import Sequence
from typing import Optional

from jaxtyping import Float
from torch import Tensor

from wys_nerfstudio.editing.edit import encode_images
from wys_nerfstudio.editing.editor import Editor, ImageEncoding, join_encodings


class EncodingCache:
    """Encodings of a fixed set of images, each computed once. They wait in main memory: an image takes 0.13 MB at 512x512 pixels
    with InstructPix2Pix, 2 MB per megapixel with FLUX.2."""

    def __init__(self) -> None:
        self._encodings: dict[tuple[str, Optional[int], int], ImageEncoding] = {}

    def encode(
        self, editor: Editor, images: Float[Tensor, "b h w 3"], numbers: Sequence[int], resolution: Optional[int]
    ) -> ImageEncoding:
        """Encode images, one by one, unless they have been encoded before.

        Args:
            editor: The editor; two of one name have the same networks.
            images: Images in [0, 1].
            numbers: Number of each image in the set.
            resolution: As in `EditSettings`.

        Returns:
            Their encoding on the editor's device.
        """
        encodings = []
        for i, number in enumerate(numbers):
            key = (editor.name, resolution, number)
            if key not in self._encodings:
                image = images[i : i + 1]
                self._encodings[key] = join_encodings([encode_images(editor, image, image, resolution)], "cpu")
            encodings.append(self._encodings[key])
        return join_encodings(encodings, editor.device)
