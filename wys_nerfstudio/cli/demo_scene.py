"""`wys demo-scene`: write a toy scene with its ground truth."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from wys_nerfstudio.utils.errors import WysError


@dataclass
class DemoScene:
    """Writes a scene of the toy world in nerfstudio's format, with the ground truth of every edit beside it."""

    output: tyro.conf.Positional[Path]
    """Folder to write."""
    seed: int = 0
    """Which scene; 0 is the demo's."""
    width: int = 80
    """Width of the views in pixels."""
    height: int = 64
    """Height of the views in pixels."""
    views: int = 48
    """Number of views."""

    def main(self) -> None:
        """Writes the scene."""
        from wys_nerfstudio.demo.scene import write_demo_scene

        try:
            write_demo_scene(self.output, seed=self.seed, width=self.width, height=self.height, num_views=self.views)
        except ValueError as error:
            raise WysError(str(error)) from error
        print(
            f'Wrote {self.views} views to {self.output}. Edit them: ns-train wys-tiny --data {self.output} --instruction "..."'
        )
