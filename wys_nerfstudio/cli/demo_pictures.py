"""`wys demo-pictures`: images of the toy world and a list of edits for `wys sweep`."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class DemoPictures:
    """Write held-out images of the toy world, and list.csv with one edit of each for wys sweep."""

    output: tyro.conf.Positional[Path]
    """Output folder, new or empty."""
    count: int = 12
    """Number of images."""

    def main(self) -> None:
        """Write the images."""
        from wys_nerfstudio.demo.images import write_demo_images
        from wys_nerfstudio.demo.scene import require_empty_folder

        require_empty_folder(self.output)
        print(
            f"Wrote {self.count} images. To edit them: wys sweep {write_demo_images(self.output, self.count)} -o OUT "
            "--editor embedded --clip embedded"
        )
