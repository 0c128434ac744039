"""`wys demo-scene`: a scene of the toy world with ground truth."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from wys_nerfstudio.utils.errors import WysError


@dataclass
class DemoScene:
    """Write a scene of the toy world in nerfstudio's format, with the ground truth of every edit."""

    output: tyro.conf.Positional[Path]
    """Output folder, new or empty."""
    seed: int = 0
    """Seed of the scene; 0 is the scene of wys demo."""
    width: int = 80
    """Width of the views in pixels."""
    height: int = 64
    """Height of the views in pixels."""
    views: int = 48
    """Number of views."""

    def main(self) -> None:
        """Write the scene."""
        from wys_nerfstudio.demo.scene import require_empty_folder, write_demo_scene

        require_empty_folder(self.output)
        try:
            write_demo_scene(self.output, seed=self.seed, width=self.width, height=self.height, num_views=self.views)
        except ValueError as error:
            raise WysError(str(error)) from error
        print(
            f"Wrote {self.views} views to {self.output}. To edit them: ns-train wys-tiny --data {self.output} "
            '--instruction "..."'
        )
