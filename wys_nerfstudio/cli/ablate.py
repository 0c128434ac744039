"""`wys ablate`: the paper's ablations on the demo scene."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from wys_nerfstudio.utils.folder_lock import locked_folder


@dataclass
class Ablate:
    """Run the paper's ablations on the demo scene and compare them with its ground truth. Edits of one reconstruction are
    confined by the relevance field, by 2D relevance maps, by ground-truth masks (for other scenes, wys make-masks makes
    masks), or not at all. An interrupted command continues with the same command."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("wys-ablations")
    """Folder of the scene, the runs, ablations.json and contact_sheet.png."""
    instruction: str = "turn the bear into a panda"
    """What to change."""
    seeds: int = 3
    """Number of seeds per variant."""
    reconstruct_steps: int = 800
    """Training steps of the reconstruction."""
    edit_steps: int = 600
    """Training steps of each edit; --seeds 1 --reconstruct-steps 100 --edit-steps 50 is a short trial."""

    def main(self) -> None:
        """Run the ablations."""
        from wys_nerfstudio.demo.ablations import run_ablations

        with locked_folder(self.output, "the ablations"):
            run_ablations(self.output, self.instruction, self.seeds, self.reconstruct_steps, self.edit_steps)
