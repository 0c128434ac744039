"""`wys demo-pictures`: images of the toy world and a list of edits for `wys sweep`."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class DemoPictures:
    """Write held-out images of the toy world, and list.csv with one edit of each for wys sweep; existing ones are
    replaced."""

    output: tyro.conf.Positional[Path]
    """Output folder."""
    count: int = 12
    """Number of images."""

    def main(self) -> None:
        """Write the images."""
        from wys_nerfstudio.demo.images import write_demo_images

        replaced = (self.output / "list.csv").exists()
        print(
            f"Wrote {self.count} images. To edit them: wys sweep {write_demo_images(self.output, self.count)} -o OUT "
            "--editor embedded --clip embedded"
        )
        if replaced:
            print(f"Replaced the earlier list.csv and its images in {self.output}.")
